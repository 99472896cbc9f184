"""AutoencoderKL: a convolutional VAE for latent diffusion (Rombach et al. 2022)."""

import dataclasses
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn.conv import Conv, depth_to_space, space_to_depth, upsample_nearest
from ..nn.norms import GroupNorm
from ..nn.resnet import AttentionBlock, ResnetBlock, silu_conv


class Posterior(eqx.Module):
    """A diagonal Gaussian `N(mean, exp(logvar))`: what an encoder says of one image."""

    mean: Float[Array, "zc zh zw"]
    logvar: Float[Array, "zc zh zw"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "zc zh zw"]:
        """`mean + exp(logvar / 2) n`, `n ~ N(0, I)`.

        >>> Posterior(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2))).sample(jax.random.key(0)).shape
        (1, 2, 2)
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class Encoder(eqx.Module):
    """Image `(h, w, c)` to the moments `(zh, zw, 2 zc)` of the latent, channels-last.

    A `patch x patch` space-to-depth, a convolution, then per level `blocks` residual blocks and,
    but for the last level, a stride-2 convolution; a middle of two residual blocks, with
    attention between them if asked for.
    """

    stem: Conv
    levels: list[list[ResnetBlock]]
    downs: list[Conv]
    middle: list[ResnetBlock | AttentionBlock]
    norm: GroupNorm
    head: Conv
    patch: int = eqx.field(static=True)

    def __init__(
        self, in_channels, out_channels, channels, blocks, patch, groups, attention, *, key
    ):
        keys = iter(jax.random.split(key, 6 + len(channels) * (blocks + 1)))
        self.patch = patch
        self.stem = Conv(in_channels * patch * patch, channels[0], 3, key=next(keys))
        self.levels, self.downs, width = [], [], channels[0]
        for i, out in enumerate(channels):
            widths = [width] + [out] * blocks
            self.levels.append(_resnets(widths, groups, keys))
            width = out
            if i < len(channels) - 1:
                # Padding only below and right, as in the published autoencoders.
                side = (0, 1)
                self.downs.append(Conv(out, out, 3, stride=2, padding=(side, side), key=next(keys)))
        self.middle = _middle(width, groups, attention, keys)
        self.norm = GroupNorm(width, groups)
        self.head = Conv(width, out_channels, 3, key=next(keys))

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "zh zw zc"]:
        x = self.stem(space_to_depth(x, self.patch))
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.downs):
                x = self.downs[i](x)
        for block in self.middle:
            x = block(x)
        return silu_conv(self.norm, self.head, x)


class Decoder(eqx.Module):
    """Latent `(zh, zw, zc)` to image `(h, w, c)`, channels-last; the encoder's mirror.

    `features` is everything but the last layer, `head`, whose gradient balances the losses of
    adversarial training.
    """

    stem: Conv
    middle: list[ResnetBlock | AttentionBlock]
    levels: list[list[ResnetBlock]]
    ups: list[Conv]
    norm: GroupNorm
    head: Conv
    patch: int = eqx.field(static=True)

    def __init__(
        self, in_channels, out_channels, channels, blocks, patch, groups, attention, *, key
    ):
        keys = iter(jax.random.split(key, 6 + len(channels) * (blocks + 1)))
        self.patch = patch
        width = channels[-1]
        self.stem = Conv(in_channels, width, 3, key=next(keys))
        self.middle = _middle(width, groups, attention, keys)
        self.levels, self.ups = [], []
        for i, out in enumerate(reversed(channels)):
            self.levels.append(_resnets([width] + [out] * blocks, groups, keys))
            width = out
            if i < len(channels) - 1:
                self.ups.append(Conv(out, out, 3, key=next(keys)))
        self.norm = GroupNorm(width, groups)
        self.head = Conv(width, out_channels * patch * patch, 3, key=next(keys))

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
        return depth_to_space(self.head(self.features(z)), self.patch)


class AutoencoderKL(eqx.Module):
    """A convolutional variational autoencoder between images in [-1, 1] and unit-variance latents.

    `encode` and `decode` speak normalised latents, `z = (z_raw - shift) * scale`: this class is
    the one place where that happens. `posterior` and `decoder` are the raw halves that training
    uses. `shift` and `scale` are a number a latent channel, measured on training data
    (`training.measure_latents`) and set with `with_latent_stats`; until then 0 and 1.

    **Arguments**:

    - `in_channels`, `latent_channels`: any; images `(in_channels, h, w)`.
    - `channels`: the width of each level; every further level halves the resolution.
    - `blocks`: residual blocks a level (the decoder has as many).
    - `patch`: a space-to-depth before the first and after the last layer.
    - `groups`: of every GroupNorm; divides every width.
    - `attention`: self-attention in the middle.

    The downsampling factor is `patch * 2^(len(channels) - 1)`; image sides must divide by it.

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> ae.decode(ae.encode(jnp.zeros((1, 8, 8)))).shape
    (1, 8, 8)
    """

    encoder: Encoder
    decoder: Decoder
    in_channels: int = eqx.field(static=True)
    latent_channels: int = eqx.field(static=True)
    factor: int = eqx.field(static=True)
    shift: tuple[float, ...] = eqx.field(static=True)
    scale: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        *,
        channels: tuple[int, ...],
        blocks: int,
        patch: int = 1,
        groups: int = 32,
        attention: bool = False,
        key,
    ):
        k1, k2 = jax.random.split(key)
        sizes = (channels, blocks, patch, groups, attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *sizes, key=k1)
        self.decoder = Decoder(latent_channels, in_channels, *sizes, key=k2)
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.factor = patch * 2 ** (len(channels) - 1)
        self.shift, self.scale = (0.0,) * latent_channels, (1.0,) * latent_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The latent's shape for an image of this size; `ValueError` if it does not divide."""
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"AutoencoderKL: a {height} x {width} image does not divide by the "
                f"downsampling factor {self.factor}."
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def with_latent_stats(self, shift: tuple[float, ...], scale: tuple[float, ...]):
        """The same autoencoder with another latent shift and scale, one a channel."""
        n = self.latent_channels
        if len(shift) != n or len(scale) != n or not all(s > 0 for s in scale):
            raise ValueError(f"with_latent_stats: need {n} shifts and {n} positive scales.")
        new = object.__new__(AutoencoderKL)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in {**values, "shift": tuple(shift), "scale": tuple(scale)}.items():
            object.__setattr__(new, name, value)
        return new

    def posterior(self, x: Float[Array, "c h w"]) -> Posterior:
        """`q(z_raw | x)`, the log-variance clamped to [-30, 20]."""
        if x.shape[0] != self.in_channels:
            raise ValueError(f"AutoencoderKL: need {self.in_channels} channels, got {x.shape[0]}.")
        self.latent_shape(*x.shape[1:])
        moments = jnp.moveaxis(self.encoder(jnp.moveaxis(x, 0, -1)), -1, 0)
        mean, logvar = jnp.split(moments, 2)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def normalise(self, posterior: Posterior) -> Posterior:
        """The posterior of `z` from that of `z_raw`."""
        shift, scale = self._stats(posterior.mean)
        return Posterior((posterior.mean - shift) * scale, posterior.logvar + 2 * jnp.log(scale))

    def encode(
        self, x: Float[Array, "c h w"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "zc zh zw"]:
        """Image in [-1, 1] to normalised latent: a posterior sample with a `key`, else its mode."""
        posterior = self.normalise(self.posterior(x))
        return posterior.mean if key is None else posterior.sample(key)

    def decode(self, z: Float[Array, "zc zh zw"]) -> Float[Array, "c h w"]:
        """Normalised latent to image; values may overshoot [-1, 1] a little."""
        if z.shape[0] != self.latent_channels:
            raise ValueError(
                f"AutoencoderKL: need {self.latent_channels} latent channels, got {z.shape[0]}."
            )
        shift, scale = self._stats(z)
        return jnp.moveaxis(self.decoder(jnp.moveaxis(z / scale + shift, 0, -1)), -1, 0)

    def _stats(self, z: Float[Array, "zc zh zw"]) -> tuple[Array, Array]:
        per_channel = lambda v: jnp.asarray(v, z.dtype)[:, None, None]
        return per_channel(self.shift), per_channel(self.scale)


def _resnets(widths, groups, keys):
    return [ResnetBlock(a, b, groups=groups, key=next(keys)) for a, b in pairwise(widths)]


def _middle(width, groups, attention, keys):
    blocks: list[ResnetBlock | AttentionBlock] = [
        ResnetBlock(width, width, groups=groups, key=next(keys)) for _ in range(2)
    ]
    if attention:
        blocks.insert(1, AttentionBlock(width, groups=groups, key=next(keys)))
    return blocks
