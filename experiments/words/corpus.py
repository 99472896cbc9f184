"""A text as tokens: its vocabulary, its parts to train on and to measure, batches of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from eqxldm.data import Batches, DataError, open_wikipedia, read_text

from ..train.terminal import UserError, say

HELD_OUT = 0.05  # of the text, at its end


@dataclass(frozen=True)
class Vocabulary:
    """Texts to ids and back. [MASK] is `mask_id`, one above all others: the size without it.

    `characters` are those that it knows; "" means bytes, and None that `tokenizer`, a file of the
    `tokenizers` library, does it.

    >>> letters = Vocabulary("abc")
    >>> letters.encode("cab").tolist(), letters.decode([2, 3, 1])
    ([2, 0, 1], 'c_b')
    """

    characters: str | None
    tokenizer: Any = None
    mask: int | None = None  # [MASK] where the tokenizer has one of its own

    @property
    def mask_id(self) -> int:
        if self.mask is not None:
            return self.mask
        if self.tokenizer is not None:
            return self.tokenizer.get_vocab_size()
        return len(self.characters or "") or 256

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        if self.tokenizer is not None:
            return np.array(self.tokenizer.encode(_encodable(text)).ids, np.int32)
        if not self.characters:
            text = _encodable(text)
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        known = np.frombuffer(self.characters.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(known, codes)
        wrong = known[np.minimum(ids, len(known) - 1)] != codes
        if wrong.any():
            raise UserError(
                f"{text[int(wrong.argmax())]!r} is not among the {len(known)} characters that the "
                f"network knows: {self.characters[:60]!r}."
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; "_" where [MASK] stands."""
        ids = [int(i) for i in ids]
        if self.tokenizer is not None:
            parts, run = [], []
            for i in [*ids, self.mask_id]:
                if i != self.mask_id:
                    run.append(i)
                    continue
                parts += [self.tokenizer.decode(run), "_"]
                run = []
            return "".join(parts[:-1])
        if not self.characters:
            known = bytes(b"_"[0] if i >= 256 else i for i in ids)
            return known.decode(errors="replace")
        return "".join(self.characters[i] if i < self.mask_id else "_" for i in ids)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text holds bytes that are no UTF-8.") from None
    return text


@dataclass(frozen=True)
class Corpus:
    """A text's tokens, and how many characters there are to a token."""

    name: str
    vocabulary: Vocabulary
    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]
    characters_per_token: float
    digest: str = ""  # of the text

    def windows(self, length: int, count: int) -> Int[np.ndarray, "windows length"]:
        """At most `count` windows of the part that is measured, evenly spaced."""
        starts = np.arange(0, len(self.test) - length + 1, length)
        starts = starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)]
        return self.test[starts[:, None] + np.arange(length)]

    def batches(self, length: int, batch_size: int, *, seed: int, rows: Any) -> Batches:
        """Windows that begin anywhere, in a random order."""
        tokens = self.train

        def read(indices: np.ndarray, epochs: np.ndarray) -> tuple[dict[str, Any], dict[str, str]]:
            return {"x0": tokens[indices[:, None] + np.arange(length)]}, {}

        starts = len(tokens) - length + 1
        return Batches(starts, batch_size, read, seed=seed, rows=rows, prefetch=4)


def open_vocabulary(tokens: str, text: str) -> Vocabulary:
    """That of `characters`, `bytes`, or a tokenizer's file."""
    if tokens == "characters":
        return Vocabulary("".join(sorted(set(text))))
    if tokens == "bytes":
        return Vocabulary("")
    path = Path(tokens).expanduser()
    if not path.is_file():
        raise UserError(
            f"--tokens {tokens}: unknown tokenizer. Choose characters, bytes, or a tokenizer.json "
            "of a model."
        )
    return Vocabulary(None, make_tokenizer(read_text(path), f"--tokens {tokens}"))


def make_tokenizer(text: str, where: Path | str, repair: str = "") -> Any:
    """That of a file's text; `UserError` names the file, `where`, and what repairs it."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"{where}: needs the package tokenizers: pip install 'eqxldm[text]'."
        ) from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no other kind
        raise UserError(f"{where} is no tokenizer file: {error}. {repair}".rstrip()) from None


def open_corpus(path: Path | None, tokens: str, length: int) -> Corpus:
    """A file's text, or the sample of Wikipedia, as tokens; `UserError` where it is too short."""
    try:
        text = open_wikipedia(log=say) if path is None else read_text(path)
    except DataError as error:
        reason = str(error).replace("(the job: --images)", "(the job: --text FILE)")
        raise UserError(reason) from None
    name = "Wikipedia's sample" if path is None else str(path)
    if not text.strip():
        raise UserError(f"{name}: is empty. A text to learn from has some thousand characters.")
    if len(set(text)) < 2:
        raise UserError(f"{name}: has one character only, {text[0]!r}: there is nothing to learn.")
    vocabulary = open_vocabulary(tokens, text)
    ids = vocabulary.encode(text)
    held_out = max(int(len(ids) * HELD_OUT), length)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary.mask_id:
        raise UserError(
            f"--tokens {tokens}: makes tokens up to {ids.max()}, and says that it has "
            f"{vocabulary.mask_id}."
        )
    if len(ids) < 2 * held_out or len(ids) - held_out < 2 * length:
        raise UserError(
            f"{name}: has {len(ids)} tokens, too few for windows of {length} to learn from and "
            f"others to measure. Give a longer text, or a smaller --length."
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, vocabulary, ids[:-held_out], ids[-held_out:], len(text) / len(ids), digest)


def entropies(train: np.ndarray, test: np.ndarray, size: int) -> dict[str, float]:
    """Bits a token of the part that is measured under counts of the other: of single tokens and of
    pairs, one added to each count."""
    single = np.bincount(train, minlength=size) + 1.0
    unigram = -np.log2(single / single.sum())[test].mean()
    found = {"unigram": float(unigram)}
    if size <= 512:
        pairs = np.bincount(train[:-1] * size + train[1:], minlength=size * size) + 1.0
        pairs = pairs.reshape(size, size)
        bits = -np.log2(pairs / pairs.sum(1, keepdims=True))
        found["bigram"] = float(bits[test[:-1], test[1:]].mean())
    return found
