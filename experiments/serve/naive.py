"""A server as it is often written, to compare with: one compiled sampler, one request at a time."""

import asyncio
import base64
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
from eqxldm.serving.server import bind

from .generators import from_run


def sampler(generator: Generator, solver: str, steps: int, guidance: float) -> Any:
    """`(seeds, cond) -> pictures`, a whole run of a batch as one jitted call."""
    network, decoder, null = generator.network, generator.decoder, generator.null
    interval, times = generator.defaults.interval, generator.times(steps)

    def one(network, decoder, flow_map, seed, cond):
        noise_key, key = jax.random.split(generator.stream(jax.random.key(seed)))
        z = generator.diffusion.sample_prior(generator.shape, key=noise_key)
        if solver == MAP:
            z = ex.sample_map(flow_map, ex.uniform_times(steps), z, cond, key=key)
        else:
            if guidance != 1:
                network = ex.guide(network, jnp.asarray(null), guidance, interval=interval)
            given = generator.diffusion, generator.solvers[solver], times, z, cond
            z = ex.sample(network, *given, key=key)
        return to_uint8(decoder(z)[None], pad=generator.pad)[0]

    drawn = eqx.filter_jit(eqx.filter_vmap(one, in_axes=(None, None, None, 0, 0)))
    return lambda seeds, cond: drawn(network, decoder, generator.flow_map, seeds, cond)


def main(path: str, solver: str, steps: str, guidance: str) -> None:
    """Serves a run on a free port, and says which."""
    import uvicorn
    from fastapi import FastAPI, Request

    begun = time.monotonic()
    generator = from_run(Path(path))
    draw = sampler(generator, solver, int(steps), float(guidance))
    app, lock = FastAPI(), asyncio.Lock()

    def make(body):
        cond = generator.condition(body.get("prompt"), body.get("label"))
        batch = jax.tree.map(lambda a: np.asarray(a)[None], cond)
        return png(np.asarray(draw(np.asarray([body.get("seed", 0)], np.int32), batch))[0])

    async def generate(request: Request):
        body = await request.json()
        async with lock:
            data = await asyncio.to_thread(make, body)
        return {"data": [{"b64_json": base64.b64encode(data).decode()}]}

    app.post("/v1/images/generations")(generate)
    make({"label": 0})  # which compiles
    listener = bind("127.0.0.1", 0)
    seconds, port = time.monotonic() - begun, listener.getsockname()[1]
    print(f"ready after {seconds:.1f} s: http://127.0.0.1:{port}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
