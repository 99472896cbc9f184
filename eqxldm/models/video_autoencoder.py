"""CausalVideoAutoencoder: a VAE of clips whose frames see only what came before (Wan 2025)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn.attention import AttentionBlock
from ..nn.causal_conv import (
    SMALLEST,
    CausalConv3d,
    CausalResnetBlock,
    ClipDownsample,
    ClipUpsample,
    FrameCache,
    average_down,
    repeat_up,
)
from ..nn.conv import depth_to_space, space_to_depth
from ..nn.fields import with_fields
from ..nn.linear import Linear
from ..nn.norms import RMSNorm
from .config import arguments, make_record
from .latents import NormalisedLatents, Posterior, normalised


class Cell(NamedTuple):
    """What one latent pixel stands for: `channels x time x side x side` numbers."""

    channels: int
    time: int
    side: int

    @property
    def numbers(self) -> int:
        return self.channels * self.time * self.side**2


class VideoEncoder(eqx.Module):
    """Clip `(f, h, w, c)` to the moments `(zf, zh, zw, 2 zc)` of the latent, channels-last.

    `downs[i]` stands after level `i`. With `shortcuts` the mean of a level's input
    (`average_down`) is added to what comes out of the level and its resampling.
    """

    stem: CausalConv3d
    levels: list[list[CausalResnetBlock]]
    downs: list[ClipDownsample]
    middle: list[CausalResnetBlock | AttentionBlock]
    norm: RMSNorm
    head: CausalConv3d
    quant: CausalConv3d | None
    cell_map: Linear | None
    patch_size: int = eqx.field(static=True)
    shortcuts: bool = eqx.field(static=True)
    cell: Cell = eqx.field(static=True)

    def __init__(self, config: "CausalVideoAutoencoderConfig", cell_map: Linear | None, *, key):
        self.cell_map, self.cell = cell_map, config.cell
        channels, blocks = config.channels, config.blocks
        times: Any = config.time_levels  # which the autoencoder has filled in
        keys = iter(jax.random.split(key, 7 + len(channels) * (blocks + 1)))
        self.patch_size, self.shortcuts = config.patch_size, config.shortcuts
        self.stem = CausalConv3d(
            config.in_channels * config.patch_size**2, channels[0], 3, key=next(keys)
        )
        self.levels, self.downs, width = [], [], channels[0]
        for i, out in enumerate(channels):
            self.levels.append(_blocks([width] + [out] * blocks, keys))
            width = out
            if i < len(channels) - 1:
                self.downs.append(ClipDownsample(out, time=times[i], key=next(keys)))
        self.middle = _middle(width, config.attention, keys)
        self.norm = RMSNorm(width, SMALLEST)
        moments, gain = 2 * config.latent_channels, 0.1 if config.cell_map else 1.0
        self.head = CausalConv3d(width, moments, 3, gain=gain, key=next(keys))
        self.quant = None
        if config.quant_convs:
            self.quant = CausalConv3d(moments, moments, 1, key=next(keys))

    def __call__(
        self, x: Float[Array, "f h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "zf zh zw zc"]:
        clip, x = x, jax.vmap(lambda frame: space_to_depth(frame, self.patch_size))(x)
        x = self.stem(x, cache)
        for i, level in enumerate(self.levels):
            before = x
            for block in level:
                x = block(x, cache)
            down = self.downs[i] if i < len(self.downs) else None
            x = x if down is None else down(x, cache)
            if self.shortcuts:
                time = 1 if down is None or down.time is None else 2
                x = x + average_down(before, x.shape[-1], time, 1 if down is None else 2)
        x = _through(self.middle, x, cache)
        x = self.head(jax.nn.silu(self.norm(x)), cache)
        x = x if self.quant is None else self.quant(x)
        if self.cell_map is None:
            return x
        return x + self.cell_map(average_down(clip, self.cell.numbers, *self.cell[1:]))


class VideoDecoder(eqx.Module):
    """Latent `(zf, zh, zw, zc)` to clip `(f, h, w, c)`, channels-last; the encoder's mirror.

    `ups[i]` stands after level `i`, counted from the deepest. With `shortcuts` what a level is
    given is enlarged (`repeat_up`) and added to what comes out of its resampling; without, that
    resampling halves the channels. `features` is everything but the last layer, `head`, as in the
    decoder of images.
    """

    quant: CausalConv3d | None
    stem: CausalConv3d
    middle: list[CausalResnetBlock | AttentionBlock]
    levels: list[list[CausalResnetBlock]]
    ups: list[ClipUpsample]
    norm: RMSNorm
    head: CausalConv3d
    cell_map: Linear | None
    patch_size: int = eqx.field(static=True)
    shortcuts: bool = eqx.field(static=True)
    cell: Cell = eqx.field(static=True)

    def __init__(self, config: "CausalVideoAutoencoderConfig", cell_map: Linear | None, *, key):
        self.cell_map, self.cell = cell_map, config.cell
        channels: Any = config.decoder_channels  # which the autoencoder has filled in
        blocks: Any = config.decoder_blocks
        times: Any = config.time_levels
        keys = iter(jax.random.split(key, 7 + len(channels) * (blocks + 1)))
        self.patch_size, self.shortcuts = config.patch_size, config.shortcuts
        latent, width = config.latent_channels, channels[-1]
        self.quant = CausalConv3d(latent, latent, 1, key=next(keys)) if config.quant_convs else None
        self.stem = CausalConv3d(latent, width, 3, key=next(keys))
        self.middle = _middle(width, config.attention, keys)
        self.levels, self.ups = [], []
        for i, out in enumerate(reversed(channels)):
            self.levels.append(_blocks([width] + [out] * blocks, keys))
            width = out
            if i < len(channels) - 1:
                width = out if config.shortcuts else out // 2
                self.ups.append(ClipUpsample(out, width, time=times[-1 - i], key=next(keys)))
        self.norm = RMSNorm(width, SMALLEST)
        gain = 0.0 if config.cell_map else 1.0
        self.head = CausalConv3d(
            width, config.in_channels * config.patch_size**2, 3, gain=gain, key=next(keys)
        )

    def features(
        self, z: Float[Array, "zf zh zw zc"], cache: FrameCache | None = None
    ) -> Float[Array, "f h w d"]:
        """The input of the last layer."""
        x = self.stem(z if self.quant is None else self.quant(z), cache)
        x = _through(self.middle, x, cache)
        for i, level in enumerate(self.levels):
            before = x
            for block in level:
                x = block(x, cache)
            if i < len(self.ups):
                up = self.ups[i]
                x = up(x, cache)
                if self.shortcuts:
                    time, first = 1 if up.time is None else 2, cache is None or cache.first
                    x = x + repeat_up(before, x.shape[-1], time, 2, first=first)
        return jax.nn.silu(self.norm(x))

    def __call__(
        self, z: Float[Array, "zf zh zw zc"], cache: FrameCache | None = None
    ) -> Float[Array, "f h w c"]:
        x = self.head(self.features(z, cache), cache)
        x = jax.vmap(lambda frame: depth_to_space(frame, self.patch_size))(x)
        if self.cell_map is None:
            return x
        mapped, first = self.cell_map(z), cache is None or cache.first
        return x + repeat_up(mapped, x.shape[-1], *self.cell[1:], first=first)


@dataclass(frozen=True)
class CausalVideoAutoencoderConfig:
    """How a `CausalVideoAutoencoder` was made: the arguments of its constructor, explained there.

    `shift` and `scale` are a number a latent channel, `time_levels` has an entry for each level but
    the last.

    >>> config = CausalVideoAutoencoderConfig(1, 2, channels=(8, 8), blocks=1)
    >>> config.build(key=jax.random.key(0)).config.time_levels
    (True,)
    """

    in_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    blocks: int
    decoder_channels: tuple[int, ...] | None = None
    decoder_blocks: int | None = None
    time_levels: tuple[bool, ...] | None = None
    patch_size: int = 1
    attention: bool = True
    shortcuts: bool = False
    quant_convs: bool = True
    cell_map: bool = False
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    @property
    def cell(self) -> Cell:
        """What a latent pixel stands for."""
        time = 2 ** sum(self.time_levels or ())
        return Cell(self.in_channels, time, self.patch_size * 2 ** (len(self.channels) - 1))

    def build(self, *, key) -> "CausalVideoAutoencoder":
        """The autoencoder, with random weights."""
        return CausalVideoAutoencoder(**arguments(self), key=key)


class CausalVideoAutoencoder(NormalisedLatents):
    """A convolutional VAE between clips `(c, f, h, w)` in [-1, 1] and unit-variance latents.

    No frame sees a later one, and the first stands alone: `1 + 4 k` frames become `1 + k` latent
    frames, so that an image is a clip of one frame. The form of Wan 2.1's and 2.2's autoencoders
    (Wan 2025, section 4.1), and of small ones of any width.

    `encode` and `decode` speak normalised latents, `z = (z_raw - shift) * scale`, as
    `AutoencoderKL` does. They compute the whole clip at once, or with `chunked` one group of frames
    after the other in a `jax.lax.scan`, each layer keeping the last frames of its input: the same
    numbers, and memory that does not grow with the clip but for the clip itself.

    **Arguments**:

    - `in_channels`, `latent_channels`: any.
    - `channels`: the width of each level; every further level halves height and width.
    - `blocks`: residual blocks a level of the encoder.

    `options`, the other fields of `CausalVideoAutoencoderConfig`:

    - `decoder_channels`, `decoder_blocks`: those of the decoder; None means as in the encoder, Wan
      has one block more.
    - `time_levels`: whether time is halved, too, after each level but the last; None means after
      the last two of them, so that the time compression is 4 with three levels or more.
    - `patch_size`: a space-to-depth before the first and after the last layer.
    - `attention`: single-head self-attention within each frame, in the middle.
    - `shortcuts`: around each level a path without parameters (Wan 2.2).
    - `quant_convs`: a 1 x 1 x 1 convolution on the moments and one on the raw latent.
    - `cell_map`: beside the convolutions a linear map of each latent pixel's cell, its own frames
      and pixels (the first frame's with zeros before it), to the moments, and one back. It starts
      as a projection onto a random subspace and learns within some hundred steps what principal
      components give, while the convolutions start at nothing and learn the rest: for small
      budgets of training.
    - `shift`, `scale`: of the normalised latent, a number or one a latent channel.

    `config` is its `CausalVideoAutoencoderConfig`. Batches are made by `jax.vmap`.

    **Raises** `ValueError` for sizes that do not fit, and for a clip of another number of frames
    than `1 + time_factor k`.

    >>> ae = CausalVideoAutoencoder(1, 2, channels=(4, 8, 8), blocks=1, key=jax.random.key(0))
    >>> eqx.filter_eval_shape(ae.encode, jnp.zeros((1, 5, 8, 8))).shape
    (2, 2, 2, 2)
    """

    encoder: VideoEncoder
    decoder: VideoDecoder
    config: CausalVideoAutoencoderConfig = eqx.field(static=True)

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
        name = "CausalVideoAutoencoder"
        config = _completed(make_record(CausalVideoAutoencoderConfig, name, sizes | options))
        k1, k2 = jax.random.split(key)
        down, up = _cell_maps(config, jax.random.fold_in(key, 2))
        self.encoder = VideoEncoder(config, down, key=k1)
        self.decoder = VideoDecoder(config, up, key=k2)
        self.config = config

    @property
    def in_channels(self) -> int:
        """Of the clips."""
        return self.config.in_channels

    @property
    def factor(self) -> int:
        """How many pixels a latent's pixel is wide."""
        return self.config.cell.side

    @property
    def time_factor(self) -> int:
        """How many frames a latent frame but the first stands for."""
        return self.config.cell.time

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latent's shape for such a clip; `ValueError` if it does not divide.

        >>> ae = CausalVideoAutoencoder(1, 2, channels=(4, 4), blocks=1, key=jax.random.key(0))
        >>> ae.latent_shape(5, 8, 12)
        (2, 3, 4, 6)
        """
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"CausalVideoAutoencoder: a {height} x {width} frame does not divide by the "
                f"downsampling factor {self.factor}."
            )
        time = self.time_factor
        if frames < 1 or (frames - 1) % time:
            near = 1 + time * max(0, (frames - 1) // time)
            raise ValueError(
                f"CausalVideoAutoencoder: a clip must have 1 + {time} k frames, such as {near} or "
                f"{near + time}; got {frames}."
            )
        return (
            self.latent_channels,
            1 + (frames - 1) // time,
            height // self.factor,
            width // (self.factor),
        )

    def posterior(self, x: Float[Array, "c f h w"], *, chunked: bool = False) -> Posterior:
        """`q(z_raw | x)`, the log-variance clamped to [-30, 20]."""
        if x.shape[0] != self.in_channels:
            raise ValueError(
                f"CausalVideoAutoencoder: need {self.in_channels} channels, got {x.shape[0]}."
            )
        self.latent_shape(*x.shape[1:])
        moments = _run(self.encoder, jnp.moveaxis(x, 0, -1), self.time_factor if chunked else None)
        return Posterior.of_moments(jnp.moveaxis(moments, -1, 0))

    def encode(
        self,
        x: Float[Array, "c f h w"],
        *,
        key: Key[Array, ""] | None = None,
        chunked: bool = False,
    ) -> Float[Array, "zc zf zh zw"]:
        """Clip in [-1, 1] to normalised latent: a posterior sample with a `key`, else its mode."""
        posterior = self.normalise(self.posterior(x, chunked=chunked))
        return posterior.mean if key is None else posterior.sample(key)

    def decode(
        self, z: Float[Array, "zc zf zh zw"], *, chunked: bool = False
    ) -> Float[Array, "c f h w"]:
        """Normalised latent to clip; values may overshoot [-1, 1] a little."""
        raw = jnp.moveaxis(self.raw(z), 0, -1)
        return jnp.moveaxis(_run(self.decoder, raw, 1 if chunked else None), -1, 0)


def _run(half: Callable[..., Array], x: Array, chunk: int | None) -> Array:
    """The encoder or the decoder: on the whole clip, or on the first frame and then on `chunk`
    frames after `chunk` frames."""
    if chunk is None:
        return half(x)
    cache = FrameCache()
    first = half(x[:1], cache)
    if len(x) == 1:
        return first

    def step(frames: list[Array], part: Array) -> tuple[list[Array], Array]:
        cache = FrameCache(frames)
        y = half(part, cache)
        return cache.frames, y

    parts = x[1:].reshape(-1, chunk, *x.shape[1:])
    _, rest = jax.lax.scan(step, cache.frames, parts)
    return jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])])


def _completed(config: CausalVideoAutoencoderConfig) -> CausalVideoAutoencoderConfig:
    """The configuration without a default left open, checked."""
    channels, blocks = config.channels, config.decoder_blocks
    levels = len(channels)
    decoder = channels if config.decoder_channels is None else config.decoder_channels
    times = config.time_levels
    times = tuple(i >= levels - 3 for i in range(levels - 1)) if times is None else times
    config = replace(
        config,
        decoder_channels=decoder,
        decoder_blocks=config.blocks if blocks is None else blocks,
        time_levels=times,
    )
    sizes: list[Any] = [config.in_channels, config.latent_channels, *channels, *decoder]
    sizes += [config.blocks, config.decoder_blocks, config.patch_size]
    if not levels or min(sizes) < 1 or len(times) != levels - 1 or len(decoder) != levels:
        raise ValueError(
            "CausalVideoAutoencoder: need at least one level, sizes of at least 1, as many "
            f"decoder_channels as channels and one of time_levels less; got {config}."
        )
    cells = [4 * (1 + time) for time in times] + [1]  # numbers of a shortcut's cell, a level each
    for i, (a, b) in enumerate(pairwise((channels[0], *channels))):
        if config.shortcuts and a * cells[i] % b:
            raise ValueError(
                f"CausalVideoAutoencoder: with shortcuts the width of level {i}, {b}, must divide "
                f"the {a * cells[i]} numbers that come in for it."
            )
    if not config.shortcuts and any(width % 2 for width in decoder[1:]):
        raise ValueError(
            f"CausalVideoAutoencoder: the decoder halves its widths {decoder}, so all but the "
            "first must be even."
        )
    return normalised(config, config.shift, config.scale)


def _cell_maps(
    config: CausalVideoAutoencoderConfig, key: Any
) -> tuple[Linear, Linear] | tuple[None, None]:
    """The linear maps of a cell to moments and of a latent to a cell: at first each other's
    transposes, and the posteriors' standard deviation `exp(-3)`."""
    if not config.cell_map:
        return None, None
    n, latent = config.cell.numbers, config.latent_channels
    basis = jax.nn.initializers.orthogonal()(key, (latent, n))
    down = Linear(
        n, 2 * latent, init=lambda _, shape: jnp.zeros(shape).at[:latent].set(basis), key=key
    )
    down = with_fields(down, bias=jnp.repeat(jnp.array([0.0, -6.0]), latent))
    return down, Linear(latent, n, init=lambda *_: basis.T, key=key)


def _blocks(widths: list[int], keys: Any) -> list[CausalResnetBlock]:
    return [CausalResnetBlock(a, b, key=next(keys)) for a, b in pairwise(widths)]


def _middle(width: int, attention: bool, keys: Any) -> list[CausalResnetBlock | AttentionBlock]:
    first, last = _blocks([width] * 3, keys)
    if not attention:
        return [first, last]
    norm = lambda size: RMSNorm(size, SMALLEST)
    return [first, AttentionBlock(width, norm=norm, key=next(keys)), last]


def _through(
    blocks: list[CausalResnetBlock | AttentionBlock], x: Array, cache: FrameCache | None
) -> Array:
    """The middle: attention sees one frame at a time."""
    for block in blocks:
        x = jax.vmap(block)(x) if isinstance(block, AttentionBlock) else block(x, cache)
    return x
