"""A run that is stopped, killed or handed on ends with the bytes of one left alone."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np

from eqxldm.data import loader
from experiments.train import autoencoder as ae, sampling
from experiments.train.shapes import EACH, SHAPES

from children import ROOT, free_port, run_together
from job_runs import POSTHOC, SMALL, final_arrays, final_bytes, interrupt, train


def test_interrupted_in_each_stage_ends_with_the_same_bytes(finished, copied, monkeypatch):
    """Begun anew in the folder of another run, where what is not that run's stays."""
    run = copied
    for name in ("notes.png", "checkpoints/notes"):
        (run / name).write_text("mine")
    moments = {
        "another seed": (loader._ReadImages, "__call__", 2),
        "classifier": (loader._ReadImages, "__call__", 4),
        "autoencoder": (loader._ReadImages, "__call__", 9),
        "statistics": (ae.Encoder, "__call__", 1),
        "latents": (ae.Encoder, "__call__", 9),
        "diffusion": (loader._ReadLatents, "__call__", 6),
        "sampling": (sampling.Drawing, "__call__", 1),
    }
    options = {
        "another seed": ("--seed", 2**40 + 1, "--overwrite"),
        "classifier": ("--overwrite",),
    }
    for name, moment in moments.items():
        with monkeypatch.context() as patch:
            interrupt(patch, *moment)
            assert train(run, *options.get(name, ())) == 143
        assert not (run / "metrics.json").exists()
        seed = json.loads((run / "config.json").read_text())["seed"]
        assert seed == (2**40 + 1 if name == "another seed" else 0)
        assert (run / "notes.png").exists() and (run / "checkpoints" / "notes").exists()
    assert not list((run / "latents").glob("*part*"))
    assert train(run) == 0
    assert final_bytes(run) == final_bytes(finished)
    scores = lambda run: json.loads((run / "metrics.json").read_text())["diffusion"]
    assert scores(run) == scores(finished)


def test_killed_while_it_trains_ends_with_the_same_bytes(finished, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", "train", "--preset", "smoke", *SMALL]
    command += [*POSTHOC, "--run-dir", str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "autoencoder" / "8").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (run / "metrics.json").exists()
    assert train(run) == 0
    assert final_bytes(run) == final_bytes(finished)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for stage in ("classifier", "autoencoder", "diffusion"):
        counted = [row["step"] for row in rows if row["stage"] == stage]
        assert counted == sorted(set(counted))


def train_in_two(run, *options):
    """The same command in two processes, each with one device."""
    command = ["-m", "experiments.train", "train", "--preset", "smoke", *SMALL, *POSTHOC]
    command += ["--run-dir", run, *options, "--distributed", "--coordinator"]
    command += [f"127.0.0.1:{free_port()}", "--processes", 2, "--process-id"]
    return run_together(*([*command, i] for i in range(2)), devices=1)


def test_two_processes_go_on_with_a_run_of_one(finished, copied):
    """From the trained autoencoder on, which they measure, cache latents with, train and sample."""
    for name in ("latents", "checkpoints/diffusion", "snapshots/diffusion"):
        shutil.rmtree(copied / name)
    for name in ("autoencoder.safetensors", "autoencoder.json", "metrics.json", "samples.npz"):
        (copied / name).unlink()
    first, second = train_in_two(copied, "--eval-every", "8")
    for ended in (first, second):
        assert ended.code == 0, ended.err[-3000:]
    assert "psnr_db" in first.out and "psnr_db" not in second.out and "step 8: fd" in first.out
    found, expected = final_arrays(copied), final_arrays(finished)
    # Sums of float32 in another order, which Adam's division by small gradients makes larger, one
    # rounding of float16, and what uint8 may make of those.
    bounds = {"statistics": 1e-5, "network": 1e-4, "latents": 2**-10, "samples": 1 / 255}
    for name, bound in bounds.items():
        atol = bound * max(np.abs(array).max() for array in expected[name])
        for a, b in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=name)
    assert found["autoencoder"] == expected["autoencoder"]
    assert found["labels"] == expected["labels"]
    assert found["index"] == list(range(len(SHAPES) * EACH))


def test_two_processes_stop_together_with_one_message(copied):
    first, second = train_in_two(copied, "--seed", 1)
    assert (first.code, second.code) == (2, 2)
    assert "--seed: the folder has 0, now 1" in first.err
    assert "error: process 0 stopped; what it printed says why." in second.err
