"""The image folder job as its user sees it: files, messages, exit codes, nothing lost."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from children import free_port, run_together
from PIL import Image

from eqxldm import pretrained
from eqxldm.checkpoints import Checkpoints
from eqxldm.data import loader, open_latents
from eqxldm.digests import digest
from eqxldm.models import LPIPS
from eqxldm.sharding import make_mesh
from experiments.common.loop import open_snapshots
from experiments.common.run import RunFolder
from experiments.common.terminal import run_main
from experiments.imagenet import (
    __main__ as program,
    autoencoder as ae,
    config as cfg,
    evaluate as ev,
    stages,
)
from experiments.imagenet.__main__ import main
from experiments.imagenet.images import EACH, SHAPES, make_shapes, shrunk

from helpers import filled

SIZES = (
    "--size 16 --checkpoint-every 4 --reference 20 --classifier.steps 8 "
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
        "--dit.width 16 --dit.num-heads 2 --diffusion.posthoc 0.05 0.1 "
        "--diffusion.snapshot-every 5 --samples 24 --sampling.steps 3 --sampling-batch 8"
    ).split()
)
FILES = {
    "samples.png", "reconstructions.png", "forward.png", "reverse.png", "curves.png",
    "samples.npz", "metrics.json", "log.jsonl", "config.json", "data.json", "checkpoints",
    "autoencoder.safetensors", "latents", "images", "snapshots", "tensorboard",
}  # fmt: skip
STAGES = ("classifier", "autoencoder", "diffusion")


def call(*args) -> int:
    """The program in this process: its exit code."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        return run_main(lambda: main([str(arg) for arg in args]))
    except SystemExit as stop:  # how the option parser ends
        return int(stop.code or 0)
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(signum, handler)


def train(run, *options) -> int:
    return call("train", "--preset", "smoke", *SMALL, "--run-dir", run, *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run on images that it made itself; never written to."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(run, "--log.tensorboard") == 0
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shapes"
    make_shapes(folder)
    return folder


def final_digests(run: Path) -> dict[str, str]:
    config = cfg.from_dict(json.loads((run / "config.json").read_text()))
    trained, *_ = stages.load_finished(config, RunFolder(run), make_mesh())
    leaves = [leaf for leaf in jax.tree.leaves(trained.denoiser) if hasattr(leaf, "shape")]
    with np.load(run / "samples.npz") as samples:
        found = {"network": digest(leaves), "samples": digest(dict(samples))}
    vae = ae.load_vae(run)
    shards = sorted((run / "latents").glob("*.arrayrecord"))
    assert len(shards) == 4
    return {
        **found,
        "autoencoder": f"{ae.identity(vae)} {vae.shift} {vae.scale}",
        "latents": digest([np.frombuffer(shard.read_bytes(), np.uint8) for shard in shards]),
    }


def final_arrays(run: Path) -> dict[str, Any]:
    config = cfg.from_dict(json.loads((run / "config.json").read_text()))
    trained, *_ = stages.load_finished(config, RunFolder(run), make_mesh())
    latents = open_latents(run / "latents")
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


def test_what_a_finished_run_holds(finished):
    assert {entry.name for entry in finished.iterdir()} == FILES | {
        ".lock", "autoencoder.json", "autoencoder-loss.json",
    }  # fmt: skip
    with np.load(finished / "samples.npz") as samples:
        drawn, labels = samples["arr_0"], samples["arr_1"]
    assert drawn.shape == (24, 16, 16, 3) and drawn.dtype == np.uint8
    assert np.bincount(labels).tolist() == [6] * 4
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"autoencoder", "diffusion", "timings", "config", "versions", "seed"}
    assert set(metrics["autoencoder"]) == {"psnr_db", "ssim", "reconstruction_fd"}
    assert set(metrics["diffusion"]) == {
        "fd", "fd_floor", "accuracy", "precision", "recall", "judge_accuracy", "samples",
        "reference", "solver", "steps", "network_calls", "guidance_scale", "guidance_interval",
        "sigma_rel",
    }  # fmt: skip
    assert {*STAGES, "latents", "sampling", "measuring", "total"} == set(metrics["timings"])
    header = json.loads((finished / "latents" / "header.json").read_text())
    assert header["images"] == len(SHAPES) * EACH and header["shape"] == [4, 4, 4]
    (events,) = (finished / "tensorboard" / "samples").iterdir()
    assert all(name in events.read_bytes() for name in (b"reconstructions", b"samples"))
    with Image.open(finished / "samples.png") as picture:  # six of each class, twice enlarged
        assert picture.size == ((2 + 6 * 18) * 2, (2 + 4 * 18) * 2)


def interrupt(monkeypatch, owner, name: str, call_number: int) -> None:
    """The process gets SIGTERM within the so-maniest call of a function."""
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
        "sampling": (ev, "draw", 1),
    }
    for moment in moments.values():
        with monkeypatch.context() as patch:
            interrupt(patch, *moment)
            assert train(run) == 143
        assert not (run / "metrics.json").exists()
    assert not list((run / "latents").glob("*part*"))
    assert train(run) == 0
    assert final_digests(run) == final_digests(finished)
    scores = lambda run: json.loads((run / "metrics.json").read_text())["diffusion"]
    assert scores(run) == scores(finished)


def train_in_two(run, *options):
    """The same command in two processes, each with one device."""
    command = ["-m", "experiments.imagenet", "train", "--preset", "smoke", *SMALL]
    command += ["--run-dir", run, *options, "--distributed", "--coordinator"]
    command += [f"127.0.0.1:{free_port()}", "--processes", 2, "--process-id"]
    return run_together(*([*command, i] for i in range(2)), devices=1)


def test_two_processes_go_on_with_a_run_of_one(finished, copied):
    """From the trained autoencoder on, which they measure, cache latents with, train and sample."""
    for name in ("latents", "checkpoints/diffusion", "snapshots/diffusion"):
        shutil.rmtree(copied / name)
    for name in ("autoencoder.safetensors", "autoencoder.json", "metrics.json", "samples.npz"):
        (copied / name).unlink()
    first, second = train_in_two(copied)
    for ended in (first, second):
        assert ended.code == 0, ended.err[-3000:]
    assert "PSNR" in first.out and "PSNR" not in second.out
    found, expected = final_arrays(copied), final_arrays(finished)
    # Sums of float32 in another order, one rounding of float16, and what uint8 may make of those.
    bounds = {"statistics": 1e-5, "network": 1e-5, "latents": 2**-10, "samples": 1 / 255}
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


def test_a_finished_run_is_left_as_it_is(copied, capsys):
    state = lambda: {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.name != ".lock"}
    before = state()
    assert train(copied) == 0
    assert "is finished" in capsys.readouterr().out
    assert state() == before


def test_sample_and_evaluate(copied, monkeypatch):
    before, met = (copied / "metrics.json").read_text(), []
    monkeypatch.setattr(
        program, "barrier", lambda name: met.append((name, (copied / "metrics.json").read_text()))
    )
    where = ["--preset", "smoke", "--run-dir", copied]
    assert call("sample", *where, "--steps", 2, "--label", 3, "--n", 4) == 0
    assert call("sample", *where, "--steps", 2, "--n", 2, "--seed", 5) == 0
    assert {"sample-3.png", "sample.png"} <= {path.name for path in copied.iterdir()}
    assert call("evaluate", *where, "--n", 20, "--steps", 2, "--guidance", 1.0) == 0
    metrics = json.loads((copied / "metrics.json").read_text())
    assert metrics["diffusion"]["samples"] == 20
    # Where others wait for process 0: jax's own wait at an exit ends after five minutes.
    assert [(name, text != before) for name, text in met] == [("done", True)]
    assert metrics["diffusion"]["guidance_scale"] == 1.0


def test_an_average_of_any_width_after_training(copied, capsys):
    config = cfg.from_dict(json.loads((copied / "config.json").read_text()))
    with open_snapshots(RunFolder(copied), "diffusion") as snapshots:
        assert snapshots.steps() == [5, 10, 12]
    build = lambda: stages.diffusion_state(config, (4, 4, 4), 4)[0]
    like = eqx.filter_eval_shape(build)
    with Checkpoints(copied / "checkpoints" / "diffusion") as checkpoints:
        state = checkpoints.restore(12, like)[0]
    for tracked, width in zip(state.ema[1:], (0.05, 0.1), strict=True):
        found = stages.posthoc_average(config, RunFolder(copied), like.ema, width)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(tracked), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) < 1e-6
    where = ["--preset", "smoke", "--run-dir", copied]
    assert call("evaluate", *where, "--n", 20, "--steps", 2, "--sigma-rel", 0.07) == 0
    assert json.loads((copied / "metrics.json").read_text())["diffusion"]["sigma_rel"] == 0.07
    for width, reason in ((0.5, "sigma_rel must lie"), (0.25, "snapshots describe sigma_rel")):
        assert call("sample", *where, "--n", 1, "--steps", 2, "--sigma-rel", width) == 2
        assert f"--sigma-rel {width}: " in (said := capsys.readouterr().err) and reason in said
    shutil.rmtree(copied / "snapshots" / "diffusion" / "10")
    assert call("sample", *where, "--n", 1, "--steps", 2, "--sigma-rel", 0.07) == 0


def test_the_autoencoder_alone_and_handed_on(finished, images, tmp_path, capsys):
    alone, run = tmp_path / "alone", tmp_path / "run"
    args = ["autoencoder", "--preset", "smoke", *SIZES, "--images", images, "--run-dir", alone]
    assert call(*args) == 0
    said = capsys.readouterr().out
    assert f"train --vae {alone}" in said and "PSNR" in said
    found = {entry.name for entry in alone.iterdir()}
    assert {"reconstructions.png", "curves.png", "metrics.json"} <= found
    assert not {"latents", "samples.npz"} & found
    # The run on images of its own made the same autoencoder.
    assert ae.identity(ae.load_vae(alone)) == ae.identity(ae.load_vae(finished))
    cache = ["--images", images, "--latents", finished / "latents"]
    assert train(run, "--vae", alone, *cache) == 0
    assert not (run / "latents").exists()
    assert not (run / "checkpoints" / "autoencoder").exists()


def folder_of(path: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 90, 200 - i)).save(path / name / f"{i}.png")
    return path


BAD = {
    "mesh": (["--mesh", "data=3"], "--mesh: mesh data=3,fsdp=1,tensor=1: its sizes must multiply"),
    "mesh text": (["--mesh", "rows=2"], "--mesh: mesh 'rows=2': need each of data, fsdp, tensor"),
    "batch": (["--diffusion.batch-size", 9], "--diffusion.batch-size: a batch of 9 does not"),
    "parts": (
        ["--grad-accum-steps", 3],
        "--diffusion.batch-size: a batch of 8 does not divide by 6",
    ),
    "large": (["--diffusion.batch-size", 402], "402 is more than the 400 training images"),
    "model": (["--dit.model", "dit_xxl_2"], "dit_xxl_2"),
    "labels": (["--num-classes", 3], "--num-classes 3: {images} has 4 classes"),
    "size": (["--size", 18], "does not divide by the downsampling factor 4"),
    "patch_size": (["--dit.patch-size", 3], "does not divide by the patch 3"),
    "num_heads": (["--dit.num-heads", 3], "width 16 does not divide into 3 heads"),
    "crop": (["--autoencoder.crop-from", 12], "--autoencoder.crop-from 12 is less than --size 16"),
    "layers": (["--autoencoder.discriminator-layers", 5], "leave nothing of a 16 x 16 image"),
    "range": (["--diffusion.learned-range"], "it needs --diffusion.path ddpm"),
    "average": (
        ["--diffusion.ema-decays", 1.5],
        "--diffusion.ema-decays must lie in [0, 1), got 1.5",
    ),
    "width": (
        ["--diffusion.posthoc", 0.5],
        "--diffusion.posthoc: sigma_rel must lie between",
    ),
    "warmup": (["--diffusion.warmup", 12], "must be below --diffusion.steps"),
    "samples": (["--samples", 3], "--samples must be at least 10, got 3"),
    "no vae": (["--vae", "{tmp}/nowhere"], "--vae {tmp}/nowhere: "),
    "vae": (["--vae", "{images}"], "has no config.json"),
    "other vae": (["--vae", "{tmp}/dit.safetensors"], "is a DiT; needed is an AutoencoderKL"),
    "lpips": (["--lpips", "{tmp}"], "--lpips: LPIPS: its weights are not in"),
    "test": (["--test-images", "{other}"], "its 2 classes are not the 4 of --images"),
    "processes": (["--process-id", 0], "need --distributed"),
    "nothing": (["--images", "{tmp}/nowhere"], "there is no such file or folder"),
    "empty": (["--images", "{tmp}/empty"], "is empty"),
    "loose": (["--images", "{images}/cross"], "holds images without labels"),
    "one class": (["--images", "{tmp}/one"], "without labels"),
    "hollow": (["--images", "{tmp}/hollow"], "1 of 2 classes have no image: dog"),
}


@pytest.fixture(scope="module")
def places(images, tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "empty").mkdir()
    folder_of(tmp / "one", cat=2)
    folder_of(tmp / "hollow", cat=2, dog=0)
    config = cfg.from_dict(
        {name: {} for name in ("classifier", "autoencoder", "latents", "diffusion", "dit")}
    )
    small = cfg.DiTConfig(depth=1, width=16, num_heads=2)
    dit = cfg.make_dit(cfg.replace(config, dit=small), (4, 4, 4), 2)
    pretrained.save(dit, tmp / "dit.safetensors")
    return {"tmp": tmp, "images": images, "other": folder_of(tmp / "other", cat=2, dog=2)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_writes_nothing(name, places, tmp_path, capsys):
    options, message = BAD[name]
    run = tmp_path / "run"
    options = [str(option).format(**places) for option in options]
    code = train(
        run, *(["--images", places["images"]] if "--images" not in options else []), *options
    )
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert code == 2
    assert message.format(**places) in said
    assert "Traceback" not in said
    assert not run.exists()


def test_without_images_it_says_what_is_needed(tmp_path, capsys):
    assert call("train", "--run-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "class" in said and "make train-imagenet SMOKE=1" in said
    assert not (tmp_path / "run").exists()


def test_another_configuration_or_other_images_are_refused(copied, images, places, capsys):
    assert train(copied, "--seed", 1) == 2
    assert "--seed: the folder has 0, now 1" in capsys.readouterr().err
    (copied / "metrics.json").unlink()
    vae = copied / "other.safetensors"
    model = ae.load_vae(copied)
    pretrained.save(model.with_latent_stats(0.0, 0.5), vae)
    assert train(copied, "--vae", vae) == 2
    said = capsys.readouterr().err
    assert "this latent cache was made otherwise" in said and "scale: it has" in said
    shutil.rmtree(copied / "latents")
    assert train(copied, "--vae", vae) == 2
    assert "has another autoencoder than --vae" in capsys.readouterr().err
    more = Path(shutil.copytree(images, copied.parent / "more"))
    folder_of(more, zigzag=2)
    assert train(copied, "--images", more) == 2
    said = capsys.readouterr().err
    assert "is about other images" in said and "classes: it has 4, now 5" in said
    (more / "zigzag" / "0.png").unlink()
    shutil.rmtree(more / "zigzag")
    (more / "cross" / "000.jpg").unlink()
    assert train(copied, "--images", more) == 2
    assert "images: it has 400, now 399" in capsys.readouterr().err


def test_a_cache_of_another_recipe_is_refused_before_anything_is_written(
    finished, tmp_path, capsys
):
    run = tmp_path / "run"
    given = ["--vae", finished, "--images", finished / "images", "--latents", finished / "latents"]
    assert train(run, *given, "--latents.dtype", "bfloat16") == 2
    assert 'dtype: it has "float16", expected "bfloat16"' in capsys.readouterr().err
    other = Path(shutil.copytree(finished / "images", tmp_path / "images"))
    (other / "cross" / "000.jpg").unlink()
    given[3] = other
    assert train(run, *given) == 2
    said = capsys.readouterr().err
    assert "source: it has" in said and "images: it has 400, expected 399" in said
    assert not run.exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_the_cache_of_another_run_needs_its_autoencoder(finished, tmp_path, capsys, options):
    run = tmp_path / "run"
    images = ["--images", finished / "images"]
    assert train(run, *images, "--latents", finished / "latents", *options) == 2
    assert "Give the one that made it with --vae" in capsys.readouterr().err
    assert not run.exists()


def test_a_cache_whose_header_is_damaged_is_refused_before_training(finished, tmp_path, capsys):
    latents = tmp_path / "latents"
    latents.mkdir()
    (latents / "header.json").write_text('{"format"')
    given = ["--vae", finished, "--images", finished / "images", "--latents", latents]
    assert train(tmp_path / "run", *given) == 2
    assert "header.json: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_left_out_or_stop_the_run(images, finished, tmp_path, capsys):
    broken = Path(shutil.copytree(images, tmp_path / "images"))
    (broken / "circle" / "007.jpg").write_bytes(b"no image")
    whole = (broken / "square" / "003.jpg").read_bytes()
    (broken / "square" / "003.jpg").write_bytes(whole[: len(whole) // 2])
    run = tmp_path / "run"
    args = ["--images", broken, "--vae", finished]
    assert train(run, *args, "--strict") == 2
    assert "cannot be decoded" in capsys.readouterr().err
    assert train(run, *args) == 0
    assert "latents: 2 unreadable images are left out" in capsys.readouterr().out
    skipped = json.loads((run / "latents" / "skipped.json").read_text())
    assert set(skipped) == {"circle/007.jpg", "square/003.jpg"}
    all_of_them = ["--latents", run / "latents", "--diffusion.batch-size", 400]
    assert train(tmp_path / "other", *args, *all_of_them) == 2
    said = capsys.readouterr().err
    assert "--diffusion.batch-size 400 is more than the 398 images that could be read" in said


def test_commands_that_need_a_finished_run_say_so(tmp_path, capsys):
    assert call("sample", "--run-dir", tmp_path / "nowhere") == 2
    assert "no run in" in capsys.readouterr().err
    assert call("evaluate", "--run-dir", tmp_path / "nowhere") == 2
    assert "no run in" in capsys.readouterr().err


def test_presets_are_what_help_shows(capsys):
    assert call("train", "--preset", "cifar10", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: cifar10)" in shown and "(default: 32)" in shown
    for name, preset in cfg.PRESETS.items():
        config = preset().config
        shape = (4, 4, 4) if name != "imagenet256" else (4, 32, 32)
        dit = jax.eval_shape(lambda c=config, s=shape: jax.tree.leaves(cfg.make_dit(c, s, 10)))
        assert dit


def test_the_default_is_the_published_recipe():
    preset = cfg.imagenet256()
    d = preset.config.diffusion
    assert (d.batch_size, d.learning_rate, d.weight_decay, d.warmup) == (256, 1e-4, 0.0, 0)
    assert (d.ema_decays, d.ema_warmup, d.label_dropout, d.steps) == (
        (0.9999,),
        False,
        0.1,
        400_000,
    )
    assert cfg.dit_sizes(preset.config.dit) == {
        "depth": 28,
        "width": 1152,
        "num_heads": 16,
        "patch_size": 2,
    }
    diffusion = cfg.make_diffusion(preset.config)
    assert diffusion.example_loss is not None and diffusion.timesteps == 1000
    assert (preset.sampling.solver, preset.sampling.steps) == ("ddpm", 250)


def test_images_shrink_to_means_of_blocks():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    means = images.reshape(2, 4, 2, 4, 2, 3).astype(float).mean((2, 4))
    assert np.abs(shrunk(images, 4) - means).max() <= 0.5
    assert shrunk(images, 8) is images


def test_an_autoencoder_begun_without_lpips_does_not_go_on_with_it(copied, monkeypatch, capsys):
    for name in ("metrics.json", "autoencoder.safetensors"):
        (copied / name).unlink()
    lpips = filled(lambda: LPIPS(channels=(4,) * 5, key=jax.random.key(0)))
    monkeypatch.setattr(ae, "load_lpips", lambda folder: lpips)
    assert train(copied, "--lpips", copied) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"is trained with --lpips none, given is {ae.identity(lpips)[:12]}." in said


def test_evaluate_checks_its_numbers(finished, capsys):
    assert call("evaluate", "--run-dir", finished, "--keep-every", "0") == 2
    assert "--keep-every must be" in capsys.readouterr().err
