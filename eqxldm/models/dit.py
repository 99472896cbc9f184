"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2023)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import Attention, attend
from ..nn.conditioning import Conditioning, embed_condition, embed_times
from ..nn.embeddings import LabelEmbedding, Sinusoid, sincos_positions
from ..nn.fields import with_fields
from ..nn.linear import Linear, normal, zeros
from ..nn.modulation import Modulation
from ..nn.patchify import patch_grid, patch_sizes, patchify, unpatchify
from ..nn.rope import RoPE, Rotation, grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .dit_blocks import BlockContext, DiTBlock, MakeNorm, OutputHead, apply_head

PUBLISHED_TIME = Sinusoid()
UNSCALED_TIME = Sinusoid(scale=1.0, offset=0.0)


@dataclass(frozen=True)
class DiTConfig:
    """How a `DiT` was made: the arguments of its constructor, all of them explained there.

    >>> config = DiTConfig((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2)
    >>> config.build(key=jax.random.key(0)).config == config
    True
    """

    shape: tuple[int, ...]
    patch_size: int | tuple[int, ...]
    depth: int
    width: int
    num_heads: int
    num_classes: int | None = None
    embed_cond: Any = None
    learn_sigma: bool = False
    mlp_ratio: float = 4.0
    time_embedding: Any = PUBLISHED_TIME
    step_embedding: Any = None
    block: Callable[..., Any] = DiTBlock
    qk_norm: Callable[[int], Any] | None = None
    rope: RoPE | None = None
    attention: Attention = attend
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1
    norm: MakeNorm | None = None
    swiglu: bool = False
    modulated: bool = True
    condition_tokens: int = 0
    time_tokens: int = 0
    tokens_start: int = 0
    early_depth: int | None = None
    early_head: bool = False
    patch_bottleneck: int | None = None

    def build(self, *, key) -> "DiT":
        """The network, with random weights."""
        return DiT(**arguments(self), key=key)


class DiTOutputs(NamedTuple):
    """What a DiT made on the way: its output, and at `early_depth` the patches' tokens.

    `early` is the auxiliary head's output there, None without `early_head`; `tokens` are those of
    the patches, None without `early_depth`.
    """

    out: Float[Array, "c_out *spatial"]
    early: Float[Array, "c_out *spatial"] | None = None
    tokens: Float[Array, "n d"] | None = None


class DiT(eqx.Module):
    """A diffusion transformer: `(x_t, t, cond) -> out`, one example at a time.

    **Arguments**:

    - `shape`: `(channels, height, width)` of the latent, or `(channels, length)` of a sequence, or
      `(channels, frames, height, width)` of a clip. `patch_size`, one number or one for each axis,
      must divide them.
    - `depth`, `width`, `num_heads`: the transformer's size.
    - `num_classes`: `cond` is a label `0 .. num_classes - 1`, or `num_classes` (`DiT.null`) for
      none. None: the network is unconditional and `cond` is None.
    - `embed_cond`: for any other condition, a function or module of `cond`, a PyTree. It gives a
      vector of `width`, which is added to the embedding of the time: `nn.Linear(5, width, key=key)`
      for five numbers. Or it gives `nn.Conditioning`, with tokens too: `ByteTextEncoder` for a
      text. Instead of `num_classes`.

    `options`, the other fields of `DiTConfig`:

    - `learn_sigma`: the output has `2 channels`: the prediction, then the variance's part, as
      `eqxldm.LearnedRange` reads it.
    - `mlp_ratio`: the hidden units of the MLPs, in widths.
    - `time_embedding`: how `t` is read. `nn.Sinusoid()` is the published one, `nn.Sinusoid(scale=1,
      offset=0)` for objectives that differentiate in `t`; or any module from `t` to a vector.
    - `step_embedding`: the same for a second time, the step `h` of a flow map, whose vector is
      added: `dit(x, t, cond, h=0.5)`. Without `h` it is 0. None: the network has one time.
    - `block`: `DiTBlock`, where tokens of the condition are joined to the patches,
      `CrossAttentionDiTBlock`, or any function of their arguments.
    - `qk_norm`: a norm of queries and keys, made from the head size, such as `nn.RMSNorm`.
    - `rope`: rotates queries and keys by their patch's place, beside the fixed positions: a size
      for each axis, `nn.RoPE((32, 32))` for heads of 64. Tokens of the condition lie at 0.
    - `attention`: `nn.attend`; `nn.cudnn_attend` for bfloat16 on a GPU, `nn.flash_attend` for many
      tokens on a TPU.
    - `remat`, `unroll`: those of `nn.Stack`.

    Those of newer networks, each of which the published DiT does without:

    - `norm`, `swiglu`, `modulated`: of the blocks, see `DiTBlock`; `norm` is also the last norm's.
      Without `modulated` nothing is shifted or scaled, and the time comes as `time_tokens`.
    - `condition_tokens`: so many tokens, each the condition's vector and a learned vector of its
      own, stand before the patches (in-context conditioning: Li & He 2025, JiT, has 32).
      `time_tokens`: the same of the time (Geng et al. 2025b). From block `tokens_start` on.
    - `early_depth`: after so many blocks `outputs` gives the tokens of the patches, for losses on
      them (`Denoising(dispersive=, alignment=)`). With `early_head` a second last layer reads them
      there: it learns the same, less well, for `internal_guide` (Zhou et al. 2025).
    - `patch_bottleneck`: a patch goes through so few numbers before it is a token (Li & He 2025).

    Blocks are stacked on a leading axis and scanned. Every inexact array leaf is trainable; the
    fixed positions are computed in the call. Weights start as in DiT: Xavier-uniform with zero
    biases, `N(0, 0.02^2)` for the embeddings of label and time, zero for every modulation and the
    last layer, so the untrained network outputs 0. The network computes in the dtype of `x_t`;
    the time, the norms' statistics and the softmax are float32. `config` is its `DiTConfig`.

    **Raises** `ValueError` for a size that does not divide, on construction, and for an `x_t` of
    another shape, a `cond` or an `h` that the network was not made for, a time outside
    [0, 1] and a label outside the table. Where it is traced such a label gives NaN, and
    `eqxldm.checked` and `nn.check_label` raise when the program runs.

    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, num_classes=10,
    ...           key=jax.random.key(0))
    >>> dit(jnp.ones((4, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
    (4, 8, 8)
    """

    patch_bottleneck: Linear | None
    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    embed_cond: Callable[..., Any] | None  # a table of labels, or the argument
    context_positions: Float[Array, "m d"] | None  # of the tokens of condition and time
    blocks: Stack
    early_head: OutputHead | None
    final_norm: Callable[..., Any] | None
    final_modulation: Modulation | None
    final_linear: Linear
    config: DiTConfig = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        patch_size: int | tuple[int, ...],
        depth: int,
        width: int,
        num_heads: int,
        num_classes: int | None = None,
        embed_cond: Callable[..., Any] | Any = None,
        key,
        **options: Any,
    ):
        sizes = dict(shape=shape, patch_size=patch_size, depth=depth, width=width)
        sizes |= dict(num_heads=num_heads, num_classes=num_classes, embed_cond=embed_cond)
        config = make_record(DiTConfig, "DiT", sizes | options)
        _check(config)
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        token = shape[0]
        for side in patch_sizes(patch_size, len(shape) - 1):
            token *= side
        narrow = config.patch_bottleneck
        through = jax.random.fold_in(k1, 1)
        self.patch_bottleneck = (
            None if narrow is None else Linear(token, narrow, use_bias=False, key=through)
        )
        self.patch_embedding = Linear(narrow or token, width, key=k1)
        # A part that was given as a module is used as it is; the record only describes it.
        part = lambda name: options.get(name, getattr(config, name))
        self.time_embedding = build_part(part("time_embedding"), width, key=k2)
        step_key = jax.random.fold_in(k2, 1)
        self.step_embedding = build_part(part("step_embedding"), width, key=step_key)
        if num_classes is not None:
            self.embed_cond = LabelEmbedding(num_classes, width, key=k3)
        else:
            self.embed_cond = build_part(embed_cond, key=k3)
        count = config.condition_tokens + config.time_tokens
        place_key = jax.random.fold_in(k3, 1)
        self.context_positions = normal(0.02)(place_key, (count, width)) if count else None
        form: dict[str, Any] = dict(norm=config.norm, modulated=config.modulated)
        # Blocks of a user's own need not know what is not asked for.
        newer = {**form, "swiglu": config.swiglu}
        newer = {name: v for name, v in newer.items() if v != getattr(DiTConfig, name)}
        make_block = lambda k: config.block(
            width,
            num_heads,
            config.mlp_ratio,
            qk_norm=config.qk_norm,
            attention=config.attention,
            key=k,
            **newer,
        )
        self.blocks = Stack(make_block, depth, remat=config.remat, unroll=config.unroll, key=k4)
        out = (1 + config.learn_sigma) * token
        self.early_head = OutputHead(width, out, **form, key=k5) if config.early_head else None
        self.final_norm = config.norm(width) if config.norm else None
        self.final_modulation = Modulation(width, 2, key=k5) if config.modulated else None
        self.final_linear = Linear(width, out, init=zeros, key=k6)
        self.config = config

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latent: channels, then the spatial axes."""
        return self.config.shape

    @property
    def patch_size(self) -> int | tuple[int, ...]:
        """The side of a patch, or its sides."""
        return self.config.patch_size

    @property
    def null(self) -> Int[Array, ""]:
        """The label that means "no label"; a `ValueError` if the condition is not a label."""
        if not isinstance(self.embed_cond, LabelEmbedding):
            raise ValueError("DiT: only a network with num_classes has a null label.")
        return self.embed_cond.null

    def with_spatial(self, spatial: tuple[int, ...]) -> "DiT":
        """The same weights for latents of another size, as many axes and channels.

        No parameter depends on the size: a network of clips is one of images, which are clips of
        one frame (Wan 2025 trains both), and one of 256 pixels can go on with 512.

        **Raises** `ValueError` for a size that patches do not divide.

        >>> dit = DiT((4, 4, 8, 8), patch_size=(1, 2, 2), depth=1, width=24, num_heads=2,
        ...           key=jax.random.key(0))
        >>> dit.with_spatial((1, 8, 8))(jnp.ones((4, 1, 8, 8)), jnp.array(0.5)).shape
        (4, 1, 8, 8)
        """
        config = replace(self.config, shape=(self.shape[0], *spatial))
        _check(config)
        return with_fields(self, config=config)

    def __call__(
        self,
        x_t: Float[Array, "c *spatial"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out *spatial"]:
        return self._run(x_t, t, cond, h, early=False).out

    def outputs(
        self,
        x_t: Float[Array, "c *spatial"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> DiTOutputs:
        """The output, and what there is at `early_depth`, of one pass.

        >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, early_depth=1,
        ...           early_head=True, key=jax.random.key(0))
        >>> made = dit.outputs(jnp.ones((4, 8, 8)), jnp.array(0.5))
        >>> made.early.shape, made.tokens.shape
        ((4, 8, 8), (16, 16))
        """
        return self._run(x_t, t, cond, h, early=True)

    def keep(
        self,
        x_t: Float[Array, "c *spatial"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        h: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "c_out *spatial"], PyTree]:
        """What the call gives, and what attention and MLP of every block gave, for `reuse`.

        Blocks must have `keep` and `reuse`, as `DiTBlock` and `CrossAttentionDiTBlock`, and tokens
        must not set in between (`tokens_start`).
        """
        kept: list[PyTree] = []

        def run(x: Array, c: Array, context: BlockContext, span: tuple[int, int]) -> Array:
            self._check_whole(span)
            x, more = self.blocks.each(lambda block, x, _: block.keep(x, c, context), x, None)
            kept.append(more)
            return x

        out = self._run(x_t, t, cond, h, early=False, blocks=run).out
        return out, kept[0]

    def reuse(
        self,
        x_t: Float[Array, "c *spatial"],
        t: Float[Array, ""],
        cond: PyTree,
        kept: PyTree,
        *,
        h: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "c_out *spatial"]:
        """The call with the `kept` outputs of another one in the place of attention and MLPs.

        Patches, time, condition, modulation and the last layer are this call's own.
        """

        def run(x: Array, c: Array, context: BlockContext, span: tuple[int, int]) -> Array:
            self._check_whole(span)
            return self.blocks.each(lambda b, x, own: (b.reuse(x, c, own), None), x, kept)[0]

        return self._run(x_t, t, cond, h, early=False, blocks=run).out

    def _check_whole(self, span: tuple[int, int]) -> None:
        if span != (0, self.config.depth):
            raise ValueError(
                "DiT: outputs of blocks are kept where all blocks see the same tokens; here some "
                f"set in at block {self.config.tokens_start}. Sample it with eqxldm.sample."
            )

    def _run(
        self, x_t: Any, t: Any, cond: PyTree, h: Any, *, early: bool, blocks: Any = None
    ) -> DiTOutputs:
        config, blocks = self.config, self.blocks if blocks is None else blocks
        if x_t.shape[1:] == self.shape:
            raise ValueError(
                f"DiT: x_t of shape {x_t.shape} is a batch of {len(x_t)}, and the network takes "
                "one example: jax.vmap(dit)(x_t, t, cond)."
            )
        if x_t.shape != self.shape:
            raise ValueError(f"DiT: x_t must have shape {self.shape}, got {x_t.shape}.")
        grid, _ = patch_grid(self.shape[1:], self.patch_size)
        # Time and condition in float32, rounded once.
        time = embed_times("DiT", self.time_embedding, self.step_embedding, t, h)
        own = embed_condition("DiT", jnp.zeros_like(time), self.embed_cond, cond)
        vector: Any = own.vector
        c = (time + vector).astype(x_t.dtype)
        x = patchify(x_t, self.patch_size)
        x = self.patch_embedding(x if self.patch_bottleneck is None else self.patch_bottleneck(x))
        x = x + jnp.asarray(sincos_positions(grid, x.shape[-1]), x.dtype)
        x, context, before = self._joined(x, own, grid)
        at = config.early_depth if early else None
        joins = None if self.context_positions is None else config.tokens_start
        ends = sorted({0, joins or 0, at or config.depth, config.depth})
        tokens = None
        for start, stop in itertools.pairwise(ends):
            if start == joins:
                x, context, before = self._with_context(x, context, before, time, vector)
            x = blocks(x, c, context, span=(start, stop))
            tokens = x[before:] if stop == at else tokens
        whole = lambda y: unpatchify(y, self.shape[1:], self.patch_size)
        out = apply_head(self.final_norm, self.final_modulation, self.final_linear, x[before:], c)
        if tokens is None or self.early_head is None:
            return DiTOutputs(whole(out), None, tokens)
        return DiTOutputs(whole(out), whole(self.early_head(tokens, c)), tokens)

    def _joined(
        self, x: Float[Array, "n d"], conditioning: Conditioning, grid: tuple[int, ...]
    ) -> tuple[Float[Array, "n2 d"], BlockContext, int]:
        """The sequence that the blocks see, their context, and how many tokens stand before the
        patches."""
        mask, before = conditioning.mask, 0
        tokens = conditioning.tokens
        if tokens is not None:
            tokens = tokens.astype(x.dtype)
        if tokens is not None and getattr(self.blocks.stacked, "joint", True):
            before = len(tokens)
            if tokens.shape[1] != x.shape[1]:
                raise ValueError(
                    f"DiT: tokens that are joined to the patches must have the width "
                    f"{x.shape[1]}, got {tokens.shape[1]}. Project them in embed_cond, or use "
                    "block=CrossAttentionDiTBlock."
                )
            if mask is not None:
                mask = jnp.concatenate([mask, jnp.ones(len(x), bool)])
            x, tokens = jnp.concatenate([tokens, x]), None
        return x, BlockContext(tokens, mask, self._rotation(before, grid)), before

    def _with_context(
        self, x: Float[Array, "n d"], context: BlockContext, before: int, time: Any, vector: Any
    ) -> tuple[Float[Array, "n2 d"], BlockContext, int]:
        """The same with the tokens of condition and time before all others."""
        config, places = self.config, self.context_positions
        assert places is not None
        kinds = [vector] * config.condition_tokens + [time] * config.time_tokens
        tokens = (jnp.stack(kinds) + places).astype(x.dtype)
        before, mask = before + len(tokens), context.mask
        if (
            mask is not None and context.tokens is None
        ):  # of the sequence, not of what it attends to
            mask = jnp.concatenate([jnp.ones(len(tokens), bool), mask])
        grid, _ = patch_grid(self.shape[1:], self.patch_size)
        context = BlockContext(context.tokens, mask, self._rotation(before, grid))
        return jnp.concatenate([tokens, x]), context, before

    def _rotation(self, before: int, grid: tuple[int, ...]) -> Rotation | None:
        """Of the patches by their places; what stands before them is not turned."""
        if self.config.rope is None:
            return None
        places = grid_positions(grid)
        return self.config.rope(np.concatenate([np.zeros((before, places.shape[1])), places]))


def _check(config: DiTConfig) -> None:
    patch = config.patch_size if isinstance(config.patch_size, tuple) else (config.patch_size,)
    numbers = (*config.shape, *patch, config.depth, config.width, config.num_heads)
    if min(numbers) < 1:
        raise ValueError(
            f"DiT: every size must be at least 1, got shape {config.shape}, patch_size "
            f"{config.patch_size}, depth {config.depth}, width {config.width}, num_heads "
            f"{config.num_heads}."
        )
    axes = len(config.shape) - 1
    if not 1 <= axes <= 3:
        raise ValueError(
            f"DiT: shape must be the channels and one to three spatial axes, got {config.shape}."
        )
    patch_grid(config.shape[1:], config.patch_size, "DiT")
    sincos_positions((1,) * axes, config.width)
    if config.num_classes is not None and config.embed_cond is not None:
        raise ValueError("DiT: give num_classes or embed_cond, not both.")
    if config.rope is not None and len(config.rope.sizes) != axes:
        raise ValueError(
            f"DiT: rope needs a size for each of the {axes} axes of {config.shape}, got "
            f"{config.rope.sizes}."
        )
    _check_newer(config)


def _check_newer(config: DiTConfig) -> None:
    early, narrow = config.early_depth, config.patch_bottleneck
    if early is not None and not 1 <= early < config.depth:
        raise ValueError(
            f"DiT: early_depth must lie in 1 .. {config.depth - 1}, below depth, got {early}."
        )
    if config.early_head and early is None:
        raise ValueError("DiT: early_head needs early_depth, the block after which it reads.")
    if narrow is not None and narrow < 1:
        raise ValueError(f"DiT: patch_bottleneck must be at least 1, got {narrow}.")
    counts = config.condition_tokens, config.time_tokens
    if min(counts) < 0 or not 0 <= config.tokens_start < config.depth:
        raise ValueError(
            f"DiT: need condition_tokens and time_tokens of at least 0 and tokens_start in 0 .. "
            f"{config.depth - 1}, got {counts} and {config.tokens_start}."
        )
    if not config.modulated and not config.time_tokens:
        raise ValueError(
            "DiT: without modulated the blocks know nothing of the time; give time_tokens, and "
            "condition_tokens for a condition that is a vector."
        )
