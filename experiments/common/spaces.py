"""What the diffusion works on: the latents of an autoencoder, or pixels; and what was trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqxldm.models import AutoencoderKL, DiT, Posterior, UNet
from eqxldm.sharding import batch_vmap


class Pixels(eqx.Module):
    """The image itself, in place of an autoencoder's latent."""

    in_channels: int = eqx.field(static=True)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.in_channels, height, width

    def encode(self, x: Float[Array, "c h w"], *, key: Any = None) -> Float[Array, "c h w"]:
        return x

    def decode(self, z: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        return z


class Trained(NamedTuple):
    """A finished run's models, and the shape of what the denoiser sees."""

    space: AutoencoderKL | Pixels
    denoiser: DiT | UNet
    shape: tuple[int, int, int]


def posterior_draw(autoencoder: AutoencoderKL) -> Callable[[Any, Any], dict[str, Any]]:
    """`prepare(batch, key) -> {"x0", "cond"}`: a fresh draw of each posterior, inside jit."""

    def one(mean, logvar, key):
        raw = Posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32))
        return autoencoder.normalise(raw).sample(key)

    def prepare(batch, key):
        keys = jax.random.split(key, len(batch["mean"]))
        x0 = batch_vmap(one)(batch["mean"], batch["logvar"], keys)
        return {"x0": x0, "cond": batch["cond"]}

    return prepare
