"""The job as its user sees it: files, messages, exit codes, and nothing lost when stopped."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from children import ROOT, free_port, run_together
from PIL import Image

from eqxldm import pretrained
from eqxldm.data import loader, open_images, open_latents
from eqxldm.digests import digest
from eqxldm.models import LPIPS
from eqxldm.sharding import make_mesh
from experiments.train import autoencoder as ae, commands, few_steps, job as jobs, sampling
from experiments.train.__main__ import PRESETS, chosen_preset, main
from experiments.train.commands import finished_config, run_folder
from experiments.train.conditions import Labels, Nothing, choose_condition
from experiments.train.diffusion import diffusion_state, load_finished, posthoc_average
from experiments.train.evaluate import EVALUATORS
from experiments.train.hooks import open_snapshots
from experiments.train.networks import make_denoiser
from experiments.train.options import range_of
from experiments.train.presets import preset
from experiments.train.run import RunFolder
from experiments.train.shapes import EACH, SHAPES, shapes
from experiments.train.streams import STREAMS, stream_key, stream_seed
from experiments.train.terminal import UserError, run_main

from helpers import filled

SIZES = (
    "--size 16 16 --checkpoint-every 4 --reference 20 --classifier.steps 8 "
    "--classifier.batch-size 16 --classifier.channels 4 --classifier.features 8 "
    "--autoencoder.steps 12 --autoencoder.batch-size 8 --autoencoder.gan-start 6 "
    "--autoencoder.channels 8 8 --autoencoder.groups 4 --autoencoder.discriminator-channels 4 "
    "--autoencoder.discriminator-layers 1 --latents.batch-size 40 --latents.images-per-shard 100 "
    "--latents.statistics 64"
).split()
SMALL = (
    SIZES
    + (
        "--diffusion.steps 12 --diffusion.batch-size 8 --diffusion.warmup 2 --dit.depth 2 "
        "--dit.width 16 --dit.num-heads 2 --unet.channels 8 8 --unet.groups 4 --unet.num-heads 2 "
        "--samples 24 --sampling.steps 3 --sampling-batch 8 --eval-samples 10"
    ).split()
)
POSTHOC = "--diffusion.posthoc 0.05 0.1 --diffusion.snapshot-every 5".split()
FILES = {
    "samples.png", "reconstructions.png", "forward.png", "reverse.png", "curves.png",
    "samples.npz", "metrics.json", "log.jsonl", "config.json", "data.json", "manifest.json",
    "checkpoints", "autoencoder.safetensors", "latents",
}  # fmt: skip


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run on images that it made itself; never written to."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(run, "--log.tensorboard") == 0
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def write_images(folder: Path, names, side=(20, 26), mode="RGB") -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*side, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The smoke run's images as class folders."""
    folder, source = tmp_path_factory.mktemp("images") / "shapes", shapes()
    for i in range(len(source)):
        record = source[i]
        path = folder / SHAPES[record.label or 0] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.image).save(path)
    return folder


def loaded(run: Path):
    config = finished_config(RunFolder(run))
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


# What a run leaves


def test_what_a_finished_run_holds(finished):
    names = {entry.name for entry in finished.iterdir()}
    assert names >= FILES | {"snapshots", "tensorboard"}
    assert not [name for name in names if name.startswith(".") and name != ".lock"]
    manifest = json.loads((finished / "manifest.json").read_text())["wrote"]
    tops = {Path(name).parts[0] for name in manifest}
    assert tops >= names - {".lock", "manifest.json"}
    with np.load(finished / "samples.npz") as samples:
        drawn, labels = samples["arr_0"], samples["arr_1"]
    assert drawn.shape == (24, 16, 16, 3) and drawn.dtype == np.uint8
    assert np.bincount(labels).tolist() == [6] * 4
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["autoencoder"]["psnr_db"] > 0 and metrics["diffusion"]["samples"] == 24
    assert {"fd", "accuracy", "precision", "recall", "fd_real"} <= set(metrics["diffusion"])
    assert metrics["timings"]["total"]["seconds"] > 0 and metrics["versions"]["jax"]
    (events,) = (finished / "tensorboard" / "samples").iterdir()
    assert all(name in events.read_bytes() for name in (b"reconstructions", b"samples"))
    with Image.open(finished / "samples.png") as picture:  # six of each class, twice enlarged
        assert picture.size == ((2 + 6 * 18) * 2, (2 + 4 * 18) * 2)


def test_a_finished_run_is_left_as_it_is(copied, capsys):
    state = lambda: {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.name != ".lock"}
    before = state()
    assert train(copied) == 0
    assert "is finished" in capsys.readouterr().out and state() == before


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """A finished run on a folder with captions, of images that are not square, measured along."""
    base = tmp_path_factory.mktemp("captioned")
    names = [f"{i:02d}.png" for i in range(40)]
    folder = write_images(base / "images", names)
    texts = {name: f"{('red', 'blå')[i % 2]} boat {i}" for i, name in enumerate(names)}
    (folder / "captions.json").write_text(json.dumps(texts))
    options = "--size 16 24 --eval-every 5 --text.depth 1 --text.num-heads 2 --text.max-length 16"
    args = ["--images", folder, *SMALL, *options.split(), "--run-dir", base / "run"]
    assert call("train", *args) == 0
    return base / "run"


def test_a_run_with_captions(captioned, tmp_path, capsys):
    assert json.loads((captioned / "data.json").read_text())["condition"] == "text"
    with np.load(captioned / "samples.npz") as samples:
        assert samples["arr_0"].shape == (24, 16, 24, 3)
        assert all(" boat " in text for text in samples["texts"])
    metrics = json.loads((captioned / "metrics.json").read_text())["diffusion"]
    assert "accuracy" not in metrics and metrics["fd"] > 0
    pictures = []
    for prompt in ("red boat", "blå boat", None):
        out = tmp_path / "drawn.png"
        args = ["--run-dir", captioned, "--steps", 2, "--n", 4, "--out", out]
        args += [] if prompt is None else ["--prompt", prompt]
        assert call("sample", *args, "--guidance", 3) == 0
        with Image.open(out) as picture:
            assert picture.size == ((2 + 2 * 26) * 4, (2 + 2 * 18) * 4)
            pictures.append(np.asarray(picture))
    assert not np.array_equal(*pictures[:2]) and not np.array_equal(*pictures[1:])
    assert call("sample", "--run-dir", captioned, "--label", 1) == 2
    assert "the run has no classes" in capsys.readouterr().err


def test_evaluation_during_training(captioned):
    rows = [json.loads(line) for line in (captioned / "log.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["stage"] == "evaluation"]
    assert [row["step"] for row in measured] == [5, 10, 12]
    assert all(row["fd"] > 0 and "precision" in row for row in measured)


def test_an_unconditional_run_of_grey_pixels_from_a_flat_folder(tmp_path, capsys):
    folder = write_images(tmp_path / "images", [f"{i}.jpg" for i in range(30)], mode="L")
    which = ["--space", "pixel", "--denoiser", "unet"]
    run = ["--run-dir", tmp_path / "run"]
    args = ["--images", folder, *SMALL, *which, "--channels", 1, *run]
    assert call("train", *args, "--mesh", "data=2") == 0
    assert {entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "classifier", "diffusion",
    }  # fmt: skip
    assert not (tmp_path / "run" / "latents").exists()
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (24, 16, 16, 1) and "arr_1" not in samples
    assert call("sample", *run, *which, "--steps", 2, "--n", 3) == 0
    assert call("evaluate", *run, "--n", 10, "--steps", 2) == 0  # the images are where they were
    capsys.readouterr()
    assert call("sample", *run, "--prompt", "a boat") == 2
    assert "the run has no captions" in capsys.readouterr().err
    write_images(folder, ["more.jpg"], mode="L")
    assert call("train", *args, "--diffusion.batch-size", 8) == 2
    assert "is about other images" in capsys.readouterr().err


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(folder: Path, side: int = 28) -> Path:
    """200 training and 60 test images: a bar whose place is the class, and noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 200), ("t10k", 60)):
        labels = np.arange(n) % 10
        pictures = rng.integers(0, 60, (n, side, side))
        for image, label in zip(pictures, labels, strict=True):
            image[4 : side - 4, 4 + 2 * label : 7 + 2 * label] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte", pictures)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def test_mnist_and_its_data(tmp_path, capsys):
    data = write_mnist(tmp_path / "mnist")
    where = ["--preset", "mnist", "--run-dir", tmp_path / "run"]
    args = [*where, "--images", data, *SMALL, "--size", 28, 28]
    assert call("train", *args) == 0
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (24, 28, 28, 1)
    assert call("sample", *where, "--label", 7, "--n", 2, "--steps", 2) == 0
    assert (tmp_path / "run" / "sample-7.png").exists()
    capsys.readouterr()
    (tmp_path / "run" / "metrics.json").unlink()
    images = data / "train-images-idx3-ubyte"
    changed = bytearray(images.read_bytes())
    changed[-1] ^= 1
    images.write_bytes(changed)  # one bit of one pixel
    assert call("train", *args) == 2
    assert "is about other images" in capsys.readouterr().err
    images.write_bytes(images.read_bytes()[:-5])
    assert call("train", *args) == 2
    assert "is truncated" in capsys.readouterr().err
    odd = write_mnist(tmp_path / "odd", side=30)
    new = ["--preset", "mnist", "--run-dir", tmp_path / "new", "--images", odd, *SMALL]
    assert call("train", *new, "--size", 30, 30) == 2
    assert "30 x 30 images with a border of 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# Stopped and gone on


def interrupt(monkeypatch, owner, name: str, call_number: int) -> None:
    """The process gets SIGTERM within call number `call_number` of a function."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def counting(*args, **kwargs):
        if next(calls) == call_number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


def test_interrupted_in_each_stage_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    moments = {
        "classifier": (loader._ReadImages, "__call__", 4),
        "autoencoder": (loader._ReadImages, "__call__", 9),
        "statistics": (ae.Encoder, "__call__", 1),
        "latents": (ae.Encoder, "__call__", 9),
        "diffusion": (loader._ReadLatents, "__call__", 6),
        "sampling": (sampling.Drawing, "__call__", 1),
    }
    for moment in moments.values():
        with monkeypatch.context() as patch:
            interrupt(patch, *moment)
            assert train(run) == 143
        assert not (run / "metrics.json").exists()
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


# Sampling and measuring a finished run


def test_sample_and_evaluate(copied, monkeypatch, capsys):
    before, met = (copied / "metrics.json").read_text(), []
    note = lambda name: met.append((name, (copied / "metrics.json").read_text() != before))
    monkeypatch.setattr(commands, "barrier", note)
    where = ["--preset", "smoke", "--run-dir", copied]
    assert call("sample", *where, "--steps", 2, "--label", 3, "--n", 4) == 0
    assert call("sample", *where, "--steps", 2, "--n", 2, "--seed", 2**63) == 0
    assert {"sample-3.png", "sample.png"} <= {path.name for path in copied.iterdir()}
    assert call("evaluate", *where, "--n", 20, "--steps", 2, "--guidance", 1.0) == 0
    metrics = json.loads((copied / "metrics.json").read_text())
    assert metrics["diffusion"]["samples"] == 20
    # Where others wait for process 0: jax's own wait at an exit ends after five minutes.
    assert met == [("done", True)]
    assert metrics["diffusion"]["guidance_scale"] == 1.0


def test_an_average_of_any_width_after_training(copied, capsys):
    config = finished_config(RunFolder(copied))
    with open_snapshots(RunFolder(copied), "diffusion") as snapshots:
        assert snapshots.steps() == [5, 10, 12]
    condition = Labels(4, 4)
    like = eqx.filter_eval_shape(lambda: diffusion_state(config, (4, 4, 4), condition)[0])
    from eqxldm.checkpoints import Checkpoints

    with Checkpoints(copied / "checkpoints" / "diffusion") as checkpoints:
        state = checkpoints.restore(12, like)[0]
    for tracked, width in zip(state.ema[1:], (0.05, 0.1), strict=True):
        found = posthoc_average(config, RunFolder(copied), like.ema, width)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(tracked), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) < 1e-6
    where = ["--preset", "smoke", "--run-dir", copied]
    assert call("sample", *where, "--n", 1, "--steps", 2, "--sigma-rel", 0.07) == 0
    for width, reason in ((0.5, "sigma_rel must lie"), (0.25, "snapshots describe sigma_rel")):
        assert call("sample", *where, "--n", 1, "--steps", 2, "--sigma-rel", width) == 2
        assert f"--sigma-rel {width}: " in (text := capsys.readouterr().err) and reason in text


def test_sampling_wants_a_finished_undamaged_run(copied, tmp_path, capsys):
    def refused(*args):
        assert call("sample", "--preset", "smoke", "--run-dir", *args) == 2
        return said(capsys)

    assert "no run in" in refused(tmp_path / "none")
    assert "--label 4: the classes are 0 to 3" in refused(copied, "--label", 4)
    assert "--n must lie in [1" in refused(copied, "--n", 0)
    for out in ("name", "a.webm"):
        assert "a picture's name ends with one of" in refused(copied, "--out", tmp_path / out)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(copied, "--out", tmp_path / "folder.png")
    newest = copied / "checkpoints" / "diffusion" / "12"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):  # it is not repaired by looking
        assert "metrics.json and train again" in refused(copied)
    largest.write_bytes(content)
    weights = copied / "autoencoder.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert "autoencoder.safetensors is damaged" in refused(copied)
    shutil.rmtree(newest)
    weights.write_bytes(bytes(flipped[:-1]) + bytes([flipped[-1] ^ 1]))
    assert "diffusion is at step 8 of 12" in refused(copied)


def test_the_autoencoder_alone_and_handed_on(finished, tmp_path, capsys):
    alone, run = tmp_path / "alone", tmp_path / "run"
    args = ["autoencoder", "--preset", "smoke", *SMALL, "--run-dir", alone]
    assert call(*args) == 0
    text = capsys.readouterr().out
    assert f"train --vae {alone}" in text and "psnr_db" in text
    assert not {"latents", "samples.npz"} & {entry.name for entry in alone.iterdir()}
    assert ae.identity(ae.load_vae(alone, 3)) == ae.identity(ae.load_vae(finished, 3))
    assert train(run, "--vae", alone, "--latents", finished / "latents") == 0
    assert not (run / "latents").exists()
    assert not (run / "checkpoints" / "autoencoder").exists()


# What is refused


BAD = {
    "mesh": (["--mesh", "data=3"], "--mesh: mesh data=3,fsdp=1,tensor=1: its sizes must multiply"),
    "batch": (["--diffusion.batch-size", 9], "--diffusion.batch-size: a batch of 9 does not"),
    "parts": (["--grad-accum-steps", 3], "--diffusion.batch-size: a batch of 8 does not divide"),
    "large": (["--diffusion.batch-size", 402], "402 is more than the 400 training images"),
    "model": (["--dit.model", "dit_xxl_2"], "dit_xxl_2"),
    "labels": (["--num-classes", 3], "--num-classes 3: the images have 4 classes"),
    "size": (["--size", 18, 16], "does not divide by the downsampling factor 4"),
    "huge": (["--size", 16, 10**7], "--size must lie in [8, 8192], got 10000000"),
    "patch_size": (["--dit.patch-size", 3], "does not divide by the patch size 3"),
    "num_heads": (["--dit.num-heads", 3], "width 16 does not divide into 3 heads"),
    "groups": (["--autoencoder.groups", 3], "8 channels do not divide into 3 groups"),
    "unet": (["--denoiser", "unet", "--unet.num-heads", 7], "does not divide into 7 heads"),
    "crop": (["--autoencoder.crop-from", 12], "--autoencoder.crop-from 12 is less than --size 16"),
    "layers": (["--autoencoder.discriminator-layers", 5], "leave nothing of a 16 x 16 image"),
    "range": (["--diffusion.learned-range"], "it needs --diffusion.path ddpm"),
    "average": (["--diffusion.ema-decays", 1.5], "--diffusion.ema-decays must lie in [0, 1), got"),
    "no average": (["--diffusion.ema-decays"], "--diffusion.ema-decays needs at least one value"),
    "width": (["--diffusion.posthoc", 0.5], "--diffusion.posthoc: sigma_rel must lie between"),
    "warmup": (["--diffusion.warmup", 12], "must be below --diffusion.steps"),
    "samples": (["--samples", 3], "--samples must lie in [10"),
    "reference": (["--reference", 3], "--reference must lie in [10"),
    "b2": (["--diffusion.b2", 1.5], "--diffusion.b2 must lie in [0, 1), got 1.5"),
    "rate": (["--diffusion.learning-rate", "nan"], "--diffusion.learning-rate must lie in (0, 10]"),
    "weight": (["--autoencoder.kl-weight", "inf"], "--autoencoder.kl-weight must lie in [0, "),
    "negative": (["--diffusion.weight-decay", -1], "--diffusion.weight-decay must lie in [0, "),
    "steps": (["--sampling.steps", 10**11], "--sampling.steps must lie in [1, 10_000]"),
    "interval": (["--sampling.guidance-interval", 0.5, 0.2], "must be LOW HIGH with LOW < HIGH"),
    "steps > T": (
        ["--diffusion.path", "ddpm", "--diffusion.prediction", "eps", "--sampling.steps", 1001],
        "the table has 1000 timesteps",
    ),
    "singular": (
        ["--diffusion.prediction", "eps"],
        "--diffusion.path cosine, --diffusion.prediction eps and --sampling.solver ddim do not go "
        "together: predict_eps",
    ),
    "seed": (["--seed", 2**64], "--seed must lie in [0, 18"),
    "cudnn": (["--attention", "cudnn"], "--attention cudnn: needs a GPU"),
    "no vae": (["--vae", "{tmp}/nowhere"], "--vae {tmp}/nowhere: "),
    "vae": (["--vae", "{images}"], "has no config.json"),
    "other vae": (["--vae", "{tmp}/dit.safetensors"], "is a DiT; needed is an AutoencoderKL"),
    "pixel vae": (["--vae", "{vae}", "--space", "pixel"], "--space pixel has no autoencoder"),
    "lpips": (["--lpips", "{tmp}"], "--lpips: LPIPS: its weights are not in"),
    "latents": (["--latents", "{tmp}/dit.safetensors"], "is a file; needed is a folder"),
    "test": (["--test-images", "{other}"], "its 2 classes are not the 4 of --images"),
    "processes": (["--process-id", 0], "need --distributed"),
    "remote": (["--run-dir", "gs://bucket/run"], "--run-dir gs:/bucket/run: a remote path"),
    "remote images": (["--images", "s3://bucket"], "--images s3:/bucket: a remote path"),
    "nothing": (["--images", "{tmp}/nowhere"], "there is no such file or folder"),
    "empty": (["--images", "{tmp}/empty"], "is empty"),
    "no captions": (["--images", "{images}", "--condition", "text"], "the images have no captions"),
    "no labels": (["--images", "{images}/cross", "--condition", "label"], "have no classes"),
    "unet text": (["--condition", "text", "--denoiser", "unet"], "Captions need --denoiser dit"),
    "few": (["--images", "{tmp}/few", "--condition", "none"], "is more than the 4 training images"),
    "option": (["--no-such-option", 1], "no-such-option"),
    "solver": (["--sampling.solver", "magic"], "magic"),
}


@pytest.fixture(scope="module")
def places(images, finished, tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "empty").mkdir()
    write_images(tmp / "few", [f"{i}.png" for i in range(4)])
    small = dataclasses.replace(finished_config(RunFolder(finished)))
    pretrained.save(make_denoiser(small, (4, 4, 4), Labels(2, 2)), tmp / "dit.safetensors")
    other = write_images(tmp / "other", ["cat/0.png", "cat/1.png", "dog/0.png"])
    return {"tmp": tmp, "images": images, "other": other, "vae": finished}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_writes_nothing(name, places, tmp_path, capsys, monkeypatch):
    options, message = BAD[name]
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    code = train(run, *(str(option).format(**places) for option in options))
    text = said(capsys)
    assert code == 2
    assert message.format(**places) in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_without_images_it_says_what_is_needed(tmp_path, capsys):
    assert call("train", "--run-dir", tmp_path / "run") == 2
    text = capsys.readouterr().err
    assert "captions.json" in text and "make train-imagenet SMOKE=1" in text
    assert not (tmp_path / "run").exists()


def test_another_configuration_or_other_images_are_refused(copied, images, capsys):
    assert train(copied, "--seed", 1, "--channels", 1) == 2
    text = capsys.readouterr().err
    assert "--seed: the folder has 0, now 1" in text
    assert "--channels: the folder has 3, now 1" in text and "--dit.depth" not in text
    (copied / "metrics.json").unlink()
    vae = copied / "other.safetensors"
    pretrained.save(ae.load_vae(copied, 3).with_latent_stats(0.0, 0.5), vae)
    assert train(copied, "--vae", vae) == 2
    text = capsys.readouterr().err
    assert "this latent cache was made otherwise" in text and "scale: it has" in text
    shutil.rmtree(copied / "latents")
    assert train(copied, "--vae", vae) == 2
    assert "has another autoencoder than --vae" in capsys.readouterr().err
    assert train(copied, "--images", images) == 2
    assert "is about other images" in capsys.readouterr().err


def test_images_of_the_same_names_and_sizes_but_other_pixels_are_refused(tmp_path, capsys):
    """Files without compression always have the size that they had."""
    folder = write_images(tmp_path / "images", [f"{k}/{i}.bmp" for k in "ab" for i in range(12)])
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    config = preset("images", size=(16, 16), count=24).config

    def describe():
        source = open_images(folder)
        job = SimpleNamespace(
            source=source, condition=choose_condition(config, source), run=run, lpips=None
        )
        jobs.describe_data(job, folder, trains=True)  # type: ignore[arg-type]

    describe()
    before = (run.path / "data.json").read_bytes()
    describe()
    content = bytearray((folder / "a" / "5.bmp").read_bytes())
    content[-1] ^= 1
    (folder / "a" / "5.bmp").write_bytes(content)
    with pytest.raises(UserError, match="about other images:\n  content: it has"):
        describe()
    assert (run.path / "data.json").read_bytes() == before


def test_overwrite_starts_anew_and_leaves_what_is_not_the_runs(copied, capsys):
    (copied / "notes.png").write_text("mine")
    (copied / "checkpoints" / "notes").write_text("mine")
    assert train(copied, "--seed", 2**40 + 1, "--overwrite", "--samples", 10) == 0
    assert (copied / "notes.png").exists() and (copied / "checkpoints" / "notes").exists()
    assert json.loads((copied / "config.json").read_text())["seed"] == 2**40 + 1


def test_a_latent_cache_of_another_recipe_is_refused(finished, tmp_path, capsys):
    run, cache = tmp_path / "run", ["--latents", finished / "latents"]
    assert train(run, "--vae", finished, *cache, "--latents.dtype", "bfloat16") == 2
    assert 'dtype: it has "float16", expected "bfloat16"' in capsys.readouterr().err
    for options in ([], ["--overwrite"]):
        assert train(run, *cache, *options) == 2
        assert "Give the one that made it with --vae" in capsys.readouterr().err
    damaged = tmp_path / "latents"
    damaged.mkdir()
    (damaged / "header.json").write_text('{"format"')
    assert train(run, "--vae", finished, "--latents", damaged) == 2
    assert "header.json" in (text := capsys.readouterr().err) and "damaged" in text
    assert not run.exists()


def test_unreadable_images_are_left_out_or_stop_the_run(images, finished, tmp_path, capsys):
    broken = Path(shutil.copytree(images, tmp_path / "images"))
    (broken / "circle" / "007.png").write_bytes(b"no image")
    (broken / "square" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    run = tmp_path / "run"
    args = ["--images", broken, "--vae", finished]
    assert train(run, *args, "--strict") == 2
    assert "cannot be decoded" in capsys.readouterr().err
    assert train(run, *args) == 0
    assert "latents: 2 unreadable images are left out" in capsys.readouterr().out
    assert len(json.loads((run / "latents" / "skipped.json").read_text())) == 2


def test_an_autoencoder_begun_without_lpips_does_not_go_on_with_it(copied, monkeypatch, capsys):
    for name in ("metrics.json", "autoencoder.safetensors"):
        (copied / name).unlink()
    lpips = filled(lambda: LPIPS(channels=(4,) * 5, key=jax.random.key(0)))
    monkeypatch.setattr(commands, "load_lpips", lambda folder: lpips)
    assert train(copied, "--lpips", copied) == 2
    assert f"lpips: it has None, now {ae.identity(lpips)[:16]}" in said(capsys)


# Presets, options, streams


def test_presets_are_what_help_shows(capsys):
    assert call("train", "--preset", "cifar10", "--help") == 0
    text = said(capsys)
    assert "(default: cifar10)" in text and "(default: 32 32)" in text
    first = [w.strip(",") for w in text.split() if re.fullmatch("--[a-z-]+,?", w)]
    names = (
        "size space denoiser form objective seed preset images run-dir samples eval-every overwrite"
    )
    wanted = [f"--{name}" for name in names.split()]
    assert list(dict.fromkeys(first))[2:14] == wanted  # after --help


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("which", [("latent", "dit"), ("pixel", "unet"), ("pixel", "dit")])
def test_every_preset_makes_networks_for_every_space(name, which):
    size = "128 192" if name == "images" else ""
    args = ["--preset", name, "--space", which[0], "--denoiser", which[1]]
    args += ["--size", *size.split()] if size else []
    found = chosen_preset(args)
    commands.check(found.config)
    for condition in (Labels(10, 10), Nothing()):
        commands.check_networks(found.config, found.sampling, condition, None)


def test_the_default_of_imagenet_is_the_published_recipe():
    found = preset("imagenet256")
    d = found.config.diffusion
    assert (d.batch_size, d.learning_rate, d.weight_decay, d.warmup) == (256, 1e-4, 0.0, 0)
    assert (d.ema_decays, d.ema_warmup, d.cond_dropout, d.steps) == ((0.9999,), False, 0.1, 400_000)
    assert (d.path, d.prediction, d.learned_range) == ("ddpm", "eps", True)
    assert (found.sampling.solver, found.sampling.steps) == ("ddpm", 250)


def every_field(kind, prefix=""):
    import typing

    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        plain = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(plain):
            yield from every_field(plain, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], plain


@pytest.mark.parametrize(
    "kind", [commands.Train, commands.Autoencoder, commands.Sample, commands.Evaluate]
)
def test_every_number_has_a_range_and_every_option_a_sentence(kind, capsys):
    for name, hint, plain in every_field(kind):
        numbers = "int" in str(plain) or "float" in str(plain)
        words = "str" in str(plain) or "bool" in str(plain) or "Literal" in str(plain)
        assert not numbers or words or range_of(hint) is not None, name
    assert call(kind.__name__.lower(), "--help") == 0
    import tyro  # its parser's own help texts, without the frame

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = tyro.extras.get_parser(kind)
    for action in parser._actions:
        assert action.help and not action.help.startswith("(default"), action


def test_all_streams_of_all_seeds_differ():
    seeds = (0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    keys = {
        tuple(jax.random.key_data(stream_key(seed, name)).tolist())
        for seed in seeds
        for name in STREAMS
    }
    assert len(keys) == len(seeds) * len(STREAMS)
    assert len({stream_seed(seed, name) for seed in seeds for name in STREAMS}) == len(keys)
    with pytest.raises(ValueError, match="is not one of"):
        stream_key(0, "diffusion/typo")
    with pytest.raises(ValueError, match="a seed must lie in"):
        stream_key(2**64, "samples")


def test_each_kind_of_run_has_its_folder():
    names = {
        run_folder(commands.Sample(preset, space, denoiser)).path.name
        for preset in ("mnist", "smoke")
        for space in ("latent", "pixel")
        for denoiser in ("dit", "unet")
    }
    assert names == {
        f"{preset}{space}{denoiser}"
        for preset in ("mnist", "smoke")
        for space in ("", "-pixel")
        for denoiser in ("", "-unet")
    }


def test_evaluators_see_what_they_should():
    from experiments.train.classifier import Described
    from experiments.train.evaluate import Comparison

    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(40, 3)), np.arange(40) % 4
    same = Comparison(Described(features, None), Described(features, classes), classes)
    found = {name: x for function in EVALUATORS for name, x in function(same).items()}
    assert found["fd"] == pytest.approx(0, abs=1e-6) and found["accuracy"] == 1
    assert found["precision"] == found["recall"] == 1
    far = same._replace(samples=Described(features + 9, classes[::-1]))
    found = {name: x for function in EVALUATORS for name, x in function(far).items()}
    assert found["fd"] > 100 and found["precision"] == 0 and found["accuracy"] < 0.5


# For few network calls.


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
    assert finished_config(RunFolder(run)).few.pretrain == 0
    # Sampled with any number of calls, and by the solvers.
    for how in (("--steps", 2), ("--solver", "heun", "--steps", 2)):
        out = tmp_path / "out.png"
        assert call("sample", "--run-dir", run, "--guidance", 1, *how, "--n", 1, "--out", out) == 0


def test_a_network_starts_as_the_finished_denoiser(finished):
    config = finished_config(RunFolder(finished))
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
