"""The examples run from data to picture at small sizes, each a file that fits on a page."""

import ast
import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
# What makes each of them small.
OPTIONS = {
    "two_moons": "--steps 20 --samples 50 --calls 4",
    "own_loss": "--steps 20",
    "one_call": "--steps 4 --samples 50",
    "mnist_ddpm": "--steps 2 --batch-size 4 --width 8 --sampling-steps 2 --columns 1 --data .",
    "mnist_latent": "--autoencoder-steps 1 --steps 2 --channels 8 --width 16 --images 40 --data .",
    "mnist_tokens": "--steps 2 --batch-size 2 --width 8 --depth 1 --calls 2 --columns 1 --data .",
    "inpaint": "--steps 2 --sampling-steps 4 --resamplings 2 --data .",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with files in MNIST's format, of noise: nothing is fetched."""
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (60, 28, 28), np.uint8)
        for name, array in (("images", images), ("labels", np.arange(60, dtype=np.uint8) % 10)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path = tmp_path / f"{prefix}-{name}-idx{array.ndim}-ubyte"
            path.write_bytes(head + array.tobytes())
    return tmp_path


def run(name, options, monkeypatch, folder):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    module.main()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_leaves_its_picture(name, monkeypatch, folder):
    run(name, OPTIONS[name], monkeypatch, folder)
    with Image.open(folder / f"{name}.png") as picture:
        low, high = picture.convert("L").getextrema()
    assert low < high  # not one colour


def test_every_example_is_run_and_fits_on_a_page():
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert files.keys() == OPTIONS.keys()
    for path in files.values():
        assert len(path.read_text().splitlines()) <= 200
        modules = {
            node.module.split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert "experiments" not in modules  # the library alone, no framework
