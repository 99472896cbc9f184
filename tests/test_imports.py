"""The import rules of the library, read from its source."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
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
    "time_shift": {"times"},
    "diffusion": {"paths", "predictions"},
    "loss_weights": {"paths", "predictions"},
    "guidance": {"paths", "predictions"},
    "checks": {"predictions"},
    "flow_maps": {"times", "paths", "predictions", "diffusion"},
    "gaussian_mixture": {"paths", "predictions"},
    "solvers": {"paths", "predictions", "diffusion"},
    "joint": set(),
    "sampling": {"times", "paths", "predictions", "diffusion", "solvers"},
    "likelihood": {"times", "paths", "predictions", "diffusion", "solvers", "sampling"},
    "discrete": {"discrete", "times", "objectives", "sharding"},
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
    "nn": {"nn", "sharding"},
    "models": {"nn", "models"},
    "pretrained": {"nn", "models", "pretrained", "durable"},
}
APART = {"audio": {"audio"}, "metrics": {"metrics"}, "text": {"text", "durable"}}
OPTIONAL = {
    "PIL", "av", "datasets", "diffusers", "gradio", "grain", "huggingface_hub", "lpips",
    "matplotlib",
    "orbax", "pandas", "safetensors", "sentencepiece", "sklearn", "tensorboard", "tensorboardX",
    "tensorstore", "tokenizers", "torch", "torchvision", "tqdm", "transformers", "wandb",
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
    assert own(ROOT / "models" / "tiling.py") == {"models"}
    assert own(ROOT / "nn" / "stack.py") == {"nn", "sharding"}
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


# What `import eqxldm` leaves alone: what only some programs need, and what takes long.
SLOW = OPTIONAL | {
    "absl", "array_record", "etils", "fsspec", "optax", "pyarrow", "rich", "scipy", "tensorstore",
    "tyro",
}  # fmt: skip
LATER = set(eqxldm._LAZY)


def printed_by(code, *before):
    """What `code` prints in a fresh interpreter which has imported `before`."""
    lines = ["import sys", *(f"import {name}" for name in before), "old = set(sys.modules)", code]
    run = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT.parent, check=True)
    return done.stdout


def loaded_after(code, *before):
    """The modules that it loads."""
    return set(printed_by(f"{code}\nprint(*(set(sys.modules) - old))", *before).split())


def test_importing_the_library_imports_nothing_slow():
    """What jax and equinox need is loaded already, also where that is on the list."""
    loaded = loaded_after("import eqxldm", "jax", "jax.numpy", "equinox")
    assert {"eqxldm", "eqxldm.sampling"} <= loaded
    assert not {name.split(".")[0] for name in loaded} & SLOW
    assert not {name.split(".")[1] for name in loaded if name.startswith("eqxldm.")} & LATER


def test_a_package_is_imported_when_it_is_named():
    """Each from the same start: children of one interpreter."""
    code = f"""
import os
for name in {sorted(LATER)}:
    assert name in dir(eqxldm)
    if os.fork() == 0:
        assert getattr(eqxldm, name).__name__ == f"eqxldm.{{name}}"
        loaded = set(sys.modules) - old
        assert f"eqxldm.{{name}}" in loaded
        print(name, *{{m.split(".")[0] for m in loaded}}, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
os._exit(0)
"""
    children = printed_by("import eqxldm\n" + code, "eqxldm").splitlines()
    assert [line.split()[0] for line in children] == sorted(LATER)
    for line in children:
        assert not set(line.split()[1:]) & {"matplotlib", "pyarrow", "torch"}, line


def test_every_module_is_an_attribute_of_its_package():
    for path in SOURCES:
        module = path.parent if path.name == "__init__.py" else path.with_suffix("")
        names = module.relative_to(ROOT).parts
        if len(names) == 1 and not names[0].startswith("_"):
            assert getattr(eqxldm, names[0]).__name__ == f"eqxldm.{names[0]}"


def test_a_name_that_the_library_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'dataa'"):
        _ = eqxldm.dataa


def test_the_version_is_that_of_the_project():
    assert eqxldm.__version__ == PROJECT["version"]


PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
# torch reads old checkpoints of others; who has such a file has it. diffusers is what the server is
# compared with, by the Python that has it for the parity tests.
UNDECLARED = {"torch", "diffusers"}
BY_JAX = {"flatbuffers"}  # jax.export imports it to write and read, and does not ask for it


def third_party(path):
    """The top-level modules that a file imports anywhere, but for the standard library and ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        tops = {name.split(".")[0] for name in names}
        yield from tops - {"eqxldm", "experiments", *sys.stdlib_module_names}


def test_what_is_imported_is_declared():
    plain = lambda name: re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()
    extras = PROJECT["optional-dependencies"]
    for_users = [extras[name] for name in extras if name not in ("dev", "docs")]
    declared = {plain(name) for names in (PROJECT["dependencies"], *for_users) for name in names}
    sources = [*SOURCES, *(ROOT.parent / "experiments").rglob("*.py")]
    names = {name for path in sources for name in third_party(path)}
    assert {"jax", "scipy", "PIL", "torch"} <= names
    packages = packages_distributions()
    of = lambda name: {plain(package) for package in packages.get(name, [name])}
    assert {name for name in names if not of(name) & declared} == UNDECLARED
    imported = set().union(*map(of, names))
    assert {plain(name) for name in PROJECT["dependencies"]} <= imported | BY_JAX


def test_public_names_exist_and_have_docstrings():
    public = [name for name in vars(eqxldm) if not name.startswith("_")]
    exported = [vars(eqxldm)[name] for name in public]
    functions = [f for f in exported if getattr(f, "__module__", "").startswith("eqxldm.")]
    assert len(functions) > 30
    assert all(f.__doc__ for f in functions if isinstance(f, type) or hasattr(f, "__code__"))


def test_importing_the_data_imports_nothing_optional():
    """Grain takes longer than all the rest, so that what reads no batch does not wait for it."""
    code = "import sys, eqxldm.data; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert not set(done.stdout.split()) & (OPTIONAL | {"pyarrow", "array_record"})
    for name in eqxldm.data._LAZY:
        assert name in dir(eqxldm.data) and getattr(eqxldm.data, name).__name__ == name


def test_the_versions_that_a_run_records_are_of_declared_packages():
    """One that is not declared need not be installed, and a run would end when it asks."""
    from experiments.train.run import PACKAGES

    text = (ROOT.parent / "pyproject.toml").read_text()
    needed = tomllib.loads(text)["project"]["dependencies"]
    declared = {re.split(r"[<>=!~;\[ ]", line)[0] for line in needed} | {"jaxlib"}  # jax's own
    assert set(PACKAGES) <= declared
