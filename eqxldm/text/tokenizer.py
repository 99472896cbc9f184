"""From prompts to rows of ids: begin, text, end, padding. What is cut off is handed back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# A text to its ids, without those of begin and end, and the character where each begins.
Encode = Callable[[str], tuple[list[int], list[int]]]


class Tokens(NamedTuple):
    """Prompts as ids, one row each.

    `mask` is false on padding. `cut` has, for each prompt, the end of it that found no room, as it
    was written; "" where all of it did.
    """

    ids: Int[np.ndarray, "b n"]
    mask: Bool[np.ndarray, "b n"]
    cut: tuple[str, ...]


@dataclass(frozen=True)
class Tokenizer:
    """`tokenizer(prompts, length)`: a row of `length` ids for each prompt.

    A row is `[begin] + text + [end] + [padding ...]`. A text that is too long loses its last
    tokens, never the end.

    **Arguments**:

    - `encode`: a text to ids, and the character where each begins.
    - `begin`, `end`, `padding`: ids; `begin` may be None. Some models are padded with their end
      token, some with another one, and as padding is attended to in many, it matters which.
    - `vocabulary`: the number of ids; all are below it.
    - `longest`: the length of a row where none is asked for; `fixed` if none may be longer, as for
      encoders with learned positions.

    In the call, `length` is the number of ids in a row; None is `longest`.

    **Raises** `ValueError` for a single string, for no prompts, for what is no valid text, and for
    a `length` that has no room for any text or that is above `longest` where that is fixed.

    >>> letters = lambda text: ([ord(c) for c in text], list(range(len(text))))
    >>> tokenizer = Tokenizer(letters, begin=1, end=2, padding=0, vocabulary=128, longest=5)
    >>> tokens = tokenizer(["cat", "", "cattle"])
    >>> tokens.ids.tolist()
    [[1, 99, 97, 116, 2], [1, 2, 0, 0, 0], [1, 99, 97, 116, 2]]
    >>> tokens.mask.sum(1).tolist(), tokens.cut
    ([5, 2, 5], ('', '', 'tle'))
    """

    encode: Encode
    begin: int | None
    end: int
    padding: int
    vocabulary: int
    longest: int
    fixed: bool = False

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tokens:
        _check_prompts(prompts)
        length = self.longest if length is None else length
        begin = [] if self.begin is None else [self.begin]
        room = length - len(begin) - 1
        if room < 1 or (self.fixed and length > self.longest):
            upper = f" and at most {self.longest}" if self.fixed else ""
            raise ValueError(
                f"Tokenizer: length must be at least {len(begin) + 2}{upper}, got {length}."
            )
        ids = np.full((len(prompts), length), self.padding, np.int32)
        mask, cut = np.zeros((len(prompts), length), bool), []
        for i, prompt in enumerate(prompts):
            text, starts = self.encode(prompt)
            row = [*begin, *text[:room], self.end]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
            cut.append(prompt[starts[room] :] if len(text) > room else "")
        return Tokens(ids, mask, tuple(cut))


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError("Tokenizer: needs a list of prompts; for a single one, [prompt].")
    if not prompts:
        raise ValueError("Tokenizer: needs at least one prompt; an empty one is [''].")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Tokenizer: prompt {i} must be a string, got {prompt!r}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Tokenizer: prompt {i} is no valid text: {prompt[error.start]!a} at "
                f"character {error.start} is half of a pair, or a byte that was not UTF-8."
            ) from error
