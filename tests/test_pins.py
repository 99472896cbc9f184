"""The pins: what pyproject.toml asks for is there, every file has its hash, and pip compares it."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = sorted((ROOT / "constraints").glob("python*.txt"))
TOOL = ROOT / "constraints" / "pins.py"


def pins(*args):
    done = subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def project(requirement):
    return re.split(r"[=<>~!\s\[;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_every_requirement_is_pinned_with_hashes(path):
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sets = {"runtime": asked["project"]["dependencies"], "build": asked["build-system"]["requires"]}
    extras = asked["project"]["optional-dependencies"]
    sets |= extras
    for kind, requirements in sets.items():
        blocks = re.findall(r"^\S.*(?:\n .*)*", pins("select", path, kind), re.MULTILINE)
        assert {project(r) for r in requirements} <= {project(block) for block in blocks}, kind
        for block in blocks:
            assert re.match(r"[a-z0-9.-]+==\S+", block), block
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    every = pins("versions", path)
    assert "--hash" not in every
    missing = {project(r) for rs in extras.values() for r in rs}
    assert not missing - {project(line) for line in every.splitlines()}


def test_pip_takes_one_of_several_hashes_and_refuses_another_file(tmp_path):
    """As where one index has a wheel and another one built elsewhere."""
    info = "tiny-1.dist-info"
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    right, wrong = hashlib.sha256(wheel.read_bytes()).hexdigest(), "0" * 64
    block = "tiny==1 \\\n{}    # runtime\n"
    line = "    --hash=sha256:{}"
    for hashes, code in (([wrong, right], 0), ([wrong], 1)):
        lines = " \\\n".join(line.format(h) for h in hashes) + "\n"
        (tmp_path / "pins.txt").write_text(block.format(lines))
        (tmp_path / "chosen.txt").write_text(pins("select", tmp_path / "pins.txt", "runtime"))
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--isolated",
            "install",
            "--require-hashes",
            "--no-deps",
        ]
        pip += ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "target")]
        pip += ["--upgrade", "-r", str(tmp_path / "chosen.txt")]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "DO NOT MATCH THE HASHES" in done.stderr
