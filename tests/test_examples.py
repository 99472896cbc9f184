"""The examples run from data to picture at small sizes, each a file that fits on a page."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
# What makes each of them small.
OPTIONS = {
    "two_moons": "--steps 20 --samples 50 --calls 4",
    "own_loss": "--steps 20",
    "mnist_ddpm": "--steps 2 --batch-size 4 --width 8 --sampling-steps 2 --columns 1 --data .",
    "mnist_latent": "--autoencoder-steps 3 --steps 2 --images 40 --data .",
    "inpaint": "--steps 2 --sampling-steps 4 --resamplings 2 --data .",
}


@pytest.fixture
def digits(tmp_path):
    """A folder with files like MNIST's, of squares: nothing is fetched."""
    images, labels = synthetic_digits(60), np.arange(60, dtype=np.uint8) % 10
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


def run(name, options, monkeypatch, folder):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    module.main()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_leaves_its_picture(name, monkeypatch, tmp_path):
    run(name, OPTIONS[name], monkeypatch, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as picture:
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
