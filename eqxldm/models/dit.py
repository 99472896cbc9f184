"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import Attention, attend
from ..nn.conditioning import Conditioning, embed_condition, embed_times
from ..nn.embeddings import LabelEmbedding, Sinusoid, sincos_positions
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.patchify import patch_grid, patch_sizes, patchify, unpatchify
from ..nn.rope import RoPE, Rotation, grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .dit_blocks import BlockContext, DiTBlock

PUBLISHED_TIME = Sinusoid()


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

    def build(self, *, key) -> "DiT":
        """The network, with random weights."""
        return DiT(**arguments(self), key=key)


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
    - `attention`: `nn.attend`, or `nn.cudnn_attend` for bfloat16 on a GPU.
    - `remat`, `unroll`: those of `nn.Stack`.

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

    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    embed_cond: Callable[..., Any] | None  # a table of labels, or the argument
    blocks: Stack
    final_modulation: Modulation
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
        self.patch_embedding = Linear(token, width, key=k1)
        # A part that was given as a module is used as it is; the record only describes it.
        part = lambda name: options.get(name, getattr(config, name))
        self.time_embedding = build_part(part("time_embedding"), width, key=k2)
        step_key = jax.random.fold_in(k2, 1)
        self.step_embedding = build_part(part("step_embedding"), width, key=step_key)
        if num_classes is not None:
            self.embed_cond = LabelEmbedding(num_classes, width, key=k3)
        else:
            self.embed_cond = build_part(embed_cond, key=k3)
        make_block = lambda k: config.block(
            width,
            num_heads,
            config.mlp_ratio,
            qk_norm=config.qk_norm,
            attention=config.attention,
            key=k,
        )
        self.blocks = Stack(make_block, depth, remat=config.remat, unroll=config.unroll, key=k4)
        self.final_modulation = Modulation(width, 2, key=k5)
        self.final_linear = Linear(width, (1 + config.learn_sigma) * token, init=zeros, key=k6)
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

    def __call__(
        self,
        x_t: Float[Array, "c *spatial"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out *spatial"]:
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
        conditioning = embed_condition("DiT", time, self.embed_cond, cond)
        c: Any = conditioning.vector
        c = c.astype(x_t.dtype)
        x = self.patch_embedding(patchify(x_t, self.patch_size))
        x = x + jnp.asarray(sincos_positions(grid, x.shape[-1]), x.dtype)
        x, context, before = self._joined(x, conditioning, grid)
        x = self.blocks(x, c, context)[before:]
        shift, scale = self.final_modulation(c)
        x = self.final_linear(modulate(layer_norm(x), shift, scale))
        return unpatchify(x, self.shape[1:], self.patch_size)

    def _joined(
        self, x: Float[Array, "n d"], conditioning: Conditioning, grid: tuple[int, ...]
    ) -> tuple[Float[Array, "n2 d"], BlockContext, int]:
        """The sequence that the blocks see, their context, and how many tokens stand before the
        patches."""
        rope, mask, before = self.config.rope, conditioning.mask, 0
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
        rotation: Rotation | None = None
        if rope is not None:
            places = grid_positions(grid)
            rotation = rope(np.concatenate([np.zeros((before, places.shape[1])), places]))
        return x, BlockContext(tokens, mask, rotation), before


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


def _published(name: str, patch_size: int, *, depth: int, width: int, num_heads: int):
    """The constructor of one size of the paper (Peebles & Xie 2023, tables 1 and 4)."""

    def make(
        shape: tuple[int, ...],
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        *,
        key,
        **options: Any,
    ) -> DiT:
        size: dict[str, Any] = dict(
            patch_size=patch_size, depth=depth, width=width, num_heads=num_heads
        )
        size |= dict(num_classes=num_classes, learn_sigma=learn_sigma)
        return DiT(shape, **size, **options, key=key)

    make.__name__ = make.__qualname__ = f"dit_{name.lower()}_{patch_size}"
    make.__doc__ = f"""DiT-{name}/{patch_size}: {depth} blocks, {width} wide, {num_heads} heads.

    `shape` is the latent's, (4, 32, 32) in the paper (Peebles & Xie 2023). All other arguments are
    those of `DiT`; for another condition than a class, `num_classes=None, embed_cond=...`.

    >>> dit = eqx.filter_eval_shape({make.__name__}, (4, 32, 32), key=jax.random.key(0))
    >>> dit.patch_size, dit.blocks.stacked.fc1.weight.shape
    ({patch_size}, ({depth}, {4 * width}, {width}))
    """
    return make


dit_s_2 = _published("S", 2, depth=12, width=384, num_heads=6)
dit_s_4 = _published("S", 4, depth=12, width=384, num_heads=6)
dit_s_8 = _published("S", 8, depth=12, width=384, num_heads=6)
dit_b_2 = _published("B", 2, depth=12, width=768, num_heads=12)
dit_b_4 = _published("B", 4, depth=12, width=768, num_heads=12)
dit_b_8 = _published("B", 8, depth=12, width=768, num_heads=12)
dit_l_2 = _published("L", 2, depth=24, width=1024, num_heads=16)
dit_l_4 = _published("L", 4, depth=24, width=1024, num_heads=16)
dit_l_8 = _published("L", 8, depth=24, width=1024, num_heads=16)
dit_xl_2 = _published("XL", 2, depth=28, width=1152, num_heads=16)
dit_xl_4 = _published("XL", 4, depth=28, width=1152, num_heads=16)
dit_xl_8 = _published("XL", 8, depth=28, width=1152, num_heads=16)
