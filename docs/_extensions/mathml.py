"""For mkdocs: the LaTeX of a page as MathML, which browsers draw without a script.

`pymdownx.arithmatex` finds `$...$` and `$$...$$` outside of code; what it found is translated here.
"""

import html
import re
from itertools import pairwise
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What arithmatex writes with `generic: true`.
_FOUND = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
_MATH = f"{{{_NAMESPACE}}}"
_OPERATORS = {_MATH + name for name in ("mo", "mspace", "munder", "munderover")}


def on_page_content(content, page, **_):
    """Translate the formulas of a rendered page."""

    def translated(match):
        try:
            return to_mathml(html.unescape(match["latex"]), block=match["tag"] == "div")
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from None

    return _FOUND.sub(translated, content)


def to_mathml(latex, *, block):
    """The element that shows a formula: a box of its own, which scrolls, or a part of a line.

    Raises `ValueError` for a command that latex2mathml does not know: it would copy it.
    """
    latex = latex.strip()
    # latex2mathml knows `aligned` only by this name, and MathJax (on GitHub) only by that one.
    source = latex.replace("{aligned}", "{align*}")
    try:
        mathml = convert(source, display="block" if block else "inline")
        root = ElementTree.fromstring(mathml)
    except Exception as error:  # its own errors have no common class
        raise ValueError(f"latex2mathml cannot read ${latex}$: {error!r}") from error
    unknown = [text for text in root.itertext() if "\\" in text]
    if unknown:
        raise ValueError(f"latex2mathml does not know {', '.join(unknown)} in ${latex}$")
    _tidy(root)
    ElementTree.register_namespace("", _NAMESPACE)
    mathml = ElementTree.tostring(root, encoding="unicode")
    return f'<div class="formula" tabindex="0">{mathml}</div>' if block else mathml


def _tidy(parent):
    """TeX's distances where MathML has others, in all of an element."""
    children = list(parent)
    for child in children:
        _tidy(child)
        # A prime is drawn raised already; as an exponent it would be raised and shrunk once more.
        if child.tag == _MATH + "msup" and child[1].text in ("\u2032", "\u2033"):
            child.tag = _MATH + "mrow"
            child[1].tag = _MATH + "mo"
            child[1].attrib.update(lspace="0", rspace="0")
        if child.tag == _MATH + "mo" and child.text == "\u2016":
            child.set("stretchy", "false")
        if child.tag == _MATH + "mo" and child.text == "/":
            child.attrib.update(lspace="0", rspace="0")
    # A thin space around the name of a function, except beside an operator or a bracket.
    for before, after in pairwise(children):
        if (_is_name(before) and after.tag not in _OPERATORS) or (
            _is_name(after) and before.tag not in _OPERATORS
        ):
            space = ElementTree.Element(_MATH + "mspace", width="0.17em")
            parent.insert(list(parent).index(after), space)


def _is_name(element):
    return element.tag == _MATH + "mi" and len((element.text or "").strip()) > 1
