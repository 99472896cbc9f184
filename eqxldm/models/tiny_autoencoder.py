"""TinyAutoencoder: TAESD, a small autoencoder for the latents of published ones (Bohan 2023)."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn.conv import Conv, upsample_nearest
from ..nn.norms import GroupNorm
from .config import arguments, make_record
from .latents import Posterior

CERTAIN = -30.0  # a log-variance: that of a posterior without one


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """How a `TinyAutoencoder` was made: the arguments of its constructor, explained there.

    >>> config = TinyAutoencoderConfig(3, 4, width=8)
    >>> config.build(key=jax.random.key(0)).config == config
    True
    """

    in_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    pool: bool = False

    def build(self, *, key) -> "TinyAutoencoder":
        """The autoencoder, with random weights."""
        return TinyAutoencoder(**arguments(self), key=key)


class TinyPool(eqx.Module):
    """`conv(relu(norm(conv(x))))` of 1 x 1 convolutions: a look at the whole picture.

    >>> TinyPool(8, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 8)
    """

    conv1: Conv
    norm: GroupNorm
    conv2: Conv

    def __init__(self, width: int, *, key):
        k1, k2 = jax.random.split(key)
        self.conv1 = Conv(width, 4 * width, 1, use_bias=False, key=k1)
        self.norm = GroupNorm(4 * width, 4, 1e-5)
        self.conv2 = Conv(4 * width, width, 1, use_bias=False, key=k2)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        return self.conv2(jax.nn.relu(self.norm(self.conv1(x))))


class TinyBlock(eqx.Module):
    """`relu(x + conv(relu(conv(relu(conv(x))))))`, after `x += pool(x)` where it has one.

    >>> TinyBlock(8, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 8)
    """

    convs: list[Conv]
    pool: TinyPool | None

    def __init__(self, width: int, *, pool: bool = False, key):
        *keys, last = jax.random.split(key, 4)
        self.convs = [Conv(width, width, 3, key=k) for k in keys]
        self.pool = TinyPool(width, key=last) if pool else None

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        x = x if self.pool is None else x + self.pool(x)
        first, second, third = self.convs
        y = third(jax.nn.relu(second(jax.nn.relu(first(x)))))
        return jax.nn.relu(x + y)


class TinyHalf(eqx.Module):
    """The encoder or the decoder: a convolution, blocks with resampling between levels, another.

    `resample[i]` stands between levels `i` and `i + 1`: a step of two, or enlarged before.
    """

    stem: Conv
    levels: list[list[TinyBlock]]
    resample: list[Conv]
    head: Conv

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        blocks: tuple[int, ...],
        *,
        down: bool,
        pool_level: int | None,
        key,
    ):
        keys = iter(jax.random.split(key, 2 + sum(blocks) + len(blocks)))
        # Both sides are padded, where a step of two needs one only, as in PyTorch.
        step: dict[str, Any] = dict(stride=2, padding=((1, 1), (1, 1))) if down else {}
        self.stem = Conv(in_channels, width, 3, key=next(keys))
        self.levels = [
            [TinyBlock(width, pool=i == pool_level, key=next(keys)) for _ in range(count)]
            for i, count in enumerate(blocks)
        ]
        self.resample = [
            Conv(width, width, 3, use_bias=False, **step, key=next(keys)) for _ in blocks[1:]
        ]
        self.head = Conv(width, out_channels, 3, key=next(keys))


class TinyAutoencoder(eqx.Module):
    """TAESD: pictures `(c, h, w)` in [-1, 1] to the latents of a published autoencoder, and back.

    In a hundredth of its time, with softer pictures: for previews, and where the large one does
    not fit. Latents are as the diffusion model has them, shifted and scaled already.

    **Arguments**:

    - `in_channels`, `latent_channels`: 4 for Stable Diffusion 1, 2 and XL, 16 for SD3 and FLUX.1,
      32 for FLUX.2. Each of these has weights of its own.
    - `width`: of every layer.
    - `encoder_blocks`, `decoder_blocks`: of each level; between two the side is halved, or doubled.
    - `pool`: whether the blocks at the latent's size look at the whole picture, as for FLUX.2.

    `encode` and `decode` are called as `AutoencoderKL`'s; there is nothing random, and `key` is
    ignored. Values may overshoot [-1, 1]. `config` is its `TinyAutoencoderConfig`.

    **Raises** `ValueError` for sizes that do not fit.

    >>> ae = TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))
    >>> ae.encode(jnp.ones((3, 16, 24))).shape, ae.decode(jnp.ones((4, 2, 3))).shape
    ((4, 2, 3), (3, 16, 24))
    """

    encoder: TinyHalf
    decoder: TinyHalf
    config: TinyAutoencoderConfig = eqx.field(static=True)

    def __init__(self, in_channels: int = 3, latent_channels: int = 4, *, key, **options: Any):
        sizes = dict(in_channels=in_channels, latent_channels=latent_channels)
        config = make_record(TinyAutoencoderConfig, "TinyAutoencoder", sizes | options)
        _check(config)
        k1, k2 = jax.random.split(key)
        encoder, decoder, width = config.encoder_blocks, config.decoder_blocks, config.width
        self.encoder = TinyHalf(
            in_channels,
            latent_channels,
            width,
            encoder,
            down=True,
            pool_level=len(encoder) - 1 if config.pool else None,
            key=k1,
        )
        self.decoder = TinyHalf(
            latent_channels,
            in_channels,
            width,
            decoder,
            down=False,
            pool_level=0 if config.pool else None,
            key=k2,
        )
        self.config = config

    @property
    def in_channels(self) -> int:
        """Of the pictures."""
        return self.config.in_channels

    @property
    def latent_channels(self) -> int:
        """Of the latents."""
        return self.config.latent_channels

    @property
    def factor(self) -> int:
        """How many pixels a latent's pixel is wide."""
        return 2 ** (len(self.config.encoder_blocks) - 1)

    @property
    def shift(self) -> tuple[float, ...]:
        """Zeros: latents come out normalised."""
        return (0.0,) * self.latent_channels

    @property
    def scale(self) -> tuple[float, ...]:
        """Ones: latents come out normalised."""
        return (1.0,) * self.latent_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The latent's shape for a picture of this size; `ValueError` if it does not divide."""
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"TinyAutoencoder: a {height} x {width} picture does not divide by the "
                f"downsampling factor {self.factor}."
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def posterior(self, x: Float[Array, "c h w"]) -> Posterior:
        """The latent as a Gaussian without a spread: where an `AutoencoderKL`'s is asked for."""
        z = self.encode(x)
        return Posterior(z, jnp.full_like(z, CERTAIN))

    def normalise(self, posterior: Posterior) -> Posterior:
        """The posterior itself: latents are normalised already."""
        return posterior

    def encode(
        self, x: Float[Array, "c h w"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "zc zh zw"]:
        """Picture in [-1, 1] to normalised latent."""
        if x.shape[0] != self.in_channels:
            raise ValueError(
                f"TinyAutoencoder: need {self.in_channels} channels, got {x.shape[0]}."
            )
        self.latent_shape(*x.shape[1:])
        y = self.encoder.stem(jnp.moveaxis(0.5 * (x + 1), 0, -1))
        for i, level in enumerate(self.encoder.levels):
            y = y if i == 0 else self.encoder.resample[i - 1](y)
            for block in level:
                y = block(y)
        return jnp.moveaxis(self.encoder.head(y), -1, 0)

    def decode(self, z: Float[Array, "zc zh zw"]) -> Float[Array, "c h w"]:
        """Normalised latent to picture; latents beyond 3 are bent back, `3 tanh(z / 3)`."""
        if z.shape[0] != self.latent_channels:
            raise ValueError(
                f"TinyAutoencoder: need {self.latent_channels} latent channels, got {z.shape[0]}."
            )
        y = jax.nn.relu(self.decoder.stem(jnp.moveaxis(3 * jnp.tanh(z / 3), 0, -1)))
        for i, level in enumerate(self.decoder.levels):
            y = y if i == 0 else self.decoder.resample[i - 1](upsample_nearest(y))
            for block in level:
                y = block(y)
        return 2 * jnp.moveaxis(self.decoder.head(y), -1, 0) - 1


def _check(config: TinyAutoencoderConfig) -> None:
    encoder, decoder = config.encoder_blocks, config.decoder_blocks
    sizes = (config.in_channels, config.latent_channels, config.width)
    if len(encoder) != len(decoder) or min(*sizes, *encoder, *decoder, len(encoder)) < 1:
        raise ValueError(
            "TinyAutoencoder: need as many levels in the decoder as in the encoder, and sizes of "
            f"at least 1; got encoder_blocks={encoder}, decoder_blocks={decoder}, "
            f"in_channels={sizes[0]}, latent_channels={sizes[1]}, width={sizes[2]}."
        )
