"""The optimizer: AdamW with warm-up, clipping, and decay on weight matrices only."""

import jax
import optax
from jaxtyping import PyTree

from ..sharding import is_weight, path_name


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
