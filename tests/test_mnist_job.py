"""The MNIST job as its user sees it: files, messages, exit codes, and nothing lost when killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eqxldm.checkpoints import Checkpoints
from eqxldm.digests import digest
from experiments.common.terminal import run_main
from experiments.mnist import config as cfg, stages
from experiments.mnist.__main__ import main

ROOT = Path(__file__).parent.parent
SMALL = (
    "--classifier.steps 40 --classifier.batch-size 32 --autoencoder.steps 40 "
    "--autoencoder.batch-size 8 --autoencoder.gan-start 20 --autoencoder.channels 8 8 "
    "--autoencoder.groups 4 --autoencoder.discriminator-channels 8 --diffusion.steps 40 "
    "--diffusion.batch-size 16 --diffusion.warmup 5 --dit.depth 2 --dit.width 32 "
    "--dit.num-heads 2 --checkpoint-every 10 --sampling.steps 3 --samples 40 --devices 1"
).split()
FILES = {
    "samples.png", "reconstructions.png", "forward.png", "reverse.png", "curves.png",
    "samples.npz", "metrics.json", "log.jsonl", "config.json", "checkpoints",
}  # fmt: skip


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_data(folder: Path, side: int = 28) -> Path:
    """600 training and 60 test images: a bar whose place is the class, and noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 600), ("t10k", 60)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 60, (n, side, side))
        for image, label in zip(images, labels, strict=True):
            image[4 : side - 4, 4 + 2 * label : 7 + 2 * label] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The judge is cached: each test its own cache, or the first would train for the others."""
    monkeypatch.setenv("EQXLDM_CACHE", str(tmp_path / "cache"))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(signum, handler)


def start(run: Path, data: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.mnist", "train", *SMALL]
    command += ["--run-dir", str(run), "--data-dir", str(data), *options]
    own = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # for those that come after it
    own |= {"EQXLDM_CACHE": str(run.parent / f"{run.name}-cache")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | own,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def logged(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_until(process: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def final_digests(run: Path) -> dict[str, str]:
    config = cfg.from_dict(json.loads((run / "config.json").read_text()))
    states = {
        "classifier": stages.classifier_state(config, (1, 28, 28), 10)[0],
        "autoencoder": stages.autoencoder_state(config, 1)[0],
        "diffusion": stages.diffusion_state(config, (4, 8, 8), 10)[0],
    }
    found = {}
    for stage, like in states.items():
        with Checkpoints(run / "checkpoints" / stage) as checkpoints:
            assert checkpoints.steps()[-1] == 40
            found[stage] = digest(checkpoints.restore(40, like)[0])
    with np.load(run / "samples.npz") as samples:
        found["samples"] = digest(dict(samples))
    return found


def test_killed_in_three_stages_ends_with_the_same_bits(finished, data, tmp_path):
    unbroken, broken = finished, tmp_path / "broken"
    latents = broken / "latents.npz"
    moments = {
        "adversarial": lambda: (broken / "checkpoints" / "autoencoder" / "30").exists(),
        "latents": lambda: list(broken.glob(".latents*")) or latents.exists(),
        "diffusion": lambda: (broken / "checkpoints" / "diffusion" / "10").exists(),
    }
    for happened in moments.values():
        process = start(broken, data)
        wait_until(process, happened)
        process.kill()
        process.communicate()
        assert not (broken / "metrics.json").exists()
    finish(start(broken, data))
    assert final_digests(broken) == final_digests(unbroken)
    # The log reads as if nothing had happened: every step once, in order, with the same losses.
    steps = lambda run: [(e["stage"], e["step"], e["loss"]) for e in logged(run) if "step" in e]
    assert {e[:2] for e in steps(broken)} >= {e[:2] for e in steps(unbroken)}
    for stage in ("classifier", "autoencoder", "diffusion"):
        counted = [step for name, step, _ in steps(broken) if name == stage]
        assert counted == sorted(set(counted))


def test_ctrl_c_saves_and_exits(data, tmp_path):
    """SIGTERM: tests/test_imagenet_job.py and tests/test_processes.py, by the same loop."""
    run = tmp_path / "run"
    process = start(run, data, "--checkpoint-every", "1000", "--classifier.steps", "100000")
    wait_until(process, lambda: bool(logged(run)))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "goes on from here" in output
    with Checkpoints(run / "checkpoints" / "classifier") as checkpoints:
        (step,) = checkpoints.steps()
    assert step >= logged(run)[0]["step"]


def call(*args: str) -> int:
    """The program in this process: its exit code."""
    try:
        return run_main(lambda: main(args))
    except SystemExit as stop:  # how the option parser ends
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A finished run, never written to."""
    run = tmp_path_factory.mktemp("finished") / "run"
    old = os.environ.get("EQXLDM_CACHE")
    os.environ["EQXLDM_CACHE"] = str(run.parent / "cache")
    try:
        assert call("train", *SMALL, "--run-dir", str(run), "--data-dir", str(data)) == 0
    finally:
        os.environ.pop("EQXLDM_CACHE") if old is None else os.environ.update(EQXLDM_CACHE=old)
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_what_a_finished_run_holds(finished):
    assert {entry.name for entry in finished.iterdir()} >= FILES
    assert not list(finished.glob(".*-*"))  # nothing temporary is left
    with np.load(finished / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (40, 28, 28, 1) and images.dtype == np.uint8
    assert np.issubdtype(labels.dtype, np.integer)
    assert np.bincount(labels).tolist() == [4] * 10
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"autoencoder", "diffusion", "timings", "config", "versions", "seed"}
    assert set(metrics["autoencoder"]) == {"psnr_db", "ssim", "reconstruction_fd"}
    assert set(metrics["diffusion"]) == {
        "fd", "fd_floor", "accuracy", "precision", "recall",
        "samples", "solver", "steps", "network_calls", "guidance_scale", "guidance_interval",
    }  # fmt: skip
    assert {"autoencoder", "latents", "diffusion", "sampling"} <= set(metrics["timings"])
    assert metrics["timings"]["diffusion"]["images_per_second"] > 0
    assert metrics["versions"]["jax"] and metrics["seed"] == 0


def test_a_finished_run_is_left_as_it_is(copied, data, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in copied.iterdir() if p.is_file()}
    assert call("train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)) == 0
    assert "is finished" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in copied.iterdir() if p.is_file()}
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_sample_writes_a_picture(copied, capsys):
    args = ["--run-dir", str(copied), "--steps", "2"]
    assert call("sample", *args, "--label", "7", "--n", "4", "--solver", "ddim") == 0
    assert (copied / "sample-7.png").exists()
    assert call("sample", *args, "--n", "2", "--seed", "5", "--solver", "ddpm") == 0
    assert (copied / "sample.png").exists()


def test_evaluate_brings_the_run_up_to_date(copied, data):
    args = ["--run-dir", str(copied), "--data-dir", str(data)]
    assert call("evaluate", *args, "--n", "50", "--steps", "2", "--guidance", "1.0") == 0
    metrics = json.loads((copied / "metrics.json").read_text())
    assert metrics["diffusion"]["samples"] == 50
    assert metrics["diffusion"]["guidance_scale"] == 1.0
    with np.load(copied / "samples.npz") as samples:
        assert len(samples["arr_0"]) == 50
    # Training a finished run again does not undo its evaluation.
    assert call("train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)) == 0
    assert json.loads((copied / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("denoiser", ["unet", "dit"])
def test_pixels_and_the_unet(denoiser, data, tmp_path, capsys):
    where = ["--run-dir", str(tmp_path / "run")]
    which = ["--space", "pixel", "--denoiser", denoiser]
    options = "--unet.channels 8 8 --unet.groups 4 --unet.num-heads 2 --diffusion.steps 10".split()
    args = [*where, "--data-dir", str(data), *which]
    assert call("train", *SMALL, *args, *options) == 0
    run = tmp_path / "run"
    found = {entry.name for entry in run.iterdir()}
    assert found >= FILES - {"reconstructions.png"} and "latents.npz" not in found
    assert {entry.name for entry in (run / "checkpoints").iterdir()} == {"classifier", "diffusion"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert "autoencoder" not in metrics and "autoencoder" not in metrics["timings"]
    with np.load(run / "samples.npz") as samples:
        assert samples["arr_0"].shape == (40, 28, 28, 1)
    assert call("sample", *where, *which, "--label", "3", "--n", "2", "--steps", "2") == 0
    assert (run / "sample-3.png").exists()


def test_each_kind_of_run_has_its_folder():
    names = {cfg.run_name("mnist", s, d) for s in ("latent", "pixel") for d in ("dit", "unet")}
    assert names == {"mnist", "mnist-pixel", "mnist-unet", "mnist-pixel-unet"}


BAD = {
    "zero steps": (["--sampling.steps", "0"], "--sampling.steps must be positive, got 0"),
    "negative batch": (["--diffusion.batch-size", "-1"], "--diffusion.batch-size must be positive"),
    "large batch": (["--diffusion.batch-size", "601"], "more than the 600 training images"),
    "guidance": (["--sampling.guidance", "-1"], "--sampling.guidance must lie in [0, 100]"),
    "interval": (["--sampling.guidance-interval", "0.5", "0.2"], "must be LOW HIGH"),
    "nan": (["--diffusion.learning-rate", "nan"], "--diffusion.learning-rate must be a number"),
    "steps > T": (
        ["--diffusion.path", "ddpm", "--diffusion.prediction", "eps", "--sampling.steps", "1001"],
        "the table has 1000 timesteps",
    ),
    "singular": (
        ["--diffusion.prediction", "eps"],
        "--diffusion.path cosine, --diffusion.prediction eps and --sampling.solver ddim do not go "
        "together: predict_eps on CosineVP says nothing about x0 at t = 1",
    ),
    "num_heads": (["--dit.num-heads", "3"], "width 32 does not divide into 3 heads"),
    "size": (["--autoencoder.pad", "1"], "does not divide by the downsampling factor 4"),
    "patch_size": (["--dit.patch-size", "3"], "does not divide by the patch 3"),
    "groups": (["--autoencoder.groups", "3"], "8 channels do not divide into 3 groups"),
    "unet": (["--denoiser", "unet", "--unet.num-heads", "7"], "does not divide into 7 heads"),
    "unet levels": (
        ["--denoiser", "unet", "--unet.channels", *["16"] * 5],
        "a 8 x 8 input does not divide by 16, as 5 levels need",
    ),
    "pixels": (["--space", "pixel", "--dit.patch-size", "5"], "does not divide by the patch 5"),
    "layers": (["--autoencoder.discriminator-layers", "6"], "leave nothing of a 32 x 32 image"),
    "warmup": (["--diffusion.warmup", "40"], "must be below --diffusion.steps"),
    "devices": (["--devices", "99"], "asked for 99 devices"),
    "solver": (["--sampling.solver", "magic"], "magic"),
    "dataset": (["--dataset", "imagenet"], "imagenet"),
    "option": (["--no-such-option", "1"], "no-such-option"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_message_and_write_nothing(name, data, tmp_path, capsys):
    options, message = BAD[name]
    run = tmp_path / "run"
    code = call("train", *SMALL, "--run-dir", str(run), "--data-dir", str(data), *options)
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not run.exists()


def test_bad_data_folders(data, tmp_path, capsys):
    run = tmp_path / "run"
    train = lambda folder: call("train", *SMALL, "--run-dir", str(run), "--data-dir", str(folder))
    lacking = Path(shutil.copytree(data, tmp_path / "lacking"))
    (lacking / "t10k-labels-idx1-ubyte").unlink()
    assert train(lacking) == 2
    assert "lacks t10k-labels-idx1-ubyte" in capsys.readouterr().err
    cut = Path(shutil.copytree(data, tmp_path / "cut"))
    images = cut / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    assert train(cut) == 2
    assert "is truncated" in capsys.readouterr().err
    assert train(write_data(tmp_path / "odd", side=30)) == 2
    assert "30 x 30 images with a border of 2" in capsys.readouterr().err
    assert train(tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    assert not run.exists()


def test_another_configuration_is_refused_and_overwritten_on_request(copied, data, capsys):
    args = ["train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)]
    assert call(*args, "--dit.depth", "1", "--seed", "3") == 2
    said = capsys.readouterr().err
    assert "--dit.depth: the folder has 2, now 1" in said
    assert "--seed: the folder has 0, now 3" in said
    assert "--dit.width" not in said
    assert (copied / "metrics.json").exists()


def test_sampling_wants_a_finished_run(copied, tmp_path, capsys):
    assert call("sample", "--run-dir", str(tmp_path / "none")) == 2
    assert "no run in" in capsys.readouterr().err
    assert call("sample", "--run-dir", str(copied), "--label", "10") == 2
    assert "--label 10: the classes are 0 to 9" in capsys.readouterr().err
    assert call("sample", "--run-dir", str(copied), "--n", "0") == 2
    assert "--n must be at least 1" in capsys.readouterr().err
    for path in (copied / "checkpoints" / "diffusion" / "40").glob("*/c/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # nothing older is taken in its place, the second time neither
        assert call("sample", "--run-dir", str(copied)) == 2
        assert "diffusion/40: " in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints" / "diffusion" / "40")
    assert call("sample", "--run-dir", str(copied)) == 2
    assert "diffusion is at step 30 of 40" in capsys.readouterr().err


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for k in range(len(content) // 4, len(content), len(content) // 8):
        content[k] ^= 255
    path.write_bytes(content)


DAMAGE = {"flipped": flip, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(copied, data, damage, capsys):
    before = final_digests(copied)
    (copied / "metrics.json").unlink()
    folder = copied / "checkpoints" / "diffusion"
    DAMAGE[damage](largest_file(folder / "40"))
    assert call("train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)) == 0
    said = capsys.readouterr().out
    assert f"damaged checkpoint {folder / '40'}" in said and "Renamed to 40.damaged" in said
    assert (folder / "40.damaged").exists() and final_digests(copied) == before


def test_without_an_undamaged_checkpoint_the_run_stops_with_all_reasons(copied, data, capsys):
    (copied / "metrics.json").unlink()
    folder = copied / "checkpoints" / "diffusion"
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    for step in steps:
        largest_file(step).unlink()
    assert call("train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)) == 2
    said = capsys.readouterr().err
    assert "no checkpoint is usable" in said and "--overwrite" in said
    assert all(str(step) in said and step.exists() for step in steps)


def test_losses_that_are_not_finite_stop_the_run_with_the_norms_by_block(data, tmp_path, capsys):
    run = tmp_path / "run"
    args = ["train", *SMALL, "--run-dir", str(run), "--data-dir", str(data)]
    assert call(*args, "--classifier.learning-rate", "1e30") == 2
    said = capsys.readouterr().err
    assert "classifier: the loss or its gradient (10 steps in a row) is not finite at step" in said
    assert "Last good checkpoint: " in said and "hidden: nan" in said


def test_a_run_folder_belongs_to_one_process(copied, data, capsys):
    import fcntl

    with open(copied / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call("train", *SMALL, "--run-dir", str(copied), "--data-dir", str(data)) == 2
    assert "is in use by another process" in capsys.readouterr().err
