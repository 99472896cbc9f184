"""What the diffusion works on: the latents of an autoencoder, or pixels; and what was trained."""

from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Float

from eqxldm.models import AutoencoderKL, DiT, UNet


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
