"""A stack of equal blocks: one is compiled, whatever the depth."""

from collections.abc import Callable, Collection
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..sharding import gather_params
from .constraints import divide_tokens, replicate_activation

# Keep what a matmul against a weight produced; recompute the elementwise rest.
save_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# Keep what is as narrow as a token: the outputs of attention and MLP, and the softmax's maxima and
# sums. On a TPU the least time: what is wider costs more to store than to compute again.
save_narrow = jax.checkpoint_policies.save_only_these_names("attention", "softmax", "mlp")


class Stack(eqx.Module):
    """`depth` blocks of one kind, applied one after the other: `x = block(x, *shared)`.

    Their parameters lie stacked on a leading axis (`stacked`, a block with one more axis), and
    `jax.lax.scan` runs over it, so that compile time is flat in depth. In each round the block's
    weights are cast to the dtype of `x` and gathered from the devices that share them
    (`sharding.gather_params`), and what goes in and out is kept whole on each device
    (`nn.replicate_activation`).

    **Arguments**:

    - `make_block`: from a key to a block; called once for each, all must be of one shape.
    - `depth`: at least 1.
    - `remat`: a `jax.checkpoint` policy. The default keeps the outputs of the linear layers and
      recomputes the rest; `save_narrow` is best on TPUs; None keeps everything.
    - `unroll`: how many blocks of the scan to unroll; True unrolls all.
    - `sequence_axis`: the mesh's axis over which the tokens of `x`, its first axis, are divided
      between the blocks (`nn.divide_tokens`); None keeps them whole.

    Called as `stack(x, *shared)`. `x`, what the blocks hand on, is an array or a tree of arrays,
    such as the tokens of two streams; a block gives back the same shapes and dtypes. `shared` are
    further arguments of every block, trees of arrays or None. Blocks whose numbers are in `skip`
    are left out; of `span = (start, stop)` only blocks `start .. stop - 1` are applied, for what is
    to happen between two of them.

    >>> from eqxldm.nn import Linear
    >>> stack = Stack(lambda key: Linear(4, 4, key=key), 3, key=jax.random.key(0))
    >>> stack.stacked.weight.shape, stack(jnp.ones((2, 4))).shape
    ((3, 4, 4), (2, 4))
    """

    stacked: PyTree
    depth: int = eqx.field(static=True)
    remat: Callable[..., Any] | None = eqx.field(static=True)
    unroll: int = eqx.field(static=True)
    sequence_axis: str | None = eqx.field(static=True)

    def __init__(
        self,
        make_block: Callable[..., Any],
        depth: int,
        *,
        remat: Callable[..., Any] | None = save_matmuls,
        unroll: int = 1,
        sequence_axis: str | None = None,
        key,
    ):
        if depth < 1:
            raise ValueError(f"Stack: depth must be at least 1, got {depth}.")
        self.stacked = eqx.filter_vmap(make_block)(jax.random.split(key, depth))
        self.depth, self.remat, self.unroll = depth, remat, unroll
        self.sequence_axis = sequence_axis

    def __call__(
        self,
        x: PyTree,
        *shared: PyTree,
        skip: Collection[int] = (),
        span: tuple[int, int] | None = None,
    ) -> PyTree:
        return self._scan(x, shared, every=False, skip=skip, span=span)[0]

    def outputs(self, x: PyTree, *shared: PyTree) -> PyTree:
        """What each block gave, on a leading axis of length `depth`.

        >>> from eqxldm.nn import Linear
        >>> stack = Stack(lambda key: Linear(4, 4, key=key), 3, key=jax.random.key(0))
        >>> stack.outputs(jnp.ones((2, 4))).shape
        (3, 2, 4)
        """
        return self._scan(x, shared, every=True)[1]

    def each(
        self, function: Callable[..., tuple[PyTree, PyTree]], x: PyTree, own: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`x, out = function(block, x, own[i])` over the blocks: the last `x`, and all outputs.

        For what each block has beside its parameters and changes, such as a cache of keys and
        values. `own` has a leading axis of length `depth`, and so has what comes out.

        >>> from eqxldm.nn import Linear
        >>> stack = Stack(lambda key: Linear(4, 4, key=key), 3, key=jax.random.key(0))
        >>> add = lambda block, x, own: (block(x) + own, own + 1)
        >>> stack.each(add, jnp.ones(4), jnp.zeros(3))[1]
        Array([1., 1., 1.], dtype=float32)
        """
        params, static = eqx.partition(self.stacked, eqx.is_array)
        dtype = jnp.result_type(*(a.dtype for a in jax.tree.leaves(x) if eqx.is_inexact_array(a)))

        def apply(x: PyTree, one: PyTree) -> tuple[PyTree, PyTree]:
            block_params, state = one
            block = eqx.combine(gather_params(block_params, dtype), static)
            x, state = function(block, x, state)
            return jax.tree.map(replicate_activation, x), state

        return jax.lax.scan(apply, x, (params, own), unroll=self.unroll)

    def _scan(
        self,
        x: PyTree,
        shared: tuple,
        every: bool,
        skip: Collection[int] = (),
        span: tuple[int, int] | None = None,
    ) -> tuple[PyTree, PyTree]:
        start, stop = span or (0, self.depth)
        if not 0 <= start < stop <= self.depth:
            raise ValueError(f"Stack: no blocks {start} .. {stop - 1} among {self.depth}.")
        if wrong := [i for i in skip if not 0 <= i < self.depth]:
            raise ValueError(f"Stack: skip must name blocks 0 .. {self.depth - 1}, got {wrong}.")
        params, static = eqx.partition(self.stacked, eqx.is_array)
        dtype = jnp.result_type(*(a.dtype for a in jax.tree.leaves(x) if eqx.is_inexact_array(a)))
        replicate = lambda tree: jax.tree.map(replicate_activation, tree)
        divide = lambda tree: jax.tree.map(lambda a: divide_tokens(a, self.sequence_axis), tree)

        # Whether each block is used; None where all are, so that nothing is asked in the loop.
        used = np.isin(np.arange(self.depth), list(skip), invert=True) if skip else None

        def apply(x: PyTree, block_params: PyTree) -> tuple[PyTree, PyTree]:
            block_params, use = block_params

            def run(x: PyTree) -> PyTree:
                block = eqx.combine(gather_params(block_params, dtype), static)
                return divide(block(x, *replicate(shared)))

            x = run(x) if use is None else jax.lax.cond(use, run, lambda x: x, x)
            return x, (x if every else None)

        # The body is what is recomputed: a block's input is kept, and what the policy says.
        blocks = (params, used)
        if stop - start < self.depth:
            blocks = jax.tree.map(lambda leaf: leaf[start:stop], blocks)
        if self.remat is not None:
            apply = jax.checkpoint(apply, policy=self.remat)
        return jax.lax.scan(apply, divide(x), blocks, unroll=self.unroll)
