"""An objective's loss over a batch: what `make_train_step` needs to train a network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from ..objectives import AbstractObjective, Context
from ..objectives.auxiliary import EXAMPLES
from ..sharding import batch_vmap
from .state import LossFn


def drop_condition(
    cond: PyTree, null: PyTree, probability: float, *, key: Key[Array, ""]
) -> PyTree:
    """Replaces an example's condition by `null` with this probability, all of it or nothing.

    It trains the unconditional branch of classifier-free guidance (Ho & Salimans 2022,
    algorithm 1).

    **Arguments**: `cond` is a PyTree of arrays with a leading axis over the batch, `null` one of
    the same structure for a single example. `probability` in [0, 1].

    **Raises** `ValueError` if they are not alike.

    >>> drop_condition(jnp.arange(3), jnp.array(10), 1.0, key=jax.random.key(0))
    Array([10, 10, 10], dtype=int32)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"drop_condition: probability must lie in [0, 1], got {probability}.")
    if jax.tree.structure(cond) != jax.tree.structure(null):
        raise ValueError(
            "drop_condition: null must have the structure of one example's condition, "
            f"{jax.tree.structure(cond)}; got {jax.tree.structure(null)}."
        )
    leaves = jax.tree.leaves(cond)
    if not leaves:
        return cond
    dropped = jax.random.bernoulli(key, probability, leaves[0].shape[:1])

    def choose(c: Array, n: Any) -> Array:
        n = jnp.asarray(n).astype(c.dtype)
        if n.shape != c.shape[1:]:
            raise ValueError(
                f"drop_condition: null has an array of shape {n.shape} where an example's "
                f"condition has {c.shape[1:]}."
            )
        return jnp.where(dropped.reshape(-1, *[1] * n.ndim), n, c)

    return jax.tree.map(choose, cond, null)


def in_dtype(denoiser: Any, dtype: Any) -> Any:
    """The denoiser computing in `dtype`: it gets `x_t` in it, and its output is float32.

    Its layers cast their float32 parameters where they use them; norms' statistics, softmax and
    the time's embedding are float32 all the same.

    >>> half = in_dtype(lambda x_t, t, cond, *, key=None: x_t, jnp.bfloat16)
    >>> half(jnp.ones(2), 0.5, None).dtype
    dtype('float32')
    """
    return denoiser if jnp.dtype(dtype) == jnp.float32 else _Cast(denoiser, dtype)


class _Cast:
    """What `in_dtype` gives; a `log_weight` (`nn.Weighted`) and a `project` (`nn.Aligned`) of the
    denoiser stay what they are, and `outputs` (`models.DiT`) computes in the dtype, too."""

    def __init__(self, denoiser: Any, dtype: Any):
        self._denoiser, self._dtype = denoiser, dtype
        self.log_weight = getattr(denoiser, "log_weight", None)
        self.project = getattr(denoiser, "project", None)
        self.outputs = self._outputs if hasattr(denoiser, "outputs") else None

    def _outputs(self, x_t: Any, t: Any, cond: Any, *, key: Any = None, **options: Any) -> Any:
        made = self._denoiser.outputs(x_t.astype(self._dtype), t, cond, key=key, **options)
        return jax.tree.map(lambda a: a.astype(jnp.float32), made)

    def __call__(self, x_t: Any, t: Any, cond: Any, *, key: Any = None, **options: Any) -> Any:
        out = self._denoiser(x_t.astype(self._dtype), t, cond, key=key, **options)
        return out.astype(jnp.float32)


def make_loss(
    objective: AbstractObjective,
    *,
    null: PyTree = None,
    cond_dropout: float = 0.0,
    prepare: Callable[[Any, Key[Array, ""]], dict[str, Any]] | None = None,
    dtype: Any = jnp.float32,
) -> LossFn:
    """`loss(model, batch, key, context)`: an objective's mean loss over a batch, for any condition.

    A batch is `{"x0": (b, ...), "cond": PyTree}`, the condition's arrays with a leading axis too;
    without `"cond"`, or with None there, the network is unconditional. `"features"`, where there
    are any, go to the objective (`Denoising(alignment=)`).

    **Arguments**:

    - `objective`: `Denoising(diffusion)`, `Hybrid(diffusion)`, or another `AbstractObjective`.
    - `null`, `cond_dropout`: `drop_condition`'s, which trains the unconditional branch of guidance:
      for labels of a DiT `null=dit.null, cond_dropout=0.1`.
    - `prepare`: `prepare(batch, key) -> {"x0", "cond"}` runs first, inside jit; it may, for
      example, draw latents from cached posteriors.
    - `dtype`: what the network computes in; its parameters, the schedule and the loss stay
      float32 (`in_dtype`).

    **Raises** `ValueError` for a `cond_dropout` without `null`.

    >>> from eqxldm import Denoising, Diffusion, LinearFlow, predict_velocity
    >>> loss = make_loss(Denoising(Diffusion(LinearFlow(), predict_velocity)))
    >>> network = lambda x_t, t, cond, *, key=None: x_t
    >>> value, _ = loss(network, {"x0": jnp.ones((2, 3))}, jax.random.key(0), None)
    >>> value.shape
    ()
    """
    if cond_dropout and not jax.tree.leaves(null):
        raise ValueError(
            f"make_loss: cond_dropout = {cond_dropout} needs null, the condition that means 'none' "
            "(for the labels of a DiT, dit.null)."
        )

    def loss_fn(model: Any, batch: Any, key: Key[Array, ""], context: Context | None):
        prepare_key, time_key, drop_key, loss_key = jax.random.split(key, 4)
        if prepare is not None:
            batch = prepare(batch, prepare_key)
        x0, cond = batch["x0"], batch.get("cond")
        n = len(jax.tree.leaves(x0)[0])  # of an objective of several parts x0 is a tree
        times = objective.times(time_key, n)
        if cond_dropout:
            cond = drop_condition(cond, null, cond_dropout, key=drop_key)
        keys = jax.random.split(loss_key, n)
        network = in_dtype(model, dtype)
        if context is not None:
            context = Context(context.step, tuple(in_dtype(m, dtype) for m in context.ema))

        given = {"features": batch["features"]} if "features" in batch else {}

        def one(x0: Any, times: Any, cond: Any, key: Any, given: Any):
            return objective.loss(network, x0, times, cond, key=key, context=context, **given)

        each = batch_vmap(one, axis_name=EXAMPLES)
        return jax.tree.map(jnp.mean, each(x0, times, cond, keys, given))

    return loss_fn
