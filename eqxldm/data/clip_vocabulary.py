"""The list of byte pairs that CLIP's vocabulary is made of, fetched once."""

import logging
from pathlib import Path

from .archives import Wheel
from .download import Log, Mirror, PublishedFile, cache_dir, fetch

# 1,356,917 bytes packed; MIT licence (Radford et al. 2021).
FILE = PublishedFile(
    name="bpe_simple_vocab_16e6.txt",
    md5_gz="933b7abbbbde62c36f02f0e6ccde464f",
    md5="f83f3e2479df59e7cd1597baa03f34c8",
    sha256="67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8",
)
SOURCES = (
    Wheel("open-clip-torch==3.3.0", "open_clip"),
    Mirror("https://raw.githubusercontent.com/openai/CLIP/main/clip/"),
)
_logger = logging.getLogger(__name__)


def fetch_clip_vocabulary(cache: str | Path | None = None, *, log: Log = _logger.info) -> str:
    """The text of the list: a line of comment, then a pair of symbols a line, the commonest first.

    `text.clip_tokenizer` takes what `text.byte_pairs` makes of it.

    **Arguments**: `cache` is the folder in which `clip/` keeps it, `cache_dir()` unless given;
    `log` gets a line on each source that is tried.

    **Raises** `DataError` if no source has the file.
    """
    folder = (cache_dir() if cache is None else Path(cache).expanduser()) / "clip"
    return fetch([FILE], SOURCES, folder, log)[FILE.name].decode()
