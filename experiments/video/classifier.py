"""A small network that sees whole clips: what it is trained to say, and its features."""

from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqxldm.nn import Conv, Linear


class ClipClassifier(eqx.Module):
    """Clip `(c, f, h, w)` in [-1, 1] to features and logits.

    Every two neighbouring frames go through the same three convolutions of stride 2, so that what
    is seen depends neither on when nor, by the maximum over all places, on where; the mean over
    time goes through a layer of `features` units, which are the features, to the logits.

    >>> net = ClipClassifier(1, 10, channels=4, features=8, key=jax.random.key(0))
    >>> features, logits = net(jnp.zeros((1, 5, 32, 32)))
    >>> features.shape, logits.shape
    ((8,), (10,))
    """

    convs: list[Conv]
    hidden: Linear
    head: Linear

    def __init__(self, in_channels: int, outputs: int, *, channels: int, features: int, key: Any):
        keys = jax.random.split(key, 5)
        widths = (2 * in_channels, channels, 2 * channels, 4 * channels)
        self.convs = [
            Conv(a, b, 5 if i == 0 else 3, stride=2, padding=((2 - (i > 0),) * 2,) * 2, key=keys[i])
            for i, (a, b) in enumerate(pairwise(widths))
        ]
        self.hidden = Linear(2 * widths[-1], features, key=keys[3])
        self.head = Linear(features, outputs, key=keys[4])

    def __call__(self, x: Float[Array, "c f h w"]) -> tuple[Float[Array, " d"], Float[Array, " k"]]:
        frames = jnp.moveaxis(x, 0, -1)
        after = frames[1:] if len(frames) > 1 else frames
        pairs = jnp.concatenate([frames[: len(after)], after - frames[: len(after)]], -1)

        def look(y: Any) -> Any:
            for conv in self.convs:
                y = jax.nn.relu(conv(y))
            return jnp.concatenate([y.max((0, 1)), y.mean((0, 1))])

        features = jax.nn.relu(self.hidden(jax.vmap(look)(pairs).mean(0)))
        return features, self.head(features)


def halved(frames: Any) -> Float[Array, "n c f h w"]:
    """Clips of bytes `(n, f, h, w, c)` at half the size, in [-1, 1]: what the network sees."""
    n, f, h, w, c = frames.shape
    small = frames.astype(jnp.float32).reshape(n, f, h // 2, 2, w // 2, 2, c).mean((3, 5))
    return jnp.moveaxis(small, -1, 1) / 127.5 - 1


def turned_clips(clips: Float[Array, "n c f h w"], key: Any) -> tuple[Any, Any]:
    """Each clip turned by a random number of quarters and, by a coin, played backwards, and which
    of the eight ways it was; a clip that is no square by halves. A task for clips of which nothing
    is said (Gidaris et al. 2018)."""
    n, _, _, h, w = clips.shape
    turns = 4 if h == w else 2
    number = jax.random.randint(key, (n,), 0, 2 * turns)
    ways = [jnp.rot90(clips, k * (4 // turns), (3, 4)) for k in range(turns)]
    ways = jnp.stack([*ways, *(way[:, :, ::-1] for way in ways)])
    return ways[number, jnp.arange(n)], number


def clip_features(model: ClipClassifier, frames: Any) -> Any:
    """`(features, logits)` of clips of bytes."""
    return jax.vmap(model)(halved(frames))
