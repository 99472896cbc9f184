"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2023)."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import Attention, NormedSelfAttention, SelfAttention, attend
from ..nn.constraints import fusion_barrier, gather_params, replicate_activation
from ..nn.embeddings import LabelEmbedding, TimeEmbedding, condition_vector, sincos_positions
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.patchify import patchify, unpatchify

# Keep what a matmul against a weight produced; recompute the elementwise rest.
save_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# Keep what is as narrow as a token: the outputs of attention and MLP, and the softmax's maxima and
# sums. On a TPU the least time: what is wider costs more to store than to compute again.
save_narrow = jax.checkpoint_policies.save_only_these_names("attention", "softmax", "mlp")


class DiTBlock(eqx.Module):
    """One transformer block, conditioned by adaLN-Zero on a vector `c`.

    `x += g1 attention(modulate(norm(x), b1, a1))`, then
    `x += g2 mlp(modulate(norm(x), b2, a2))`, with `(b1, a1, g1, b2, a2, g2)` from `c`.
    `qk_norm`, if given, and `attention` are those of `NormedSelfAttention`.

    >>> block = DiTBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> block(jnp.ones((5, 16)), jnp.ones(16)).shape
    (5, 16)
    """

    attention: SelfAttention | NormedSelfAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        hidden = int(width * mlp_ratio)
        if qk_norm is None:
            self.attention = SelfAttention(width, num_heads, attention=attention, key=k1)
        else:
            self.attention = NormedSelfAttention(
                width, num_heads, qk_norm=qk_norm, attention=attention, key=k1
            )
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.modulation = Modulation(width, 6, key=k4)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        b1, a1, g1, b2, a2, g2 = self.modulation(c)
        x = x + g1 * self.attention(modulate(layer_norm(x), b1, a1))
        y = jax.nn.gelu(self.fc1(modulate(layer_norm(x), b2, a2)), approximate=True)
        return x + g2 * checkpoint_name(self.fc2(fusion_barrier(y)), "mlp")


class DiT(eqx.Module):
    """A diffusion transformer: `(x_t, t, cond) -> out`, one example at a time.

    **Arguments**:

    - `shape`: `(channels, height, width)` of the latent; both sides divisible by `patch_size`.
    - `depth`, `width`, `num_heads`, `mlp_ratio`: the transformer's size.
    - `num_classes`: `cond` is a label `0 .. num_classes - 1`, or `num_classes` (`DiT.null`) for
      none. None: the network is unconditional and `cond` is None.
    - `embed_cond`: for any other condition, a function or module from `cond` to a vector of
      `width`, which is added to the embedding of the time: `nn.Linear(5, width, key=key)` for a
      vector of five numbers. Instead of `num_classes`.
    - `learn_sigma`: the output has `2 channels`: the prediction, then the variance's part, as
      `eqxldm.LearnedRange` reads it.
    - `qk_norm`: a norm of queries and keys, made from the head size, such as `nn.RMSNorm`.
    - `freq_shift`: of the timestep's frequencies, see `nn.sinusoidal`; diffusers' DiT has 1.
    - `attention`: `nn.attend`, or `nn.cudnn_attend` for bfloat16 on a GPU.
    - `remat`: a `jax.checkpoint` policy for the blocks. The default keeps the outputs of the
      linear layers and recomputes the rest; `save_narrow` is best on TPUs; None keeps everything.
    - `unroll`: how many blocks of the scan to unroll. 1 keeps compile time flat in depth; True
      unrolls all.

    Blocks are stacked on a leading axis and scanned. Every inexact array leaf is trainable; the
    fixed positions are computed in the call. Weights start as in DiT: Xavier-uniform with zero
    biases, `N(0, 0.02^2)` for the embeddings of label and time, zero for every modulation and the
    last layer, so the untrained network outputs 0. The network computes in the dtype of `x_t`;
    the time, the norms' statistics and the softmax are float32.

    **Raises** `ValueError` for a size that does not divide, on construction, and for an `x_t` of
    another shape or a `cond` that the network was not made for. A label outside the table gives
    NaN; `nn.check_label` raises.

    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, num_classes=10,
    ...           key=jax.random.key(0))
    >>> dit(jnp.ones((4, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
    (4, 8, 8)
    """

    patch_embedding: Linear
    time_embedding: TimeEmbedding
    label_embedding: Callable[..., Any] | None  # or `embed_cond`; None: unconditional
    blocks: DiTBlock
    final_modulation: Modulation
    final_linear: Linear
    shape: tuple[int, int, int] = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)
    remat: Callable[..., Any] | None = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch_size: int,
        depth: int,
        width: int,
        num_heads: int,
        num_classes: int | None = None,
        embed_cond: Callable[..., Any] | None = None,
        learn_sigma: bool = False,
        mlp_ratio: float = 4.0,
        qk_norm: Callable[[int], Any] | None = None,
        freq_shift: int = 0,
        attention: Attention = attend,
        remat: Callable[..., Any] | None = save_matmuls,
        unroll: int = 1,
        key,
    ):
        channels, height, wide = shape
        if min(*shape, patch_size, depth, width, num_heads) < 1:
            raise ValueError(
                f"DiT: every size must be at least 1, got shape {shape}, patch {patch_size}, "
                f"depth {depth}, width {width}, heads {num_heads}."
            )
        if height % patch_size or wide % patch_size:
            raise ValueError(
                f"DiT: a {height} x {wide} input does not divide by the patch {patch_size}."
            )
        if width % 4:
            raise ValueError(f"DiT: width must be a multiple of 4 for 2-D positions, got {width}.")
        if num_classes is not None and embed_cond is not None:
            raise ValueError("DiT: give num_classes or embed_cond, not both.")
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        token = channels * patch_size * patch_size
        self.patch_embedding = Linear(token, width, key=k1)
        self.time_embedding = TimeEmbedding(width, freq_shift=freq_shift, key=k2)
        self.label_embedding = (
            embed_cond if num_classes is None else LabelEmbedding(num_classes, width, key=k3)
        )
        make_block = lambda k: DiTBlock(
            width, num_heads, mlp_ratio, qk_norm=qk_norm, attention=attention, key=k
        )
        self.blocks = eqx.filter_vmap(make_block)(jax.random.split(k4, depth))
        self.final_modulation = Modulation(width, 2, key=k5)
        self.final_linear = Linear(width, (1 + learn_sigma) * token, init=zeros, key=k6)
        self.shape, self.patch_size, self.remat, self.unroll = shape, patch_size, remat, unroll

    @property
    def null(self) -> Int[Array, ""]:
        """The label that means "no label"; a `ValueError` if the condition is not a label."""
        if not isinstance(self.label_embedding, LabelEmbedding):
            raise ValueError("DiT: only a network with num_classes has a null label.")
        return self.label_embedding.null

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out h w"]:
        if x_t.shape != self.shape:
            raise ValueError(f"DiT: x_t must have shape {self.shape}, got {x_t.shape}.")
        _, height, width = self.shape
        c = condition_vector("DiT", self.time_embedding(t), self.label_embedding, cond)
        c = c.astype(x_t.dtype)
        x = self.patch_embedding(patchify(x_t, self.patch_size))
        grid = sincos_positions(height // self.patch_size, width // self.patch_size, x.shape[-1])
        x = self._run_blocks(x + jnp.asarray(grid, x.dtype), c)
        shift, scale = self.final_modulation(c)
        x = self.final_linear(modulate(layer_norm(x), shift, scale))
        return unpatchify(x, height, width, self.patch_size)

    def _run_blocks(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        params, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(x, block_params):
            block = eqx.combine(gather_params(block_params, x.dtype), static)
            return replicate_activation(block(x, replicate_activation(c))), None

        if self.remat is not None:
            apply = jax.checkpoint(apply, policy=self.remat)
        return jax.lax.scan(apply, replicate_activation(x), params, unroll=self.unroll)[0]


def parameter_count(model: PyTree) -> int:
    """The number of trainable parameters: the sizes of all inexact arrays of a model.

    Shapes are enough, so a model too large for the memory can be counted under
    `eqx.filter_eval_shape`.

    >>> parameter_count(Linear(3, 2, key=jax.random.key(0)))
    8
    >>> parameter_count(eqx.filter_eval_shape(dit_xl_2, (4, 32, 32), key=jax.random.key(0)))
    674834720
    """
    leaves = jax.tree.leaves(eqx.filter(model, _is_inexact))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _is_inexact(leaf: Any) -> bool:
    described = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return described or eqx.is_inexact_array(leaf)


def multiply_adds(dit: DiT) -> int:
    """The multiply-adds of one forward pass of one example; twice as many FLOPs.

    With `n` tokens of width `d` in `L` blocks, an MLP of `4 d`, `k` numbers in a token that comes
    in and `k'` in one that goes out:

    `L (12 n d^2 + 2 n^2 d + 6 d^2 + 2 n d) + n d (k + k') + 256 d + d^2 + 2 d^2`

    In the blocks: the linear layers, the two matmuls of attention, adaLN, and one for each number
    that a layer norm sees. Around them: the patch embedding and the last layer, the MLP of the
    time, the last adaLN. Left out: softmax, activations, biases, gates, sums, `qk_norm`, the
    lookup of the label, and `embed_cond`. A training step is three times as many, four if
    everything is recomputed.

    This is the convention of the "Gflops" in the paper of DiT (Peebles & Xie 2023, table 4). All
    twelve sizes at 256 x 256 and XL/2 at 512 x 512 come out to the last digit, except B/4: 5.57
    against the 5.56 printed there, which no choice of terms gives together with the others.

    >>> dit = eqx.filter_eval_shape(dit_xl_2, (4, 32, 32), key=jax.random.key(0))
    >>> print(f"{multiply_adds(dit) / 1e9:.2f} G")
    118.64 G
    """
    _, height, wide = dit.shape
    n, block = height * wide // dit.patch_size**2, dit.blocks
    depth, _, d = block.fc1.weight.shape
    size = lambda *layers: sum(math.prod(layer.weight.shape[-2:]) for layer in layers)
    per_block = (
        n * (3 * size(block.attention.qkv) + size(block.attention.proj, block.fc1, block.fc2))
        + 2 * n * n * d
        + size(block.modulation.linear)
        + 2 * n * d
    )
    time = dit.time_embedding
    ends = n * size(dit.patch_embedding, dit.final_linear)
    vectors = size(time.linear1, time.linear2, dit.final_modulation.linear)
    return depth * per_block + ends + vectors


def _published(name: str, patch_size: int, *, depth: int, width: int, num_heads: int):
    """The constructor of one size of the paper (Peebles & Xie 2023, tables 1 and 4)."""

    def make(
        shape: tuple[int, int, int],
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
    >>> dit.patch, dit.blocks.fc1.weight.shape
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
