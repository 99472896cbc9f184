"""Small generators to serve in tests, and the pictures and texts that they should make."""

import contextlib
from queue import Queue

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm import discrete as dd
from eqxldm.data.pixels import to_uint8
from eqxldm.serving import Defaults, Engine, Generator, Request
from eqxldm.serving.events import Failure, Picture, seed_words
from eqxldm.serving.text import TextEngine, TextGenerator, Written

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


# Text

LETTERS = "abcdef"
MASK = len(LETTERS)


class Neighbours(eqx.Module):
    """A network of tokens that looks at both neighbours and at all that are there."""

    tables: jax.Array

    def __init__(self, key):
        self.tables = 2 * jax.random.normal(key, (3, MASK + 1, MASK + 1))

    def __call__(self, ids, t=None, cond=None, *, key=None, mask=None):
        there = jnp.ones(len(ids)) if mask is None else mask.astype(float)
        left, right, every = (table[ids] * there[:, None] for table in self.tables)
        left = jnp.concatenate([left[:1] * 0, left[:-1]])
        right = jnp.concatenate([right[1:], right[:1] * 0])
        return left + right + jnp.sum(every, 0) / jnp.sum(there)


def letters(ids):
    return "".join((LETTERS + "_")[i] for i in ids)


def ids_of(text):
    if wrong := set(text) - set(LETTERS):
        raise ValueError(f"{min(wrong)!r} is not among the letters.")
    return np.array([LETTERS.index(c) for c in text], np.int32)


def text_sampler(name, block_size=4, start=0, **options):
    if name == "blocks":
        inside = dd.Ordered(dd.at_random, **options)
        return dd.InBlocks(inside, block_size=block_size, start=start)
    kinds = {
        "random": lambda **o: dd.Ordered(dd.at_random, **o), "ancestral": dd.Ancestral,
        "threshold": lambda **o: dd.Threshold(0.5, **o),
    }  # fmt: skip
    return kinds[name](**options)


TEXT_SAMPLERS = ("random", "ancestral", "threshold", "blocks")


def make_text_generator(length=16, **changes):
    given = dict(most_calls=60, stream=lambda key: jax.random.fold_in(key, 5)) | changes
    return TextGenerator(
        "words", Neighbours(jax.random.key(2)), dd.Masking(MASK), MASK + 1, length, ids_of, letters,
        TEXT_SAMPLERS, text_sampler, **given,
    )  # fmt: skip


def expected_texts(generator, request, start):
    """What `sample_tokens` writes for a request of one prompt, and its calls: of a text alone."""
    ids = np.concatenate([ids_of(part) if part != "_" else [MASK] for part in start])
    x = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (request.n, len(ids)))
    sampler = text_sampler(
        request.sampler, request.block_size, int(np.argmax(ids == MASK)),
        temperature=request.temperature, top_p=request.top_p,
    )  # fmt: skip
    denoiser = dd.guide_prompt(generator.network, MASK, request.guidance)
    calls = request.calls or int((ids == MASK).sum()) // 2
    key = jax.random.wrap_key_data(seed_words(request.seed), impl="threefry2x32")
    found = dd.sample_tokens(
        denoiser, generator.path, sampler, calls, x, x != MASK,
        key=generator.stream(key),
    )  # fmt: skip
    return [letters(tokens) for tokens in np.asarray(found.tokens)], int(found.calls)


@contextlib.contextmanager
def writing(generator, **options):
    """A text engine that is ready."""
    engine = TextEngine(generator, **options)
    engine.start()
    try:
        assert engine.ready.wait(60), engine.failed
        yield engine
    finally:
        engine.stop()


def written(engine, *requests, decode=letters):
    """The texts and calls of requests that are handed in together, a list for each."""
    queues = [Queue() for _ in requests]
    for wanted, queue in zip(requests, queues, strict=True):
        engine.submit(wanted, queue.put)
    found = []
    for wanted, queue in zip(requests, queues, strict=True):
        texts = {}
        while len(texts) < wanted.texts:
            event = queue.get(timeout=30)
            assert not isinstance(event, Failure), event.message
            if isinstance(event, Written):
                texts[event.index] = decode(event.tokens), event.calls
        found.append([texts[i] for i in range(wanted.texts)])
    return found
