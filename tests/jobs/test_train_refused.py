"""What the job refuses: one message, exit code 2, and nothing written."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from PIL import Image

from eqxldm import pretrained
from eqxldm.data import open_images
from eqxldm.models import LPIPS
from experiments.train import autoencoder as ae, commands, job as jobs
from experiments.train.conditions import Labels, choose_condition
from experiments.train.config import Config
from experiments.train.networks import make_denoiser
from experiments.train.options import read_options
from experiments.train.presets import preset
from experiments.train.run import RunFolder
from experiments.train.shapes import SHAPES, shapes
from experiments.train.terminal import UserError

from helpers import filled
from job_runs import (
    call,
    said,
    train,
    write_images,
)


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
    "flash": (["--attention", "flash"], "--attention flash: needs a TPU"),
    "no vae": (["--vae", "{tmp}/nowhere"], "--vae {tmp}/nowhere: "),
    "vae": (["--vae", "{images}"], "has no config.json"),
    "other vae": (["--vae", "{tmp}/dit.safetensors"], "is a DiT; needed is an AutoencoderKL"),
    "pixel vae": (["--vae", "{vae}", "--space", "pixel"], "--space pixel has no autoencoder"),
    "lpips": (["--lpips", "{tmp}"], "--lpips: LPIPS: its weights are not in"),
    "latents": (["--latents", "{tmp}/dit.safetensors"], "is a file; needed is a folder"),
    "test": (["--test-images", "{other}"], "its 2 classes are not the 4 of --images"),
    "processes": (["--process-id", 0], "need --distributed"),
    "remote": (["--run-dir", "gs://bucket/run"], "--run-dir gs:/bucket/run: a remote path"),
    "loop": (["--run-dir", "{tmp}/loop/run"], "--run-dir {tmp}/loop/run: Too many levels"),
    "backslash": (["--run-dir", "a\\b"], "a\\b: no checkpoint can be kept there: the name has"),
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
    (tmp / "loop").symlink_to("loop")
    write_images(tmp / "few", [f"{i}.png" for i in range(4)])
    small = dataclasses.replace(read_options(Config, RunFolder(finished)))
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


@pytest.mark.parametrize("changed, field", [("images", "content"), ("test", "test_content")])
def test_images_of_the_same_names_and_sizes_but_other_pixels_are_refused(changed, field, tmp_path):
    """Files without compression always have the size that they had."""
    names = [f"{k}/{i}.bmp" for k in "ab" for i in range(12)]
    folders = {name: write_images(tmp_path / name, names) for name in ("images", "test")}
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    config = preset("images", size=(16, 16), count=24).config

    def describe():
        source, test = open_images(folders["images"]), open_images(folders["test"])
        condition = choose_condition(config, source)
        job = SimpleNamespace(source=source, condition=condition, run=run, lpips=None, test=test)
        jobs.describe_data(job, folders["images"], trains=True)  # type: ignore[arg-type]

    describe()
    before = (run.path / "data.json").read_bytes()
    describe()
    content = bytearray((folders[changed] / "a" / "5.bmp").read_bytes())
    content[-1] ^= 1
    (folders[changed] / "a" / "5.bmp").write_bytes(content)
    with pytest.raises(UserError, match=f"about other images:\n  {field}: it has"):
        describe()
    assert (run.path / "data.json").read_bytes() == before


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
