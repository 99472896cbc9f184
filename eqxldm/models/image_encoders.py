"""Vision transformers whose features images are judged by: DINOv2, and CLIP's image encoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.activations import gelu, quick_gelu
from ..nn.linear import Linear, normal
from ..nn.norms import LayerNorm
from ..nn.patchify import patchify
from ..nn.resize import resize, resize_and_crop, sparse_bicubic_matrix
from ..nn.stack import Stack, save_matmuls
from .config import arguments, make_record
from .encoder_block import EncoderBlock

# Means and standard deviations of the channels, from 0 to 1: ImageNet's, and those of CLIP.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class DINOv2Config:
    """How a `DINOv2` was made: the arguments of its constructor, explained there.

    >>> DINOv2Config(16, 2, 2).grid
    37
    """

    width: int
    depth: int
    num_heads: int
    grid: int = 37
    patch_size: int = 14
    hidden: int | None = None
    norm_eps: float = 1e-6
    remat: Callable[..., Any] | None = save_matmuls

    def build(self, *, key) -> "DINOv2":
        """The encoder, with random weights."""
        return DINOv2(**arguments(self), key=key)


@dataclass(frozen=True)
class CLIPImageConfig:
    """How a `CLIPImage` was made: the arguments of its constructor, explained there.

    >>> CLIPImageConfig(16, 2, 2, 8).side
    336
    """

    width: int
    depth: int
    num_heads: int
    projection: int
    grid: int = 24
    patch_size: int = 14
    hidden: int | None = None
    activation: Callable[..., Any] = quick_gelu
    norm_eps: float = 1e-5
    remat: Callable[..., Any] | None = save_matmuls

    @property
    def side(self) -> int:
        """Pixels of its images."""
        return self.grid * self.patch_size

    def build(self, *, key) -> "CLIPImage":
        """The encoder, with random weights."""
        return CLIPImage(**arguments(self), key=key)


class ImageOutput(NamedTuple):
    """What an image encoder says: its features, and the tokens of the patches, row by row.

    `features` of `DINOv2` is the class token after the last norm; of `CLIPImage`, its projection.
    """

    features: Float[Array, " d"]
    patches: Float[Array, "n width"]


class DINOv2(eqx.Module):
    """DINOv2's vision transformer (Oquab et al. 2024), without registers.

    A class token and the patches, with positions, through blocks with layer scale, and a norm.
    An image whose patches are not `grid x grid` has the positions interpolated, as in transformers.

    **Arguments**: `width`, `depth`, `num_heads`; `grid` patches a side have positions of their own,
    of `patch_size` pixels; `hidden` are the units of the MLPs, None is `4 width`; `norm_eps`,
    `remat` as in `CLIPText`. `mask_token` is in the files and of no use here.

    In the call, the image is what `dinov2_input` gives, its sides multiples of the patch.

    >>> network = DINOv2(16, 2, 2, grid=3, key=jax.random.key(0))
    >>> out = network(jnp.zeros((3, 28, 42)))
    >>> out.features.shape, out.patches.shape
    ((16,), (6, 16))
    """

    patch_embedding: Linear
    class_token: Float[Array, " d"]
    mask_token: Float[Array, " d"]
    positions: Float[Array, "n d"]
    blocks: Stack
    norm: LayerNorm
    config: DINOv2Config = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, *, key, **options):
        sizes = dict(width=width, depth=depth, num_heads=num_heads)
        config = self.config = make_record(DINOv2Config, "DINOv2", sizes | options)
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.patch_embedding = Linear(3 * config.patch_size**2, width, key=k1)
        self.class_token = 0.02 * jax.random.normal(k2, (width,))
        self.mask_token = jnp.zeros(width)
        self.positions = normal(0.02)(k3, (config.grid**2 + 1, width))
        block: dict[str, Any] = dict(hidden=config.hidden, activation=gelu, layer_scale=True)
        make = lambda k: EncoderBlock(width, num_heads, **block, norm_eps=config.norm_eps, key=k)
        self.blocks = Stack(make, depth, remat=config.remat, key=k4)
        self.norm = LayerNorm(width, config.norm_eps)

    def __call__(self, x: Float[Array, "c h w"]) -> ImageOutput:
        config = self.config
        shape = _patches("DINOv2", x.shape, config.patch_size)
        tokens = self.patch_embedding(patchify(x, config.patch_size))
        tokens = jnp.concatenate([self.class_token[None].astype(tokens.dtype), tokens])
        tokens = tokens + _positions(self.positions, config.grid, shape).astype(tokens.dtype)
        found = self.norm(self.blocks(tokens))
        return ImageOutput(found[0], found[1:])


class CLIPImage(eqx.Module):
    """CLIP's image encoder (Radford et al. 2021): a vision transformer and a projection.

    **Arguments**: as `DINOv2`; `projection` is the size of the features; `activation`:
    `nn.quick_gelu` in OpenAI's weights.

    In the call, the image is what `clip_input` gives: `config.side` pixels a side.

    **Raises** `ValueError` for an image of another size.

    >>> network = CLIPImage(16, 2, 2, 8, grid=2, patch_size=4, key=jax.random.key(0))
    >>> network(jnp.zeros((3, 8, 8))).features.shape
    (8,)
    """

    patch_embedding: Linear
    class_token: Float[Array, " d"]
    positions: Float[Array, "n d"]
    pre_norm: LayerNorm
    blocks: Stack
    norm: LayerNorm
    project: Linear
    config: CLIPImageConfig = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, projection: int, *, key, **options):
        sizes = dict(width=width, depth=depth, num_heads=num_heads, projection=projection)
        config = self.config = make_record(CLIPImageConfig, "CLIPImage", sizes | options)
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        self.patch_embedding = Linear(3 * config.patch_size**2, width, use_bias=False, key=k1)
        self.class_token = 0.02 * jax.random.normal(k2, (width,))
        self.positions = normal(0.02)(k3, (config.grid**2 + 1, width))
        block: dict[str, Any] = dict(hidden=config.hidden, activation=config.activation)
        make = lambda k: EncoderBlock(width, num_heads, **block, norm_eps=config.norm_eps, key=k)
        self.blocks = Stack(make, depth, remat=config.remat, key=k4)
        self.pre_norm = LayerNorm(width, config.norm_eps)
        self.norm = LayerNorm(width, config.norm_eps)
        self.project = Linear(width, projection, use_bias=False, key=k5)

    def __call__(self, x: Float[Array, "c h w"]) -> ImageOutput:
        config = self.config
        if x.shape != (3, config.side, config.side):
            raise ValueError(
                f"CLIPImage: an image must be (3, {config.side}, {config.side}), got {x.shape}. "
                f"clip_input(image, {config.side}) makes it so."
            )
        tokens = self.patch_embedding(patchify(x, config.patch_size))
        tokens = jnp.concatenate([self.class_token[None].astype(tokens.dtype), tokens])
        found = self.blocks(self.pre_norm(tokens + self.positions.astype(tokens.dtype)))
        return ImageOutput(self.project(self.norm(found[0])), found[1:])


def dinov2_input(image: Float[Array, "c h w"], side: int = 224) -> Float[Array, "c s s"]:
    """An image with pixels from 0 to 255 as `DINOv2` takes it: the middle square, normalised.

    The shorter side is brought to `side` by an antialiased bicubic, which is not rounded.

    >>> dinov2_input(jnp.zeros((3, 40, 30)), 28).shape
    (3, 28, 28)
    """
    return _normalised(image, side, IMAGENET)


def clip_input(image: Float[Array, "c h w"], side: int = 336) -> Float[Array, "c s s"]:
    """The same for `CLIPImage`, by its means and deviations.

    >>> clip_input(jnp.zeros((3, 40, 30)), 28).shape
    (3, 28, 28)
    """
    return _normalised(image, side, CLIP)


def dinov2_s(*, key, **options) -> DINOv2:
    """ViT-S/14.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(dinov2_s, key=jax.random.key(0)))
    22056576
    """
    return DINOv2(384, 12, 6, **options, key=key)


def dinov2_b(*, key, **options) -> DINOv2:
    """ViT-B/14.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(dinov2_b, key=jax.random.key(0)))
    86580480
    """
    return DINOv2(768, 12, 12, **options, key=key)


def dinov2_l(*, key, **options) -> DINOv2:
    """ViT-L/14, whose features FD-DINOv2 is measured by.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(dinov2_l, key=jax.random.key(0)))
    304368640
    """
    return DINOv2(1024, 24, 16, **options, key=key)


def clip_image_b_32(*, key, **options) -> CLIPImage:
    """That of ViT-B/32, at 224 pixels.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_image_b_32, key=jax.random.key(0)))
    87849216
    """
    return CLIPImage(768, 12, 12, 512, **dict(grid=7, patch_size=32) | options, key=key)


def clip_image_l_14(*, key, **options) -> CLIPImage:
    """That of ViT-L/14, at 224 pixels.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_image_l_14, key=jax.random.key(0)))
    303966208
    """
    return CLIPImage(1024, 24, 16, 768, **dict(grid=16) | options, key=key)


def clip_image_l_14_336(*, key, **options) -> CLIPImage:
    """That of ViT-L/14 at 336 pixels, whose features CMMD is measured by.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_image_l_14_336, key=jax.random.key(0)))
    304293888
    """
    return CLIPImage(1024, 24, 16, 768, **options, key=key)


def _patches(name: str, shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    c, h, w = shape
    if c != 3 or h % patch or w % patch or min(h, w) < patch:
        raise ValueError(
            f"{name}: an image needs 3 channels, and sides that are multiples of {patch}; got "
            f"{shape}."
        )
    return h // patch, w // patch


def _positions(
    table: Float[Array, "n d"], grid: int, shape: tuple[int, int]
) -> Float[Array, "m d"]:
    if shape == (grid, grid):
        return table
    square = jnp.moveaxis(table[1:].reshape(grid, grid, -1), -1, 0)
    fitted = resize(square, shape, sparse_bicubic_matrix)
    return jnp.concatenate([table[:1], jnp.moveaxis(fitted, 0, -1).reshape(-1, table.shape[1])])


def _normalised(
    image: Float[Array, "c h w"], side: int, channels: tuple[tuple[float, ...], tuple[float, ...]]
) -> Float[Array, "c s s"]:
    mean, deviation = (jnp.array(values)[:, None, None] for values in channels)
    return (resize_and_crop(image, side) / 255 - mean) / deviation
