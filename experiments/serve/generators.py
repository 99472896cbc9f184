"""What can be served: a finished run of `experiments.train`, or a diffusers folder."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import eqxldm as ex
from eqxldm import pipelines, pretrained
from eqxldm.serving import Defaults, Generator, from_pipeline
from eqxldm.serving.pipeline import Decoder, solvers_that_fit
from eqxldm.sharding import make_mesh
from eqxldm.training import in_dtype

from ..train.conditions import Captions, Condition, Labels
from ..train.config import Config, SamplingConfig
from ..train.few_steps import FEW_STEP
from ..train.finished import open_finished
from ..train.methods import DTYPES, SOLVERS, Method, make_times
from ..train.run import RunFolder
from ..train.streams import stream_number
from ..train.terminal import user_errors

MOST_STEPS = 250


class InDType(eqx.Module):
    """`training.in_dtype` as a PyTree, so that the weights are arguments of what is compiled."""

    network: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, x_t, t, cond, *, key=None, **options):
        return in_dtype(self.network, self.dtype)(x_t, t, cond, key=key, **options)


class RunMap(eqx.Module):
    """A run's flow map as a PyTree."""

    network: Any
    make: Any = eqx.field(static=True)

    def __call__(self, x_t, t, s, cond, *, key=None):
        return self.make(self.network)(x_t, t, s, cond, key=key)


def from_run(path: Path) -> Generator:
    """A finished run; **raises** `UserError` where there is none."""
    finished = open_finished(RunFolder(path))
    run, config, method = finished.run, finished.config, finished.method
    condition, trained = finished.condition, finished.networks(make_mesh())
    network = InDType(trained.denoiser, DTYPES[config.diffusion.dtype])
    table = method.timesteps
    sampling = usual_sampling(config, run)
    number = stream_number("samples")
    return Generator(
        path.resolve().name,
        network,
        method.diffusion,
        trained.shape,
        Decoder(trained.space),
        config.size,
        solvers_of(method, config),
        lambda steps: make_times(method, SamplingConfig(steps=steps)),
        Defaults(sampling.solver, sampling.steps, sampling.guidance, sampling.guidance_interval),
        reader(condition),
        trained.null,
        labels=tuple(finished.about["class_names"]) if isinstance(condition, Labels) else (),
        takes_text=isinstance(condition, Captions),
        flow_map=None if method.flow_map is None else RunMap(network, method.flow_map),
        pad=config.pictures.pad,
        channels=config.pictures.channels,
        # The pictures of a seed are those of `make sample SEED=`.
        stream=lambda key: jax.random.fold_in(key, number),
        most_steps=MOST_STEPS if table is None else min(MOST_STEPS, table),
    )


def reader(condition: Condition) -> Any:
    """A request's condition, on the host."""
    if isinstance(condition, Labels):
        return lambda prompt, label: condition.of([label or 0]).cond[0]
    if isinstance(condition, Captions):
        return lambda prompt, label: condition.read.tokens(prompt or "")
    return lambda prompt, label: None


def solvers_of(method: Method, config: Config) -> dict[str, ex.AbstractSolver]:
    """The solvers that sample this run; of a consistency function there is none but its map."""
    if config.objective == "scm":
        return {}
    known = SOLVERS | {"ddpm": ex.DDPM(method.variance)}
    return solvers_that_fit(method.diffusion, make_times(method, SamplingConfig(steps=3)), known)


def usual_sampling(config: Config, run: RunFolder) -> SamplingConfig:
    """How the run was measured, or its objective's way."""
    if config.objective in FEW_STEP:
        # A shortcut's velocity has no guidance in it; that of a mean flow has.
        scale = config.few.guidance if config.objective == "shortcut" else 1.0
        return SamplingConfig(solver="map", steps=1, guidance=scale)
    measured = (run.metrics() or {}).get("diffusion") or {}
    usual = SamplingConfig()
    try:
        return dataclasses.replace(
            usual,
            solver=measured.get("solver", usual.solver),
            steps=int(measured.get("steps", usual.steps)),
            guidance=float(measured.get("guidance_scale", usual.guidance)),
            guidance_interval=tuple(measured.get("guidance_interval", usual.guidance_interval)),
        )
    except (TypeError, ValueError):  # of another version
        return usual


def from_folder(path: Path, size: tuple[int, int] | None, dtype: str) -> Generator:
    """A diffusers folder; **raises** `UserError` for what cannot be served."""
    with user_errors(pipelines.PipelineError, pretrained.WeightsError):
        pipe = pipelines.load(path, dtype=jnp.dtype(dtype))
        return from_pipeline(pipe, size=size)
