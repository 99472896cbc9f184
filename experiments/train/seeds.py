"""Several seeds of one configuration at once: trained on latents that stay on the device."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm.data import ImageSource
from eqxldm.durable import replacing
from eqxldm.models import DiT, multiply_adds, parameter_count

from .autoencoder import image_encoder
from .classifier import Images
from .conditions import Condition
from .config import Config, SamplingConfig
from .diffusion import diffusion_state, diffusion_step
from .few_steps import FEW_STEP
from .networks import Shape
from .sampling import Sampler
from .streams import stream_key
from .terminal import StageBar

CHUNK = 100  # steps in one program: what is between two lines of the bar


class Built(NamedTuple):
    """A configuration's states, one a seed on a leading axis, and its compiled training.

    `chunks` are the programs in their order and how often each runs; `static` completes a network.
    """

    config: Config
    state: Any
    static: Any
    chunks: list[tuple[Callable[..., Any], int]]
    parameters: int
    multiply_adds: int


def posteriors(source: ImageSource, config: Config, space: Any, path: Path) -> dict[str, Any]:
    """Mean and log-variance of all images' latents, on the device, and their classes.

    They are kept in the file `path`, and read from there where it is.
    """
    if not path.exists():
        found = _encoded(source, config, space)
        with replacing(path) as temporary:
            np.savez(temporary, **found)
    with np.load(path) as kept:
        return {name: jnp.asarray(kept[name]) for name in ("mean", "logvar", "cond")}


def _encoded(source: ImageSource, config: Config, space: Any) -> dict[str, Any]:
    encode, found, done = image_encoder(space, config), [], 0
    with StageBar("latents", len(source), "image") as bar:
        every = np.arange(len(source))
        for moments, labels in encode.of_images(source, every, config, strict=True):
            found.append((*(m.astype(np.float16) for m in moments), labels))
            done += len(labels)
            bar.update(done)
    mean, logvar, cond = map(np.concatenate, zip(*found, strict=True))
    return {"mean": mean, "logvar": logvar, "cond": cond}


def build(
    config: Config, condition: Condition, space: Any, shape: Shape, data: Any, seeds: int
) -> Built:
    """The states of seeds 0, 1, ... and their training, compiled.

    A step is that of the job (`diffusion_step`), its batches drawn with replacement.
    """
    make = lambda seed: diffusion_state(
        replace(config, seed=seed), shape, condition, remat="nothing"
    )
    with jax.default_device(_host()):
        made = [make(seed) for seed in range(seeds)]
    _, static, optimizer = made[0]
    state = jax.tree.map(lambda *leaves: np.stack(leaves), *(state for state, _, _ in made))
    plain_steps = config.few.pretrain if config.objective in FEW_STEP else 0
    chunks, size = [], config.diffusion.batch_size
    for plain, steps in ((True, plain_steps), (False, config.diffusion.steps - plain_steps)):
        if not steps:
            continue
        step = diffusion_step(config, condition, space, static, optimizer, plain=plain)

        def one(state, key, data, count, step=step):
            def body(state, _):
                at = jax.random.fold_in(key, state.step)
                rows = jax.random.randint(at, (size,), 0, len(data["cond"]))
                batch = jax.tree.map(lambda a: a[rows], data)
                return step(state, batch, key)[0], None

            return jax.lax.scan(body, state, None, length=count)[0]

        for count, times in ((CHUNK, steps // CHUNK), (steps % CHUNK, 1)):
            if count and times:
                run = jax.vmap(lambda s, k, d, n=count, f=one: f(s, k, d, n), in_axes=(0, 0, None))
                compiled = jax.jit(run, donate_argnums=0).lower(state, keys(seeds), data).compile()
                chunks.append((compiled, times))
    network = eqx.filter_eval_shape(lambda: eqx.combine(made[0][0].params, static))
    work = multiply_adds(network) if isinstance(network, DiT) else 0
    return Built(config, state, static, chunks, parameter_count(network), work)


def _host() -> Any:
    """The CPU, where many small programs are compiled sooner, if JAX has it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def keys(seeds: int) -> Any:
    return jnp.stack([stream_key(seed, "diffusion/step") for seed in range(seeds)])


def train(built: Built, data: Any, name: str) -> tuple[list[Any], float]:
    """The averaged network of each seed, and the seconds that all together took."""
    state, key = jax.tree.map(jnp.asarray, built.state), keys(len(built.state.step))
    done, begin = 0, time.monotonic()
    with StageBar(name, built.config.diffusion.steps, "step") as bar:
        for program, times in built.chunks:
            for _ in range(times):
                state = program(state, key, data)
                done = int(state.step[0])
                bar.update(done)
    seconds = time.monotonic() - begin
    part = lambda i: jax.tree.map(lambda a: a[i], state.ema[0])
    networks = [eqx.combine(part(i), built.static) for i in range(len(state.step))]
    return networks, seconds


class Draw:
    """Draws images of one way of sampling from any network of a configuration.

    It is compiled when it is made, from shapes alone.
    """

    def __init__(
        self,
        built: Built,
        sampling: SamplingConfig,
        space: Any,
        shape: Shape,
        null: Any,
        batch: int,
    ):
        sampler = Sampler.of(built.config, sampling)
        function, self._batch = sampler.function(shape, null), batch
        self._space, space_static = eqx.partition(space, eqx.is_array)

        def draw(space, params, cond, keys):
            whole = eqx.combine(space, space_static), eqx.combine(params, built.static)
            return function(*whole, cond, keys)

        first = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
        params = jax.tree.map(first, built.state.ema[0])
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        self._draw = jax.jit(draw).lower(self._space, params, labels, keys).compile()

    def __call__(self, network: Any, cond: Any, key: Any) -> tuple[Images, float]:
        """An image for each condition, and how many a second, the first batch left out."""
        params, images, seconds = eqx.filter(network, eqx.is_inexact_array), [], 0.0
        all_keys = jax.random.split(key, len(cond))
        for i in range(0, len(cond), self._batch):
            at = np.arange(i, i + self._batch) % len(cond)
            arguments = self._space, params, jnp.asarray(cond[at], jnp.int32), all_keys[at]
            if not i:
                jax.block_until_ready(self._draw(*arguments))
            begin = time.monotonic()
            images.append(np.asarray(self._draw(*arguments)))
            seconds += time.monotonic() - begin
        drawn = np.concatenate(images)[: len(cond)]
        return drawn, self._batch * len(images) / seconds
