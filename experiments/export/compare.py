"""What smaller weights and cheaper steps cost in quality, of a finished run: `make compare-...`.

Each variant draws the same images from the same noise. Its row has the error of its eps beside the
float32 network's at five times, the Fréchet distance and accuracy of its samples, the distance of
each sample from the float32 network's, the bytes, and the medians of the time of a network call and
of a whole sampling run.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tyro.conf import OmitArgPrefixes

import eqxldm as ex
from eqxldm.data.pixels import to_float
from eqxldm.quantization import quantize, weight_bytes
from eqxldm.sharding import make_mesh

from ..train.__main__ import parsed
from ..train.classifier import train_classifier
from ..train.commands import Which, run_folder
from ..train.config import SamplingConfig
from ..train.finished import open_finished
from ..train.job import Compute, Inputs
from ..train.methods import DTYPES, Method, check_sampling, make_solver, make_times
from ..train.options import Samples, check
from ..train.processes import exit_with
from ..train.sampling import Drawing, Sampler
from ..train.scores import Comparison, accuracy, frechet
from ..train.streams import stream_key
from ..train.terminal import Signals, UserError, run_main, say
from .states import BATCHES, median_seconds

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the error of eps is measured
SHOWN = 64  # images whose noised latents it is measured on


class Variant(NamedTuple):
    """A network made of the run's own, how it is sampled, and every how many calls it is whole."""

    network: Callable[[Any], Any] = lambda network: network
    sampling: Callable[[SamplingConfig], SamplingConfig] = lambda sampling: sampling
    every: int | None = None


def in_mode(mode: Any) -> Variant:
    return Variant(lambda network: quantize(network, mode))


def cast(network: Any) -> Any:
    """All weights in bfloat16, computed with in float32."""
    small = lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a
    return jax.tree.map(small, network)


def within(low: float, high: float) -> Variant:
    return Variant(sampling=lambda s: replace(s, guidance_interval=(low, high)))


def half(sampling: SamplingConfig) -> SamplingConfig:
    return replace(sampling, steps=max(1, sampling.steps // 2), guidance_interval=(0.0, 1.0))


def every(n: int) -> Variant:
    return Variant(sampling=lambda s: replace(s, guidance_interval=(0.0, 1.0)), every=n)


VARIANTS: dict[str, dict[str, Variant]] = {
    "quantized": {
        "float32": Variant(),
        "bfloat16 weights": Variant(cast),
        **{mode: in_mode(mode) for mode in ("int8", "w8a8", "fp8")},
    },
    "faster": {
        "guided everywhere": within(0.0, 1.0),
        "guided in (0, 0.8)": within(0.0, 0.8),
        "guided in (0.2, 0.8)": within(0.2, 0.8),
        "guided in (0.2, 0.6)": within(0.2, 0.6),
        "half of the steps": Variant(sampling=half),
        "blocks every 2nd call": every(2),
        "blocks every 3rd call": every(3),
        "blocks every 4th call": every(4),
    },
}


@dataclass(frozen=True)
class Compare(Which):
    """Smaller weights, or cheaper steps, beside the run as it is."""

    what: Literal["quantized", "faster"] = "quantized"  # Which variants.
    only: tuple[str, ...] = ()  # The variants to run after the first; by default all.
    images: Path | None = None  # The training images; by default where they were.
    n: Samples = 2000  # How many images, as many of each class.
    inputs: OmitArgPrefixes[Inputs] = field(default_factory=Inputs)
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)


class Cached(NamedTuple):
    """A `Sampler` whose blocks are computed at every `every`-th call; guidance is everywhere."""

    sampler: Sampler
    every: int

    def function(self, shape: Any, null: Any) -> Callable[..., Any]:
        method, sampling = self.sampler.method, self.sampler.sampling
        given = method.diffusion, make_solver(method, sampling), make_times(method, sampling)
        scale = 1.0 if null is None else sampling.guidance
        options: dict[str, Any] = dict(every=self.every, null=null, scale=scale)

        def end(network: Any, z: Any, cond: Any, key: Any) -> Any:
            return ex.sample_cached(network, *given, z, cond, **options, key=key)

        return self.sampler.function(shape, null, end)


def compare(command: Compare) -> list[dict[str, Any]]:
    """Prints the table; returns its rows."""
    check(command)
    signals, mesh = Signals(), make_mesh()
    finished = open_finished(run_folder(command))
    config, method, condition = finished.config, finished.method, finished.condition
    check_sampling(method, command.sampling, prefix="")
    variants = VARIANTS[command.what]
    if unknown := [name for name in command.only if name not in variants]:
        raise UserError(f"--only {unknown[0]!r}: known are {', '.join(map(repr, variants))}.")
    if command.what == "faster" and config.denoiser != "dit":
        raise UserError("--what faster: only the blocks of a DiT can be kept; this is a U-Net.")
    about = command.images, command.inputs, command.compute
    job, reference = finished.measured(*about, mesh, signals)
    trained = finished.networks(mesh, command.sigma_rel)
    with job.run.locked():
        features = train_classifier(job)
    real = reference.described(features)[0]
    wanted = condition.wanted(command.n, *reference.texts(command.n))
    shown = jnp.asarray(reference.first(SHOWN))
    encode = eqx.filter_jit(jax.vmap(lambda x: trained.space.encode(x)))
    noised = Noised.of(method, encode(to_float(shown, pad=config.pictures.pad)), wanted.take(
        np.arange(len(shown)) % wanted.count
    ).cond)  # fmt: skip

    rows: list[dict[str, Any]] = []
    first: Any = None
    for i, (name, variant) in enumerate(variants.items()):
        if i and command.only and name not in command.only:
            continue
        network, sampling = variant.network(trained.denoiser), variant.sampling(command.sampling)
        sampler: Any = Sampler(method, sampling, config.pictures.pad, DTYPES["float32"])
        if variant.every is not None:
            sampler = Cached(sampler, variant.every)
        batch = min(command.compute.sampling_batch, wanted.count)
        drawing = Drawing(sampler, trained.shape, trained.null, batch=batch)
        made = trained._replace(denoiser=network)
        key = stream_key(config.seed, "samples")
        drawing(made, wanted.take(np.arange(batch)), key, name=f"{name}, compiling")
        begin = time.monotonic()
        drawn = drawing(made, wanted, key, name=name)
        seconds = (time.monotonic() - begin) / wanted.count
        eps = noised.eps(network)
        first = (drawn, eps) if first is None else first
        row: dict[str, Any] = {"variant": name, "bytes": weight_bytes(network)}
        off = jnp.sqrt(jnp.mean((eps - first[1]) ** 2, axis=tuple(range(1, eps.ndim))))
        row |= {f"eps {t:g}": float(error) for t, error in zip(TIMES, off, strict=True)}
        row["pixels"] = float(np.mean(np.abs(drawn.astype(float) - first[0]))) / 255
        compared = Comparison(real, features(drawn), wanted.labels, job.source.class_names)
        row |= frechet(compared) | accuracy(compared)
        for n in BATCHES:
            row[f"call of {n}, ms"] = 1e3 * noised.call_seconds(network, n)
        rows.append(row | {"ms an image": 1e3 * seconds})
    say(table(rows, command.what))
    return rows


class Noised(NamedTuple):
    """Latents noised to each of `TIMES` and their conditions, the same for every network."""

    method: Method
    x_t: Array  # times, images, and a latent's shape
    cond: Any

    @classmethod
    def of(cls, method: Method, z: Array, cond: Any) -> "Noised":
        eps = jax.random.normal(jax.random.key(0), z.shape)
        at = lambda t: jax.vmap(lambda z, e: method.diffusion.noise(z, jnp.asarray(t), e))(z, eps)
        return cls(method, jnp.stack([at(t) for t in TIMES]), cond)

    def eps(self, network: Any) -> Array:
        """What the network takes for the noise, of unit variance."""
        diffusion = self.method.diffusion

        @eqx.filter_jit
        def estimate(network: Any, x_t: Array, t: Array) -> Array:
            return jax.vmap(lambda x, c: diffusion.estimate(x, t, network(x, t, c)).eps)(
                x_t, self.cond
            )

        return jnp.stack(
            [estimate(network, x_t, jnp.asarray(t)) for x_t, t in zip(self.x_t, TIMES, strict=True)]
        )

    def call_seconds(self, network: Any, batch: int) -> float:
        """The median time of a call on so many examples, without guidance."""
        call = eqx.filter_jit(lambda n, x, t, c: jax.vmap(n)(x, t, c))
        cond = jax.tree.map(lambda a: jnp.asarray(a)[:batch], self.cond)
        arguments = network, self.x_t[2, :batch], jnp.full(batch, TIMES[2]), cond
        return median_seconds(call, *arguments)


def table(rows: list[dict[str, Any]], what: str) -> str:
    """Markdown, without the columns that say nothing of these variants."""
    own = (lambda name: name.startswith(("eps", "bytes", "call"))) if what == "faster" else None
    columns = [name for name in rows[0] if own is None or not own(name)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    show = lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.4g}" if isinstance(v, float) else v
    lines += [f"| {' | '.join(show(row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    compare(parsed(Compare, args, prog="python -m experiments.export.compare", description=__doc__))


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
