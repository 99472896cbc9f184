"""What an encoder says of a latent, and the normalisation of latents that autoencoders share."""

from dataclasses import replace
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn.fields import with_fields

Record = TypeVar("Record")
Own = TypeVar("Own")


class Posterior(eqx.Module):
    """A diagonal Gaussian `N(mean, exp(logvar))`: what an encoder says of one image or clip."""

    mean: Float[Array, "zc *space"]
    logvar: Float[Array, "zc *space"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "zc *space"]:
        """`mean + exp(logvar / 2) n`, `n ~ N(0, I)`.

        >>> Posterior(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2))).sample(jax.random.key(0)).shape
        (1, 2, 2)
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    @classmethod
    def of_moments(cls, moments: Float[Array, "two_zc *space"]) -> "Posterior":
        """Of an encoder's output, the log-variance clamped to [-30, 20]."""
        mean, logvar = jnp.split(moments, 2)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))


class NormalisedLatents(eqx.Module):
    """What the autoencoders have in common: `z = (z_raw - shift) * scale`, a number a channel.

    `config` is the record of the autoencoder, with `latent_channels`, `shift` and `scale`.
    """

    config: eqx.AbstractVar[Any]

    @property
    def latent_channels(self) -> int:
        """Of the latents."""
        return self.config.latent_channels

    @property
    def shift(self) -> tuple[float, ...]:
        """Subtracted from a raw latent, a number a channel."""
        return self.config.shift

    @property
    def scale(self) -> tuple[float, ...]:
        """What the difference is multiplied by, a number a channel."""
        return self.config.scale

    def with_latent_stats(
        self: Own, shift: float | int | tuple[float, ...], scale: float | int | tuple[float, ...]
    ) -> Own:
        """The same autoencoder with another latent shift and scale: one a channel, or one for all.

        >>> from eqxldm.models import AutoencoderKL
        >>> ae = AutoencoderKL(1, 2, channels=(8,), blocks=1, groups=4, key=jax.random.key(0))
        >>> ae.with_latent_stats(0, 0.18215).scale
        (0.18215, 0.18215)
        """
        config = normalised(self.config, shift, scale)  # type: ignore[attr-defined]
        return with_fields(self, config=config)  # type: ignore[arg-type]

    def normalise(self, posterior: Posterior) -> Posterior:
        """The posterior of `z` from that of `z_raw`."""
        shift, scale = self._stats(posterior.mean)
        return Posterior((posterior.mean - shift) * scale, posterior.logvar + 2 * jnp.log(scale))

    def raw(self, z: Float[Array, "zc *space"]) -> Float[Array, "zc *space"]:
        """`z_raw` of a normalised latent; `ValueError` for another number of channels."""
        if z.shape[0] != self.latent_channels:
            raise ValueError(
                f"{type(self).__name__}: need {self.latent_channels} latent channels, got "
                f"{z.shape[0]}."
            )
        shift, scale = self._stats(z)
        return z / scale + shift

    def _stats(self, z: Array) -> tuple[Array, Array]:
        per_channel = lambda v: jnp.asarray(v, z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        return per_channel(self.shift), per_channel(self.scale)


def normalised(config: Record, shift: Any, scale: Any) -> Record:
    """The configuration of an autoencoder with this shift and scale, spread over the channels.

    **Raises** `ValueError` for another number of them, and for scales that are not positive.

    >>> from eqxldm.models import AutoencoderConfig
    >>> normalised(AutoencoderConfig(1, 2, channels=(8,), blocks=1), 0, 2).scale
    (2.0, 2.0)
    """
    n = config.latent_channels  # type: ignore[attr-defined]
    shift, scale = (
        tuple(map(float, value if isinstance(value, tuple) else (value,) * n))
        for value in (shift, scale)
    )
    if len(shift) != n or len(scale) != n or not all(s > 0 for s in scale):
        raise ValueError(
            f"with_latent_stats: need {n} shifts and {n} positive scales, or a number for all "
            f"channels; got {shift} and {scale}."
        )
    return replace(config, shift=shift, scale=scale)  # type: ignore[type-var]
