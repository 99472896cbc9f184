"""What a network is told of an image: its class, its caption, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from eqxldm.data import ImageSource, caption_bytes, label_condition, no_condition

from .captions import CaptionTokens
from .config import Config
from .frozen_text import CAPTIONS, ENCODER, FrozenText, load_encoder
from .terminal import UserError, say

KindName = Literal["label", "text", "none"]
SHOWN = 10  # classes, or rows, in the pictures


@dataclass(frozen=True)
class Wanted:
    """What to draw, an entry an image: conditions, and classes or texts where there are any."""

    count: int
    cond: Any
    labels: Int[np.ndarray, " n"] | None = None
    texts: tuple[str, ...] | None = None

    def take(self, chosen: Sequence[int] | np.ndarray) -> "Wanted":
        """The entries of these numbers."""
        at = np.asarray(chosen, int)
        labels = None if self.labels is None else self.labels[at]
        texts = None if self.texts is None else tuple(self.texts[i] for i in at.tolist())
        return Wanted(len(at), jax.tree.map(lambda a: a[at], self.cond), labels, texts)


@dataclass(frozen=True)
class Labels:
    """The class, as a number. The network has `num_classes`, of which the images have `classes`."""

    num_classes: int
    classes: int
    read = staticmethod(label_condition)
    kind = "label"

    @property
    def null(self) -> Any:
        return np.array(self.num_classes, np.int32)

    def wanted(self, count: int, texts: Sequence[str] = (), labels: Any = None) -> Wanted:
        """The classes in turn, so that there are as many of each."""
        return self.of(np.arange(count) % self.classes)

    def of(self, labels: Any) -> Wanted:
        labels = np.asarray(labels, np.int32)
        return Wanted(len(labels), labels, labels)

    def shown(self) -> Int[np.ndarray, " n"]:
        """The classes in the pictures: all, or some spread over them."""
        spread = np.linspace(0, self.classes - 1, min(SHOWN, self.classes))
        return np.unique(spread.round().astype(np.int32))


@dataclass(frozen=True)
class Captions:
    """The caption's tokens: bytes, or of CLIP's byte pairs the first `merges`."""

    max_length: int
    merges: int | None = None
    kind = "text"

    @property
    def read(self) -> Any:
        if self.merges is None:
            return caption_bytes(self.max_length)
        return CaptionTokens(self.max_length, self.merges)

    @property
    def null(self) -> Any:
        """An empty caption."""
        return self.read.tokens("")

    def wanted(self, count: int, texts: Sequence[str] = (), labels: Any = None) -> Wanted:
        """These captions in turn, and the classes of what they say where they are known."""
        at = np.arange(count) % len(texts)
        cond = jax.tree.map(lambda *rows: np.stack(rows)[at], *self._conditions(texts))
        chosen = tuple(texts[i] for i in at.tolist())
        return Wanted(count, cond, None if labels is None else np.asarray(labels)[at], chosen)

    def say_cut(self, prompt: str) -> None:
        """Says which end of a prompt is not read."""
        if cut := self.read.cut(prompt):
            say(f"The prompt is too long for the network; this was cut off: {cut}")

    def _conditions(self, texts: Sequence[str]) -> list[Any]:
        return [self.read.tokens(text) for text in texts]


@dataclass(frozen=True)
class FrozenCaptions(Captions):
    """What a frozen encoder says of the caption: `tokens`, their `mask`, and a `vector`.

    `folder` is that of the encoder, `table` the file of the run's captions.
    """

    folder: Path = Path()
    table: Path = Path()

    @property
    def size(self) -> int:
        """Numbers in a token."""
        return load_encoder(self.folder).size

    @property
    def read(self) -> Any:
        return FrozenText(self.folder, self.max_length, self.table)

    def _conditions(self, texts: Sequence[str]) -> list[Any]:
        return self.read.all(texts)


@dataclass(frozen=True)
class Nothing:
    """No condition."""

    read = staticmethod(no_condition)
    null = None
    kind = "none"

    def wanted(self, count: int, texts: Sequence[str] = (), labels: Any = None) -> Wanted:
        return Wanted(count, None)


Condition = Labels | Captions | Nothing


def make_condition(
    config: Config, kind: KindName, classes: int, run: Path = Path(), encoder: Path | None = None
) -> Condition:
    """The condition of a kind, for images of so many classes.

    A frozen encoder is that of the `run` folder, unless another one is given.
    """
    if kind == "text":
        text = config.text
        if text.tokens == "frozen":
            folder = encoder or run / ENCODER
            return FrozenCaptions(text.max_length, None, folder=folder, table=run / CAPTIONS)
        return Captions(text.max_length, text.merges if text.tokens == "clip" else None)
    if kind == "none":
        return Nothing()
    labels = classes if config.pictures.num_classes is None else config.pictures.num_classes
    if classes > labels:
        raise UserError(
            f"--num-classes {labels}: the images have {classes} classes. Leave it out or raise it."
        )
    return Labels(labels, classes)


def choose_condition(
    config: Config, source: ImageSource, run: Path = Path(), encoder: Path | None = None
) -> Condition:
    """The condition asked for, or with "auto" the first of text and label that the images have.

    `run` and `encoder` as in `make_condition`.
    """
    kind, classes = config.pictures.condition, len(source.class_names)
    if kind == "auto":
        kind = "text" if source.has_captions else "label" if classes else "none"
    if kind == "text" and not source.has_captions:
        raise UserError(
            "--condition text: the images have no captions. Put captions.json ({file: caption}) or "
            "metadata.jsonl (file_name, text) beside them."
        )
    if kind == "label" and not classes:
        raise UserError(
            "--condition label: the images have no classes. Put them into a folder for each class, "
            "or give --condition none."
        )
    if kind == "text" and config.denoiser == "unet":
        raise UserError(
            "--denoiser unet: it takes classes or no condition. Captions need --denoiser dit, or "
            "give --condition label or none."
        )
    return make_condition(config, kind, classes, run, encoder)
