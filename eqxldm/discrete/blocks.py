"""Block diffusion: autoregressive over blocks of tokens, masked diffusion inside a block."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..objectives import Context, OneTimeObjective
from ..times import stratified_time
from .masking import Masking
from .objectives import Aux, TokenDenoiser, exact_bound, masked_sum


def block_mask(n: int, block_size: int) -> Bool[np.ndarray, "n n"]:
    """Which tokens a token sees among clean ones: those of its own block and of all before.

    >>> block_mask(4, 2).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    _check_blocks("block_mask", n, block_size)
    block = np.arange(n) // block_size
    return block[:, None] >= block[None]


def training_mask(n: int, block_size: int) -> Bool[np.ndarray, "two_n two_n"]:
    """The mask for `[x_t, x0]`, with which one pass gives the logits of all blocks.

    A block of `x_t` sees itself and the clean blocks before it; a clean block sees itself and the
    clean blocks before it, and nothing of `x_t` (Arriola et al. 2025, section 3.1).

    >>> training_mask(2, 1).astype(int).tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    clean = block_mask(n, block_size)
    own = clean & clean.T
    return np.block([[own, clean & ~own], [np.zeros_like(own), clean]])


def one_pass(
    denoiser: Any, x_t: Int[Array, " n"], x0: Int[Array, " n"], block_size: int, cond: PyTree = None
) -> Float[Array, "n v"]:
    """The logits of each block of `x_t` given itself and the clean blocks before, in one call.

    The network takes `mask=` and `positions=`, as `models.TokenTransformer` does, and has no time:
    each block has one of its own.
    """
    n = len(x0)
    positions = np.concatenate([np.arange(n), np.arange(n)])
    both = jnp.concatenate([x_t, x0])
    mask = training_mask(n, block_size)
    return denoiser(both, None, cond, key=None, mask=jnp.asarray(mask), positions=positions)[:n]


class BlockDiffusion(OneTimeObjective):
    """The bound of block diffusion, in nats a token.

    `1 / n sum_b w(t_b) sum_{i in b: x_t[i] = MASK} -log p(x0[i] | x_t of b, x0 before b)`: the
    likelihood factors over blocks, and each factor is bounded as in `MaskedDiffusion` (Arriola et
    al. 2025, eq. 8). With blocks of one token it is an autoregressive model's likelihood, with one
    block the bound of masked diffusion. All blocks take one pass over `2 n` tokens.

    The times of an example's blocks are evenly spaced from a random one, `t_b = (u + b / B) mod 1`
    in (0, 1]: each is uniform, and their weights vary less together. `block_size` divides the
    length. The network is as `one_pass` says.

    >>> import jax
    >>> BlockDiffusion(Masking(mask_id=2), block_size=4).times(jax.random.key(0), 3).shape
    (3,)
    """

    path: Masking
    block_size: int = eqx.field(static=True)

    time_sampler = staticmethod(stratified_time)

    def loss(
        self,
        denoiser: TokenDenoiser,
        x0: Int[Array, " n"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        _check_blocks("BlockDiffusion", len(x0), self.block_size)
        blocks = len(x0) // self.block_size
        u = 1 - (1 - times + jnp.arange(blocks) / blocks) % 1.0
        t = jnp.repeat(u, self.block_size)
        x_t = self.path.mask(x0, t, key=key)
        logits = one_pass(denoiser, x_t, x0, self.block_size, cond)
        weight = self.path.weight(t) / len(x0)
        return masked_sum(logits, x0, x_t, self.path.mask_id, weight), {}


def exact_block_bound(
    denoiser: Any, x0: Int[Array, " n"], mask_id: int, block_size: int, cond: PyTree = None
) -> Float[Array, ""]:
    """The bound of one sequence without any chance, in nats: all masks of each block are tried.

    Each block's passes are its own, over the clean tokens before it and the masked ones in it,
    `exact_bound`'s sum with those before as they are. For blocks of at most 14 tokens.

    >>> uniform = lambda x, t, cond, key=None, mask=None, positions=None: jnp.zeros((len(x), 3))
    >>> round(float(exact_block_bound(uniform, jnp.array([0, 1, 0, 1]), 2, 2) / jnp.log(2)), 4)
    4.0
    """
    _check_blocks("exact_block_bound", len(x0), block_size)
    total = jnp.zeros(())
    for start in range(0, len(x0), block_size):
        before = x0[:start]
        mask = jnp.asarray(block_mask(start + block_size, block_size))

        def own(x_t: Any, t: Any, cond: Any, *, key: Any = None, before=before, mask=mask) -> Any:
            whole = jnp.concatenate([before, x_t])
            positions = np.arange(len(whole))
            return denoiser(whole, None, cond, key=None, mask=mask, positions=positions)[
                len(before) :
            ]

        total += exact_bound(own, x0[start : start + block_size], mask_id, cond)
    return total


def _check_blocks(name: str, n: int, block_size: int) -> None:
    if block_size < 1 or n % block_size:
        raise ValueError(
            f"{name}: {n} tokens do not divide into blocks of {block_size}. Choose a block_size "
            "that divides the length."
        )
