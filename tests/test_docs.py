"""Every public name is documented, and what the documentation names exists."""

import re
from pathlib import Path

import pytest

import eqxldm

ROOT = Path(__file__).parent.parent
TYPES = ("Prediction",)  # a docstring cannot be attached to these
PUBLIC = [name for name in dir(eqxldm) if not name.startswith("_") and name not in TYPES]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    assert (getattr(eqxldm, name).__doc__ or "").strip()


def test_derivations_name_functions_and_tests_that_exist():
    page = (ROOT / "docs" / "derivations.md").read_text()
    functions = set(re.findall(r"`eqxldm\.(\w+)`", page))
    assert len(functions) > 25
    assert [name for name in functions if name not in dir(eqxldm)] == []
    tests = set(re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", page))
    assert len(tests) > 20
    for file, test in tests:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_picture_says_where_it_is_from_and_its_licence():
    folder = ROOT / "docs" / "images"
    said = re.findall(r"^(\S+\.png) .*", (folder / "LICENSES.txt").read_text(), re.MULTILINE)
    assert sorted(said) == sorted(p.name for p in folder.iterdir() if p.suffix != ".txt")


def test_every_reliability_promise_names_a_test_that_exists():
    table = (ROOT / "docs" / "reliability.md").read_text().split("## How")[0]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    rows = [line for line in table.splitlines() if line.startswith("| ") and "test |" not in line]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names or "tests/soak.py" in row or "test_durable.py" in row, row
        assert [name for name in names if f"def {name}(" not in tests] == [], row


def test_every_module_has_an_api_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for path in sorted((ROOT / "eqxldm").rglob("[!_]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f"::: {module}\n" in pages, module
