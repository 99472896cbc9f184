"""Captions as tokens of CLIP's vocabulary."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from eqxldm.data import DataError, ImageRecord, fetch_clip_vocabulary
from eqxldm.text import Tokenizer, TokenizerError, byte_pairs, clip_tokenizer

from .terminal import say, user_errors


@functools.cache
def caption_tokenizer(merges: int) -> Tokenizer:
    """CLIP's tokenizer with its commonest merges; the list of them is fetched at the first time."""
    with user_errors(TokenizerError, what="captions in CLIP's tokens"):
        return clip_tokenizer(*byte_pairs(fetch_clip_vocabulary(log=say), merges))


@dataclass(frozen=True)
class CaptionTokens:
    """A condition: `(max_length,)` ids of the caption, begun, ended, and padded with the end.

    Worker processes get it pickled, and make the tokenizer themselves.
    """

    max_length: int
    merges: int

    def __call__(self, record: ImageRecord) -> Int32[np.ndarray, " n"]:
        if record.caption is None:
            raise DataError(f"{record.id}: has no caption, which --condition text needs.")
        return self.tokens(record.caption)

    def tokens(self, text: str) -> Int32[np.ndarray, " n"]:
        """The ids of a text; those of `""` are begin and end, a caption that says nothing."""
        return caption_tokenizer(self.merges)([text], self.max_length).ids[0]

    def cut(self, text: str) -> str:
        """The end of a text that finds no room."""
        return caption_tokenizer(self.merges)([text], self.max_length).cut[0]
