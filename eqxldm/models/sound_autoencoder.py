"""SoundAutoencoder: a causal 1-D VAE of spectrograms."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from ..nn.causal_conv import CausalConv3d
from ..nn.linear import Linear
from ..nn.norms import RMSNorm
from ..nn.stack import Stack
from .config import arguments, make_record
from .latents import NormalisedLatents, Posterior, normalised


class SoundBlock(eqx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` over time: convolutions of three steps, causal.

    >>> SoundBlock(8, key=jax.random.key(0))(jax.numpy.ones((5, 8))).shape
    (5, 8)
    """

    norm1: RMSNorm
    conv1: CausalConv3d
    norm2: RMSNorm
    conv2: CausalConv3d

    def __init__(self, width: int, *, key):
        k1, k2 = jax.random.split(key)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.conv1 = CausalConv3d(width, width, 1, time=3, key=k1)
        self.conv2 = CausalConv3d(width, width, 1, time=3, gain=0.1, key=k2)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        y = x[:, None, None]  # a clip of frames of one pixel
        y = self.conv1(jax.nn.silu(self.norm1(y)))
        return x + self.conv2(jax.nn.silu(self.norm2(y)))[:, 0, 0]


class SoundCoder(eqx.Module):
    """Steps `(n, in)` to steps `(n, out)`: a linear layer, `SoundBlock`s, a norm, a linear layer.

    >>> SoundCoder(6, 8, 2, 4, key=jax.random.key(0))(jax.numpy.ones((5, 6))).shape
    (5, 4)
    """

    stem: Linear
    blocks: Stack
    norm: RMSNorm
    head: Linear

    def __init__(self, in_size: int, width: int, blocks: int, out_size: int, *, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.stem = Linear(in_size, width, key=k1)
        make = lambda key: SoundBlock(width, key=key)
        self.blocks = Stack(make, blocks, remat=None, key=k2)
        self.norm = RMSNorm(width)
        self.head = Linear(width, out_size, key=k3)

    def __call__(self, x: Float[Array, "n in"]) -> Float[Array, "n out"]:
        return self.head(jax.nn.silu(self.norm(self.blocks(self.stem(x)))))


@dataclass(frozen=True)
class SoundAutoencoderConfig:
    """How a `SoundAutoencoder` was made: the arguments of its constructor, explained there.

    >>> SoundAutoencoderConfig(6, 2, width=8).build(key=jax.random.key(0)).config.fold
    4
    """

    bands: int
    latent_channels: int
    width: int = 128
    blocks: int = 2
    fold: int = 4
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def build(self, *, key) -> "SoundAutoencoder":
        """The autoencoder, with random weights."""
        return SoundAutoencoder(**arguments(self), key=key)


class SoundAutoencoder(NormalisedLatents):
    """A VAE between spectrograms `(bands, frames)` in about [-1, 1] and unit-variance latents.

    `fold` frames become one latent step, `(latent_channels, frames / fold)`; no step sees a later
    frame, as in `CausalVideoAutoencoder`. The bands are channels, so that the convolutions are over
    time alone. `encode` and `decode` speak normalised latents, `z = (z_raw - shift) * scale`.

    **Arguments**:

    - `bands`, `latent_channels`: of spectrogram and latent.
    - `width`, `blocks`: of the encoder, and of the decoder.
    - `fold`: frames in a latent step.
    - `shift`, `scale`: of the normalised latent, a number or one a latent channel.

    `config` is its `SoundAutoencoderConfig`.

    **Raises** `ValueError` for sizes below 1, and for a spectrogram that does not divide.

    >>> autoencoder = SoundAutoencoder(40, 8, width=16, key=jax.random.key(0))
    >>> z = autoencoder.encode(jax.numpy.zeros((40, 12)))
    >>> z.shape, autoencoder.decode(z).shape
    ((8, 3), (40, 12))
    """

    encoder: SoundCoder
    decoder: SoundCoder
    config: SoundAutoencoderConfig = eqx.field(static=True)

    def __init__(self, bands: int, latent_channels: int, *, key, **options: Any):
        sizes = dict(bands=bands, latent_channels=latent_channels)
        config = make_record(SoundAutoencoderConfig, "SoundAutoencoder", sizes | options)
        if min(bands, latent_channels, config.width, config.blocks, config.fold) < 1:
            raise ValueError(f"SoundAutoencoder: sizes must be at least 1, got {config}.")
        config = normalised(config, config.shift, config.scale)
        k1, k2 = jax.random.split(key)
        step, inner = bands * config.fold, (config.width, config.blocks)
        self.encoder = SoundCoder(step, *inner, 2 * latent_channels, key=k1)
        self.decoder = SoundCoder(latent_channels, *inner, step, key=k2)
        self.config = config

    def posterior(self, y: Float[Array, "bands frames"]) -> Posterior:
        """`q(z_raw | y)`, the log-variance clamped to [-30, 20]."""
        bands, fold = self.config.bands, self.config.fold
        if y.shape[0] != bands or y.shape[1] % fold or not y.shape[1]:
            raise ValueError(
                f"SoundAutoencoder: need a spectrogram ({bands}, frames) with frames a multiple of "
                f"{fold}, got {y.shape}."
            )
        steps = y.T.reshape(-1, fold * bands)
        return Posterior.of_moments(self.encoder(steps).T)

    def encode(
        self, y: Float[Array, "bands frames"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "zc n"]:
        """A normalised latent: a posterior sample with a `key`, else its mode."""
        posterior = self.normalise(self.posterior(y))
        return posterior.mean if key is None else posterior.sample(key)

    def decode(self, z: Float[Array, "zc n"]) -> Float[Array, "bands frames"]:
        """A normalised latent to a spectrogram."""
        return self.decode_raw(self.raw(z))

    def decode_raw(self, z_raw: Float[Array, "zc n"]) -> Float[Array, "bands frames"]:
        """A raw latent, such as a sample of `posterior`, to a spectrogram: what training needs."""
        return self.decoder(z_raw.T).reshape(-1, self.config.bands).T
