"""Names of paths, predictions, weights and solvers, and what they stand for."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp

import eqxldm as ex
from eqxldm.models import DiT, UNet
from eqxldm.solvers import Variance
from eqxldm.training import in_dtype

from .options import check
from .terminal import UserError

PathName = Literal["flow", "cosine", "ddpm"]
PredictionName = Literal["velocity", "eps", "v", "x0"]
WeightName = Literal["constant", "min-snr"]
SolverName = Literal[
    "ddim", "ddpm", "euler", "heun", "euler-maruyama", "dpmsolver++", "sde-dpmsolver++"
]

TIMESTEPS = 1000  # of the "ddpm" path's table


class Named(Protocol):
    """A configuration that names a diffusion."""

    @property
    def path(self) -> PathName: ...
    @property
    def prediction(self) -> PredictionName: ...
    @property
    def weight(self) -> WeightName: ...
    @property
    def time_mean(self) -> float: ...
    @property
    def time_stddev(self) -> float: ...


@dataclass(frozen=True)
class SamplingConfig:
    """How the finished model is sampled."""

    solver: SolverName = "ddim"
    steps: int = 20
    guidance: float = 1.6
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    """Guide only for t between these two (0 is data); outside, the conditional network alone."""


class Diffusion(NamedTuple):
    """What a configuration's names stand for, and the names, for messages."""

    diffusion: ex.Diffusion
    objective: ex.AbstractObjective
    variance: Variance  # of ancestral steps
    names: tuple[str, str]

    @property
    def path(self) -> ex.AbstractPath:
        return self.diffusion.path

    @property
    def timesteps(self) -> int | None:
        """Of the path's table, if it has one."""
        return self.path.timesteps if isinstance(self.path, ex.DiscreteVP) else None


def named_diffusion(named: Named, *, learned_range: bool = False) -> Diffusion:
    """The diffusion of these names.

    With `learned_range` the network has an output for the variance too, and the loss is the hybrid
    one, which the `ddpm` path alone has.
    """
    path = _path(named.path)
    prediction: ex.Prediction = {
        "velocity": ex.predict_velocity,
        "eps": ex.predict_eps,
        "v": ex.predict_v,
        "x0": ex.predict_x0,
    }[named.prediction]
    weight = ex.min_snr_weight(prediction) if named.weight == "min-snr" else ex.constant_weight
    if isinstance(path, ex.DiscreteVP):
        times = ex.discrete_time(path.timesteps)
    else:
        times = ex.logit_normal_time(named.time_mean, named.time_stddev)
    names = named.path, named.prediction
    if not learned_range:
        diffusion = ex.Diffusion(path, prediction)
        objective = ex.Denoising(diffusion, weight, times)
        return Diffusion(diffusion, objective, ex.fixed_small, names)
    if not isinstance(path, ex.DiscreteVP) or named.weight != "constant":
        raise UserError(
            "--diffusion.learned-range has the hybrid loss: it needs --diffusion.path ddpm and "
            f"--diffusion.weight constant, got {named.path} and {named.weight}."
        )
    diffusion = ex.Diffusion(path, ex.LearnedRange(prediction))
    return Diffusion(diffusion, ex.Hybrid(diffusion), ex.learned_range, names)


def _path(name: PathName) -> ex.AbstractPath:
    if name == "flow":
        return ex.LinearFlow()
    if name == "cosine":
        return ex.CosineVP()
    return ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(TIMESTEPS)))


def make_solver(diffusion: Diffusion, sampling: SamplingConfig) -> ex.AbstractSolver:
    table = {
        "ddim": ex.DDIM(),
        "ddpm": ex.DDPM(diffusion.variance),
        "euler": ex.Euler(),
        "heun": ex.Heun(),
        "euler-maruyama": ex.EulerMaruyama(lambda at: at.sigma),  # finite at t = 1
        "dpmsolver++": ex.DPMSolverPP2M(),
        "sde-dpmsolver++": ex.DPMSolverPP2M(1.0),
    }
    return table[sampling.solver]


def make_times(diffusion: Diffusion, sampling: SamplingConfig) -> Any:
    """The time grid: the kept timesteps of the table, or evenly spaced times."""
    table = diffusion.timesteps
    if table is None:
        return ex.uniform_times(sampling.steps)
    if sampling.steps > table:
        raise UserError(f"--steps {sampling.steps}: the table has {table} timesteps.")
    return ex.timestep_times(table, ex.respace(table, [sampling.steps]))


def guided(network: DiT | UNet, sampling: SamplingConfig, dtype: Any = jnp.float32) -> ex.Denoiser:
    """The network with the guidance asked for, computing in `dtype`."""
    denoiser = in_dtype(network, dtype)
    if sampling.guidance == 1:
        return denoiser
    return ex.guide(denoiser, network.null, sampling.guidance, interval=sampling.guidance_interval)


def check_guidance(sampling: SamplingConfig, prefix: str = "") -> None:
    """Refuses numbers that make no sense, by the option's name."""
    check(sampling, prefix)
    if not 0 <= sampling.guidance <= 100:
        raise UserError(f"--{prefix}guidance must lie in [0, 100], got {sampling.guidance}.")
    low, high = sampling.guidance_interval
    if not 0 <= low < high <= 1:
        raise UserError(
            f"--{prefix}guidance-interval must be LOW HIGH with 0 <= LOW < HIGH <= 1, "
            f"got {low} {high}."
        )


def check_sampling(diffusion: Diffusion, sampling: SamplingConfig) -> int:
    """Refuses what cannot be sampled, before anything is trained; returns the network calls."""
    path, solver = diffusion.path, make_solver(diffusion, sampling)
    times = make_times(diffusion, sampling)
    try:
        ex.check_combination(diffusion.diffusion, solver, times)
    except ValueError as error:
        raise UserError(
            f"--diffusion.path {diffusion.names[0]}, --diffusion.prediction "
            f"{diffusion.names[1]} and --sampling.solver {sampling.solver} do not go together: "
            f"{error}"
        ) from None
    return ex.nfe(path, solver, times)
