"""MMDiT: the two-stream transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..nn.attention import Attention, attend, check_heads
from ..nn.conditioning import Conditioning, embed_times
from ..nn.embeddings import Sinusoid, VectorEmbedding, sincos_features
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import RMSNorm, layer_norm
from ..nn.patchify import patch_grid, patchify, unpatchify
from ..nn.rope import grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .joint_blocks import JointBlock

FLOW_TIME = Sinusoid(offset=0.0)  # of 1000 t: these networks were trained on t in [0, 1] itself


@dataclass(frozen=True)
class MMDiTConfig:
    """How an `MMDiT` was made: the arguments of its constructor, all of them explained there.

    >>> config = MMDiTConfig(4, depth=2, width=16, num_heads=2, context_size=6)
    >>> config.build(key=jax.random.key(0)).config.out_channels
    4
    """

    in_channels: int
    depth: int
    width: int
    num_heads: int
    context_size: int
    pooled_size: int | None = None
    patch_size: int = 2
    out_channels: int | None = None
    dual_depth: int = 0
    mlp_ratio: float = 4.0
    embed_cond: Any = None
    max_grid: int = 192
    base_grid: int = 64
    time_embedding: Any = FLOW_TIME
    step_embedding: Any = None
    qk_norm: Callable[[int], Any] | None = None
    attention: Attention = attend
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1

    def build(self, *, key) -> "MMDiT":
        """The network, with random weights."""
        return MMDiT(**arguments(self), key=key)


class MMDiT(eqx.Module):
    """A two-stream transformer `(x_t, t, cond) -> out`, one example at a time.

    `cond` is `nn.Conditioning`: `tokens` `(m, context_size)` of the text, a `vector`
    `(pooled_size,)` where the network has one, and a `mask` of the tokens, or None: the published
    networks were trained without, and attend to the padding too. `t` in [0, 1] is read as `1000 t`.

    **Arguments**:

    - `in_channels`: of the latent, whose height and width are any that divide by `patch_size` and
      give at most `max_grid` patches a side.
    - `depth`, `width`, `num_heads`: the transformer's size. The last block is a `JointBlock` with
      `last`.
    - `context_size`, `pooled_size`: of a token and of the vector of the condition; without
      `pooled_size` there is no vector, and the blocks are told the time alone.

    `options`, the other fields of `MMDiTConfig`:

    - `patch_size`; `out_channels`, None means `in_channels`; `mlp_ratio`, the hidden units of the
      MLPs in widths.
    - `dual_depth`: how many blocks, the first ones, have `dual_attention`.
    - `embed_cond`: a function or module from another condition to `nn.Conditioning`.
    - `max_grid`, `base_grid`: the fixed sin-cos positions are those of a square of `max_grid`
      patches, `base_grid / max_grid` apart, from whose centre the image's grid is cut.
    - `time_embedding`, `step_embedding`, `qk_norm`, `attention`, `remat`, `unroll`: as in `DiT`.

    Every modulation and the last layer start at zero, so the untrained network outputs 0. It
    computes in the dtype of `x_t`; the time, the pooled vector, the norms' statistics and the
    softmax are float32. `config` is its `MMDiTConfig`.

    In the call `skip` are the numbers of blocks that are left out: skip-layer guidance takes the
    difference (the authors use 7, 8 and 9 in Stable Diffusion 3.5 medium).

    **Raises** `ValueError` for sizes that do not fit, on construction, and for an `x_t`, a `cond`,
    an `h` or a `skip` that the network was not made for.

    >>> mmdit = MMDiT(4, depth=2, width=16, num_heads=2, context_size=6, pooled_size=5,
    ...               key=jax.random.key(0))
    >>> cond = Conditioning(vector=jnp.ones(5), tokens=jnp.ones((3, 6)))
    >>> mmdit(jnp.ones((4, 8, 12)), jnp.array(0.5), cond).shape
    (4, 8, 12)
    """

    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    pooled_embedding: VectorEmbedding | None
    context_embedding: Linear
    embed_cond: Callable[..., Any] | None
    dual_blocks: Stack | None
    blocks: Stack | None
    last_block: Stack  # of one
    final_modulation: Modulation
    final_linear: Linear
    config: MMDiTConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        depth: int,
        width: int,
        num_heads: int,
        context_size: int,
        pooled_size: int | None = None,
        key,
        **options: Any,
    ):
        sizes = dict(in_channels=in_channels, depth=depth, width=width, num_heads=num_heads)
        sizes |= dict(context_size=context_size, pooled_size=pooled_size)
        config = _completed(make_record(MMDiTConfig, "MMDiT", sizes | options))
        ks = jax.random.split(key, 11)
        token = in_channels * config.patch_size**2
        self.patch_embedding = Linear(token, width, key=ks[0])
        # A part that was given as a module is used as it is; the record only describes it.
        part = lambda name: options.get(name, getattr(config, name))
        self.time_embedding = build_part(part("time_embedding"), width, key=ks[1])
        self.step_embedding = build_part(part("step_embedding"), width, key=ks[2])
        self.pooled_embedding = None
        if pooled_size is not None:
            self.pooled_embedding = VectorEmbedding(pooled_size, width, key=ks[3])
        self.context_embedding = Linear(context_size, width, key=ks[4])
        self.embed_cond = build_part(part("embed_cond"), key=ks[5])

        def stack(count: int, key, **kind: bool) -> Stack | None:
            block: dict[str, Any] = dict(qk_norm=config.qk_norm, attention=config.attention) | kind
            make = lambda k: JointBlock(width, num_heads, config.mlp_ratio, **block, key=k)
            repeat: dict[str, Any] = dict(remat=config.remat, unroll=config.unroll)
            return Stack(make, count, **repeat, key=key) if count else None

        duals = min(config.dual_depth, depth - 1)
        self.dual_blocks = stack(duals, ks[6], dual_attention=True)
        self.blocks = stack(depth - 1 - duals, ks[7])
        last: Any = stack(1, ks[8], last=True, dual_attention=config.dual_depth == depth)
        self.last_block = last
        out = config.out_channels or in_channels
        self.final_modulation = Modulation(width, 2, key=ks[9])
        self.final_linear = Linear(width, out * config.patch_size**2, init=zeros, key=ks[10])
        self.config = config

    def stacks(self) -> list[tuple[str, Stack, int]]:
        """The stacks in order: `(field, stack, number of its first block)`.

        >>> mmdit = MMDiT(4, depth=3, width=16, num_heads=2, context_size=6, dual_depth=1,
        ...               key=jax.random.key(0))
        >>> [(name, first) for name, _, first in mmdit.stacks()]
        [('dual_blocks', 0), ('blocks', 1), ('last_block', 2)]
        """
        found, first = [], 0
        for name in ("dual_blocks", "blocks", "last_block"):
            if (stack := getattr(self, name)) is not None:
                found.append((name, stack, first))
                first += stack.depth
        return found

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        cond: PyTree,
        *,
        h: Float[Array, ""] | float | None = None,
        skip: Collection[int] = (),
        key: PyTree | None = None,
    ) -> Float[Array, "c_out h w"]:
        ours = self.config
        if x_t.shape[0] != ours.in_channels:
            raise ValueError(f"MMDiT: need {ours.in_channels} channels, got {x_t.shape[0]}.")
        if wrong := sorted(i for i in skip if not 0 <= i < ours.depth):
            raise ValueError(f"MMDiT: skip must name blocks 0 .. {ours.depth - 1}, got {wrong}.")
        grid, _ = patch_grid(x_t.shape[1:], ours.patch_size, "MMDiT")
        time = embed_times("MMDiT", self.time_embedding, self.step_embedding, t, h)
        c, tokens, mask = self._conditioned(time, cond, x_t.dtype)
        x = self.patch_embedding(patchify(x_t, ours.patch_size))
        x = x + jnp.asarray(cut_positions(ours, grid), x.dtype)
        if mask is not None:
            mask = jnp.concatenate([mask, jnp.ones(len(x), bool)])
        streams = self.context_embedding(tokens), x
        for _, stack, first in self.stacks():
            left_out = [i - first for i in skip if first <= i < first + stack.depth]
            streams = stack(streams, c, mask, skip=left_out)
        shift, scale = self.final_modulation(c)
        out = self.final_linear(modulate(layer_norm(streams[1]), shift, scale))
        return unpatchify(out, x_t.shape[1:], ours.patch_size)

    def _conditioned(
        self, time: Float[Array, " d"], cond: PyTree, dtype: Any
    ) -> tuple[Float[Array, " d"], Float[Array, "m size"], Bool[Array, " m"] | None]:
        """The vector that modulates the blocks, and the text's tokens with their mask."""
        ours = self.config
        cond = cond if self.embed_cond is None else self.embed_cond(cond)
        check_conditioning("MMDiT", cond, ours.context_size, ours.pooled_size)
        if self.pooled_embedding is not None:
            time = time + self.pooled_embedding(cond.vector.astype(time.dtype))
        return time.astype(dtype), cond.tokens.astype(dtype), cond.mask


def check_conditioning(name: str, cond: PyTree, context_size: int, pooled_size: int | None) -> None:
    """`ValueError` unless `cond` is `nn.Conditioning` with tokens, and a vector, of these sizes.

    >>> check_conditioning("MMDiT", Conditioning(tokens=jnp.ones((3, 6))), 6, None)
    """
    need = f"tokens of shape (m, {context_size})"
    need += "" if pooled_size is None else f" and a vector of shape ({pooled_size},)"
    if not isinstance(cond, Conditioning):
        raise ValueError(
            f"{name}: cond must be nn.Conditioning with {need}, got {type(cond).__name__}."
        )
    shape = lambda part: None if part is None else part.shape
    tokens, vector = shape(cond.tokens), shape(cond.vector)
    fits = tokens is not None and len(tokens) == 2 and tokens[1] == context_size
    if not fits or vector != (None if pooled_size is None else (pooled_size,)):
        raise ValueError(
            f"{name}: cond must have {need}; got tokens of shape {tokens} and a vector of shape "
            f"{vector}."
        )


def cut_positions(config: MMDiTConfig, grid: tuple[int, ...]) -> Float[np.ndarray, "n d"]:
    """The fixed positions of an image of `grid` patches, cut from the centre of the square.

    Patch `(i, j)` lies at `(top + i, left + j) base_grid / max_grid` with `top = (max_grid - rows)
    // 2`, and `left` alike (Esser et al. 2024, section 5.3.2).

    **Raises** `ValueError` for a grid that is larger than the square.

    >>> config = MMDiTConfig(4, depth=2, width=16, num_heads=2, context_size=6, max_grid=4)
    >>> cut_positions(config, (2, 4)).shape
    (8, 16)
    """
    if max(grid) > config.max_grid:
        raise ValueError(
            f"MMDiT: the image has {grid[0]} x {grid[1]} patches, and positions are there for "
            f"{config.max_grid} a side. Give a smaller one, or make the network with max_grid."
        )
    first = np.array([(config.max_grid - side) // 2 for side in grid])
    return sincos_features(scaled_places(config, grid_positions(grid) + first), config.width)


def scaled_places(config: MMDiTConfig, places: np.ndarray) -> np.ndarray:
    """Places in the square as coordinates; float32, as the tables in published files have them.

    >>> config = MMDiTConfig(4, depth=2, width=16, num_heads=2, context_size=6)
    >>> scaled_places(config, np.array([3])).tolist()
    [1.0]
    """
    step = np.float32(config.max_grid / config.base_grid)
    return (places.astype(np.float32) / step).astype(np.float64)


def _completed(config: MMDiTConfig) -> MMDiTConfig:
    """The configuration without a default left open, checked."""
    out = config.in_channels if config.out_channels is None else config.out_channels
    numbers = dict(in_channels=config.in_channels, out_channels=out, patch_size=config.patch_size)
    numbers |= dict(depth=config.depth, width=config.width, context_size=config.context_size)
    numbers |= dict(max_grid=config.max_grid, base_grid=config.base_grid)
    numbers |= {} if config.pooled_size is None else dict(pooled_size=config.pooled_size)
    if min(numbers.values()) < 1:
        shown = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ValueError(f"MMDiT: every size must be at least 1, got {shown}.")
    if not 0 <= config.dual_depth <= config.depth:
        raise ValueError(
            f"MMDiT: dual_depth must lie in 0 .. {config.depth}, the depth; got "
            f"{config.dual_depth}."
        )
    check_heads(config.width, config.num_heads)
    sincos_features(np.zeros((1, 2)), config.width)
    return replace(config, out_channels=out)


def _published(name: str, what: str, depth: int, **sizes: Any):
    """The constructor of a published network: width 64 a block, and as many heads as blocks."""

    def make(*, key, **options: Any) -> MMDiT:
        given: dict[str, Any] = dict(depth=depth, width=64 * depth, num_heads=depth)
        given |= dict(context_size=4096, pooled_size=2048) | sizes | options
        return MMDiT(16, **given, key=key)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""{what}: {depth} blocks, {64 * depth} wide.

    Latents have 16 channels; tokens are (333, 4096) of CLIP and T5, the pooled vector (2048,) of
    both CLIPs. `options` are further arguments of `MMDiT`.

    >>> mmdit = eqx.filter_eval_shape({name}, key=jax.random.key(0))
    >>> mmdit.final_linear.weight.shape
    (64, {64 * depth})
    """
    return make


mmdit_sd3_medium = _published("mmdit_sd3_medium", "Stable Diffusion 3 medium", 24)
mmdit_sd35_medium = _published(
    "mmdit_sd35_medium",
    "Stable Diffusion 3.5 medium (MMDiT-X)",
    24,
    qk_norm=RMSNorm,
    dual_depth=13,
    max_grid=384,
)
mmdit_sd35_large = _published("mmdit_sd35_large", "Stable Diffusion 3.5 large", 38, qk_norm=RMSNorm)
