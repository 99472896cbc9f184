"""Images that are learned with the clips: one frame is a video."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from eqxldm.data import Batches, ImageRecord, ImageSource, Latents, open_images


@dataclass(frozen=True)
class Captioned:
    """Images with captions: their own, else the names of their classes, else none is told, ""."""

    source: ImageSource
    has_captions: bool = True
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> ImageRecord:
        record = self.source[index]
        caption = record.caption
        if caption is None:
            names, label = self.source.class_names, record.label
            caption = names[label].replace("_", " ") if names and label is not None else ""
        return record._replace(caption=caption, label=None)

    def digest(self) -> str:
        return self.source.digest()


def open_captioned(folder: Path) -> Captioned:
    """Images as for training: folders, tars or parquet."""
    return Captioned(open_images(folder))


@dataclass(frozen=True)
class ReadBoth:
    """A batch of clips, and beside each an image, drawn from (seed, epoch, clip) alone."""

    clips: Latents
    images: Latents
    seed: int

    def __call__(
        self, indices: Int[np.ndarray, " n"], epochs: Int[np.ndarray, " n"]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        pairs = zip(epochs.tolist(), indices.tolist(), strict=True)
        draw = lambda *at: np.random.default_rng((self.seed, *at)).integers(len(self.images))
        chosen, unflipped = np.array([draw(*at) for at in pairs]), np.zeros(len(indices), bool)
        return {
            "clips": self.clips.read(indices, unflipped),
            "images": self.images.read(chosen, unflipped),
        }, {}


def both_batches(
    clips: Latents, images: Latents, batch_size: int, *, seed: int, rows: Any = None
) -> Batches:
    """Endless batches of cached clips, each with as many images, whose position can be saved."""
    read = ReadBoth(clips, images, seed)
    return Batches(len(clips), batch_size, read, seed=seed, rows=rows)


def both_loss(of_clips: Callable, of_images: Callable, weight: float) -> Callable:
    """The loss of clips and, weighted, that of images by the same weights of the network."""

    def loss(model: Any, batch: Any, key: Any, context: Any) -> Any:
        clips_key, images_key = jax.random.split(key)
        error, aux = of_clips(model, batch["clips"], clips_key, context)
        beside, _ = of_images(model.with_frames(1), batch["images"], images_key, context)
        return error + weight * beside, {**aux, "images": beside}

    return loss
