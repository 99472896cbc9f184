"""Objectives of one or few network calls: their losses, their maps, and a start from a denoiser."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxldm as ex
from eqxldm import nn
from eqxldm.nn import TimeEmbedding
from eqxldm.objectives import AbstractObjective
from eqxldm.sharding import path_name

from .config import Config, ObjectiveName, SamplingConfig
from .terminal import UserError

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
TRIG = ex.Diffusion(ex.CosineVP(), ex.predict_v)
UNSCALED = nn.Sinusoid(scale=1.0, offset=0.0)  # how these networks read their times
TWO_TIMES: tuple[ObjectiveName, ...] = ("meanflow", "imf", "shortcut")
FEW_STEP: tuple[ObjectiveName, ...] = (*TWO_TIMES, "scm")
DIFFERENTIATED: tuple[ObjectiveName, ...] = ("meanflow", "imf", "scm")  # forward, in the loss
CALLS, ODE_STEPS = (1, 2, 4, 8), 50  # what is measured at the end
SHORTCUT_STEPS = 32  # the finest grid


class OfAnother(AbstractObjective):
    """An objective of another network: of what `change` makes of the one that is trained.

    It sets in after `start` steps, and counts from there.
    """

    objective: AbstractObjective
    change: Callable[[Any], Any] = eqx.field(static=True)
    start: int = eqx.field(static=True, default=0)

    def times(self, key: Any, n: int) -> Any:
        return self.objective.times(key, n)

    def loss(self, denoiser: Any, x0: Any, times: Any, cond: Any, *, key: Any, context: Any = None):
        if context is not None:
            ema = tuple(map(self.change, context.ema))
            context = ex.Context(context.step - self.start, ema)
        changed = self.change(denoiser)
        return self.objective.loss(changed, x0, times, cond, key=key, context=context)


class AtScale:
    """A network whose condition is guidance, too (`nn.GuidanceEmbedding`), at one scale of it."""

    def __init__(
        self, denoiser: Any, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
    ):
        self._denoiser = denoiser
        self._given = lambda cond: ex.guided_condition(cond, scale, interval)
        inside = getattr(denoiser, "outputs", None)
        self.outputs = None if inside is None else self._outputs

    def __call__(self, x_t: Any, t: Any, cond: Any, *, key: Any = None, **options: Any) -> Any:
        return self._denoiser(x_t, t, self._given(cond), key=key, **options)

    def _outputs(self, x_t: Any, t: Any, cond: Any, *, key: Any = None, **options: Any) -> Any:
        return self._denoiser.outputs(x_t, t, self._given(cond), key=key, **options)


def few_step_objective(
    config: Config, diffusion: ex.Diffusion, null: Any = None, teacher: Any = None
) -> AbstractObjective:
    """The loss of the objective's name, for a network of the run's own diffusion.

    `null` is the condition for "none", without which there is no guidance; `teacher` a finished
    network of the same diffusion, from which scm distils.
    """
    few, name = config.few, config.objective
    guidance = few.guidance if null is not None else 1.0
    times = ex.logit_normal_time(few.time_mean, few.time_stddev)
    to = FLOW
    if name == "scm":
        to, times = TRIG, ex.angle_time(few.time_mean, few.time_stddev)
        if teacher is not None and guidance != 1:
            teacher = ex.guide(teacher, null, guidance, interval=few.guidance_interval)
        if teacher is not None:
            teacher = ex.change_diffusion(teacher, diffusion, TRIG)
        objective: AbstractObjective = ex.SCM(teacher, times, warmup=few.warmup)
    elif name == "shortcut":
        options: dict[str, Any] = dict(clip=None, guidance=guidance, null=null)
        options |= dict(interval=few.guidance_interval)
        objective = ex.Shortcut(SHORTCUT_STEPS, few.flow_share, times, **options)
    else:
        target: ex.AbstractVelocityTarget = ex.DataVelocity()
        if few.conditioned and null is not None:
            target = ex.ConditionedGuidance(null, few.largest)
        elif guidance != 1:  # w / (1 - k) of the published form, with w = 1
            target = ex.FixedGuidance(null, 1.0, 1 - 1 / guidance, few.guidance_interval)
        make = ex.improved_mean_flow if name == "imf" else ex.MeanFlow
        objective = make(target=target, flow_share=few.flow_share, time_sampler=times)
    change = lambda network: ex.change_diffusion(network, diffusion, to)
    return OfAnother(objective, change, few.pretrain)


def make_flow_map(config: Config, diffusion: ex.Diffusion, denoiser: Any) -> ex.FlowMap:
    """What takes a step of any length, of a network of the run's own diffusion."""
    if config.objective == "scm":
        changed = ex.change_diffusion(denoiser, diffusion, TRIG)
        return ex.renoise(ex.consistency_function(changed, TRIG), TRIG.path)
    return ex.average_velocity_map(ex.change_diffusion(denoiser, diffusion, FLOW))


def variants(config: Config, sampling: SamplingConfig) -> dict[int, SamplingConfig]:
    """How the finished network is sampled for its table: few calls, and the ODE of its velocity."""
    few, scale = config.few, 1.0
    if few.conditioned:  # the network is told, whatever the solver
        scale, sampling = few.guidance, replace(sampling, guidance_interval=few.guidance_interval)
    found = {n: replace(sampling, solver="map", steps=n, guidance=scale) for n in CALLS}
    if config.objective != "scm":
        # A shortcut's velocity has no guidance in it; that of a mean flow has.
        scale = few.guidance if config.objective == "shortcut" else scale
        options: dict[str, Any] = dict(guidance_interval=config.few.guidance_interval)
        found[ODE_STEPS] = replace(
            sampling, solver="ddim", steps=ODE_STEPS, guidance=scale, **options
        )
    return found


def warm_start(network: Any, finished: Any) -> Any:
    """The network with the parameters of a finished denoiser, to begin with.

    What is new is the embedding of the step, whose last layer becomes 0: at first the network
    is the denoiser, whatever the step. An embedding of the time that read it on another scale is
    fitted anew.

    **Raises** `UserError` where a parameter has another shape there.
    """
    params, static = eqx.partition(network, eqx.is_inexact_array)
    given = eqx.filter(finished, eqx.is_inexact_array)
    old = {path_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(given)}
    same_time = network.time_embedding.config == finished.time_embedding.config

    def start(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name.startswith("step_embedding.") and name not in old:
            return jnp.zeros_like(leaf) if ".linear2." in name else leaf
        if name.startswith("time_embedding.") and not same_time:
            return leaf
        if re.match(r"embed_cond\.(strength|low|high)_embedding\.", name):  # says nothing yet
            return leaf
        found = old.get(name.replace("embed_cond.embed_cond.", "embed_cond."))
        if found is None or found.shape != leaf.shape:
            there = "none" if found is None else f"the shape {found.shape}"
            raise UserError(
                f"--start-from: its network is another: {name} has {there} there, and "
                f"{leaf.shape} here. Give the same options of the network as that run."
            )
        return jnp.array(found, leaf.dtype)  # a copy: the state is donated

    started = eqx.combine(jax.tree_util.tree_map_with_path(start, params), static)
    if same_time:
        return started
    fitted = fit_time_embedding(finished.time_embedding, network.time_embedding)
    return eqx.tree_at(lambda n: n.time_embedding, started, fitted)


def fit_time_embedding(old: TimeEmbedding, new: TimeEmbedding, steps: int = 3000) -> TimeEmbedding:
    """`new`, trained to give what `old` gives: a smooth function of the time through its values.

    Sinusoids of 1000 t let a finished network vary in t as fast as it likes; the derivative in t
    that the new objectives take should be of what stays when that is smoothed.
    """
    t = jnp.linspace(0.001, 1.0, 1000)
    wanted = jax.vmap(old)(t)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    params, static = eqx.partition(new, eqx.is_inexact_array)

    def error(params: Any) -> Any:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(t) - wanted) ** 2)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(error)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return eqx.combine(run((params, optimizer.init(params)))[0], static)
