"""Two real processes over loopback train, checkpoint and resume together; one goes on alone."""

import json
import shutil
import time

import numpy as np
import pytest

from children import ROOT, free_port, run_together

MESH = "data=2,fsdp=2"
PROGRAM = ROOT / "tests" / "process_run.py"


def run(devices, *commands):
    rows = []
    for code, out, err in run_together(*commands, devices=devices):
        assert code == 0, err[-3000:]
        rows.append(json.loads(out.splitlines()[-1]))
    return rows


def two(folder, until, mesh, *arguments):
    """Each with two of the mesh's four devices."""
    same = [PROGRAM, folder, "--mesh", mesh, "--until", until, *arguments]
    port = free_port()
    return run(2, *([*same, "--process", port, 2, i] for i in range(2)))


def one(folder, until, mesh=MESH):
    return run(4, [PROGRAM, folder, "--mesh", mesh, "--until", until])[0]


FAILS = """
import sys
from eqxldm.distributed import barrier, is_primary
from experiments.train import processes
from experiments.train.terminal import UserError, run_main
processes.GRACE = 1.0
def main():
    processes.join(processes.Processes(True, sys.argv[1], 2, int(sys.argv[2])))
    if is_primary():
        return barrier("never")
    raise UserError("its disk is full")
processes.exit_with(lambda: run_main(main))
"""


def test_a_process_that_fails_does_not_wait_for_the_others():
    at = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    first, second = run_together(*(["-c", FAILS, at, i] for i in range(2)), devices=1)
    assert time.monotonic() - begin < 100  # jax waits 300 seconds
    assert (first.code, second.code) == (1, 2)
    assert "If another process stopped first" in first.err
    assert second.err.endswith("error: its disk is full\n")


STEPS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process alone; two together, of which one gets SIGTERM; those with the model divided
    between them, and one alone.
    """
    base = tmp_path_factory.mktemp("runs")
    rows = {"alone": [one(base / "alone", STEPS)]}
    rows["begun"] = two(base / "together", STEPS, MESH, "--kill-at", "5")
    (checkpoint,) = (base / "together" / "checkpoints" / "stage").iterdir()
    shutil.copytree(base / "together", base / "handed_over")
    rows["together"] = two(base / "together", STEPS, "tensor=4")
    rows["handed_over"] = [one(base / "handed_over", STEPS, "tensor=2,fsdp=-1")]
    return base, rows, int(checkpoint.name)


def test_a_signal_to_one_process_stops_both_at_the_same_step_with_a_checkpoint(runs):
    _, rows, step = runs
    assert [row["stopped"] for row in rows["begun"]] == [15, 15]
    assert 1 <= step < STEPS


@pytest.mark.parametrize("name", ["together", "handed_over"])
def test_another_number_of_processes_ends_with_the_same_parameters(runs, name):
    base, _, _ = runs
    found, expected = (np.load(base / folder / "final.npy") for folder in (name, "alone"))
    # Sums in another order, in 12 steps: some roundings of float32.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_processes_read_the_global_batches_in_order_each_its_part(runs):
    _, rows, step = runs
    whole = rows["alone"][0]["seen"]
    # Of the mesh's four devices, and so of the batch's quarters, every other one is a process's.
    quarters = lambda a, b: [*a[:2], *b[:2], *a[2:], *b[2:]]
    begun = zip(*(row["seen"] for row in rows["begun"]), strict=False)
    for found, first in (
        ([quarters(a, b) for a, b in begun], 0),
        (rows["together"][0]["seen"], step),  # no axis divides the batch: each reads all of it
        (rows["together"][1]["seen"], step),
        (rows["handed_over"][0]["seen"], step),
    ):
        count = min(len(found), STEPS - first)
        assert count >= 1 and found[:count] == whole[first : first + count]
    assert all(len(part) == 4 for row in rows["begun"] for part in row["seen"])
