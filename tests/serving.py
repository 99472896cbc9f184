"""A small generator to serve in tests, and the pictures that it should draw."""

import contextlib
from queue import Queue

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm.data.pixels import to_uint8
from eqxldm.serving import Defaults, Engine, Generator, Request
from eqxldm.serving.events import Failure, Picture

COUNTED = "/jax/core/compile/backend_compile_duration"
SOLVERS = {
    "ddim": ex.DDIM(),
    "ddpm": ex.DDPM(),
    "heun": ex.Heun(),
    "unipc": ex.UniPC(),
    "dpmsolver++": ex.DPMSolverPP2M(),
    "sde-dpmsolver++": ex.DPMSolverPP2M(1.0),
}
SHAPE = (2, 4, 4)
DIFFUSION = ex.Diffusion(ex.CosineVP(), ex.predict_v)


class Network(eqx.Module):
    """Two layers over the whole state, told the time and the class."""

    first: jax.Array
    second: jax.Array
    labels: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        n = int(np.prod(SHAPE))
        self.first = jax.random.normal(keys[0], (64, n)) / n**0.5
        self.second = jax.random.normal(keys[1], (n, 64)) / 8
        self.labels = jax.random.normal(keys[2], (4, 64))

    def __call__(self, x_t, t, cond, *, key=None, h=None):
        hidden = jnp.tanh(self.first @ x_t.reshape(-1) + self.labels[cond] + t)
        return (self.second @ hidden).reshape(x_t.shape)


class Decoder(eqx.Module):
    """Nearest pixels, one channel of three."""

    scale: jax.Array

    def __call__(self, z):
        picture = jnp.repeat(jnp.repeat(z, 2, 1), 2, 2)
        return jnp.tanh(self.scale * jnp.concatenate([picture, picture[:1]]))


def condition(prompt, label):
    return np.int32(label or 0)


def make_generator(**changes):
    network = Network(jax.random.key(1))
    generator = Generator(
        "tiny", network, DIFFUSION, SHAPE, Decoder(jnp.asarray(0.5)), (8, 8), SOLVERS,
        ex.uniform_times, Defaults("ddim", 4, 2.0, (0.0, 0.8)), condition, np.int32(3),
        labels=("zero", "one", "two"), channels=3,
    )  # fmt: skip
    return generator.replace(**changes)


def request(solver="ddim", steps=4, guidance=2.0, **options):
    given = dict(interval=(0.0, 0.8), seed=0, label=0) | options
    return Request(solver, steps, guidance, **given)


def expected(generator, request, index=0):
    """What `eqxldm.sample` draws for an image of a request, as floats and as bytes."""
    key = jax.random.fold_in(jax.random.key(request.seed), index)
    noise_key, solver_key = jax.random.split(key)
    z = DIFFUSION.sample_prior(SHAPE, key=noise_key)
    cond = jnp.asarray(condition(None, request.label))
    denoiser = generator.network
    if request.guidance != 1:
        null = jnp.asarray(generator.null)
        denoiser = ex.guide(denoiser, null, request.guidance, interval=request.interval)
    solver, times = generator.solvers[request.solver], ex.uniform_times(request.steps)
    z = ex.sample(denoiser, DIFFUSION, solver, times, z, cond, key=solver_key)
    return z, np.asarray(to_uint8(generator.decoder(z)[None])[0])


@contextlib.contextmanager
def running(generator, **options):
    """An engine that is ready."""
    engine = Engine(generator, **options)
    engine.start()
    try:
        assert engine.ready.wait(60), engine.failed
        yield engine
    finally:
        engine.stop()


def drawn(engine, *requests):
    """The pictures of requests that are handed in together, a list for each."""
    queues = [Queue() for _ in requests]
    for wanted, queue in zip(requests, queues, strict=True):
        engine.submit(wanted, queue.put)
    return [
        [pixels(picture.data) for picture in pictures_of(queue, wanted.n)]
        for wanted, queue in zip(requests, queues, strict=True)
    ]


def pictures_of(queue, n):
    found = {}
    while len(found) < n:
        event = queue.get(timeout=30)
        assert not isinstance(event, Failure), event.message
        if isinstance(event, Picture):
            found[event.index] = event
    return [found[i] for i in range(n)]


def pixels(data):
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


@contextlib.contextmanager
def compilations():
    """A list that grows with every compilation inside."""
    found = []
    listen = lambda name, seconds, **_: found.append(name) if name == COUNTED else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
