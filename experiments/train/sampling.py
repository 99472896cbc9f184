"""Drawing images from a trained model, and the pictures that show how they come about."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

import eqxldm as ex
from eqxldm.data.pixels import to_float, to_uint8
from eqxldm.distributed import gather_parts, local_mesh, own_part, replicate
from eqxldm.sharding import batch_sharding

from .conditions import Wanted
from .config import Config, SamplingConfig
from .figures import image_grid
from .methods import DTYPES, Method, guided, make_method, make_solver, make_times
from .networks import Shape, Space
from .terminal import StageBar

Images = UInt8[np.ndarray, "n h w c"]
End = Callable[[Any, Any, Any, Any], Any]
COLUMNS = 11  # of the pictures of both processes


class Trained(NamedTuple):
    """A run's models, the shape of what the denoiser sees, and what means "no condition"."""

    space: Space
    denoiser: Any
    shape: Shape
    null: Any


class Sampler(NamedTuple):
    """How images are drawn: what their border is, and what the network computes in."""

    method: Method
    sampling: SamplingConfig
    pad: int = 0
    dtype: Any = jnp.float32

    @classmethod
    def of(cls, config: Config, sampling: SamplingConfig) -> "Sampler":
        """That of a run."""
        dtype = DTYPES[config.diffusion.dtype]
        return cls(make_method(config), sampling, config.pictures.pad, dtype)

    def function(self, shape: Shape, null: Any, end: End | None = None) -> Callable[..., Any]:
        """`(space, network, cond, keys) -> images`, a pure function of a batch, in uint8.

        `end(network, z, cond, key)` says where the noise leads: by default `self.end`, guided.
        """

        def draw(space, network, cond, keys):
            denoiser = self.guided(network, null) if end is None else network
            lead = self.end if end is None else end

            def one(cond, key):
                noise_key, solver_key = jax.random.split(key)
                z = self.method.diffusion.sample_prior(shape, key=noise_key)
                return space.decode(lead(denoiser, z, cond, solver_key))

            return to_uint8(jax.vmap(one)(cond, keys), pad=self.pad)

        return draw

    def guided(self, network: Any, null: Any) -> Any:
        """The network with guidance, in the type that it computes in."""
        return guided(network, null, self.sampling, self.dtype, self.method.conditioned)

    def end(self, denoiser: Any, z: Any, cond: Any, key: Any) -> Any:
        """Where the noise `z` leads."""
        method, sampling = self.method, self.sampling
        if sampling.solver == "map" and method.flow_map is not None:
            times = ex.uniform_times(sampling.steps)
            return ex.sample_map(method.flow_map(denoiser), times, z, cond, key=key)
        solver, times = make_solver(method, sampling), make_times(method, sampling)
        return ex.sample(denoiser, method.diffusion, solver, times, z, cond, key=key)

    def states(self, denoiser: Any, z: Any, cond: Any, key: Any) -> Any:
        """The states on the way there, the noise first."""
        method, sampling = self.method, self.sampling
        if sampling.solver == "map" and method.flow_map is not None:
            flow_map, times = method.flow_map(denoiser), ex.uniform_times(sampling.steps)
            states = [z]
            for i in range(sampling.steps):
                step = times[i : i + 2], states[-1], cond
                states.append(ex.sample_map(flow_map, *step, key=jax.random.fold_in(key, i)))
            return jnp.stack(states)
        solver, times = make_solver(method, sampling), make_times(method, sampling)
        arguments = method.diffusion, solver, times, z, cond
        return ex.sample_trajectory(denoiser, *arguments, key=key).states


class Drawing:
    """Draws from one trained model, compiled once: each process draws its part, on its devices.

    Image `first + i` depends on the key, its number and its condition alone.
    """

    def __init__(self, sampler: Sampler, shape: Shape, null: Any, *, batch: int):
        self._mesh = local_mesh()
        self.batch = -(-batch // self._mesh.size) * self._mesh.size
        function = sampler.function(shape, null)

        def draw(space, network, cond, key, indices):
            keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
            return function(space, network, cond, keys)

        self._draw = eqx.filter_jit(draw)

    def __call__(
        self, trained: Trained, wanted: Wanted, key: Any, *, first: int = 0, name: str = "samples"
    ) -> Images:
        """One image for each condition; all of them in every process."""
        mine, images = own_part(wanted.count), []
        space, network = (replicate(m, self._mesh) for m in (trained.space, trained.denoiser))
        with StageBar(name, len(mine), "image") as bar:
            for i in range(0, max(len(mine), 1), self.batch):
                at = mine.start + (np.arange(i, i + self.batch) % max(len(mine), 1))
                at = np.minimum(at, wanted.count - 1)  # a process may have nothing to draw
                put = lambda a: jax.device_put(a, batch_sharding(self._mesh))
                cond = jax.tree.map(put, wanted.take(at).cond)
                drawn = self._draw(space, network, cond, key, put(first + at))
                images.append(np.asarray(drawn))
                bar.update(min(i + self.batch, len(mine)))
        return gather_parts(np.concatenate(images)[: len(mine)], wanted.count)


def forward_process(sampler: Sampler, trained: Trained, originals: Images, key: Any) -> Images:
    """Each row one image, itself or its latent noised at evenly spaced t and decoded."""
    times = jnp.linspace(0.0, 1.0, COLUMNS)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0))
    def row(space, x, key):
        z = space.encode(x)
        eps = jax.random.normal(key, z.shape)
        noised = jax.vmap(lambda t: sampler.method.diffusion.noise(z, t, eps))(times)
        return jax.vmap(space.decode)(noised)

    keys = jax.random.split(key, len(originals))
    rows = row(trained.space, to_float(jnp.asarray(originals), pad=sampler.pad), keys)
    return _grid(rows, COLUMNS, sampler.pad)


def reverse_process(sampler: Sampler, trained: Trained, wanted: Wanted, key: Any) -> Images:
    """Each row one condition, the states of its denoising trajectory decoded, noise first."""
    steps = sampler.sampling.steps
    shown = np.linspace(0, steps, min(COLUMNS, steps + 1)).round().astype(int)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, None, 0, 0))
    def row(space, network, cond, key):
        denoiser = sampler.guided(network, trained.null)
        noise_key, solver_key = jax.random.split(key)
        z = sampler.method.diffusion.sample_prior(trained.shape, key=noise_key)
        return jax.vmap(space.decode)(sampler.states(denoiser, z, cond, solver_key)[shown])

    keys = jax.random.split(key, wanted.count)
    cond = jax.tree.map(jnp.asarray, wanted.cond)
    rows = row(trained.space, trained.denoiser, cond, keys)
    return _grid(rows, len(shown), sampler.pad)


def _grid(rows: Any, columns: int, pad: int) -> Images:
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=pad)
    return image_grid(np.asarray(images), columns)
