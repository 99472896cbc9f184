"""Optimizers: AdamW and Muon, with clipping, and decay on weight matrices only."""

import re
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from ..sharding import is_weight, path_name, stack_name

# The first and the last layers, whose matrices Muon leaves to Adam.
OUTER_LAYERS = re.compile(r"(patch_embedding|final_linear|stem|head|cell_map)(\.\w+)?\.weight$")


def decay_mask(params: PyTree) -> PyTree:
    """True for the weights of linear layers and convolutions, False for the rest.

    Biases, norms (`scale`, `bias`) and embedding tables (`table`) are not decayed. The rule goes
    by name (`sharding.is_weight`) and not by rank: stacked blocks give a bias a second axis.

    >>> from eqxldm.nn import GroupNorm
    >>> jax.tree.leaves(decay_mask(GroupNorm(4, 2)))
    [False, False]
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: is_weight(path_name(path)), params)


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the global norm of the gradient.

    `rate` is a number or an optax schedule, such as `optax.warmup_cosine_decay_schedule`.
    `weight_decay` multiplies it and applies where `decay_mask` says.

    >>> import jax.numpy as jnp
    >>> state = adamw(1e-3, clip_norm=1.0).init({"weight": jnp.ones(2)})
    """
    adam = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)
    return adam if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def muon(
    rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for everything else.

    A matrix of `out` rows and `in` columns moves by `0.2 sqrt(max(in, out)) U V^T`, where
    `U S V^T` is its gradients' running mean: a step of equal length in all directions. Five
    Newton-Schulz iterations compute it, up to singular values between about 0.7 and 1.2. The
    factor is that of Liu et al. (2025, section 2.2), which gives a step the root mean square that
    Adam's have, so that `rate` and `weight_decay` of AdamW serve here too. A convolution's kernel
    is the matrix of all its taps, `(taps in, out)`; each block of an `nn.Stack` and each of
    query, key and value is a matrix of its own. Biases, norms, tables, and the first and the last
    layers are Adam's, with `b1` and `b2`.

    >>> import jax.numpy as jnp
    >>> optimizer, params = muon(1.0), {"fc1": {"weight": jnp.ones((2, 2))}}
    >>> gradient = {"fc1": {"weight": jnp.array([[9.0, 0.0], [0.0, -1.0]])}}
    >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    >>> update = updates["fc1"]["weight"]
    >>> bool(update[0, 0] < -0.15), bool(update[1, 1] > 0.15)  # however long they were
    (True, True)
    """
    from optax import contrib

    def axes(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(_matrix_axes, params)

    def kinds(params: PyTree) -> PyTree:
        kind = lambda path, leaf: "adam" if _matrix_axes(path, leaf) is None else "muon"
        return jax.tree_util.tree_map_with_path(kind, params)

    matrices = contrib.muon(
        rate,
        beta=momentum,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=axes,
        consistent_rms=0.2,
    )
    others = adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    optimizer = optax.partition({"muon": matrices, "adam": others}, kinds)
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _matrix_axes(path: Any, leaf: Any) -> Any:
    """Which axes of a parameter are its matrix's, or None if it is Adam's."""
    from optax.contrib import MuonDimensionNumbers

    name = path_name(path)
    if not is_weight(name) or OUTER_LAYERS.search(name):
        return None
    stacked = stack_name(name) is not None
    if leaf.ndim - stacked < 4:  # (..., out, in)
        return MuonDimensionNumbers(-1, -2)
    return MuonDimensionNumbers(tuple(range(int(stacked), leaf.ndim - 1)), -1)
