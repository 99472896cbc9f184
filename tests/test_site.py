"""The site's own extensions: formulas as MathML, and pages whose code is executed."""

import importlib.util
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from pages import EXTENSIONS, run_blocks


def extension(name):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    spec = importlib.util.spec_from_file_location(name, EXTENSIONS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(text):
    markdown = pytest.importorskip("markdown")
    extensions = ["pymdownx.arithmatex", "pymdownx.superfences", "tables"]
    options = {"pymdownx.arithmatex": {"generic": True}}
    content = markdown.markdown(text, extensions=extensions, extension_configs=options)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    return extension("mathml").on_page_content(content, page)


def test_formulas_become_mathml_and_code_stays_code():
    out = rendered("So $x_t = \\alpha x_0$.\n\n$$\n\\frac{a}{b}\n$$\n\n`$a$`\n\n```\n$b$\n```\n")
    assert out.count("<math") == 2 and out.count('<div class="formula"') == 1
    assert "<mfrac>" in out and "<msub>" in out
    assert "$a$" in out and "$b$" in out
    assert "arithmatex" not in out


def test_underscores_and_stars_in_formulas_are_not_emphasis():
    out = rendered("$a_1 * b_2$ and $a_3 * b_4$")
    assert "<em>" not in out and out.count("<msub>") == 4


def test_aligned_formulas_are_tables_of_right_and_left_columns():
    out = extension("mathml").to_mathml(
        r"\begin{aligned} a &= b \\ c &= d \end{aligned}", block=True
    )
    root = ElementTree.fromstring(out)
    cells = [cell for cell in root.iter() if cell.tag.endswith("mtd")]
    assert [cell.attrib["columnalign"] for cell in cells] == ["right", "left"] * 2


def test_a_function_stands_off_its_argument_and_not_its_bracket():
    to_mathml = extension("mathml").to_mathml
    assert "mspace" in to_mathml(r"\log p", block=False)
    assert "mspace" not in to_mathml(r"\log(p)", block=False)


@pytest.mark.parametrize("latex", [r"\nosuchcommand x", r"\left( x"])
def test_a_formula_that_cannot_be_read_stops_the_build(latex):
    errors = pytest.importorskip("mkdocs.exceptions")
    with pytest.raises(errors.PluginError, match=r"page\.md: latex2mathml"):
        rendered(f"${latex}$")


def test_blocks_share_names_and_give_what_they_print_and_draw(tmp_path):
    done, results = run_blocks(
        tmp_path,
        "a = 3\nprint(a)\n",
        "import matplotlib.pyplot as plt\nplt.figure('Two').gca().plot([a, 4])\n",
    )
    assert done.returncode == 0, done.stderr
    assert results[0]["printed"] == "3\n" and results[0]["figures"] == []
    (figure,) = results[1]["figures"]
    assert figure["caption"] == "Two"
    assert "currentColor" in figure["svg"] and "#010203" not in figure["svg"]


def test_a_block_that_fails_leaves_no_result(tmp_path):
    done, results = run_blocks(tmp_path, "a = 3\n", "raise RuntimeError('no data')\n")
    assert done.returncode != 0 and results is None
    assert "page.md, block 2" in done.stderr and "no data" in done.stderr
