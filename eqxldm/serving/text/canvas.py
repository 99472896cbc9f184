"""The window of one text: what is known of it, and [MASK] where the network is to write."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..requests import RequestError
from .generator import TextGenerator
from .requests import TextRequest


@dataclass(frozen=True, eq=False)
class Canvas:
    """The tokens `(n,)` to begin with; the answer is what comes to stand in `begin .. end - 1`.

    >>> canvas = Canvas(np.array([0, 1, 2, 2]), 2, 4, mask_id=2)
    >>> letters = lambda ids: "".join("ab_"[i] for i in ids)
    >>> canvas.shown(np.array([0, 1, 2, 0]), letters), canvas.first(np.array([0, 1, 0, 2]), letters)
    ('_a', 'a')
    """

    tokens: np.ndarray
    begin: int
    end: int
    mask_id: int

    @property
    def blanks(self) -> int:
        """How many tokens are to be written."""
        return int((self.tokens == self.mask_id).sum())

    def shown(self, tokens: np.ndarray, decode: Callable[[Any], str]) -> str:
        """The answer as it stands."""
        return self._text(tokens, self.end, decode)

    def first(self, tokens: np.ndarray, decode: Callable[[Any], str]) -> str:
        """The answer up to what is not written yet. It stays as it is: a character of several
        tokens is left out until it is whole."""
        masked = np.flatnonzero(tokens[self.begin : self.end] == self.mask_id)
        if not len(masked):
            return self.shown(tokens, decode)
        return self._text(tokens, self.begin + int(masked[0]), decode).rstrip("\ufffd")

    def _text(self, tokens, end, decode):
        # A tokenizer may read the beginning of a text in another way than the middle.
        whole, head = decode(tokens[:end]), decode(tokens[: self.begin])
        if whole.startswith(head):
            return whole[len(head) :]
        return decode(tokens[self.begin : end])


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """A text up to the first of the stops in it, and whether there was one.

    >>> cut("one. two", (".", "two"))
    ('one', True)
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def lay_out(request: TextRequest, prompt: str, generator: TextGenerator) -> Canvas:
    """The window of one prompt of a request.

    **Raises** `RequestError` where nothing is left to write, or the window is too short.
    """
    try:
        suffix = generator.encode(request.suffix)
        parts = prompt.split("_") if request.infill else [prompt]
        pieces = [generator.encode(part) for part in parts]
    except ValueError as error:
        raise RequestError(400, str(error), "prompt") from error
    blank = np.full(1, generator.mask_id, np.int32)
    ids = np.concatenate([p for piece in pieces for p in (piece, blank)][:-1])
    known, longest = len(ids) + len(suffix), generator.length
    if known > longest:
        raise RequestError(
            400, f"prompt has {known} tokens, longer than the context of {longest}. Shorten it.",
            "prompt",
        )  # fmt: skip
    given = request.max_tokens
    more = (0 if request.infill else longest - known) if given is None else given
    if known + more > longest:
        raise RequestError(
            400,
            f"max_tokens {more}: the context has {longest} tokens, and the prompt takes {known} of "
            "them.",
            "max_tokens",
        )
    tokens = np.concatenate([ids, np.full(more, generator.mask_id), suffix]).astype(np.int32)
    if max(tokens, default=0) >= generator.vocabulary:
        raise RequestError(
            400,
            f"prompt has token {tokens.max()}, and the network knows {generator.vocabulary}.",
            "prompt",
        )
    if not (tokens == generator.mask_id).any():
        where = "mark blanks with _" if request.infill else "shorten it"
        raise RequestError(400, f"prompt leaves nothing to write: {where}.", "prompt")
    begin = 0 if request.infill else len(ids)
    return Canvas(tokens, begin, len(ids) + more, generator.mask_id)
