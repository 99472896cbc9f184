"""Steps on eight devices against the same steps on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def eight():
    """What `sharded_steps.py` measures on eight devices; in a process of its own."""
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    found = subprocess.run(
        [sys.executable, str(TESTS / "sharded_steps.py")],
        env=os.environ | flags | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return {(row["step"], row["mesh"]): row for row in json.loads(found.stdout)}


MESHES = ["data=8", "fsdp=8", "tensor=2,data=4", "data=2,fsdp=2,tensor=2"]
STEPS = [("diffusion", mesh) for mesh in MESHES]
STEPS += [("modern", "data=2,fsdp=2,tensor=2")]
STEPS += [("autoencoder", mesh) for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2")]


@pytest.mark.parametrize(("step", "mesh"), STEPS)
def test_a_step_on_eight_devices_is_the_step_on_one(eight, step, mesh):
    row = eight[step, mesh]
    assert row["loss"] <= 1e-5
    assert row["moments"] <= 1e-5  # Adam's, which are linear and quadratic in the gradient
    assert row["parameters"] <= 1e-5
    assert row["second_compilation"] is False


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_really_are_divided(eight, mesh):
    row = eight["diffusion", mesh]
    assert row["bytes"] == row["bytes_expected"]
    share = {"data=8": 1.0, "fsdp=8": 0.15, "tensor=2,data=4": 0.8, "data=2,fsdp=2,tensor=2": 0.45}
    assert row["bytes"] <= share[mesh] * row["bytes_whole"]


def test_activations_are_divided_over_the_batch_alone(eight):
    for mesh in MESHES:
        assert eight["diffusion", mesh]["boundary"] == "batch"


def test_neighbours_in_tensor_are_neighbouring_devices(eight):
    assert eight["diffusion", "data=2,fsdp=2,tensor=2"]["devices"] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]
