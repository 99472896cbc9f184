"""The job as its user sees it: files, messages, exit codes, samples and measures."""

import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

from eqxldm.models import LPIPS
from experiments.train import autoencoder as ae, commands
from experiments.train.conditions import Labels
from experiments.train.config import Config
from experiments.train.diffusion import diffusion_state, posthoc_average
from experiments.train.hooks import open_snapshots
from experiments.train.options import read_options
from experiments.train.run import RunFolder

from helpers import filled
from job_runs import SMALL, call, said, train, write_images

FILES = {
    "samples.png", "reconstructions.png", "forward.png", "reverse.png", "curves.png",
    "samples.npz", "metrics.json", "log.jsonl", "config.json", "data.json", "manifest.json",
    "checkpoints", "autoencoder.safetensors", "latents",
}  # fmt: skip


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
def captioned(finished, tmp_path_factory) -> Path:
    """A finished run on a folder with captions, of images that are not square, measured along, with
    the autoencoder of another run.
    """
    base = tmp_path_factory.mktemp("captioned")
    names = [f"{i:02d}.png" for i in range(40)]
    folder = write_images(base / "images", names)
    texts = {name: f"{('red', 'blå')[i % 2]} boat {i}" for i, name in enumerate(names)}
    (folder / "captions.json").write_text(json.dumps(texts))
    options = "--size 16 24 --eval-every 5 --text.depth 1 --text.num-heads 2 --text.max-length 16"
    args = ["--images", folder, *SMALL, *options.split(), "--vae", finished]
    args += ["--run-dir", base / "run"]
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
    # Its autoencoder goes without the discriminator, whose step would be compiled.
    args = [*where, "--images", data, *SMALL, "--size", 28, 28, "--autoencoder.gan-start", 12]
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
    config = read_options(Config, RunFolder(copied))
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


def test_the_autoencoder_alone_and_handed_on(finished, tmp_path, capsys, monkeypatch):
    alone, run = tmp_path / "alone", tmp_path / "run"
    lpips = filled(lambda: LPIPS(channels=(4,) * 5, key=jax.random.key(0)))
    monkeypatch.setattr(commands, "load_lpips", lambda folder: lpips)
    args = ["autoencoder", "--preset", "smoke", *SMALL, "--run-dir", alone]
    # Measured by LPIPS and not trained on it: the autoencoder is that of the run without.
    assert call(*args, "--lpips", tmp_path, "--autoencoder.perceptual-weight", "0") == 0
    text = capsys.readouterr().out
    assert f"train --vae {alone}" in text and "psnr_db" in text
    assert "lpips" in json.loads((alone / "metrics.json").read_text())["autoencoder"]
    assert not {"latents", "samples.npz"} & {entry.name for entry in alone.iterdir()}
    assert ae.identity(ae.load_vae(alone, 3)) == ae.identity(ae.load_vae(finished, 3))
    assert train(run, "--vae", alone, "--latents", finished / "latents") == 0
    assert not (run / "latents").exists()
    assert not (run / "checkpoints" / "autoencoder").exists()
