"""The training state as a PyTree, and the one train step that everything simple shares."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from .ema import update_ema

Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[[Any, Any, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


class TrainState(eqx.Module):
    """All that training changes: parameters, their average, the optimizer's state, the step.

    Only arrays, so that it can be donated, sharded and saved as it is. `ema` is None where no
    average is kept. `step` counts the updates done.
    """

    params: PyTree
    ema: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


def init_state(
    model: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = True
) -> tuple[TrainState, PyTree]:
    """Splits a model into its state at step 0 and its static part (`equinox.combine` joins them).

    The average starts from a float32 copy of the parameters.

    >>> state, static = init_state(eqx.nn.Linear(2, 1, key=jax.random.key(0)), optax.sgd(0.1))
    >>> int(state.step)
    0
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) if ema else None
    step = jnp.array(0, jnp.int32)  # a weak type would not survive a checkpoint
    return TrainState(params, average, optimizer.init(params), step), static


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> TrainState:
    """One optimizer update, the average after it, and the step count.

    >>> optimizer = optax.sgd(1.0)
    >>> state, _ = init_state({"w": jnp.ones(1)}, optimizer)
    >>> float(apply_gradients(state, {"w": jnp.ones(1)}, optimizer, None).params["w"][0])
    0.0
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
        ema = update_ema(ema, params, state.step, ema_decay)
    return TrainState(params, ema, opt_state, state.step + 1)


def make_train_step(
    loss_fn: LossFn,
    static: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """A pure `step(state, batch, key) -> (state, metrics)` for a scalar loss.

    `loss_fn(model, batch, key)` returns the batch's loss and a dict of scalars. The loss's own
    key is `fold_in(key, state.step)`, so a resumed run draws what an unbroken one would have.
    Jit it with the state donated: `jax.jit(step, donate_argnums=0)`.

    >>> loss_fn = lambda model, batch, key: (jnp.mean((jax.vmap(model)(batch) - 1) ** 2), {})
    >>> optimizer = optax.sgd(0.1)
    >>> state, static = init_state(eqx.nn.Linear(2, 1, key=jax.random.key(0)), optimizer)
    >>> step = jax.jit(make_train_step(loss_fn, static, optimizer), donate_argnums=0)
    >>> state, metrics = step(state, jnp.ones((4, 2)), jax.random.key(1))
    >>> int(state.step), sorted(metrics)
    (1, ['loss'])
    """

    def step(state: TrainState, batch: Any, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        def loss(params):
            return loss_fn(eqx.combine(params, static), batch, jax.random.fold_in(key, state.step))

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = apply_gradients(state, gradients, optimizer, ema_decay)
        return state, {"loss": value, **metrics}

    return step
