"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2023)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import SelfAttention
from ..nn.embeddings import LabelEmbedding, TimeEmbedding, sincos_positions
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.patchify import patchify, unpatchify

# Keep what a matmul against a weight produced; recompute the elementwise rest.
save_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


class DiTBlock(eqx.Module):
    """One transformer block, conditioned by adaLN-Zero on a vector `c`.

    `x += g1 attention(modulate(norm(x), b1, a1))`, then
    `x += g2 mlp(modulate(norm(x), b2, a2))`, with `(b1, a1, g1, b2, a2, g2)` from `c`.

    >>> block = DiTBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> block(jnp.ones((5, 16)), jnp.ones(16)).shape
    (5, 16)
    """

    attention: SelfAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        hidden = int(width * mlp_ratio)
        self.attention = SelfAttention(width, heads, key=k1)
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.modulation = Modulation(width, 6, key=k4)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        b1, a1, g1, b2, a2, g2 = self.modulation(c)
        x = x + g1 * self.attention(modulate(layer_norm(x), b1, a1))
        y = jax.nn.gelu(self.fc1(modulate(layer_norm(x), b2, a2)), approximate=True)
        return x + g2 * self.fc2(y)


class DiT(eqx.Module):
    """A diffusion transformer: `(x_t, t, label) -> out`, one example at a time.

    **Arguments**:

    - `shape`: `(channels, height, width)` of the latent; both sides divisible by `patch`.
    - `depth`, `width`, `heads`, `mlp_ratio`: the transformer's size.
    - `num_classes`: labels `0 .. num_classes - 1`; row `num_classes` (`DiT.null`) means none.
    - `remat`: a `jax.checkpoint` policy for the blocks. The default keeps the outputs of the
      linear layers and recomputes the rest; None keeps everything.
    - `unroll`: how many blocks of the scan to unroll. 1 keeps compile time flat in depth.

    Blocks are stacked on a leading axis and scanned. Every inexact array leaf is trainable; the
    fixed positions are computed in the call. The last layer starts at zero, so the untrained
    network outputs 0.

    **Raises** `ValueError` for a size that does not divide, on construction.

    >>> dit = DiT((4, 8, 8), patch=2, depth=2, width=16, heads=2, num_classes=10,
    ...           key=jax.random.key(0))
    >>> dit(jnp.ones((4, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
    (4, 8, 8)
    """

    patch_embedding: Linear
    time_embedding: TimeEmbedding
    label_embedding: LabelEmbedding
    blocks: DiTBlock
    final_modulation: Modulation
    final_linear: Linear
    shape: tuple[int, int, int] = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    remat: Callable[..., Any] | None = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int,
        depth: int,
        width: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        remat: Callable[..., Any] | None = save_matmuls,
        unroll: int = 1,
        key,
    ):
        channels, height, wide = shape
        if height % patch or wide % patch:
            raise ValueError(
                f"DiT: a {height} x {wide} input does not divide by the patch {patch}."
            )
        if width % 4:
            raise ValueError(f"DiT: width must be a multiple of 4 for 2-D positions, got {width}.")
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        token = channels * patch * patch
        self.patch_embedding = Linear(token, width, key=k1)
        self.time_embedding = TimeEmbedding(width, key=k2)
        self.label_embedding = LabelEmbedding(num_classes, width, key=k3)
        make_block = lambda k: DiTBlock(width, heads, mlp_ratio, key=k)
        self.blocks = eqx.filter_vmap(make_block)(jax.random.split(k4, depth))
        self.final_modulation = Modulation(width, 2, key=k5)
        self.final_linear = Linear(width, token, init=zeros, key=k6)
        self.shape, self.patch, self.remat, self.unroll = shape, patch, remat, unroll

    @property
    def null(self) -> Int[Array, ""]:
        """The label that means "no label"."""
        return self.label_embedding.null

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        label: Int[Array, ""],
        *,
        key: PyTree | None = None,
    ) -> Float[Array, "c h w"]:
        if x_t.shape != self.shape:
            raise ValueError(f"DiT: x_t must have shape {self.shape}, got {x_t.shape}.")
        _, height, width = self.shape
        c = (self.time_embedding(t) + self.label_embedding(label)).astype(x_t.dtype)
        x = self.patch_embedding(patchify(x_t, self.patch))
        grid = sincos_positions(height // self.patch, width // self.patch, x.shape[-1])
        x = self._run_blocks(x + jnp.asarray(grid, x.dtype), c)
        shift, scale = self.final_modulation(c)
        x = self.final_linear(modulate(layer_norm(x), shift, scale))
        return unpatchify(x, height, width, self.patch)

    def _run_blocks(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        params, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(x, block_params):
            return eqx.combine(block_params, static)(x, c), None

        if self.remat is not None:
            apply = jax.checkpoint(apply, policy=self.remat)
        return jax.lax.scan(apply, x, params, unroll=self.unroll)[0]
