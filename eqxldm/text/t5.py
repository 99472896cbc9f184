"""T5's tokenizer: a unigram model over sentence pieces (Kudo 2018; Kudo & Richardson 2018)."""

from functools import partial
from pathlib import Path
from typing import Any

from .clip import encode_with, open_core
from .errors import TokenizerError, library
from .tokenizer import Tokenizer

END, PADDING = "</s>", "<pad>"
LONGEST = 512


def t5_tokenizer(path: str | Path, *, longest: int = LONGEST) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of sentencepiece's `spiece.model`.

    The two forms of one model differ in texts that hold the names of its special tokens, such as
    `</s>`: with `tokenizer.json` these are found in a text, with `spiece.model`, as in the original
    code, they are letters like any others.

    **Arguments**: `longest` is the length of a row where none is asked for; T5 has no positions of
    its own, so that longer ones are allowed.

    **Raises** `FileNotFoundError`; `TokenizerError` if the file is damaged, is no unigram model, or
    lacks the tokens of end and padding.

    >>> t5_tokenizer("spiece.model")
    Traceback (most recent call last):
    ...
    FileNotFoundError: T5's tokenizer: there is no file spiece.model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"T5's tokenizer: there is no file {path}.")
    encode, end, padding, size = (_of_json if path.suffix == ".json" else _of_pieces)(path)
    for token, found in ((END, end), (PADDING, padding)):
        if found is None:
            raise TokenizerError(
                f"{path} has no token {token}: it is another model's. T5 and umT5 have it."
            )
    return Tokenizer(encode, begin=None, end=end, padding=padding, vocabulary=size, longest=longest)


def _of_json(path: Path) -> tuple[Any, Any, Any, int]:
    core = open_core(path, "Unigram", "T5 and umT5 have")
    ids = core.token_to_id(END), core.token_to_id(PADDING)
    return partial(encode_with, core), *ids, core.get_vocab_size()


def _of_pieces(path: Path) -> tuple[Any, Any, Any, int]:
    lib = library("sentencepiece")
    try:
        core = lib.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path} is damaged or no sentencepiece model: {error}") from error
    named = lambda token: None if (i := core.piece_to_id(token)) == core.unk_id() else i
    return partial(_encode_pieces, core), named(END), named(PADDING), core.get_piece_size()


def _encode_pieces(core: Any, text: str) -> tuple[list[int], list[int]]:
    found = core.encode(text, return_type="offset_mapping")
    return found["ids"], [start for start, _ in found["offsets"]]
