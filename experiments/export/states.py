"""The states that a run's own sampling goes through: what its exported network will be given."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..train.conditions import Condition
from ..train.config import SamplingConfig
from ..train.methods import Method, make_times
from ..train.sampling import Sampler, Trained
from .onnx import named_inputs, session

IMAGES = 32  # that are sampled; half of them calibrate, the others measure
SHOWN = (0.1, 0.5, 0.9)  # the times nearest to these are measured
BATCHES = (1, 16)  # of which a call is timed
CALLS = 20  # that are timed


class States(NamedTuple):
    """`x (steps, n, *shape)` at the times `t (steps,)`, noise first, and the conditions."""

    x: np.ndarray
    t: np.ndarray
    cond: Any

    @classmethod
    def of(
        cls, method: Method, sampling: SamplingConfig, trained: Trained, condition: Condition
    ) -> "States":
        """Of each condition in turn; every fourth image has none, as guidance asks for."""
        cond = condition.wanted(IMAGES, ("",)).cond
        if cond is not None:
            null: Any = condition.null
            cond = np.stack([null if i % 4 == 3 else c for i, c in enumerate(cond)])
        sampler = Sampler(method, sampling)

        @eqx.filter_jit
        def draw(network: Any, cond: Any, keys: Any) -> Any:
            def one(cond: Any, key: Any) -> Any:
                z = method.diffusion.sample_prior(trained.shape, key=key)
                return sampler.states(network, z, cond, key)

            return jax.vmap(one)(cond, keys)

        x = draw(trained.denoiser, cond, jax.random.split(jax.random.key(0), IMAGES))
        # The last one is what sampling ends with.
        times = np.asarray(make_times(method, sampling), np.float32)
        return cls(np.moveaxis(np.asarray(x), 1, 0)[:-1], times[:-1], cond)

    def inputs(self, step: int, images: slice) -> dict[str, np.ndarray]:
        """One step's, of some images."""
        x = self.x[step, images]
        cond = None if self.cond is None else self.cond[images]
        return named_inputs(x, np.full(len(x), self.t[step]), cond)

    def calibration(self) -> list[dict[str, np.ndarray]]:
        """Of every step, half of the images."""
        return [self.inputs(step, slice(0, None, 2)) for step in range(len(self.t))]

    def table(self, method: Method, files: dict[str, Path]) -> str:
        """Files beside the first one, on the other images: bytes, error of eps, time of a call."""
        steps = [int(np.argmin(np.abs(self.t - t))) for t in SHOWN]
        names = ["denoiser", "bytes", *(f"eps {self.t[i]:.2g}" for i in steps)]
        names += [f"call of {n}, ms" for n in BATCHES]
        lines, first = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"], None
        for name, path in files.items():
            run = session(path)
            eps = [self._eps(method, run, i) for i in steps]
            first = eps if first is None else first
            off = [float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in zip(eps, first, strict=True)]
            row = [name, f"{path.stat().st_size:,}", *(f"{error:.4f}" for error in off)]
            middle = len(self.t) // 2
            for n in BATCHES:
                given = self.inputs(middle, slice(0, n))
                row.append(f"{1e3 * median_seconds(run.run, None, given):.2f}")
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines)

    def _eps(self, method: Method, run: Any, step: int) -> Any:
        given = self.inputs(step, slice(1, None, 2))
        (out,) = run.run(None, given)
        estimate = lambda x, t, out: method.diffusion.estimate(x, t, out).eps
        return jax.vmap(estimate)(given["x_t"], given["t"], jnp.asarray(out))


def median_seconds(call: Callable[..., Any], *given: Any) -> float:
    """The median time of some calls, the first of which is not counted."""
    jax.block_until_ready(call(*given))
    found = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(call(*given))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
