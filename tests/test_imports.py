"""The import rules of the library, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eqxldm

ROOT = Path(eqxldm.__file__).parent
# What a module may import of the library, besides what those may.
DIFFUSION = {
    "betas": set(),
    "paths": {"betas"},
    "predictions": {"paths"},
    "times": {"betas", "paths"},
    "diffusion": {"paths", "predictions"},
    "loss_weights": {"paths", "predictions"},
    "guidance": {"paths", "predictions"},
    "checks": {"predictions"},
    "gaussian_mixture": {"paths", "predictions"},
    "solvers": {"paths", "predictions", "diffusion"},
    "sampling": {"times", "paths", "predictions", "diffusion", "solvers"},
    "likelihood": {"times", "paths", "predictions", "diffusion", "solvers", "sampling"},
    "objectives": {
        "objectives",
        "times",
        "paths",
        "predictions",
        "diffusion",
        "loss_weights",
        "solvers",
        "likelihood",
    },
}
LAYERS = {
    "nn": {"nn"},
    "models": {"nn", "models"},
    "pretrained": {"nn", "models", "pretrained", "durable"},
}
APART = {"metrics": {"metrics"}}
OPTIONAL = {
    "PIL", "datasets", "diffusers", "gradio", "grain", "huggingface_hub", "lpips", "matplotlib",
    "orbax", "pandas", "safetensors", "sklearn", "tensorboard", "tensorboardX", "tensorstore",
    "torch", "torchvision", "tqdm", "transformers", "wandb",
}  # fmt: skip


def imports(path):
    """`(top-level module, at import time?)` of every import; the library's own are relative."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        now = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), now
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if not node.level:
                yield module, now
                continue
            base = ("eqxldm", *package[: len(package) - node.level + 1])
            for alias in node.names:  # `from . import nn` names modules, `from .nn import x` not
                yield (*base, *(module or (alias.name,))), now


def own(path):
    return {name[1] for name, _ in imports(path) if name[0] == "eqxldm" and len(name) > 1}


SOURCES = sorted(ROOT.rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_reader_sees_imports(tmp_path):
    assert own(ROOT / "sampling.py") == DIFFUSION["sampling"]
    assert own(ROOT / "models" / "dit.py") == {"nn"}
    assert "nn" in own(ROOT / "__init__.py")


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_code_imports_one_way(name):
    module = ROOT / f"{name}.py"
    for path in [module] if module.exists() else (ROOT / name).glob("*.py"):
        assert own(path) <= DIFFUSION[name] | {name}, path.name


@pytest.mark.parametrize("name", LAYERS | APART)
def test_networks_and_metrics_know_nothing_of_diffusion(name):
    for path in (ROOT / name).rglob("*.py"):
        assert own(path) <= (LAYERS | APART)[name], path.name


@each_source
def test_modules_import_their_package_relatively_and_nothing_above(path):
    text_imports = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
    ]
    for node in text_imports:
        assert node.level or not (node.module or "").startswith("eqxldm")
    names = {name[0] for name, _ in imports(path)}
    assert not names & {"experiments", "tests", "benchmarks", "argparse"}


@each_source
def test_optional_dependencies_are_imported_where_used(path):
    at_import = {name[0] for name, now in imports(path) if now and name}
    allowed = {"grain", "tensorstore"} if path.parts[-2] in ("data", "checkpoints") else set()
    assert not at_import & (OPTIONAL - allowed)


def test_importing_the_library_imports_nothing_optional():
    code = "import sys, eqxldm; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert not set(done.stdout.split()) & OPTIONAL


def test_public_names_exist_and_have_docstrings():
    public = [name for name in vars(eqxldm) if not name.startswith("_")]
    exported = [vars(eqxldm)[name] for name in public]
    functions = [f for f in exported if getattr(f, "__module__", "").startswith("eqxldm.")]
    assert len(functions) > 30
    assert all(f.__doc__ for f in functions if isinstance(f, type) or hasattr(f, "__code__"))
