"""What a run's clips are like: reconstructions, motion, captions, predictions, distances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from eqxldm.data import direction_of, read_caption
from eqxldm.metrics import frechet_distance, motions, track

from ..train.classifier import ConvClassifier, map_images
from .classifier import ClipClassifier, clip_features
from .networks import to_clips, to_frames

Frames = UInt8[np.ndarray, "n f h w c"]
SIDE = 28  # of a digit


def psnr_by_frame(x: Frames, y: Frames) -> Float[np.ndarray, " f"]:
    """`10 log10(255^2 / mean (x - y)^2)` in dB of each frame's number, over all clips.

    >>> x = np.zeros((1, 2, 4, 4, 1), np.uint8)
    >>> psnr_by_frame(x, x + np.uint8(255))
    array([0., 0.], dtype=float32)
    """
    errors = np.mean((x.astype(np.float32) - y.astype(np.float32)) ** 2, (0, 2, 3, 4))
    return 10 * np.log10(255.0**2 / np.maximum(errors, 1e-6))


def reconstruct(autoencoder: Any, frames: Frames, batch: int) -> Frames:
    """What is left of clips after encoding and decoding."""

    @jax.jit
    def both(model, part):
        return to_frames(jax.vmap(lambda x: model.decode(model.encode(x)))(to_clips(part)))

    return map_clips(both, autoencoder, frames, batch)


def map_clips(function: Any, model: Any, frames: Frames, batch: int) -> Any:
    """`function(model, frames)` over all clips, some at once; the last batch is padded."""
    parts = []
    for i in range(0, len(frames), batch):
        at = np.minimum(np.arange(i, i + batch), len(frames) - 1)
        found = function(model, frames[at])
        parts.append(jax.tree.map(lambda a, i=i: np.asarray(a)[: len(frames) - i], found))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


class Measure:
    """Compares clips with real ones. `digits` classifies digits that were tracked, if they are
    MNIST's; `network` sees whole clips."""

    def __init__(self, digits: ConvClassifier | None, network: ClipClassifier):
        self.digits, self._network = digits, network
        self._clip = jax.jit(clip_features)
        self._digit = jax.jit(lambda m, x: jax.vmap(m)(jnp.moveaxis(x, -1, 1) / 127.5 - 1.0)[1])

    def features(self, frames: Frames) -> tuple[Any, Any]:
        """`(features, logits)` of whole clips."""
        return map_clips(self._clip, self._network, frames, 50)

    def distance(self, real: Frames, other: Frames) -> float:
        return float(frechet_distance(self.features(real)[0], self.features(other)[0]))

    def tracked(self, frames: Frames, texts: list[str]) -> dict[str, float]:
        """How digits move and what they are, in the clips where both are seen apart in five frames.

        `residual`: pixels between the digits and the best path of constant speed that the walls
        throw back, root mean square. `speed_variation`: of the speed between frames away from the
        walls, the standard deviation by the mean. `turns_at_walls`: of the turns. `digits`,
        `directions`, `pairs`: the shares that are as the caption says.
        """
        room = float(frames.shape[2] - SIDE), float(frames.shape[3] - SIDE)
        rows = []
        for clip, text in zip(frames[..., 0], texts, strict=True):
            wanted = read_caption(text)
            places = track(clip, len(wanted))
            found = motions(places, room)
            if found is not None:
                rows.append((clip, wanted, places, found))
        out: dict[str, float] = {"seen": len(rows) / len(frames)}
        if not rows:
            return out
        every = [m for _, _, _, found in rows for m in found]
        turns = sum(m.turns for m in every)
        variation = [m.variation for m in every if np.isfinite(m.variation)]
        # The root mean square, so that one digit that leaves its path weighs what it should.
        out["residual"] = float(np.sqrt(np.mean([m.residual**2 for m in every])))
        out["residual_median"] = float(np.median([m.residual for m in every]))
        out["speed_variation"] = float(np.mean(variation)) if variation else float("nan")
        out["turns_at_walls"] = sum(m.turns_at_walls for m in every) / max(turns, 1)
        scores = [self._as_said(*row) for row in rows]
        names = ("digits", "directions", "pairs")
        return out | dict(zip(names, np.mean(scores, 0).tolist(), strict=True))

    def _as_said(self, clip: Any, wanted: Any, places: Any, found: Any) -> tuple[float, ...]:
        directions = [direction_of(m.velocity) for m in found]
        digits = [self._which(clip, places[:, k]) for k in range(len(found))]
        pairs = list(zip(digits, directions, strict=True))
        n = len(wanted)
        return (
            _shared([d for d, _ in wanted], digits),
            _shared([d for _, d in wanted], directions),
            sum(p in pairs for p in wanted) / n,
        )

    def _which(self, clip: Any, path: Any) -> int:
        """The digit along a path, by the mean of its logits over frames."""
        assert self.digits is not None
        padded = np.pad(clip, ((0, 0), (SIDE, SIDE), (SIDE, SIDE)))
        seen = np.flatnonzero(np.isfinite(path).all(1))
        seen = seen[np.linspace(0, len(seen) - 1, 8).round().astype(int)]
        crops = []
        for f in seen:
            i, j = np.round(path[f] - 13.5).astype(int) + SIDE
            crops.append(padded[f, i : i + SIDE, j : j + SIDE])
        images = np.stack(crops)[..., None]
        logits = map_images(self._digit, self.digits, images, 8)
        return int(logits.mean(0).argmax())


def _shared(wanted: list[Any], found: list[Any]) -> float:
    """The share of what is wanted that is found, each found thing counting once."""
    left, n = list(found), 0
    for item in wanted:
        if item in left:
            left.remove(item)
            n += 1
    return n / len(wanted)
