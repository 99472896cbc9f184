"""Inception v3 of 2015-12-05, by whose features FID is measured (Szegedy et al. 2016)."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.conv import max_pool
from ..nn.linear import Linear
from ..nn.resize import bicubic_matrix, bilinear_matrix, resize, tf1_matrix
from .config import arguments, make_record
from .inception_blocks import BLOCKS, STEM, Block, Unit

SIDE, CLASSES = 299, 1008
SPATIAL = 7  # channels of the first branch of Mixed_6d: 17 x 17 x 7 numbers, of sFID
EPS = 1e-3
# How an image comes to 299 pixels, and to the range of the network.
Resizing = Literal["tf1", "pytorch-fid", "clean-fid"]


@dataclass(frozen=True)
class InceptionConfig:
    """How an `Inception` was made: by what all its widths are divided.

    >>> InceptionConfig().divide
    1
    """

    divide: int = 1

    def build(self, *, key) -> "Inception":
        """The network, with random weights."""
        return Inception(**arguments(self), key=key)


class InceptionOutput(NamedTuple):
    """What an `Inception` says of one image.

    `pooled`: FID's features; `spatial`: sFID's, channels last; `logits`: of 1008 classes, without
    their biases, as the Inception score has them.
    """

    pooled: Float[Array, " d"]
    spatial: Float[Array, "h w c"]
    logits: Float[Array, " classes"]


class ConvNorm(eqx.Module):
    """A convolution, a batch norm by fixed moments, and a ReLU.

    `relu((w * x - mean) / sqrt(variance + 1e-3) scale + bias)`, channels last. `stride` 2, and
    the stem's 3 x 3 that says so, have no padding; others keep the size.
    """

    weight: Float[Array, "kh kw in out"]
    scale: Float[Array, " out"]
    bias: Float[Array, " out"]
    mean: Float[Array, " out"]
    variance: Float[Array, " out"]
    stride: int = eqx.field(static=True)
    padded: bool = eqx.field(static=True)

    def __init__(self, in_channels: int, unit: Unit, *, key):
        shape = (*unit.kernel, in_channels, unit.out)
        bound = math.sqrt(6 / math.prod(shape[:3]))
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.scale, self.variance = jnp.ones(unit.out), jnp.ones(unit.out)
        self.bias, self.mean = jnp.zeros(unit.out), jnp.zeros(unit.out)
        self.stride, self.padded = unit.stride, unit.padded

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        sides = [(k // 2, k // 2) if self.padded else (0, 0) for k in self.weight.shape[:2]]
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight,
            (self.stride, self.stride),
            sides,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        factor = self.scale * jax.lax.rsqrt(self.variance + EPS)
        return jax.nn.relu((y - self.mean) * factor + self.bias)


class Inception(eqx.Module):
    """The network of TensorFlow's `inception-2015-12-05`, in float32 at the highest precision.

    Not torchvision's: its averages leave the padding out, the last block has a maximum where others
    have an average, and it has 1008 classes. `pretrained.load_inception` reads the published
    weights; with random ones the distances mean little.

    **Arguments**: `divide` divides all widths, for tests. The image of a call is what
    `inception_input` gives, 299 pixels a side, or any other of 75 and more.

    **Raises** `ValueError` for an image that has not three channels, or is too small.

    >>> from eqxldm.models import parameter_count
    >>> network = eqx.filter_eval_shape(Inception, key=jax.random.key(0))
    >>> len(jax.tree.leaves(eqx.filter(network, lambda a: hasattr(a, "shape"))))
    472
    >>> out = eqx.filter_eval_shape(network, jax.ShapeDtypeStruct((3, 299, 299), jnp.float32))
    >>> out.pooled.shape, out.spatial.shape, out.logits.shape
    ((2048,), (17, 17, 7), (1008,))
    """

    units: dict[str, ConvNorm]
    fc: Linear
    config: InceptionConfig = eqx.field(static=True)

    def __init__(self, *, divide: int = 1, key):
        self.config = make_record(InceptionConfig, "Inception", {"divide": divide})
        if divide < 1:
            raise ValueError(f"Inception: divide must be 1 or more, got {divide}.")
        self.units, width = {}, 3
        thin = lambda unit: unit._replace(out=max(1, unit.out // divide))
        for unit in map(thin, STEM):
            key, k = jax.random.split(key)
            self.units[unit.name] = ConvNorm(width, unit, key=k)
            width = unit.out
        for name, block in BLOCKS.items():
            widths = {"": width, "pool": width}
            for unit in map(thin, block.units):
                key, k = jax.random.split(key)
                self.units[f"{name}.{unit.name}"] = ConvNorm(widths[unit.of], unit, key=k)
                widths[unit.name] = unit.out
            width = sum(widths[output] for output in block.outputs)
        self.fc = Linear(width, CLASSES, key=key)

    def __call__(self, x: Float[Array, "c h w"]) -> InceptionOutput:
        if x.shape[0] != 3 or min(x.shape[1:]) < 75:
            raise ValueError(
                f"Inception: an image needs 3 channels and 75 pixels a side, got {x.shape}. "
                "inception_input makes 299 of any size."
            )
        with jax.default_matmul_precision("highest"):
            y = jnp.moveaxis(x, 0, -1)
            for unit in STEM:
                y = self.units[unit.name](y)
                if unit.pooled:
                    y = max_pool(y, 3, 2)
            spatial = y
            for name, block in BLOCKS.items():
                made = self._block(name, block, y)
                y = jnp.concatenate([made[output] for output in block.outputs], -1)
                spatial = made["branch1x1"][..., :SPATIAL] if name == "Mixed_6d" else spatial
            pooled = jnp.mean(y, (0, 1))
            return InceptionOutput(pooled, spatial, self.fc.weight @ pooled)

    def _block(
        self, name: str, block: Block, x: Float[Array, "h w c"]
    ) -> dict[str, Float[Array, "h2 w2 c2"]]:
        made = {"": x, "pool": POOLS[block.pool](x)}
        for unit in block.units:
            made[unit.name] = self.units[f"{name}.{unit.name}"](made[unit.of])
        return made


def inception_input(
    image: Float[Array, "c h w"], resizing: Resizing = "tf1"
) -> Float[Array, "c H W"]:
    """An image with pixels from 0 to 255 as `Inception` takes it: 299 x 299, about -1 to 1.

    - `tf1`: as in the network's own graph, bilinear from the upper left, and `(x - 128) / 128`:
      ADM's evaluator and torch-fidelity.
    - `pytorch-fid`: bilinear with half pixels, and `2 x / 255 - 1`.
    - `clean-fid`: Pillow's bicubic of floats, clipped to 0 and 255, and `(x - 128) / 128`.

    >>> inception_input(jnp.full((3, 32, 32), 128.0)).shape
    (3, 299, 299)
    """
    if resizing == "pytorch-fid":
        return 2 * (resize(image, (SIDE, SIDE), bilinear_matrix) / 255) - 1
    if resizing == "clean-fid":
        return (jnp.clip(resize(image, (SIDE, SIDE), bicubic_matrix), 0, 255) - 128) / 128
    return (resize(image, (SIDE, SIDE), tf1_matrix) - 128) / 128


def _average(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Of 3 x 3, of fewer at the border: what is beyond it does not count."""
    sides = ((1, 1), (1, 1), (0, 0))
    add = lambda a: jax.lax.reduce_window(a, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), sides)
    return add(x) / add(jnp.ones_like(x[..., :1]))


POOLS = {
    "average": _average,
    "largest": lambda x: max_pool(x, 3, 1, pad=1),
    "half": lambda x: max_pool(x, 3, 2),
}
