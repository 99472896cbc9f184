"""The networks of a run: the causal autoencoder, and the transformer that knows first frames."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from eqxldm import nn
from eqxldm.data.pixels import to_float, to_uint8
from eqxldm.models import (
    ByteTextEncoder,
    CausalVideoAutoencoder,
    CrossAttentionDiTBlock,
    DiT,
)
from eqxldm.training import in_dtype

from ..train.methods import DTYPES
from .config import Config

LEAST_TIME = 1e-3  # below it the velocity of a known frame is that at this time


def make_autoencoder(config: Config, *, key: Any) -> CausalVideoAutoencoder:
    """4 x 8 x 8: squares of two pixels are folded, then space and time are halved twice."""
    options = config.autoencoder
    return CausalVideoAutoencoder(
        config.clips.channels,
        options.latent_channels,
        channels=options.channels,
        blocks=options.blocks,
        patch_size=options.patch_size,
        time_levels=(True, True),
        attention=False,
        quant_convs=False,
        key=key,
    )


class KnownFrames(eqx.Module):
    """A denoiser of clips that may be told the first latent frames: `(x_t, t, cond) -> velocity`.

    `cond` is `{"known": (c, f, h, w), "mask": (f,)}`, and `"text"` of a network with captions.
    Where the mask is 1, the transformer sees the known latent in place of the noisy one, and a
    channel that says so. The velocity there needs no network: on the way from `x_0` at `t = 0` to
    noise at `t = 1` it is `(x_t - x_0) / t`, which is exact. So the loss counts the other frames
    alone, and a solver ends at the known frames: one network draws clips, goes on from a picture,
    and predicts what follows a few frames.
    """

    dit: DiT
    dtype: Any = eqx.field(static=True, default=jnp.float32)

    def __call__(
        self, x_t: Float[Array, "c f h w"], t: Float[Array, ""], cond: PyTree, *, key: Any = None
    ) -> Float[Array, "c f h w"]:
        mask = cond["mask"][None, :, None, None].astype(x_t.dtype)
        known = cond["known"].astype(x_t.dtype)
        seen = jnp.where(mask > 0, known, x_t)
        flag = jnp.broadcast_to(mask, (1, *x_t.shape[1:]))
        out = in_dtype(self.dit, self.dtype)(jnp.concatenate([seen, flag]), t, cond.get("text"))
        exact = (x_t - known) / jnp.maximum(t, LEAST_TIME)
        return jnp.where(mask > 0, exact, out[: len(x_t)])


def make_dit(config: Config, latent: tuple[int, ...], *, captioned: bool, key: Any) -> DiT:
    """The spacetime transformer: patches of all frames at once, 3-D rotary positions, captions by
    cross-attention. Its shape has one channel more than the latent, which says what is known."""
    options = config.diffusion
    key, text_key = jax.random.split(key)
    size = options.width // options.num_heads
    # As Wan divides a head among frames, rows and columns.
    third = 2 * (size // 6)
    given: dict[str, Any] = {}
    if captioned:
        given["embed_cond"] = ByteTextEncoder(
            options.width, options.text_depth, options.num_heads, options.max_length, key=text_key
        )
        given["block"] = CrossAttentionDiTBlock
    return DiT(
        (latent[0] + 1, *latent[1:]),
        patch_size=options.patch_size,
        depth=options.depth,
        width=options.width,
        num_heads=options.num_heads,
        qk_norm=nn.RMSNorm,
        rope=nn.RoPE((size - size % 2 - 2 * third, third, third)),
        remat=None,
        key=key,
        **given,
    )


def make_denoiser(config: Config, latent: tuple[int, ...], *, captioned: bool, key: Any) -> Any:
    """`make_dit` as a `KnownFrames`."""
    dit = make_dit(config, latent, captioned=captioned, key=key)
    return KnownFrames(dit, DTYPES[config.diffusion.dtype])


def to_clips(frames: Any) -> Float[Array, "n c f h w"]:
    """Bytes `(n, f, h, w, c)` as the networks see them, in [-1, 1]; call it inside jit."""
    n, f = frames.shape[:2]
    x = to_float(frames.reshape(n * f, *frames.shape[2:]))
    return jnp.moveaxis(x.reshape(n, f, *x.shape[1:]), 1, 2)


def to_frames(clips: Float[Array, "n c f h w"]) -> Any:
    """Inverts `to_clips`."""
    x = jnp.moveaxis(clips, 2, 1)
    n, f = x.shape[:2]
    y = to_uint8(x.reshape(n * f, *x.shape[2:]))
    return y.reshape(n, f, *y.shape[1:])
