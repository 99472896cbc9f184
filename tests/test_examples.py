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
}


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
