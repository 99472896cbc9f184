"""Runs of the job for tests: the options that make one small, and the program in this process."""

import os
import signal
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from PIL import Image

from eqxldm.data import open_latents
from eqxldm.digests import digest
from eqxldm.sharding import make_mesh
from experiments.train import autoencoder as ae, job as jobs
from experiments.train.__main__ import main
from experiments.train.config import Config
from experiments.train.diffusion import load_finished
from experiments.train.options import read_options
from experiments.train.run import RunFolder
from experiments.train.terminal import run_main

SIZES = (
    "--size 16 16 --checkpoint-every 4 --reference 20 --classifier.steps 8 "
    "--classifier.batch-size 16 --classifier.channels 4 --classifier.features 8 "
    "--autoencoder.steps 12 --autoencoder.batch-size 8 --autoencoder.gan-start 6 "
    "--autoencoder.channels 8 8 --autoencoder.blocks 1 --autoencoder.groups 4 "
    "--autoencoder.discriminator-channels 4 --autoencoder.discriminator-layers 1 "
    "--latents.batch-size 40 --latents.images-per-shard 100 --latents.statistics 64"
).split()
SMALL = (
    SIZES
    + (
        "--diffusion.steps 12 --diffusion.batch-size 8 --diffusion.warmup 2 --dit.depth 2 "
        "--dit.width 16 --dit.num-heads 2 --unet.channels 8 8 --unet.blocks 1 "
        "--unet.groups 4 --unet.num-heads 2 "
        "--samples 24 --sampling.steps 3 --sampling-batch 8 --eval-samples 10"
    ).split()
)
POSTHOC = "--diffusion.posthoc 0.05 0.1 --diffusion.snapshot-every 5".split()


def call(*args) -> int:
    """The program in this process: its exit code."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(s) for s in signums]
    try:
        return run_main(lambda: main([str(arg) for arg in args]))
    except SystemExit as stop:  # how the option parser ends
        return int(stop.code or 0)
    finally:
        for signum, handler in zip(signums, handlers, strict=True):
            signal.signal(signum, handler)


def train(run, *options) -> int:
    return call("train", "--preset", "smoke", *SMALL, *POSTHOC, "--run-dir", run, *options)


def said(capsys) -> str:
    """What was printed, without the frames of the option parser."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


def write_images(folder: Path, names, side=(20, 26), mode="RGB") -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*side, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return folder


def loaded(run: Path):
    config = read_options(Config, RunFolder(run))
    condition, _ = jobs.read_data(RunFolder(run), config)
    return load_finished(config, RunFolder(run), condition, make_mesh())


def final_arrays(run: Path) -> dict[str, Any]:
    trained, latents = loaded(run), open_latents(run / "latents")
    found = latents.read(np.arange(len(latents)), np.zeros(len(latents), bool))
    with np.load(run / "samples.npz") as samples:
        return {
            "autoencoder": ae.identity(trained.space),
            "statistics": [np.array([trained.space.shift, trained.space.scale])],
            "network": jax.tree.leaves(eqx.filter(trained.denoiser, eqx.is_array)),
            "latents": [found["mean"].astype(np.float32), found["logvar"].astype(np.float32)],
            "index": found["index"].tolist(),
            "labels": samples["arr_1"].tolist(),
            "samples": [samples["arr_0"].astype(np.float32)],
        }


def final_bytes(run: Path) -> str:
    arrays = final_arrays(run)
    lists = {name: arrays[name] for name in ("network", "samples", "latents", "statistics")}
    return digest(lists) + arrays["autoencoder"]


def interrupt(monkeypatch: Any, owner: Any, name: str, call_number: int) -> None:
    """The process gets SIGTERM within call number `call_number` of a function."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def counting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call_number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
