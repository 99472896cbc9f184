"""AutoencoderKL: a convolutional VAE for latent diffusion (Rombach et al. 2022)."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn.attention import AttentionBlock
from ..nn.conv import Conv, ConvPair, depth_to_space, space_to_depth, upsample_nearest
from ..nn.norms import GroupNorm
from ..nn.resnet import ResnetBlock
from .config import arguments, make_record
from .latents import NormalisedLatents, Posterior, normalised


class Encoder(eqx.Module):
    """Image `(h, w, c)` to the moments `(zh, zw, 2 zc)` of the latent, channels-last.

    A `patch x patch` space-to-depth, a convolution, then per level `blocks` residual blocks and,
    but for the last level, a stride-2 convolution; a middle of two residual blocks, with
    attention between them if asked for. With `quant_convs` the head is two convolutions, the
    second 1 x 1 on the moments.
    """

    stem: Conv
    levels: list[list[Any]]  # residual blocks, and attentions between them
    downs: list[Conv]
    middle: list[ResnetBlock | AttentionBlock]
    norm: GroupNorm
    head: Conv | ConvPair
    patch_size: int = eqx.field(static=True)

    def __init__(self, config: "AutoencoderConfig", *, key):
        channels, blocks, groups = config.channels, config.blocks, config.groups
        keys = iter(jax.random.split(key, 6 + len(channels) * (2 * blocks + 1)))
        patch_size = self.patch_size = config.patch_size
        in_channels, out_channels = config.in_channels, 2 * config.latent_channels
        self.stem = Conv(in_channels * patch_size * patch_size, channels[0], 3, key=next(keys))
        self.levels, self.downs, width = [], [], channels[0]
        for i, out in enumerate(channels):
            widths = [width] + [out] * blocks
            self.levels.append(_blocks(widths, groups, config.attention_levels[i], keys))
            width = out
            if i < len(channels) - 1:
                # Padding only below and right, as in the published autoencoders.
                side = (0, 1)
                self.downs.append(Conv(out, out, 3, stride=2, padding=(side, side), key=next(keys)))
        self.middle = _middle(width, groups, config.attention, keys)
        self.norm = GroupNorm(width, groups)
        self.head = Conv(width, out_channels, 3, key=next(keys))
        if config.quant_convs:
            self.head = ConvPair(self.head, Conv(out_channels, out_channels, 1, key=next(keys)))

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "zh zw zc"]:
        x = self.stem(space_to_depth(x, self.patch_size))
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.downs):
                x = self.downs[i](x)
        for block in self.middle:
            x = block(x)
        return self.head(jax.nn.silu(self.norm(x)))


class Decoder(eqx.Module):
    """Latent `(zh, zw, zc)` to image `(h, w, c)`, channels-last; the encoder's mirror.

    `features` is everything but the last layer, `head`, whose gradient balances the losses of
    adversarial training. With `quant_convs` the stem is two convolutions, the first 1 x 1 on the
    latent.
    """

    stem: Conv | ConvPair
    middle: list[ResnetBlock | AttentionBlock]
    levels: list[list[Any]]  # residual blocks, and attentions between them
    ups: list[Conv]
    norm: GroupNorm
    head: Conv
    patch_size: int = eqx.field(static=True)

    def __init__(self, config: "AutoencoderConfig", *, key):
        channels, groups = config.channels, config.groups
        blocks: Any = config.decoder_blocks  # an AutoencoderKL has filled it in
        keys = iter(jax.random.split(key, 6 + len(channels) * (2 * blocks + 1)))
        patch_size = self.patch_size = config.patch_size
        in_channels, out_channels = config.latent_channels, config.in_channels
        width = channels[-1]
        self.stem = Conv(in_channels, width, 3, key=next(keys))
        if config.quant_convs:
            self.stem = ConvPair(Conv(in_channels, in_channels, 1, key=next(keys)), self.stem)
        self.middle = _middle(width, groups, config.attention, keys)
        self.levels, self.ups = [], []
        for i, out in enumerate(reversed(channels)):
            here = config.attention_levels[-1 - i]
            self.levels.append(_blocks([width] + [out] * blocks, groups, here, keys))
            width = out
            if i < len(channels) - 1:
                self.ups.append(Conv(out, out, 3, key=next(keys)))
        self.norm = GroupNorm(width, groups)
        self.head = Conv(width, out_channels * patch_size * patch_size, 3, key=next(keys))

    def features(self, z: Float[Array, "zh zw zc"]) -> Float[Array, "h w d"]:
        """The input of the last layer."""
        x = self.stem(z)
        for block in self.middle:
            x = block(x)
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.ups):
                x = self.ups[i](upsample_nearest(x))
        return jax.nn.silu(self.norm(x))

    def __call__(self, z: Float[Array, "zh zw zc"]) -> Float[Array, "h w c"]:
        return depth_to_space(self.head(self.features(z)), self.patch_size)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How an `AutoencoderKL` was made: the arguments of its constructor, explained there.

    `shift` and `scale` are a number a latent channel, `attention_levels` has an entry a level.

    >>> config = AutoencoderConfig(1, 2, channels=(8,), blocks=1, groups=4)
    >>> config.build(key=jax.random.key(0)).config.scale
    (1.0, 1.0)
    """

    in_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    blocks: int
    decoder_blocks: int | None = None
    patch_size: int = 1
    groups: int = 32
    attention: bool = False
    attention_levels: tuple[bool, ...] = ()
    quant_convs: bool = False
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def build(self, *, key) -> "AutoencoderKL":
        """The autoencoder, with random weights."""
        return AutoencoderKL(**arguments(self), key=key)


class AutoencoderKL(NormalisedLatents):
    """A convolutional variational autoencoder between images in [-1, 1] and unit-variance latents.

    `encode` and `decode` speak normalised latents, `z = (z_raw - shift) * scale`, as
    `NormalisedLatents` says. `posterior` and `decoder` are the raw halves that training
    uses. `shift` and `scale` are a number a latent channel, measured on training data
    (`training.measure_latents`) and set with `with_latent_stats`; until then 0 and 1.

    **Arguments**:

    - `in_channels`, `latent_channels`: any; images `(in_channels, h, w)`.
    - `channels`: the width of each level; every further level halves the resolution.
    - `blocks`: residual blocks a level of the encoder.

    `options`, the other fields of `AutoencoderConfig`:

    - `decoder_blocks`: those of the decoder; `None` means as many, Stable Diffusion has one more.
    - `patch_size`: a space-to-depth before the first and after the last layer.
    - `groups`: of every GroupNorm; divides every width.
    - `attention`: single-head self-attention in the middle. `attention_levels`: one also after
      each residual block of these levels, a boolean for each; `()` means none.
    - `quant_convs`: a 1 x 1 convolution on the moments and one on the raw latent.
    - `shift`, `scale`: of the normalised latent, a number or one a latent channel.

    The downsampling factor is `patch * 2^(len(channels) - 1)`; image sides must divide by it.
    `kl_f4`, `kl_f8` and `kl_f16` have the published sizes; `kl_f8` is Stable Diffusion's.
    `config` is its `AutoencoderConfig`.

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> ae.decode(ae.encode(jnp.zeros((1, 8, 8)))).shape
    (1, 8, 8)
    """

    encoder: Encoder
    decoder: Decoder
    config: AutoencoderConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        *,
        channels: tuple[int, ...],
        blocks: int,
        key,
        **options: Any,
    ):
        sizes = dict(in_channels=in_channels, latent_channels=latent_channels)
        sizes |= dict(channels=channels, blocks=blocks)
        config = _completed(make_record(AutoencoderConfig, "AutoencoderKL", sizes | options))
        k1, k2 = jax.random.split(key)
        self.encoder, self.decoder = Encoder(config, key=k1), Decoder(config, key=k2)
        self.config = config

    @property
    def in_channels(self) -> int:
        """Of the images."""
        return self.config.in_channels

    @property
    def factor(self) -> int:
        """How many pixels a latent's pixel is wide."""
        return self.config.patch_size * 2 ** (len(self.config.channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The latent's shape for an image of this size; `ValueError` if it does not divide."""
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"AutoencoderKL: a {height} x {width} image does not divide by the "
                f"downsampling factor {self.factor}."
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def posterior(self, x: Float[Array, "c h w"]) -> Posterior:
        """`q(z_raw | x)`, the log-variance clamped to [-30, 20]."""
        if x.shape[0] != self.in_channels:
            raise ValueError(f"AutoencoderKL: need {self.in_channels} channels, got {x.shape[0]}.")
        self.latent_shape(*x.shape[1:])
        moments = self.encoder(jnp.moveaxis(x, 0, -1))
        return Posterior.of_moments(jnp.moveaxis(moments, -1, 0))

    def encode(
        self, x: Float[Array, "c h w"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "zc zh zw"]:
        """Image in [-1, 1] to normalised latent: a posterior sample with a `key`, else its mode."""
        posterior = self.normalise(self.posterior(x))
        return posterior.mean if key is None else posterior.sample(key)

    def decode(self, z: Float[Array, "zc zh zw"]) -> Float[Array, "c h w"]:
        """Normalised latent to image; values may overshoot [-1, 1] a little."""
        return jnp.moveaxis(self.decoder(jnp.moveaxis(self.raw(z), 0, -1)), -1, 0)


def _completed(config: AutoencoderConfig) -> AutoencoderConfig:
    """The configuration without a default left open, checked."""
    blocks, levels = config.decoder_blocks, len(config.channels)
    decoder_blocks = config.blocks if blocks is None else blocks
    sizes = (config.in_channels, config.latent_channels, *config.channels, config.blocks)
    if not levels or min(*sizes, decoder_blocks, config.patch_size, config.groups) < 1:
        raise ValueError(
            "AutoencoderKL: need at least one level and sizes of at least 1, got "
            f"in_channels={config.in_channels}, latent_channels={config.latent_channels}, "
            f"channels={config.channels}, blocks={config.blocks}, decoder_blocks={decoder_blocks}, "
            f"patch_size={config.patch_size}, groups={config.groups}."
        )
    attention_levels = config.attention_levels or (False,) * levels
    if len(attention_levels) != levels:
        raise ValueError(
            f"AutoencoderKL: attention_levels needs one entry for each of the {levels} levels of "
            f"channels, got {attention_levels}."
        )
    config = replace(config, decoder_blocks=decoder_blocks, attention_levels=attention_levels)
    return normalised(config, config.shift, config.scale)


def kl_f8(in_channels: int = 3, latent_channels: int = 4, *, key, **options) -> AutoencoderKL:
    """Stable Diffusion 1.x's and DiT's autoencoder (Rombach et al. 2022): 83,653,863 parameters.

    A 256 x 256 image becomes a 4 x 32 x 32 latent; shift 0, scale 0.18215. `options` are further
    arguments of `AutoencoderKL`.

    >>> ae = eqx.filter_eval_shape(kl_f8, key=jax.random.key(0))
    >>> ae.latent_shape(256, 384), ae.scale[0]
    ((4, 32, 48), 0.18215)
    """
    ae = _published(in_channels, latent_channels, (128, 256, 512, 512), options, key)
    return ae.with_latent_stats(0.0, 0.18215)


def kl_f4(in_channels: int = 3, latent_channels: int = 3, *, key, **options) -> AutoencoderKL:
    """The autoencoder of factor 4 (Rombach et al. 2022, table 8); measure shift and scale.

    >>> ae = eqx.filter_eval_shape(kl_f4, key=jax.random.key(0))
    >>> ae.latent_shape(256, 256)
    (3, 64, 64)
    """
    return _published(in_channels, latent_channels, (128, 256, 512), options, key)


def kl_f16(in_channels: int = 3, latent_channels: int = 16, *, key, **options) -> AutoencoderKL:
    """The autoencoder of factor 16 (Rombach et al. 2022, table 8); measure shift and scale.

    It has attention in its deepest level as well as in the middle.

    >>> ae = eqx.filter_eval_shape(kl_f16, key=jax.random.key(0))
    >>> ae.latent_shape(256, 256)
    (16, 16, 16)
    """
    deepest = dict(attention_levels=(False, False, False, False, True)) | options
    return _published(in_channels, latent_channels, (128, 128, 256, 256, 512), deepest, key)


def _published(in_channels, latent_channels, channels, options, key):
    sizes = dict(channels=channels, blocks=2, decoder_blocks=3, groups=32, attention=True)
    sizes |= dict(quant_convs=True) | options
    return AutoencoderKL(in_channels, latent_channels, **sizes, key=key)


def _blocks(widths, groups, attention, keys):
    """The residual blocks of a level, each with an attention after it where asked for."""
    blocks = []
    for a, b in pairwise(widths):
        blocks.append(ResnetBlock(a, b, groups=groups, key=next(keys)))
        if attention:
            blocks.append(AttentionBlock(b, groups=groups, key=next(keys)))
    return blocks


def _middle(width, groups, attention, keys):
    blocks: list[ResnetBlock | AttentionBlock] = [
        ResnetBlock(width, width, groups=groups, key=next(keys)) for _ in range(2)
    ]
    if attention:
        blocks.insert(1, AttentionBlock(width, groups=groups, key=next(keys)))
    return blocks
