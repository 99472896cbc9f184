"""`scheduler_config.json` as the library's own path, prediction, solver and time grid.

| diffusers' class | path | solver | grid |
|---|---|---|---|
| `DDIMScheduler` | the table | `DDIM()` | leading, trailing or linspace |
| `PNDMScheduler` | the table | `DPMSolverPP2M()`, PLMS is not offered | the same |
| `EulerDiscreteScheduler` | the table | `DDIM()`: Euler in `sigma / alpha` | the same |
| `DPMSolverMultistepScheduler` | the table | `DPMSolverPP2M()`, `3M` | without the first |
| `UniPCMultistepScheduler` | the table | `UniPC(p)` | without the first |
| the same, `use_flow_sigmas` | `LinearFlow()` | `UniPC(p)` | shifted |
| `FlowMatchEulerDiscreteScheduler` | `LinearFlow()` | `Euler()` | shifted |

What diffusers computes with the rest of an option's values is refused by name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from ..betas import (
    alpha_bar_from_betas,
    cosine_betas,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)
from ..diffusion import Diffusion
from ..paths import DiscreteVP, LinearFlow
from ..predictions import predict_eps, predict_v, predict_velocity, predict_x0
from ..solvers import DDIM, AbstractSolver, DPMSolverPP2M, DPMSolverPP3M, Euler, UniPC
from ..times import Grid, trailing_timesteps
from . import grids
from .errors import PipelineError
from .grids import AbstractGrid, FlowGrid, MultistepFlowGrid, TableGrid
from .interpolated import InterpolatedVP

# What diffusers assumes where a configuration is silent.
TABLE: dict[str, Any] = dict(
    num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
    trained_betas=None, prediction_type="epsilon", steps_offset=0,
)  # fmt: skip
SIGMAS: dict[str, Any] = dict(
    use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
)  # fmt: skip
THRESHOLD: dict[str, Any] = dict(
    thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0
)
DDIM_DEFAULTS = TABLE | THRESHOLD | dict(
    timestep_spacing="leading", clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True,
    rescale_betas_zero_snr=False,
)  # fmt: skip
PNDM_DEFAULTS = TABLE | dict(
    timestep_spacing="leading", skip_prk_steps=False, set_alpha_to_one=False
)
EULER_DEFAULTS = TABLE | SIGMAS | dict(
    timestep_spacing="linspace", interpolation_type="linear", timestep_type="discrete",
    sigma_min=None, sigma_max=None, rescale_betas_zero_snr=False, final_sigmas_type="zero",
)  # fmt: skip
MULTISTEP_DEFAULTS = TABLE | SIGMAS | THRESHOLD | dict(
    timestep_spacing="linspace", solver_order=2, lower_order_final=True, use_flow_sigmas=False,
    flow_shift=1.0, rescale_betas_zero_snr=False, final_sigmas_type="zero",
    use_dynamic_shifting=False, time_shift_type="exponential",
)  # fmt: skip
DPM_DEFAULTS = MULTISTEP_DEFAULTS | dict(
    algorithm_type="dpmsolver++", solver_type="midpoint", euler_at_final=False,
    use_lu_lambdas=False, lambda_min_clipped=-float("inf"), variance_type=None,
)  # fmt: skip
UNIPC_DEFAULTS = MULTISTEP_DEFAULTS | dict(
    solver_type="bh2", predict_x0=True, disable_corrector=[], solver_p=None, sigma_min=None,
    sigma_max=None, shift_terminal=None,
)  # fmt: skip
FLOW_DEFAULTS = SIGMAS | dict(
    num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False, base_shift=0.5,
    max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, invert_sigmas=False,
    shift_terminal=None, time_shift_type="exponential", stochastic_sampling=False,
)  # fmt: skip
# Of these any value will do, or it is checked where it is read.
FREE = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "steps_offset", "timestep_spacing", "set_alpha_to_one", "skip_prk_steps",
    "rescale_betas_zero_snr", "dynamic_thresholding_ratio", "sample_max_value",
    "clip_sample_range", "flow_shift", "time_shift_type", "solver_order",
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "shift_terminal",
}  # fmt: skip
# Of a multistep scheduler of flows.
FLOW_NEEDS = dict(
    use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=False,
    shift_terminal=None, num_train_timesteps=1000,
)  # fmt: skip
# The least and the greatest value of numbers; those with whole ends are integers.
NUMBERS: dict[str, tuple[float, float]] = {
    "num_train_timesteps": (2, 10**6), "steps_offset": (0, 10**6), "solver_order": (0, 100),
    "base_image_seq_len": (1, 10**9), "max_image_seq_len": (1, 10**9),
    "beta_start": (0.0, 1.0), "beta_end": (0.0, 1.0), "shift": (1e-6, 1e6),
    "flow_shift": (1e-6, 1e6),
    "base_shift": (-20.0, 20.0), "max_shift": (-20.0, 20.0), "shift_terminal": (0.0, 0.999),
}  # fmt: skip
FLAGS = ("set_alpha_to_one", "rescale_betas_zero_snr", "use_dynamic_shifting")
PREDICTIONS = {"epsilon": predict_eps, "sample": predict_x0, "v_prediction": predict_v}
BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
SMALLEST_ALPHA_BAR = 2.0**-24  # in the place of zero, where sigma / alpha must be finite


class Schedule(eqx.Module):
    """How a folder samples: the diffusion, the solver, and the grid for a number of steps.

    `start_std(times)` is the standard deviation of the noise to start from, which some schedulers
    take smaller than the prior's; `timesteps` is the length of the table that the network was
    trained with, or 1000; `whole`: it is told whole timesteps of a flow, rounded down.

    >>> config = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear",
    ...               beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    >>> schedule = read_schedule(config)
    >>> schedule.times(2), schedule.solver
    (array([0.502, 0.002, 0.   ]), DDIM(eta=0.0))
    """

    diffusion: Diffusion
    solver: AbstractSolver
    grid: AbstractGrid
    timesteps: int = eqx.field(static=True, default=1000)
    starts_at_sigma: bool = eqx.field(static=True, default=False)
    whole: bool = eqx.field(static=True, default=False)

    def times(self, steps: int, tokens: int | None = None) -> Grid:
        """The grid of so many steps; `tokens` is for schedulers that look at the picture's size."""
        return self.grid.times(steps, tokens)

    def start_std(self, times: Any) -> float:
        """Of the noise at `times[0]`.

        >>> read_schedule(dict(_class_name="EulerDiscreteScheduler")).start_std([1.0]) < 1
        True
        """
        path = self.diffusion.path
        return float(path.sigma(float(times[0]))) if self.starts_at_sigma else path.prior_std


def read_schedule(config: Mapping[str, Any], *, every_nth: bool = False) -> Schedule:
    """The schedule of a `scheduler_config.json`, read already.

    Options of other schedulers than the one that is named are left alone, as diffusers does:
    published files carry them along. `every_nth` is for the pipelines of FLUX.1, which give the
    scheduler `1, ..., 1 / n` as times instead of leaving it to choose.

    **Raises** `PipelineError` for a scheduler, an option or a value that is not known here.

    >>> read_schedule(dict(_class_name="LMSDiscreteScheduler"))
    Traceback (most recent call last):
    ...
    eqxldm.pipelines.errors.PipelineError: scheduler: LMSDiscreteScheduler is not one of \
DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, \
UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise PipelineError(f"scheduler: {name} is not one of {', '.join(SCHEDULERS)}.")
    kind = SCHEDULERS[name]
    known = {option for each in SCHEDULERS.values() for option in each.defaults}
    if unknown := sorted(k for k in config if k not in known and not k.startswith("_")):
        raise PipelineError(f"scheduler: {name} has options not known here: {', '.join(unknown)}.")
    given = kind.defaults | {k: v for k, v in config.items() if k in kind.defaults}
    _check_values(given, kind.defaults)
    if given.get("solver_type") in kind.foreign_solvers:  # one that came from another class
        given["solver_type"] = kind.defaults["solver_type"]
    if kind.flow is not None and given["use_flow_sigmas"]:
        kind = kind._replace(read=kind.flow, needs=FLOW_NEEDS)
    wanted = {k: kind.defaults[k] for k in kind.defaults.keys() - FREE} | dict(kind.needs)
    wrong = [f"{k} = {given[k]!r} ({v!r})" for k, v in sorted(wanted.items()) if given[k] != v]
    if wrong:
        raise PipelineError(
            f"scheduler: {name} has what is not offered here (in brackets what is): "
            + ", ".join(wrong)
        )
    try:
        return kind.read(given, every_nth) if kind.read is _flow else kind.read(given)
    except PipelineError:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # betas that make no table
        raise PipelineError(f"scheduler: {name}: {error}") from error


def load_schedule(path: str | Path, *, every_nth: bool = False) -> Schedule:
    """`read_schedule` of a file, or of the `scheduler_config.json` in a folder."""
    from ..pretrained.files import read_json

    path = Path(path)
    path = path / "scheduler_config.json" if path.is_dir() else path
    if not path.is_file():
        raise PipelineError(f"scheduler: there is no file {path}.")
    return read_schedule(read_json(path), every_nth=every_nth)


class _Kind(NamedTuple):
    """What is known of a class: its defaults, its reader, values that it needs to differ from
    the defaults, `solver_type`s of other classes, for which it takes its own, and its reader where
    it is told to sample a flow (`use_flow_sigmas`)."""

    defaults: dict[str, Any]
    read: Callable[..., Schedule]
    needs: Mapping[str, Any] = MappingProxyType({})
    foreign_solvers: tuple[str, ...] = ()
    flow: Callable[..., Schedule] | None = None


def _check_values(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses numbers that are none, or that no table or grid could be made of."""
    for option in given.keys() & NUMBERS.keys():
        value, (low, high) = given[option], NUMBERS[option]
        kinds = int if isinstance(low, int) else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
        if not number and not (value is None and defaults[option] is None):
            kind = "an integer" if kinds is int else "a number"
            raise PipelineError(
                f"scheduler: {option} must be {kind} from {low:g} to {high:g}, got {value!r:.60}."
            )
    for option in given.keys() & set(FLAGS):
        if not isinstance(given[option], bool):
            raise PipelineError(
                f"scheduler: {option} must be true or false, got {given[option]!r:.60}."
            )


def _choose(option: str, value: Any, among: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in among:
        raise PipelineError(f"scheduler: {option} = {value!r} is not one of {', '.join(among)}.")
    return among[value]


def _table(given: dict[str, Any], *, finite: bool) -> tuple[Any, Any]:
    """alpha_bar and the prediction; with `finite`, the last alpha_bar is never 0."""
    timesteps, schedule = given["num_train_timesteps"], given["beta_schedule"]
    if given["trained_betas"] is not None:
        betas = np.asarray(given["trained_betas"], np.float64)
    elif schedule == "squaredcos_cap_v2":
        betas = cosine_betas(timesteps)
    else:
        make = _choose("beta_schedule", schedule, BETAS | {"squaredcos_cap_v2": None})
        betas = make(timesteps, given["beta_start"], given["beta_end"])
    alpha_bar = alpha_bar_from_betas(betas)
    prediction = _choose("prediction_type", given["prediction_type"], PREDICTIONS)
    if given.get("rescale_betas_zero_snr"):
        alpha_bar = rescale_zero_terminal_snr(alpha_bar)
        if finite and alpha_bar[-2] <= SMALLEST_ALPHA_BAR:
            raise PipelineError(
                f"scheduler: rescale_betas_zero_snr with beta_schedule = {schedule!r}: alpha_bar "
                f"is {alpha_bar[-2]:.1e} before the last timestep, and {SMALLEST_ALPHA_BAR:.1e} "
                "stands for zero there. Choose DDIMScheduler, which takes 0 itself."
            )
        if finite:
            alpha_bar[-1] = SMALLEST_ALPHA_BAR
        elif prediction is predict_eps:
            raise PipelineError(
                "scheduler: rescale_betas_zero_snr with prediction_type = 'epsilon': at the last "
                "timestep no data is left, and the noise says nothing of it. Such networks predict "
                "v_prediction or sample."
            )
    return alpha_bar, prediction


def _spaced(given: dict[str, Any], table: int, spacings: Mapping[str, Any], to_data: bool):
    spacing = _choose("timestep_spacing", given["timestep_spacing"], spacings)
    # As in diffusers the offset belongs to leading alone.
    offset = given["steps_offset"] if given["timestep_spacing"] == "leading" else 0
    return TableGrid(table, spacing, offset, to_data)


SPACINGS = dict(leading=grids.leading, trailing=trailing_timesteps, linspace=grids.linspace)
EULER_SPACINGS = SPACINGS | dict(linspace=grids.linspace_fractional)
MULTISTEP_SPACINGS = dict(
    leading=grids.leading_after_first,
    trailing=trailing_timesteps,
    linspace=grids.linspace_after_first,
)


def _ddim(given: dict[str, Any]) -> Schedule:
    alpha_bar, prediction = _table(given, finite=False)
    grid = _spaced(given, len(alpha_bar), SPACINGS, given["set_alpha_to_one"])
    solver = DDIM() if "clip_sample" in given else DPMSolverPP2M()  # else it is PNDM
    return Schedule(Diffusion(DiscreteVP(alpha_bar), prediction), solver, grid, len(alpha_bar))


def _euler(given: dict[str, Any]) -> Schedule:
    alpha_bar, prediction = _table(given, finite=True)
    spacing = given["timestep_spacing"]
    grid = _spaced(given, len(alpha_bar), EULER_SPACINGS, to_data=True)
    path = InterpolatedVP(alpha_bar) if spacing == "linspace" else DiscreteVP(alpha_bar)
    starts = spacing != "leading"  # there the noise is as strong as noise and data together
    return Schedule(Diffusion(path, prediction), DDIM(), grid, len(alpha_bar), starts)


def _multistep(given: dict[str, Any]) -> Schedule:
    alpha_bar, prediction = _table(given, finite=True)
    grid = _spaced(given, len(alpha_bar), MULTISTEP_SPACINGS, to_data=True)
    diffusion = Diffusion(DiscreteVP(alpha_bar), prediction)
    return Schedule(diffusion, _multistep_solver(given), grid, len(alpha_bar))


def _multistep_solver(given: dict[str, Any]) -> AbstractSolver:
    order, solvers = given["solver_order"], {2: DPMSolverPP2M(), 3: DPMSolverPP3M(half_bend=True)}
    if "predict_x0" in given:
        solvers = {n: UniPC(n) for n in (1, 2, 3)}
    if order not in solvers:
        raise PipelineError(f"scheduler: solver_order = {order} is not one of {list(solvers)}.")
    return solvers[order]


def _multistep_flow(given: dict[str, Any]) -> Schedule:
    diffusion, grid = (
        Diffusion(LinearFlow(), predict_velocity),
        MultistepFlowGrid(given["flow_shift"]),
    )
    return Schedule(diffusion, _multistep_solver(given), grid, whole=True)


def _flow(given: dict[str, Any], every_nth: bool) -> Schedule:
    mus = None
    if given["use_dynamic_shifting"]:
        few, many = given["base_image_seq_len"], given["max_image_seq_len"]
        if few == many:
            raise PipelineError(
                f"scheduler: base_image_seq_len and max_image_seq_len must differ, both are {few}."
            )
        mus = (few, given["base_shift"], many, given["max_shift"])
    linear = _choose("time_shift_type", given["time_shift_type"], dict(exponential=0, linear=1))
    terminal = given["shift_terminal"] or None
    grid = FlowGrid(given["shift"], mus, bool(linear), every_nth, terminal)
    return Schedule(Diffusion(LinearFlow(), predict_velocity), Euler(), grid)


SCHEDULERS: dict[str, _Kind] = {
    "DDIMScheduler": _Kind(DDIM_DEFAULTS, _ddim, dict(clip_sample=False)),
    "PNDMScheduler": _Kind(PNDM_DEFAULTS, _ddim),
    "EulerDiscreteScheduler": _Kind(EULER_DEFAULTS, _euler),
    "DPMSolverMultistepScheduler": _Kind(
        DPM_DEFAULTS, _multistep, foreign_solvers=("logrho", "bh1", "bh2")
    ),
    "UniPCMultistepScheduler": _Kind(
        UNIPC_DEFAULTS,
        _multistep,
        foreign_solvers=("midpoint", "heun", "logrho"),
        flow=_multistep_flow,
    ),
    "FlowMatchEulerDiscreteScheduler": _Kind(FLOW_DEFAULTS, _flow, dict(num_train_timesteps=1000)),
}
