"""The job for few network calls, begun anew or from a finished run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from eqxldm import pretrained
from eqxldm.digests import digest
from eqxldm.sharding import make_mesh
from experiments.train import commands, few_steps
from experiments.train.__main__ import PRESETS
from experiments.train.conditions import Labels
from experiments.train.config import Config
from experiments.train.diffusion import load_finished
from experiments.train.networks import make_denoiser
from experiments.train.options import read_options
from experiments.train.presets import preset
from experiments.train.run import RunFolder
from experiments.train.shapes import SHAPES

from job_runs import (
    SMALL,
    call,
    said,
)


def test_a_run_for_one_call_starts_from_a_finished_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "CALLS", (1, 2))
    monkeypatch.setattr(few_steps, "ODE_STEPS", 3)
    run = tmp_path / "one-call"
    options = ("--objective", "imf", "--start-from", finished)
    small = (*SMALL, "--sampling.steps", "1", "--diffusion.steps", "4")
    assert call("train", "--preset", "smoke", *small, "--run-dir", run, *options) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["diffusion"]["network_calls"] == 1
    assert [(row["calls"], row["solver"]) for row in metrics["few_steps"]] == [
        (1, "map"), (2, "map"), (3, "ddim"),
    ]  # fmt: skip
    headline, first = metrics["diffusion"], metrics["few_steps"][0]
    assert headline["fd"] == first["fd"]  # the same noise
    with Image.open(run / "few-steps.png") as picture:
        assert picture.size == (2 * (3 * 18 + 2), 2 * (len(SHAPES) * 18 + 2))
    # It took that run's autoencoder and latents, and no steps of plain denoising.
    assert digest(pretrained.load(run / "autoencoder.safetensors")) == digest(
        pretrained.load(finished / "autoencoder.safetensors")
    )
    assert not (run / "latents").exists()
    assert read_options(Config, RunFolder(run)).few.pretrain == 0
    # Sampled with any number of calls, and by the solvers.
    for how in (("--steps", 2), ("--solver", "heun", "--steps", 2)):
        out = tmp_path / "out.png"
        assert call("sample", "--run-dir", run, "--guidance", 1, *how, "--n", 1, "--out", out) == 0


def test_a_network_starts_as_the_finished_denoiser(finished):
    config = read_options(Config, RunFolder(finished))
    condition = Labels(len(SHAPES), len(SHAPES))
    old = load_finished(config, RunFolder(finished), condition, make_mesh())
    config = dataclasses.replace(config, objective="imf")
    network = make_denoiser(config, old.shape, condition)
    started = few_steps.warm_start(network, old.denoiser)
    x = jax.random.normal(jax.random.key(0), old.shape)
    before = lambda t: old.denoiser(x, t, jax.numpy.array(1))
    for h in (0.0, 0.5):
        after = lambda t, h=h: started(x, t, jax.numpy.array(1), h=h)
        for t in (0.2, 0.9):
            t = jax.numpy.array(t)
            # The time is read otherwise; the fit leaves a small difference.
            assert np.max(np.abs(after(t) - before(t))) < 0.1 * np.max(np.abs(before(t)))
    wider = dataclasses.replace(config, dit=dataclasses.replace(config.dit, width=32))
    with pytest.raises(Exception, match="its network is another"):
        few_steps.warm_start(make_denoiser(wider, old.shape, condition), old.denoiser)


@pytest.mark.parametrize("objective", ["flow", "meanflow", "imf", "shortcut", "scm"])
def test_every_preset_has_every_objective(objective):
    for name in PRESETS:
        for started in (False, True):
            found = preset(name, objective=objective, started=started)
            config, steps = found.config, found.config.diffusion.steps
            commands.check_options(config, found.sampling, found.compute)
            few = config.few
            assert found.objective == objective and few.pretrain < steps
            if objective != "flow":
                assert found.sampling.solver == "map" and found.sampling.steps == 1
                assert (few.pretrain == 0) == started


REFUSED_FEW = {
    "--start-from {run}": "--start-from is for --objective meanflow, imf, shortcut, scm",
    "--objective imf --start-from {run} --diffusion.path flow": "another --diffusion.path, cosine",
    "--objective imf --few.pretrain 4 --diffusion.steps 4": "must be below --diffusion.steps 4",
    "--objective imf --diffusion.path ddpm --diffusion.learned-range": "it learns no variance",
    "--objective imf --sampling.guidance 2": "the guidance in it that it was trained with",
    "--objective imf --few.guidance-interval 0.5 0.5": "must be LOW HIGH",
    "--sampling.solver map": "for networks that are trained for few calls",
    "--objective flow --diffusion.path cosine": "needs --diffusion.path flow",
    "--objective imf --start-from nowhere": "no run in nowhere",
}


@pytest.mark.parametrize("options, message", REFUSED_FEW.items(), ids=list(REFUSED_FEW))
def test_what_few_steps_refuse(options, message, finished, tmp_path, capsys):
    small = " ".join(SMALL).replace("--sampling.steps 3", "--sampling.steps 1").split()
    options = options.format(run=finished).split()
    assert call("train", "--preset", "smoke", *small, "--run-dir", tmp_path / "run", *options) == 2
    assert message in said(capsys)
    assert not (tmp_path / "run").exists()
