"""Text to train on: a sample of Wikipedia that ships in a package, and the rule of text8."""

import bz2
import html
import logging
import re
from pathlib import Path

from ..durable import read_file
from .archives import Wheel
from .download import Log, PublishedFile, cache_dir, fetch
from .errors import DataError

_logger = logging.getLogger(__name__)
WIKIPEDIA = PublishedFile(
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "",
    "55899abfb7caa0e50d2665787fa4afca",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
SOURCES = (Wheel("gensim==4.4.0", "gensim/test/test_data"),)
DIGITS = "zero one two three four five six seven eight nine".split()
# What wiki markup is dropped, and what of it stays; in this order.
RULES = (
    (r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", " "),
    (r"<[^>]*>", " "),
    *[(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", " ")] * 4,  # templates and tables, nested ones too
    (r"\[\[[a-z\-]{2,12}:[^\]]*\]\]", " "),  # links to other languages
    (r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", " "),
    (r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1"),  # of a link what is shown
    (r"\[?https?:[^\s\]]*", " "),
)


def text8_rule(text: str) -> str:
    """Small letters a-z and single blanks, digits spelled out: the rule of text8 (Mahoney 2006).

    >>> text8_rule("In 1905, Einstein's")
    'in one nine zero five einstein s'
    """
    text = re.sub(r"\d", lambda found: f" {DIGITS[int(found[0])]} ", text.lower(), flags=re.ASCII)
    return re.sub("[^a-z]+", " ", text).strip()


def without_markup(text: str) -> str:
    """An article's text of its wiki markup: no templates, tables, references or pictures.

    >>> without_markup("A [[tree|green tree]]{{cite}}.")
    'A green tree .'
    """
    text = html.unescape(html.unescape(text))
    for pattern, kept in RULES:
        text = re.sub(pattern, kept, text, flags=re.DOTALL)
    return text


def open_wikipedia(*, cache: str | Path | None = None, log: Log = _logger.info) -> str:
    """2.9 million characters of English Wikipedia, by `text8_rule`: 27 different ones.

    The sample of articles that the tests of `gensim` read (CC BY-SA), after the recipe of text8:
    it is thirty times shorter than text8, and figures for the two do not compare. It is kept in
    `cache`, by default `cache_dir()`, with its checksum.

    **Raises** `DataError` if it cannot be had, with the reason.
    """
    folder = (cache_dir() if cache is None else Path(cache).expanduser()) / "wikipedia"
    packed = fetch((WIKIPEDIA,), SOURCES, folder, log)[WIKIPEDIA.name]
    xml = bz2.decompress(packed).decode()
    articles = re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL)
    texts = [a for a in articles if not a.lstrip().lower().startswith("#redirect")]
    return " ".join(text8_rule(without_markup(text)) for text in texts)


def read_text(path: str | Path) -> str:
    """A file's text, UTF-8.

    **Raises** `DataError` for a file that cannot be read or is no text.
    """
    try:
        return read_file(Path(path).expanduser()).decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text in UTF-8 (byte {error.start}).") from error
