"""WanTransformer: the transformer over spacetime patches of Wan 2.1 and 2.2 (Wan 2025)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from ..nn.activations import gelu_tanh
from ..nn.attention import (
    Attention,
    CrossAttention,
    SelfAttention,
    attend_in_blocks,
    check_heads,
)
from ..nn.conditioning import embed_times
from ..nn.constraints import fusion_barrier
from ..nn.dtypes import at_least_float32
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation
from ..nn.norms import LayerNorm, RMSNorm, layer_norm
from ..nn.patchify import patch_grid, patch_sizes, patchify, unpatchify
from ..nn.rope import RoPE, grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .dit_blocks import BlockContext
from .mmdit import FLOW_TIME, check_conditioning


class TextProjection(eqx.Module):
    """`fc2(gelu(fc1(x)))` of each token of a text, to the width of the network.

    >>> TextProjection(6, 8, key=jax.random.key(0))(jnp.ones((3, 6))).shape
    (3, 8)
    """

    fc1: Linear
    fc2: Linear

    def __init__(self, in_size: int, width: int, *, key):
        k1, k2 = jax.random.split(key)
        self.fc1, self.fc2 = Linear(in_size, width, key=k1), Linear(width, width, key=k2)

    def __call__(self, x: Float[Array, "m in"]) -> Float[Array, "m d"]:
        return self.fc2(gelu_tanh(self.fc1(x)))


class WanBlock(eqx.Module):
    """One block: attention over the whole clip, to the text, and an MLP.

    With `(b1, a1, g1, b2, a2, g2) = table + e`, the rows of a learned table and of what the time
    gives, one set for all tokens or one for each:

    `x += g1 attention(norm(x) (1 + a1) + b1)`, `x += cross_attention(cross_norm(x), text)`,
    `x += g2 mlp(norm(x) (1 + a2) + b2)`. Modulation and sums are float32.

    >>> block = WanBlock(16, 2, 32, key=jax.random.key(0))
    >>> context = BlockContext(tokens=jnp.ones((3, 16)))
    >>> block(jnp.ones((5, 16)), jnp.ones((6, 16)), context).shape
    (5, 16)
    """

    table: Float[Array, "6 d"]
    attention: SelfAttention
    cross_norm: LayerNorm | None
    cross_attention: CrossAttention
    fc1: Linear
    fc2: Linear
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        cross_norm: bool = True,
        norm_eps: float = 1e-6,
        attention: Attention = attend_in_blocks,
        key,
    ):
        ks = jax.random.split(key, 5)
        norm = lambda size: RMSNorm(size, norm_eps)
        options: dict[str, Any] = dict(qk_norm=norm, qk_norm_full_width=True, attention=attention)
        self.table = jax.random.normal(ks[0], (6, width)) / width**0.5
        self.attention = SelfAttention(width, num_heads, **options, key=ks[1])
        self.cross_norm = LayerNorm(width, norm_eps) if cross_norm else None
        self.cross_attention = CrossAttention(
            width, width, num_heads=num_heads, qkv_bias=True, **options, key=ks[2]
        )
        self.fc1 = Linear(width, hidden, key=ks[3])
        self.fc2 = Linear(hidden, width, key=ks[4])
        self.norm_eps = norm_eps

    def __call__(
        self, x: Float[Array, "n d"], e: Float[Array, "*n 6 d"], context: BlockContext
    ) -> Float[Array, "n d"]:
        dtype, precise = x.dtype, at_least_float32(x.dtype)
        e = self.table.astype(precise) + e.astype(precise)
        b1, a1, g1, b2, a2, g2 = jnp.moveaxis(e, -2, 0)
        normed = lambda x: layer_norm(x.astype(precise), self.norm_eps)
        add = lambda x, y, gate: (x.astype(precise) + gate * y.astype(precise)).astype(dtype)

        y = (normed(x) * (1 + a1) + b1).astype(dtype)
        x = add(x, self.attention(y, rotation=context.rotation), g1)
        y = x if self.cross_norm is None else self.cross_norm(x)
        text: Any = context.tokens
        x = x + self.cross_attention(y, text, context.mask)
        hidden = gelu_tanh(self.fc1((normed(x) * (1 + a2) + b2).astype(dtype)))
        return add(x, checkpoint_name(self.fc2(fusion_barrier(hidden)), "mlp"), g2)


@dataclass(frozen=True)
class WanConfig:
    """How a `WanTransformer` was made: the arguments of its constructor, explained there.

    >>> config = WanConfig(4, depth=1, width=16, num_heads=2, context_size=6)
    >>> config.build(key=jax.random.key(0)).config.rope.sizes
    (4, 2, 2)
    """

    in_channels: int
    depth: int
    width: int
    num_heads: int
    context_size: int
    hidden: int | None = None
    patch_size: int | tuple[int, int, int] = (1, 2, 2)
    out_channels: int | None = None
    cross_norm: bool = True
    norm_eps: float = 1e-6
    rope: RoPE | None = None
    embed_cond: Any = None
    time_embedding: Any = FLOW_TIME
    step_embedding: Any = None
    attention: Attention = attend_in_blocks
    sequence_axis: str | None = None
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1

    def build(self, *, key) -> "WanTransformer":
        """The network, with random weights."""
        return WanTransformer(**arguments(self), key=key)


class WanTransformer(eqx.Module):
    """A transformer over spacetime patches `(x_t, t, cond) -> out`, one example at a time.

    `x_t` is a clip's latent `(c, f, h, w)` of any number of frames: one is an image, and a network
    can be trained on both. `cond` is `nn.Conditioning` with `tokens` `(m, context_size)` of the
    text; its `mask` may be None: the published networks attend to the padding, which has been set
    to zero behind umT5. `t` in [0, 1] is read as `1000 t`; instead of one number it may be one for
    each frame of patches, `(f,)`: it is 0 where frames are given and not to be made.

    **Arguments**:

    - `in_channels`: of the latent. `depth`, `width`, `num_heads`: the transformer's size.
    - `context_size`: of a token of the condition.

    `options`, the other fields of `WanConfig`:

    - `hidden`: units of the MLPs; None means `4 width`.
    - `patch_size`: of frame, row and column; `out_channels`, None means `in_channels`.
    - `cross_norm`: whether there is a norm before the cross-attention. `norm_eps`: of all norms.
    - `rope`: rotary positions of frame, row and column; None divides a head's features as Wan does:
      `2 (size // 6)` for rows and columns each, the rest for frames.
    - `embed_cond`: a function or module from another condition to `nn.Conditioning`.
    - `attention`: `nn.attend_in_blocks` by default, as a clip has many tokens.
    - `sequence_axis`: the axis of a mesh over which the frames are divided between the blocks
      (`nn.Stack`).
    - `time_embedding`, `step_embedding`, `remat`, `unroll`: as in `DiT`.

    The last layer starts at zero, so the untrained network outputs 0. It computes in the dtype of
    `x_t`; time, modulation, the norms' statistics and the softmax are float32. `config` is its
    `WanConfig`.

    **Raises** `ValueError` for sizes that do not fit, on construction, and for an `x_t`, a `t`, a
    `cond` or an `h` that the network was not made for.

    >>> wan = WanTransformer(4, depth=2, width=16, num_heads=2, context_size=6,
    ...                      key=jax.random.key(0))
    >>> from eqxldm.nn import Conditioning
    >>> wan(jnp.ones((4, 3, 4, 6)), jnp.array(0.5), Conditioning(tokens=jnp.ones((5, 6)))).shape
    (4, 3, 4, 6)
    """

    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    block_modulation: Modulation
    text_embedding: TextProjection
    embed_cond: Callable[..., Any] | None
    blocks: Stack
    final_table: Float[Array, "2 d"]
    final_linear: Linear
    config: WanConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        depth: int,
        width: int,
        num_heads: int,
        context_size: int,
        key,
        **options: Any,
    ):
        sizes = dict(in_channels=in_channels, depth=depth, width=width, num_heads=num_heads)
        sizes |= dict(context_size=context_size)
        ours = _completed(make_record(WanConfig, "WanTransformer", sizes | options))
        hidden: Any = ours.hidden
        ks = jax.random.split(key, 9)
        patch = patch_sizes(ours.patch_size, 3)
        cells = patch[0] * patch[1] * patch[2]
        self.patch_embedding = Linear(in_channels * cells, width, key=ks[0])
        # A part that was given as a module is used as it is; the record only describes it.
        part = lambda name: options.get(name, getattr(ours, name))
        self.time_embedding = build_part(part("time_embedding"), width, key=ks[1])
        self.step_embedding = build_part(part("step_embedding"), width, key=ks[2])
        self.block_modulation = Modulation(width, 6, key=ks[3])
        self.text_embedding = TextProjection(context_size, width, key=ks[4])
        self.embed_cond = build_part(part("embed_cond"), key=ks[5])
        kind: dict[str, Any] = dict(cross_norm=ours.cross_norm, norm_eps=ours.norm_eps)
        kind |= dict(attention=ours.attention)
        make = lambda k: WanBlock(width, num_heads, hidden, **kind, key=k)
        repeat: dict[str, Any] = dict(remat=ours.remat, unroll=ours.unroll)
        repeat |= dict(sequence_axis=ours.sequence_axis)
        self.blocks = Stack(make, depth, **repeat, key=ks[6])
        self.final_table = jax.random.normal(ks[7], (2, width)) / width**0.5
        out = ours.out_channels or in_channels
        self.final_linear = Linear(width, out * cells, init=zeros, key=ks[8])
        self.config = ours

    def __call__(
        self,
        x_t: Float[Array, "c f h w"],
        t: Float[Array, ""] | Float[Array, " frames"],
        cond: PyTree,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out f h w"]:
        ours = self.config
        if x_t.shape[0] != ours.in_channels:
            raise ValueError(
                f"WanTransformer: need {ours.in_channels} channels, got {x_t.shape[0]}."
            )
        grid, _ = patch_grid(x_t.shape[1:], ours.patch_size, "WanTransformer")
        cond = cond if self.embed_cond is None else self.embed_cond(cond)
        check_conditioning("WanTransformer", cond, ours.context_size, None)
        time, e = self._times(t, h, grid)
        text = self.text_embedding(cond.tokens.astype(x_t.dtype))
        rope: Any = ours.rope  # which the constructor has filled in
        context = BlockContext(text, cond.mask, rope(grid_positions(grid)))
        x = self.patch_embedding(patchify(x_t, ours.patch_size))
        x = self.blocks(x, e, context)
        shift, scale = jnp.moveaxis(self.final_table + time[..., None, :], -2, 0)
        precise = at_least_float32(x.dtype)
        normed = layer_norm(x.astype(precise), ours.norm_eps)
        out = self.final_linear((normed * (1 + scale) + shift).astype(x.dtype))
        return unpatchify(out, x_t.shape[1:], ours.patch_size)

    def _times(
        self, t: Array, h: Any, grid: tuple[int, ...]
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n 6 d"]]:
        """The time's embedding, and what it gives to the blocks: once, or for each token."""
        times = (self.time_embedding, self.step_embedding)

        def embed(t: Array) -> tuple[Array, Array]:
            time = embed_times("WanTransformer", *times, t, h)
            return time, self.block_modulation(time)

        if t.ndim == 0:
            return embed(t)
        frames, rows, columns = grid
        if t.shape != (frames,):
            raise ValueError(
                f"WanTransformer: t must be one number, or one for each of {frames} frames of "
                f"patches; got shape {t.shape}."
            )
        per_frame = jax.vmap(embed)(t)
        time, e = (jnp.repeat(a, rows * columns, axis=0) for a in per_frame)
        return time, e


def _completed(config: WanConfig) -> WanConfig:
    """The configuration without a default left open, checked."""
    sizes = dict(in_channels=config.in_channels, depth=config.depth, width=config.width)
    sizes |= dict(num_heads=config.num_heads, context_size=config.context_size)
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise ValueError(f"WanTransformer: sizes must be at least 1, got {', '.join(wrong)}.")
    check_heads(config.width, config.num_heads)
    patch_sizes(config.patch_size, 3)
    size = config.width // config.num_heads
    side = 2 * (size // 6)
    if config.rope is None and (size % 2 or not side):
        raise ValueError(
            f"WanTransformer: a head has {size} features, and three axes need an even number, at "
            "least 6. Change width / num_heads, or give a rope."
        )
    rope = RoPE((size - 2 * side, side, side)) if config.rope is None else config.rope
    hidden = 4 * config.width if config.hidden is None else config.hidden
    return replace(config, rope=rope, hidden=hidden)


def wan_t2v_1_3b(in_channels: int = 16, *, key, **options: Any) -> WanTransformer:
    """Wan 2.1's text-to-video network of 1,418,996,800 parameters (Wan 2025, table 1).

    `options` are further arguments of `WanTransformer`.

    >>> wan = eqx.filter_eval_shape(wan_t2v_1_3b, key=jax.random.key(0))
    >>> wan.config.rope.sizes
    (44, 42, 42)
    """
    sizes = dict(depth=30, width=1536, num_heads=12, hidden=8960, context_size=4096)
    return WanTransformer(in_channels, **(sizes | options), key=key)


def wan_t2v_14b(in_channels: int = 16, *, key, **options: Any) -> WanTransformer:
    """Wan 2.1's text-to-video network of 14,288,491,584 parameters; each of Wan 2.2's two experts.

    >>> wan = eqx.filter_eval_shape(wan_t2v_14b, key=jax.random.key(0))
    >>> wan.config.depth
    40
    """
    sizes = dict(depth=40, width=5120, num_heads=40, hidden=13824, context_size=4096)
    return WanTransformer(in_channels, **(sizes | options), key=key)


def wan_ti2v_5b(in_channels: int = 48, *, key, **options: Any) -> WanTransformer:
    """Wan 2.2's network of 4,999,787,712 parameters for text, and an image, to video.

    An image is given as its first latent frame, at `t = 0` there.

    >>> wan = eqx.filter_eval_shape(wan_ti2v_5b, key=jax.random.key(0))
    >>> wan.config.in_channels
    48
    """
    sizes = dict(depth=30, width=3072, num_heads=24, hidden=14336, context_size=4096)
    return WanTransformer(in_channels, **(sizes | options), key=key)
