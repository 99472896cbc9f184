"""A server as it is often written, to compare with: one compiled sampler, one request at a time."""

import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm.data.pixels import to_uint8
from eqxldm.serving import MAP, Generator
from eqxldm.serving.pictures import png

from .generators import from_folder, from_run
from .one_at_a_time import serve_one_at_a_time


def sampler(generator: Generator, solver: str, steps: int, guidance: float) -> Any:
    """`(seeds, cond) -> pictures`, a whole run of a batch as one jitted call."""
    network, decoder, null = generator.network, generator.decoder, generator.null
    interval, times = generator.defaults.interval, generator.times(steps)
    start_std = generator.start_std
    std = generator.diffusion.prior_std if start_std is None else start_std(times)

    def one(network, decoder, flow_map, seed, cond):
        noise_key, key = jax.random.split(generator.stream(jax.random.key(seed)))
        z = float(std) * jax.random.normal(noise_key, generator.shape)
        if solver == MAP:
            z = ex.sample_map(flow_map, ex.uniform_times(steps), z, cond, key=key)
        else:
            if guidance != 1:
                none = jax.tree.map(jnp.asarray, null)
                network = ex.guide(network, none, guidance, interval=interval)
            given = generator.diffusion, generator.solvers[solver], times, z, cond
            z = ex.sample(network, *given, key=key)
        return to_uint8(decoder(z)[None], pad=generator.pad)[0]

    drawn = eqx.filter_jit(eqx.filter_vmap(one, in_axes=(None, None, None, 0, 0)))
    return lambda seeds, cond: drawn(network, decoder, generator.flow_map, seeds, cond)


def main(kind: str, path: str, solver: str, steps: str, guidance: str) -> None:
    """Serves a run (`--run`) or a diffusers folder (`--model`) on a free port, and says which."""
    begun = time.monotonic()
    folder = Path(path)
    generator = from_run(folder) if kind == "--run" else from_folder(folder, None, "float32")
    draw = sampler(generator, solver, int(steps), float(guidance))

    def make(body):
        cond = generator.condition(body.get("prompt"), body.get("label"))
        batch = jax.tree.map(lambda a: np.asarray(a)[None], cond)
        return png(np.asarray(draw(np.asarray([body.get("seed", 0)], np.int32), batch))[0])

    serve_one_at_a_time(make, begun)


if __name__ == "__main__":
    main(*sys.argv[1:])
