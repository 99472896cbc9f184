"""The networks of a run: the causal autoencoder, and the transformer that knows first frames."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import eqxldm as ex
from eqxldm import nn
from eqxldm.data.pixels import to_float, to_uint8
from eqxldm.models import (
    ByteTextEncoder,
    CaptionEncoder,
    CausalVideoAutoencoder,
    CrossAttentionDiTBlock,
    DiT,
    TwoTowers,
)
from eqxldm.nn.fields import with_fields
from eqxldm.text import vocabulary_size
from eqxldm.training import in_dtype

from ..train.config import AttentionName
from ..train.methods import ATTENTIONS, DTYPES, PREDICTIONS
from .config import Config
from .data import FOLD, MEL_FRAMES, NAMED

LEAST_TIME = 1e-3  # below it what is said of a known frame is that at this time


def make_diffusion(config: Config) -> ex.Diffusion:
    """The straight way from data to noise, and what the network says there."""
    return ex.Diffusion(ex.LinearFlow(), PREDICTIONS[config.diffusion.prediction])


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
        cell_map=options.cell_map,
        key=key,
    )


class KnownFrames(eqx.Module):
    """A denoiser of clips that may be told the first latent frames: `(x_t, t, cond) -> out`.

    `cond` is `{"known": (c, f, h, w), "mask": (f,)}`, and `"text"` of a network with captions.
    Where the mask is 1, the transformer sees the known latent in place of the noisy one, and a
    channel that says so. What is to be said there needs no network: `x_0` is known, and so the
    velocity of the way from it to `x_t`, `(x_t - x_0) / t`. So the loss counts the other frames
    alone, and a solver ends at the known frames: one network draws clips, goes on from a picture,
    and predicts what follows a few frames.
    """

    dit: DiT
    diffusion: ex.Diffusion
    dtype: Any = eqx.field(static=True, default=jnp.float32)

    @property
    def network(self) -> DiT:
        """What is saved."""
        return self.dit

    def with_frames(self, count: int) -> "KnownFrames":
        """The same weights for clips of another number of latent frames."""
        return with_fields(self, dit=self.dit.with_spatial((count, *self.dit.shape[2:])))

    def __call__(
        self, x_t: Float[Array, "c f h w"], t: Float[Array, ""], cond: PyTree, *, key: Any = None
    ) -> Float[Array, "c f h w"]:
        out = in_dtype(self.dit, self.dtype)(_seen(x_t, cond), t, cond.get("text"))
        return _with_known(self.diffusion, out, x_t, t, cond)


class SoundingClips(eqx.Module):
    """`KnownFrames` of clips with sound: `(x_t, t, cond) -> out`, dicts of `"video"` and `"sound"`.

    Frames may be told as there, whatever is known of the sound.
    """

    towers: TwoTowers
    diffusion: ex.Diffusion
    dtype: Any = eqx.field(static=True, default=jnp.float32)

    @property
    def network(self) -> TwoTowers:
        """What is saved."""
        return self.towers

    def __call__(self, x_t: Any, t: Any, cond: PyTree, *, key: Any = None) -> dict[str, Array]:
        video = x_t["video"]
        x = {"video": _seen(video, cond), "sound": x_t["sound"]}
        out = self.towers(jax.tree.map(lambda a: a.astype(self.dtype), x), t, cond.get("text"))
        out = jax.tree.map(lambda a: a.astype(jnp.float32), out)
        return out | {"video": _with_known(self.diffusion, out["video"], video, t["video"], cond)}


def _seen(x_t: Float[Array, "c f h w"], cond: PyTree) -> Float[Array, "c_and_one f h w"]:
    """The noisy latent with the known frames in it, and the channel that says where they are."""
    mask = cond["mask"][None, :, None, None].astype(x_t.dtype)
    seen = jnp.where(mask > 0, cond["known"].astype(x_t.dtype), x_t)
    return jnp.concatenate([seen, jnp.broadcast_to(mask, (1, *x_t.shape[1:]))])


def _with_known(
    diffusion: ex.Diffusion, out: Any, x_t: Any, t: Any, cond: PyTree
) -> Float[Array, "c f h w"]:
    """The network's output, and what it should be where frames are known."""
    at = diffusion.path.coefficients(jnp.maximum(t, LEAST_TIME))
    known = cond["known"].astype(x_t.dtype)
    exact = ex.convert(ex.predict_x0, diffusion.prediction, at, x_t, known)
    return jnp.where(cond["mask"][None, :, None, None] > 0, exact, out[: len(x_t)])


def make_text_encoder(
    config: Config, *, key: Any
) -> ByteTextEncoder | CaptionEncoder | nn.VectorEmbedding:
    """The transformer of captions, or what embeds the digits that they name; trained along."""
    options = config.diffusion
    if options.tokens == "digits":
        return nn.VectorEmbedding(NAMED, options.width, key=key)
    size = options.width, options.text_depth, options.num_heads, options.max_length
    if options.tokens == "bytes":
        return ByteTextEncoder(*size, key=key)
    return CaptionEncoder(*size, vocabulary_size(options.merges), key=key)


def make_dit(
    config: Config,
    latent: tuple[int, ...],
    *,
    captioned: bool,
    attention: nn.Attention = nn.attend,
    key: Any,
) -> DiT:
    """The spacetime transformer: patches of all frames at once, 3-D rotary positions, captions by
    cross-attention, or digits beside the time. Its shape has one channel more than the latent,
    which says what is known."""
    options = config.diffusion
    key, text_key = jax.random.split(key)
    size = options.width // options.num_heads
    # As Wan divides a head among frames, rows and columns.
    third = 2 * (size // 6)
    given: dict[str, Any] = {}
    if captioned:
        given["embed_cond"] = make_text_encoder(config, key=text_key)
        if options.tokens != "digits":
            given["block"] = CrossAttentionDiTBlock
    return DiT(
        (latent[0] + 1, *latent[1:]),
        patch_size=options.patch_size,
        depth=options.depth,
        width=options.width,
        num_heads=options.num_heads,
        swiglu=options.swiglu,
        qk_norm=nn.RMSNorm,
        rope=nn.RoPE((size - size % 2 - 2 * third, third, third)),
        attention=attention,
        key=key,
        **given,
    )


def make_towers(
    config: Config,
    latent: tuple[int, ...],
    *,
    captioned: bool,
    attention: nn.Attention = nn.attend,
    key: Any,
) -> TwoTowers:
    """The transformer of clips and sounds, both told when each of their tokens is."""
    options, clips = config.diffusion, config.clips
    key, text_key = jax.random.split(key)
    fps = clips.rate
    # A latent frame is at the middle of the frames that it stands for: 0, then 1 to 4, 5 to 8, ...
    frames = np.array([0.0, *(4 * np.arange(1, latent[1]) - 1.5)]) / fps
    seconds = frames.reshape(-1, options.patch_size[0]).mean(1)
    step = FOLD / (fps * MEL_FRAMES)
    return TwoTowers(
        (latent[0] + 1, *latent[1:]),
        sound_shape(config),
        video_seconds=tuple(seconds.tolist()),
        sound_seconds=tuple((step * (np.arange(sound_shape(config)[1]) + 0.5)).tolist()),
        patch_size=options.patch_size,
        depth=options.depth,
        width=options.width,
        num_heads=options.num_heads,
        swiglu=options.swiglu,
        embed_cond=make_text_encoder(config, key=text_key) if captioned else None,
        cross_attention=options.tokens != "digits",
        clock_rate=1 / step,
        attention=attention,
        key=key,
    )


def sound_shape(config: Config) -> tuple[int, int]:
    """Of the sound's latent."""
    return config.sound.latent_channels, config.clips.frames * MEL_FRAMES // FOLD


def make_denoiser(
    config: Config,
    latent: tuple[int, ...],
    *,
    captioned: bool,
    attention: AttentionName = "xla",
    key: Any,
) -> Any:
    """`make_dit` as a `KnownFrames`, or `make_towers` as `SoundingClips`."""
    sound, dtype = config.clips.sound, DTYPES[config.diffusion.dtype]
    make, told = (make_towers, SoundingClips) if sound else (make_dit, KnownFrames)
    attend = ATTENTIONS[attention]
    network: Any = make(config, latent, captioned=captioned, attention=attend, key=key)
    return told(network, make_diffusion(config), dtype)


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
