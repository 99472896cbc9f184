"""The training state as a PyTree, and the one train step that everything simple shares."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ..objectives import Context
from ..sharding import path_name, stack_name
from .ema import Decay, update_ema

Metrics = dict[str, Any]  # scalars, and under "norms" an array for each block of the model
# (model, batch, key, context) -> the batch's mean loss, and scalars to log
LossFn = Callable[[Any, Any, Key[Array, ""], Any], tuple[Float[Array, ""], Metrics]]


class TrainState(eqx.Module):
    """All that training changes: parameters, averages, the optimizer's state, counters.

    Only arrays, so that it can be donated, sharded and saved as it is. `ema` has one tree for each
    average. `step` counts the steps done, `skipped` those of them that changed nothing because a
    loss or gradient was not finite, `skipped_in_row` the newest of those.
    """

    params: PyTree
    ema: tuple[PyTree, ...]
    opt_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


def init_state(
    model: PyTree, optimizer: optax.GradientTransformation, *, num_emas: int = 0
) -> tuple[TrainState, PyTree]:
    """Splits a model into its state at step 0 and its static part (`equinox.combine` joins them).

    Each of the averages starts as a float32 copy of the parameters.

    >>> state, static = init_state(eqx.nn.Linear(2, 1, key=jax.random.key(0)), optax.sgd(0.1))
    >>> int(state.step)
    0
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    copy = lambda: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    ema = tuple(copy() for _ in range(num_emas))
    zero = lambda: jnp.array(0, jnp.int32)  # a weak type would not survive a checkpoint
    return TrainState(params, ema, optimizer.init(params), zero(), zero(), zero()), static


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[Decay] = (),
    finite: bool | Bool[Array, ""] = True,
) -> TrainState:
    """One optimizer update, the averages after it, and the step count.

    Unless `finite`, the step is counted and everything else stays as it is.

    >>> optimizer = optax.sgd(1.0)
    >>> state, _ = init_state({"w": jnp.ones(1)}, optimizer)
    >>> float(apply_gradients(state, {"w": jnp.ones(1)}, optimizer).params["w"][0])
    0.0
    """
    if len(ema_decays) != len(state.ema):
        raise ValueError(
            f"the state keeps {len(state.ema)} averages, but {len(ema_decays)} decays were given."
        )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    done = state.step - state.skipped
    pairs = zip(state.ema, ema_decays, strict=True)
    ema = tuple(update_ema(tree, params, decay(done)) for tree, decay in pairs)
    # Selected and not branched: inside a conditional nothing is fused or donated.
    choose = lambda new, old: jnp.where(finite, new, old)
    old = state.params, state.ema, state.opt_state
    params, ema, opt_state = jax.tree.map(choose, (params, ema, opt_state), old)
    bad = 1 - jnp.asarray(finite, jnp.int32)
    return TrainState(
        params,
        ema,
        opt_state,
        state.step + 1,
        state.skipped + bad,
        (state.skipped_in_row + 1) * bad,
    )


def block_norms(tree: PyTree) -> dict[str, Float[Array, "..."]]:
    """The Euclidean norm of each part of a tree, by the beginning of its path.

    Scanned blocks are one part, with a norm for each block.

    >>> block_norms({"stem": {"w": jnp.array([3.0, 4.0])}, "head": jnp.zeros(2)})
    {'head': Array(0., dtype=float32), 'stem': Array(5., dtype=float32)}
    """
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        stack = stack_name(name)
        part = _part(name) if stack is None else stack
        square = _row_squares(leaf.astype(jnp.float32), 0 if stack is None else 1)
        squares[part] = squares[part] + square if part in squares else square
    return {part: jnp.sqrt(square) for part, square in squares.items()}


def _row_squares(a: Array, leading: int) -> Array:
    """The sums of squares over all but the leading axes, none or one.

    On a single device as a product: XLA:CPU fuses a reduction with what made the gradient and
    computes that again. On a mesh as a reduction, which each device does on its own part.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.sum(jnp.square(a), axis=tuple(range(leading, a.ndim)))
    rows = a.reshape((*a.shape[:leading], -1))
    return jnp.einsum("...i,...i->...", rows, rows, precision=jax.lax.Precision.HIGHEST)


def _part(name: str) -> str:
    """Two names and the numbers after them: `down.blocks.0.1` of `down.blocks.0.1.conv.weight`."""
    pieces = name.split(".")[:-1] or [name]
    count = 2
    while count < len(pieces) and pieces[count].isdigit():
        count += 1
    return ".".join(pieces[:count])


def check_gradients(
    value: Float[Array, ""], gradients: PyTree
) -> tuple[Bool[Array, ""], dict[str, Any]]:
    """Whether a loss and all its gradients are finite, and `{"gradient_norm", "norms"}`.

    >>> finite, metrics = check_gradients(jnp.array(1.0), {"w": jnp.array([jnp.inf])})
    >>> bool(finite)
    False
    """
    norms = block_norms(gradients)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(n)) for n in norms.values()))
    return jnp.isfinite(value) & jnp.isfinite(norm), {"gradient_norm": norm, "norms": norms}


def make_train_step(
    loss_fn: LossFn,
    static: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    ema_decays: Sequence[Decay] = (),
    grad_accum_steps: int = 1,
) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """A pure `step(state, batch, key) -> (state, metrics)` for a scalar loss.

    `loss_fn(model, batch, key, context)` returns the batch's mean loss and a dict of scalars, as
    `make_loss` makes it of an objective; `context` (`eqxldm.Context`) has the number of steps done
    and the networks with the averaged parameters, for objectives with a teacher. The loss's own
    key is `fold_in(key, state.step)`, so a resumed run draws what an unbroken one would have.
    Jit it with the state donated: `jax.jit(step, donate_argnums=0)`.

    **Arguments**:

    - `ema_decays`: the decays of the state's averages, such as `exponential(0.9999)`.
    - `grad_accum_steps`: the batch is cut into so many parts, and the gradient is the mean of
      theirs: the memory of a part, the update of the whole. Part `j` has the examples `j, j +
      grad_accum_steps, ...`, so that a batch that is divided over devices stays where it is.

    The metrics are the loss's, `loss`, `gradient_norm` before any clipping, `skipped` (1 for a step
    whose loss or gradient is not finite: it changes nothing but counters), `skipped_in_row`, and
    `norms`, the gradient's `block_norms`.

    >>> def loss_fn(model, batch, key, context):
    ...     return jnp.mean((jax.vmap(model)(batch) - 1) ** 2), {}
    >>> optimizer = optax.sgd(0.1)
    >>> state, static = init_state(eqx.nn.Linear(2, 1, key=jax.random.key(0)), optimizer)
    >>> step = jax.jit(make_train_step(loss_fn, static, optimizer), donate_argnums=0)
    >>> state, metrics = step(state, jnp.ones((4, 2)), jax.random.key(1))
    >>> int(state.step), sorted(metrics)
    (1, ['gradient_norm', 'loss', 'norms', 'skipped', 'skipped_in_row'])
    """
    if grad_accum_steps < 1:
        raise ValueError(
            f"make_train_step: grad_accum_steps must be at least 1, got {grad_accum_steps}."
        )

    def differentiate(state: TrainState, batch: Any, key: Key[Array, ""]):
        averaged = tuple(eqx.combine(params, static) for params in state.ema)
        context = Context(state.step, averaged)
        loss = lambda params: loss_fn(eqx.combine(params, static), batch, key, context)
        return jax.value_and_grad(loss, has_aux=True)(state.params)

    def step(state: TrainState, batch: Any, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if grad_accum_steps == 1:
            (value, metrics), gradients = differentiate(state, batch, key)
        else:
            one = lambda part, key: differentiate(state, part, key)
            keys = jax.random.split(key, grad_accum_steps)
            (value, metrics), gradients = _mean(one, _parts(batch, grad_accum_steps), keys)
        finite, measured = check_gradients(value, gradients)
        state = apply_gradients(state, gradients, optimizer, ema_decays, finite)
        return state, {"loss": value, **metrics, **measured, **counters(state)}

    return step


def counters(state: TrainState) -> dict[str, Array]:
    """What a step reports of the counters: whether it was skipped, and how many were in a row.

    >>> state, _ = init_state({"w": jnp.ones(1)}, optax.sgd(0.1))
    >>> int(counters(state)["skipped_in_row"])
    0
    """
    return {"skipped": jnp.minimum(state.skipped_in_row, 1), "skipped_in_row": state.skipped_in_row}


def _parts(batch: Any, count: int) -> Any:
    def cut(a: Array) -> Array:
        if a.shape[0] % count:
            raise ValueError(
                f"make_train_step: a batch of {a.shape[0]} does not divide into {count} parts."
            )
        return jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)


def _mean(function: Callable[[Any, Any], Any], parts: Any, keys: Any) -> Any:
    """The mean of a function's outputs over the parts, with one of them in memory at a time."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], (parts, keys)))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(*part)), None)
    total, _ = jax.lax.scan(add, total, (parts, keys))
    return jax.tree.map(lambda a: a / len(keys), total)
