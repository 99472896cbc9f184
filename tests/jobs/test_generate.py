"""`make generate`: pictures that can be repeated, and one message for whatever is wrong."""

import json
import os
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eqxldm.pretrained.files import write_safetensors
from experiments.generate import memory
from experiments.generate.__main__ import main
from experiments.generate.pictures import KEY, next_path, read_settings
from experiments.train.terminal import run_main

from tiny_pipelines import write_dit, write_stable_diffusion


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_stable_diffusion(path / "sd")
    write_stable_diffusion(path / "inpaint", in_channels=9)
    write_dit(path / "dit")
    return path


def made(models, out, *options, model="sd", prompt="a fox"):
    given = ["--model", str(models / model), "--steps", "3", "--out", str(out), *options]
    given += [] if prompt is None else ["--prompt", prompt]
    main(given)
    return pixels(out)


def pixels(path):
    return np.asarray(Image.open(path))


def picture(path, size=(8, 8), mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (*size, 3) if mode == "RGB" else size
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return path


def test_a_picture_says_how_it_was_made_and_is_made_again_bit_for_bit(models, tmp_path, capsys):
    init = picture(tmp_path / "init.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--init", str(init), "--mask", str(tmp_path / "mask.png"), "--strength", "0.7"]
    options += ["--n", "2", "--negative", "blue", "--guidance", "4", "--solver", "unipc"]
    main([
        "--model", str(models / "sd"), "--prompt", 'a "red" fox', "--steps", "3", "--seed", "7",
        "--out", str(tmp_path / "a.png"), "--preview", *options,
    ])  # fmt: skip
    shown = capsys.readouterr().out
    for told in ("text_encoder", "UNet2DConditionModel", "parameters", "memory there", "drawing"):
        assert told in shown
    settings = read_settings(tmp_path / "a-1.png")
    assert settings["prompt"] == 'a "red" fox' and settings["index"] == 1
    assert not list(tmp_path.glob("*preview*"))
    main(["--repeat", str(tmp_path / "a-1.png"), "--out", str(tmp_path / "b.png")])
    for i in range(2):
        again = pixels(tmp_path / f"b-{i}.png")
        np.testing.assert_array_equal(again, pixels(tmp_path / f"a-{i}.png"))
    # What is given again counts.
    main(["--repeat", str(tmp_path / "a-1.png"), "--out", str(tmp_path / "c.png"), "--seed", "8"])
    assert np.any(pixels(tmp_path / "c-0.png") != again)
    picture(tmp_path / "init.png", size=(8, 4))
    assert failed(["--repeat", str(tmp_path / "a-1.png")], capsys).startswith("error: INIT")


def test_pictures_of_a_seed_do_not_depend_on_their_number(models, tmp_path):
    one = made(models, tmp_path / "a.png")
    main([
        "--model", str(models / "sd"), "--prompt", "a fox", "--steps", "3", "--n", "2",
        "--out", str(tmp_path / "b.png"),
    ])  # fmt: skip
    np.testing.assert_allclose(one.astype(int), pixels(tmp_path / "b-0.png"), atol=1)
    assert np.any(one != pixels(tmp_path / "b-1.png"))


def test_inpainting_with_nine_channels_and_classes_by_name(models, tmp_path):
    init, mask = picture(tmp_path / "i.png"), picture(tmp_path / "m.png", mode="L")
    made(models, tmp_path / "a.png", "--init", str(init), "--mask", str(mask), model="inpaint")
    options: dict[str, Any] = dict(model="dit", prompt=None)
    named = made(models, tmp_path / "b.png", "--label", "goldfish", **options)
    np.testing.assert_array_equal(
        named, made(models, tmp_path / "c.png", "--label", "1", **options)
    )


def write_lora(path, layer="lora_unet_mid_block_attentions_0_proj_out", shape=(8, 8)):
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    tensors = {f"{layer}.{name}": value.astype(np.float32) for name, value in tensors.items()}
    write_safetensors(path, tensors, {})
    return path


def test_a_lora_is_merged_and_weights_are_small(models, tmp_path, capsys):
    plain = made(models, tmp_path / "a.png").astype(int)
    lora = str(write_lora(tmp_path / "lora.safetensors"))
    options = "--lora", lora, "--lora-scale", "10", "--quantize", "int8"
    merged = made(models, tmp_path / "b.png", *options)
    shown = capsys.readouterr().out
    assert np.any(plain != merged) and "scale 10" in shown
    assert "denoiser in int8: 0.1 MiB before, 0.0 MiB now" in shown
    main(["--repeat", str(tmp_path / "b.png"), "--out", str(tmp_path / "d.png")])
    np.testing.assert_array_equal(pixels(tmp_path / "d.png"), merged)
    other = write_lora(tmp_path / "o.safetensors", "lora_te2_text_model_encoder_layers_0_mlp_fc1")
    wrong = write_lora(tmp_path / "w.safetensors", "lora_unet_mid_block_odd")
    start = ["--model", str(models / "sd"), "--prompt", "x"]
    for options, message in (
        (["--lora", "/no.safetensors"], "no file /no.safetensors"),
        (["--lora", str(tmp_path / "a.png")], "not a safetensors file"),
        (["--lora", str(other)], "is for another model: it has layers of text_encoder_2"),
        (["--lora", str(wrong)], "no such layer: mid_block_odd"),
        (["--lora-scale", "2"], "LORA_SCALE needs LORA"),
        (["--clip-skip", "2"], "has 1 layers only"),
    ):
        assert message in failed([*start, *options], capsys), options
    write_lora(tmp_path / "lora.safetensors", shape=(8, 9))
    assert "LORA" in failed(["--repeat", str(tmp_path / "b.png")], capsys)


def failed(args, capsys):
    capsys.readouterr()
    assert run_main(lambda: main(args)) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and "Traceback" not in shown
    return shown


BAD = {
    "which model": (["--prompt", "x"], None),
    "there is no such folder": (["--model", "/no/such", "--prompt", "x"], None),
    "the prompt is empty": (["--prompt", " "], "sd"),
    "has 10000 words": (["--prompt", "word " * 10_000], "sd"),
    "The nearest is 12 x 8": (["--prompt", "x", "--size", "13", "8"], "sd"),
    "must lie in (0, 1], got 0.0": (["--prompt", "x", "--strength", "0"], "sd"),
    "must lie in (0, 1], got 1.5": (["--prompt", "x", "--strength", "1.5"], "sd"),
    "leaves none of 3 steps": (
        ["--prompt", "x", "--init", "{i}", "--strength", "0.2", "--steps", "3"],
        "sd",
    ),
    "STRENGTH needs INIT": (["--prompt", "x", "--strength", "0.5"], "sd"),
    "MASK needs INIT": (["--prompt", "x", "--mask", "{i}"], "sd"),
    "the mask": (["--prompt", "x", "--init", "{i}", "--mask", "{w}", "--steps", "3"], "sd"),
    "there is no picture": (["--prompt", "x", "--init", "/no.png"], "sd"),
    "no picture that can be read": (["--prompt", "x", "--init", "{t}"], "sd"),
    "holds no settings": (["--repeat", "{i}"], None),
    "LABEL is for models of classes": (["--prompt", "x", "--label", "1"], "sd"),
    "draws classes": ([], "dit"),
    "takes no PROMPT": (["--label", "1", "--prompt", "x"], "dit"),
    "LABEL=3: need 0 .. 2": (["--label", "3"], "dit"),
    "network for inpainting": (["--prompt", "x", "--steps", "3"], "inpaint"),
    "would visit timestep": (["--prompt", "x", "--steps", "1000"], "sd"),
    "SKIP_LAYERS is for": (["--prompt", "x", "--steps", "3", "--skip-layers", "1"], "sd"),
    "written as PNG": (["--prompt", "x", "--steps", "3", "--out", "a.jpg"], "sd"),
    "d.png: is a folder": (["--prompt", "x", "--out", "{d}"], "sd"),
    "is no folder": (["--prompt", "x", "--out", "{t}/a.png"], "sd"),
    "File name too long": (["--prompt", "x", "--out", "{d}/" + "x" * 250 + ".png"], "sd"),
    "none of JPEG, PNG": (["--prompt", "x", "--init", "{e}"], "sd"),
    "is a pipe, a socket": (["--prompt", "x", "--init", "{p}", "--steps", "3"], "sd"),
    "a pipe, a socket": (["--repeat", "{p}"], None),
    "its pixels are floats": (["--prompt", "x", "--init", "{f}", "--steps", "3"], "sd"),
    "--size must lie in": (["--prompt", "x", "--size", "800000000", "8"], "sd"),
    "drawing 10000 pictures at once needs": (
        ["--prompt", "x", "--size", "16384", "16384", "--n", "10000"],
        "sd",
    ),
    "MESH=tensor=3": (["--prompt", "x", "--mesh", "tensor=3"], "sd"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_message(message, models, tmp_path, capsys):
    args, model = BAD[message]
    text = tmp_path / "text.png"
    text.write_text("no picture")
    files = dict(i=picture(tmp_path / "i.png"), w=picture(tmp_path / "w.png", (8, 4)), t=text)
    files |= {name: tmp_path / f"{name}.png" for name in "depf"}
    files["d"].mkdir()
    files["e"].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(files["p"])
    Image.fromarray(np.ones((8, 8), np.float32)).save(files["f"], "TIFF")
    args = [a.format(**files) if a.startswith("{") else a for a in args]
    args += [] if model is None else ["--model", str(models / model)]
    before = sorted(tmp_path.rglob("*"))
    assert message in failed(args, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_memory_is_refused_before_it_is_run(models, capsys, monkeypatch):
    args = ["--model", str(models / "sd"), "--prompt", "x", "--steps", "3", "--n", "4"]
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    assert "loading text_encoder needs" in failed(args, capsys)
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    monkeypatch.setattr("experiments.generate.run.step_bytes", lambda *_: 4 * 10**6)
    monkeypatch.setattr("experiments.generate.run.available", lambda: 10**6)
    assert "drawing 4 pictures at once needs" in (shown := failed(args, capsys))
    assert "Take N=1" in shown


def test_settings_that_were_tampered_with(models, tmp_path, capsys):
    from PIL import PngImagePlugin

    sound = {"model": str(models / "sd"), "prompt": "x", "steps": 3}
    for value in (
        {"wobble": 1}, {"steps": "many"}, {"model": 3}, [1], {"size": [8, "8"]}, {"seed": -1},
        sound | {"files": 5}, sound | {"files": {"steps": "x", "init": 3}, "init": "/no.png"},
        {"guidance": float("nan")}, {"mesh": 5},
    ):  # fmt: skip
        info = PngImagePlugin.PngInfo()
        info.add_itxt(KEY, json.dumps(value))
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
        failed(["--repeat", str(tmp_path / "a.png")], capsys)


def test_the_next_number(tmp_path):
    assert next_path(tmp_path).name == "0000.png"
    for name in ("0000.png", "0004-1.png", "note.txt"):
        (tmp_path / name).write_text("")
    assert next_path(tmp_path).name == "0005.png"
