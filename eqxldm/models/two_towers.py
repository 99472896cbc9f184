"""TwoTowers: a transformer of clips and one of sounds, that look at each other on one clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..nn.attention import Attention, CrossAttention, attend, check_heads
from ..nn.conditioning import embed_condition, embed_times
from ..nn.embeddings import sincos_positions
from ..nn.linear import Linear
from ..nn.modulation import Modulation, modulate
from ..nn.norms import RMSNorm, layer_norm
from ..nn.patchify import patch_grid, patch_sizes, patchify, unpatchify
from ..nn.rope import RoPE, Rotation, grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .dit import PUBLISHED_TIME
from .dit_blocks import BlockContext, CrossAttentionDiTBlock, DiTBlock, OutputHead

PARTS = ("video", "sound")
CLOCK_BASE = 100.0  # of the clock's frequencies: a clip has some dozens of steps, not thousands


class Exchange(eqx.Module):
    """`x += g cross_attention(modulate(norm(x), b, a), norm(y))`: one tower looks at the other.

    `(b, a, g)` come from the vectors of both, so that it depends on how noisy each is how much is
    looked at (as in LTX-2); the gate starts at zero. Queries and keys are turned by their times.

    >>> exchange = Exchange(16, 2, key=jax.random.key(0))
    >>> turn = RoPE((8,))
    >>> x, y, c = jnp.ones((5, 16)), jnp.ones((3, 16)), jnp.ones(16)
    >>> exchange(x, y, c, c, turn(np.arange(5.0)), turn(np.arange(3.0))).shape
    (5, 16)
    """

    cross_attention: CrossAttention
    modulation: Modulation

    def __init__(self, width: int, num_heads: int, *, attention: Attention = attend, key):
        k1, k2 = jax.random.split(key)
        self.cross_attention = CrossAttention(
            width, width, num_heads=num_heads, qk_norm=RMSNorm, attention=attention, key=k1
        )
        self.modulation = Modulation(width, 3, in_size=2 * width, key=k2)

    def __call__(
        self,
        x: Float[Array, "n d"],
        y: Float[Array, "m d"],
        c: Float[Array, " d"],
        c_other: Float[Array, " d"],
        rotation: Rotation,
        other_rotation: Rotation,
    ) -> Float[Array, "n d"]:
        shift, scale, gate = self.modulation(jnp.concatenate([c, c_other]))
        seen = self.cross_attention(
            modulate(layer_norm(x), shift, scale),
            layer_norm(y),
            rotation=rotation,
            context_rotation=other_rotation,
        )
        return x + gate * seen


class TowersBlock(eqx.Module):
    """A block of each tower, and then an `Exchange` each way, of the same tokens.

    Called with `{"video": tokens, "sound": tokens}`, which it gives back, the vectors of both,
    their `BlockContext`s, and the rotations of the common clock.
    """

    video: DiTBlock | CrossAttentionDiTBlock
    sound: DiTBlock | CrossAttentionDiTBlock
    to_video: Exchange
    to_sound: Exchange

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        text: bool = False,
        swiglu: bool = False,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        block = CrossAttentionDiTBlock if text else DiTBlock
        options: dict[str, Any] = dict(qk_norm=RMSNorm, swiglu=swiglu, attention=attention)
        self.video = block(width, num_heads, mlp_ratio, **options, key=k1)
        self.sound = block(width, num_heads, mlp_ratio, **options, key=k2)
        self.to_video = Exchange(width, num_heads, attention=attention, key=k3)
        self.to_sound = Exchange(width, num_heads, attention=attention, key=k4)

    def __call__(
        self,
        x: dict[str, Array],
        c: dict[str, Array],
        context: dict[str, BlockContext],
        clock: dict[str, Rotation],
    ) -> dict[str, Array]:
        v = self.video(x["video"], c["video"], context["video"])
        s = self.sound(x["sound"], c["sound"], context["sound"])
        turns = clock["video"], clock["sound"]
        return {
            "video": self.to_video(v, s, c["video"], c["sound"], *turns),
            "sound": self.to_sound(s, v, c["sound"], c["video"], *turns[::-1]),
        }


class Tower(eqx.Module):
    """The ends of a tower: from what is noisy to tokens, from its time to a vector, and back."""

    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    head: OutputHead
    shape: tuple[int, ...] = eqx.field(static=True)
    patch_size: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, shape: tuple[int, ...], patch_size: int | tuple[int, ...], width: int, time, *, key
    ):
        k1, k2, k3 = jax.random.split(key, 3)
        self.shape, self.patch_size = shape, patch_sizes(patch_size, len(shape) - 1)
        size = shape[0]
        for side in self.patch_size:
            size *= side
        self.patch_embedding = Linear(size, width, key=k1)
        self.time_embedding = build_part(time, width, key=k2)
        self.head = OutputHead(width, size, key=k3)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many patches there are along each axis."""
        return patch_grid(self.shape[1:], self.patch_size)[0]

    def tokens(self, x: Float[Array, "c *space"]) -> Float[Array, "n d"]:
        """Patches as tokens, with fixed positions added."""
        x = self.patch_embedding(patchify(x, self.patch_size))
        return x + jnp.asarray(sincos_positions(self.grid, x.shape[-1]), x.dtype)

    def whole(self, tokens: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "c *space"]:
        """What the tokens say of every number."""
        return unpatchify(self.head(tokens, c), self.shape[1:], self.patch_size)


@dataclass(frozen=True)
class TwoTowersConfig:
    """How a `TwoTowers` was made: the arguments of its constructor, explained there."""

    video_shape: tuple[int, ...]
    sound_shape: tuple[int, ...]
    video_seconds: tuple[float, ...]
    sound_seconds: tuple[float, ...]
    patch_size: int | tuple[int, ...]
    depth: int
    width: int
    num_heads: int
    embed_cond: Any = None
    cross_attention: bool = True
    mlp_ratio: float = 4.0
    swiglu: bool = False
    clock_rate: float = 16.0
    time_embedding: Any = PUBLISHED_TIME
    attention: Attention = attend
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1

    def build(self, *, key) -> "TwoTowers":
        """The network, with random weights."""
        return TwoTowers(**arguments(self), key=key)


class TwoTowers(eqx.Module):
    """A diffusion transformer of clips with sound: `(x_t, t, cond) -> out`, one example at a time.

    `x_t` is `{"video": (c, f, h, w), "sound": (k, n)}`, and `t` is `{"video": t, "sound": t}`: each
    has a time of its own (Bao et al. 2023, UniDiffuser). So one network makes both together, the
    sound of a given clip (the clip's time is 0), the clip of a given sound, and either alone (the
    other is noise, at time 1). `eqxldm.joint` turns it into denoisers of one array for each.

    Each part has a tower, a DiT with adaLN-Zero. After every block each tower looks at the other by
    cross-attention. A frame has many tokens and a step of sound has one, and their rates differ:
    all they have in common is when they are. So in these attentions queries and keys are turned by
    their second alone, `clock_rate` radians a second and slower (as in LTX-2); within the towers
    positions are those of the patches.

    **Arguments**:

    - `video_shape`, `sound_shape`: of the latents. `patch_size`: of frame, row and column of the
      video; a step of the sound is a token.
    - `video_seconds`, `sound_seconds`: when each frame of patches is, and each step of the sound.
    - `depth`, `width`, `num_heads`: of both towers. `width` is a multiple of 6.

    `options`, the other fields of `TwoTowersConfig`:

    - `embed_cond`: as of a `DiT`; tokens that it gives are cross-attended by both towers, its
      vector is added to both times. `cross_attention=False` for one that gives a vector alone.
    - `clock_rate`: radians a second of the fastest pair of features. About one radian between two
      steps of the sound can tell them apart.
    - `mlp_ratio`, `swiglu`, `time_embedding`, `attention`, `remat`, `unroll`: as of a `DiT`.

    **Raises** `ValueError` for sizes or seconds that do not fit, and in the call for parts of
    another shape.

    >>> towers = TwoTowers((4, 2, 4, 4), (3, 6), video_seconds=(0.0, 0.5),
    ...     sound_seconds=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5), patch_size=(1, 2, 2), depth=1, width=24,
    ...     num_heads=2, key=jax.random.key(0))
    >>> x = {"video": jnp.ones((4, 2, 4, 4)), "sound": jnp.ones((3, 6))}
    >>> out = towers(x, {"video": jnp.array(0.5), "sound": jnp.array(0.0)})
    >>> out["video"].shape, out["sound"].shape
    ((4, 2, 4, 4), (3, 6))
    """

    video: Tower
    sound: Tower
    embed_cond: Callable[..., Any] | None
    blocks: Stack
    config: TwoTowersConfig = eqx.field(static=True)

    def __init__(
        self,
        video_shape: tuple[int, ...],
        sound_shape: tuple[int, ...],
        *,
        video_seconds: tuple[float, ...],
        sound_seconds: tuple[float, ...],
        patch_size: int | tuple[int, ...],
        depth: int,
        width: int,
        num_heads: int,
        key,
        **options: Any,
    ):
        given: dict[str, Any] = dict(video_shape=video_shape, sound_shape=sound_shape)
        given |= dict(video_seconds=video_seconds, sound_seconds=sound_seconds)
        given |= dict(patch_size=patch_size, depth=depth, width=width, num_heads=num_heads)
        config = make_record(TwoTowersConfig, "TwoTowers", given | options)
        k1, k2, k3, k4 = jax.random.split(key, 4)
        time = options.get("time_embedding", config.time_embedding)
        self.video = Tower(config.video_shape, patch_size, width, time, key=k1)
        self.sound = Tower(config.sound_shape, 1, width, time, key=k2)
        _check(config, self.video.grid)
        self.embed_cond = build_part(options.get("embed_cond", config.embed_cond), key=k3)
        kind: dict[str, Any] = dict(attention=config.attention, swiglu=config.swiglu)
        kind["text"] = self.embed_cond is not None and config.cross_attention
        make = lambda key: TowersBlock(width, num_heads, config.mlp_ratio, **kind, key=key)
        self.blocks = Stack(make, depth, remat=config.remat, unroll=config.unroll, key=k4)
        self.config = config

    def __call__(
        self,
        x_t: Mapping[str, Float[Array, "..."]],
        t: Mapping[str, Float[Array, ""]],
        cond: PyTree = None,
        *,
        key: PyTree | None = None,
    ) -> dict[str, Array]:
        towers = {"video": self.video, "sound": self.sound}
        for name, tower in towers.items():
            if name not in x_t or x_t[name].shape != tower.shape or name not in t:
                found = x_t[name].shape if name in x_t else "nothing"
                raise ValueError(
                    f"TwoTowers: x_t and t must have {' and '.join(PARTS)}, the {name} of shape "
                    f"{tower.shape}; got {found}, and times of {', '.join(t)}."
                )
        # The condition once, its vector for both.
        own: Any = embed_condition("TwoTowers", jnp.zeros(self.config.width), self.embed_cond, cond)
        dtype = x_t["video"].dtype
        x, c, context = {}, {}, {}
        tokens = None if own.tokens is None else own.tokens.astype(dtype)
        for name, tower in towers.items():
            time = embed_times("TwoTowers", tower.time_embedding, None, t[name], None)
            c[name] = (time + own.vector).astype(dtype)
            x[name] = tower.tokens(x_t[name])
            context[name] = BlockContext(tokens, own.mask, self._places(tower.grid))
        x = self.blocks(x, c, context, self._clock())
        return {name: tower.whole(x[name], c[name]) for name, tower in towers.items()}

    def _places(self, grid: tuple[int, ...]) -> Rotation:
        """Rotary positions within a tower: frame, row and column, or the step."""
        size = self.config.width // self.config.num_heads
        third = 2 * (size // 6)
        sizes = (size - 2 * third, third, third) if len(grid) == 3 else (size,)
        return RoPE(sizes)(grid_positions(grid))

    def _clock(self) -> dict[str, Rotation]:
        """The rotation of each tower's tokens by their seconds."""
        ours = self.config
        rope = RoPE((ours.width // ours.num_heads,), theta=CLOCK_BASE)
        _, rows, columns = self.video.grid
        video = np.repeat(np.asarray(ours.video_seconds), rows * columns)
        turn = lambda seconds: rope(ours.clock_rate * np.asarray(seconds, np.float64))
        return {"video": turn(video), "sound": turn(ours.sound_seconds)}


def _check(config: TwoTowersConfig, grid: tuple[int, ...]) -> None:
    if len(config.video_shape) != 4 or len(config.sound_shape) != 2:
        raise ValueError(
            "TwoTowers: shapes must be (channels, frames, height, width) and (channels, steps), "
            f"got {config.video_shape} and {config.sound_shape}."
        )
    check_heads(config.width, config.num_heads)
    size = config.width // config.num_heads
    if config.width % 6 or size % 2 or size < 6:
        raise ValueError(
            f"TwoTowers: width {config.width} must be a multiple of 6, and a head, of {size} "
            "features, even and at least 6."
        )
    counts = {"video_seconds": grid[0], "sound_seconds": config.sound_shape[1]}
    for name, count in counts.items():
        if len(getattr(config, name)) != count:
            raise ValueError(
                f"TwoTowers: {name} must have a number for each of {count}, got "
                f"{len(getattr(config, name))}."
            )
