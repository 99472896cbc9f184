"""What names stand for: the diffusion and its objective, solvers, times, guidance, rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import eqxldm as ex
from eqxldm import nn
from eqxldm.objectives import AbstractObjective, Denoising, Hybrid
from eqxldm.solvers import Variance
from eqxldm.training import adamw, constant, exponential, in_dtype, muon, power_function

from .config import Config, DiffusionConfig, PathName, SamplingConfig
from .few_steps import FEW_STEP, AtScale, OfAnother, few_step_objective, make_flow_map
from .terminal import UserError, user_errors

TIMESTEPS = 1000  # of the "ddpm" path's table
SOLVERS: dict[str, ex.AbstractSolver] = {
    "ddim": ex.DDIM(),
    "ddpm": ex.DDPM(),
    "euler": ex.Euler(),
    "heun": ex.Heun(),
    "euler-maruyama": ex.EulerMaruyama(lambda at: at.sigma),  # finite at t = 1
    "dpmsolver++": ex.DPMSolverPP2M(),
    "dpmsolver++3m": ex.DPMSolverPP3M(),
    "unipc": ex.UniPC(),
    "sde-dpmsolver++": ex.DPMSolverPP2M(1.0),
}
PREDICTIONS: dict[str, ex.Prediction] = {
    "velocity": ex.predict_velocity,
    "eps": ex.predict_eps,
    "v": ex.predict_v,
    "x0": ex.predict_x0,
}
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
OPTIMIZERS = {"adamw": adamw, "muon": muon}  # by OptimizerName
ATTENTIONS: dict[str, nn.Attention] = {
    "xla": nn.attend,
    "cudnn": nn.cudnn_attend,
    "flash": nn.flash_attend,
}


class Method(NamedTuple):
    """A diffusion, how it is trained, the variance of ancestral steps; and names, for messages.

    Of a network that is trained for few calls, `flow_map` makes a map of a denoiser, and `plain` is
    the objective before its own sets in. `early`: the network has an auxiliary head;
    `conditioned`: guidance is a condition of it.
    """

    diffusion: ex.Diffusion
    objective: AbstractObjective
    variance: Variance
    names: tuple[str, str]
    flow_map: Callable[[Any], ex.FlowMap] | None = None
    plain: AbstractObjective | None = None
    early: bool = False
    conditioned: bool = False

    @property
    def timesteps(self) -> int | None:
        """Of the path's table, if it has one."""
        path = self.diffusion.path
        return path.timesteps if isinstance(path, ex.DiscreteVP) else None


def make_method(config: Config, null: Any = None, teacher: Any = None) -> Method:
    """The diffusion of these names and its objective.

    `null` and `teacher` are those of `few_step_objective`: for training alone.

    **Raises** `UserError` for what does not go together.
    """
    method = _denoising(config.diffusion)
    if config.objective == "denoising":
        return method
    if config.diffusion.learned_range:
        raise UserError(
            f"--objective {config.objective}: it learns no variance; give "
            "--diffusion.no-learned-range."
        )
    if config.objective == "flow":
        if method.names != ("flow", "velocity"):
            raise UserError(
                "--objective flow: it needs --diffusion.path flow and --diffusion.prediction "
                f"velocity, got {' and '.join(method.names)}."
            )
        return method
    few = few_step_objective(config, method.diffusion, null, teacher)
    flow_map = lambda denoiser: make_flow_map(config, method.diffusion, denoiser)
    plain, conditioned = method.objective, config.few.conditioned and null is not None
    plain = OfAnother(plain, AtScale) if conditioned else plain  # at the scale 1
    return method._replace(
        objective=few, flow_map=flow_map, plain=plain, conditioned=config.few.conditioned
    )


def _denoising(config: DiffusionConfig) -> Method:
    """The method of a denoiser.

    With `learned_range` the network has an output for the variance too, and the loss is the hybrid
    one, which the `ddpm` path alone has.
    """
    path, names = _path(config.path), (config.path, config.prediction)
    prediction = PREDICTIONS[config.prediction]
    if config.learned_range:
        if config.path != "ddpm" or config.weight != "constant":
            raise UserError(
                "--diffusion.learned-range has the hybrid loss: it needs --diffusion.path ddpm and "
                f"--diffusion.weight constant, got {config.path} and {config.weight}."
            )
        if config.cosine or config.early or config.dispersive:
            raise UserError(
                "--diffusion.learned-range: its loss takes no --diffusion.cosine, early or "
                "dispersive. Give --diffusion.no-learned-range."
            )
        diffusion = ex.Diffusion(path, ex.LearnedRange(prediction))
        return Method(diffusion, Hybrid(diffusion), ex.learned_range, names)
    weight = {
        "constant": ex.constant_weight,
        "min-snr": ex.min_snr_weight(prediction),
        "velocity": ex.velocity_weight(prediction),
    }[config.weight]
    if isinstance(path, ex.DiscreteVP):
        times = ex.discrete_time(path.timesteps)
    else:
        times = ex.logit_normal_time(config.time_mean, config.time_stddev)
        times = ex.shifted_time(times, config.time_shift)
    diffusion = ex.Diffusion(path, prediction)
    terms = dict(cosine=config.cosine, early=config.early, dispersive=config.dispersive)
    objective = Denoising(diffusion, weight, times, **terms)
    return Method(diffusion, objective, ex.fixed_small, names, early=config.early > 0)


def _path(name: PathName) -> ex.AbstractPath:
    if name == "flow":
        return ex.LinearFlow()
    if name == "cosine":
        return ex.CosineVP()
    return ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(TIMESTEPS)))


def make_solver(method: Method, sampling: SamplingConfig) -> ex.AbstractSolver:
    """The solver, with the variance of the method's ancestral steps."""
    if sampling.solver == "ddpm":
        return ex.DDPM(method.variance)
    return SOLVERS[sampling.solver]


def make_times(method: Method, sampling: SamplingConfig) -> Any:
    """The times: the remaining timesteps of the table, or evenly spaced ones."""
    table = method.timesteps
    if table is None:
        return ex.shifted_times(sampling.steps, sampling.shift)
    if sampling.steps > table:
        raise UserError(f"--sampling.steps {sampling.steps}: the table has {table} timesteps.")
    return ex.timestep_times(table, ex.respace(table, [sampling.steps]))


def guided(
    network: Any, null: Any, sampling: SamplingConfig, dtype: Any, conditioned: bool = False
) -> ex.Denoiser:
    """The network with the guidance asked for, computing in `dtype`.

    `conditioned`: a network that is told of its guidance.
    """
    denoiser = in_dtype(network, dtype)
    if conditioned:
        return AtScale(denoiser, sampling.guidance, sampling.guidance_interval)
    if sampling.solver == "map":  # the guidance is in the network
        return denoiser
    if sampling.internal_guidance != 1:
        interval = sampling.internal_interval
        denoiser = ex.internal_guide(denoiser, sampling.internal_guidance, interval=interval)
    if sampling.guidance == 1 or null is None:
        return denoiser
    scale = guidance_scale(sampling)
    return ex.guide(denoiser, null, scale, interval=sampling.guidance_interval)


def guidance_scale(sampling: SamplingConfig) -> Any:
    """The scale `w(t)`: those that change have the fixed one's mean over all times.

    >>> rising = guidance_scale(SamplingConfig(guidance=2.0, guidance_schedule="linear"))
    >>> [float(rising(t)) for t in (1.0, 0.5, 0.0)]
    [1.0, 2.0, 3.0]
    """
    fixed = sampling.guidance
    most = max(2 * fixed - 1, 0.0)
    if sampling.guidance_schedule == "linear":
        return ex.linear_scale(2 * fixed - most, most)
    if sampling.guidance_schedule == "cosine":
        return ex.cosine_scale(2 * fixed - most, most)
    if sampling.guidance_schedule == "bounded":
        return ex.bounded_scale(most, 0.1)
    return fixed


def check_sampling(method: Method, sampling: SamplingConfig, prefix: str = "sampling.") -> int:
    """Refuses what cannot be sampled, before anything is trained; returns the network calls."""
    for name in ("guidance", "internal"):
        low, high = getattr(sampling, f"{name}_interval")
        if not low < high:
            raise UserError(
                f"--{prefix}{name}-interval must be LOW HIGH with LOW < HIGH, got {low} {high}."
            )
    if sampling.internal_guidance != 1 and (not method.early or sampling.solver == "map"):
        raise UserError(
            f"--{prefix}internal-guidance: it needs a network with an auxiliary head, trained with "
            "--diffusion.early and --dit.early-depth, and another solver than map."
        )
    if sampling.shift != 1 and method.timesteps is not None:
        raise UserError(f"--{prefix}shift: the timesteps of a table are not moved; leave it at 1.")
    if sampling.solver == "map":
        _check_map(method, sampling, prefix)
        return sampling.steps
    solver, times = make_solver(method, sampling), make_times(method, sampling)
    path, prediction = method.names
    named = f"--diffusion.path {path}, --diffusion.prediction {prediction}"
    together = f"{named} and --{prefix}solver {sampling.solver} do not go together"
    with user_errors(ValueError, what=together):
        ex.check_combination(method.diffusion, solver, times)
    return ex.nfe(method.diffusion.path, solver, times)


def _check_map(method: Method, sampling: SamplingConfig, prefix: str) -> None:
    if method.flow_map is None:
        raise UserError(
            f"--{prefix}solver map: it is for networks that are trained for few calls, with "
            f"--objective {', '.join(FEW_STEP)}."
        )
    if method.conditioned:
        if sampling.guidance < 1:
            raise UserError(
                f"--{prefix}guidance {sampling.guidance:g}: a network whose condition it is "
                "(--few.conditioned) takes at least 1."
            )
    elif sampling.guidance != 1:
        raise UserError(
            f"--{prefix}guidance {sampling.guidance:g}: with --{prefix}solver map the network has "
            "the guidance in it that it was trained with (--few.guidance). Leave it at 1."
        )


def make_decays(config: DiffusionConfig) -> tuple[Any, ...]:
    """The decay of each average: those that were named, then those by power functions."""
    decay = exponential if config.ema_warmup else constant
    with user_errors(ValueError, what="--diffusion.posthoc"):
        return (*map(decay, config.ema_decays), *map(power_function, config.posthoc))


def warmup_cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """A learning rate: linear to `peak`, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def diffusion_rate(config: DiffusionConfig) -> Any:
    rate = config.learning_rate
    if config.cosine_decay:
        return warmup_cosine(rate, config.steps, config.warmup)
    if not config.warmup:
        return rate
    return lambda step: rate * jnp.minimum(1.0, (step + 1) / config.warmup)
