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
from .config import SamplingConfig
from .figures import image_grid
from .methods import Method, guided, make_solver, make_times
from .networks import Shape, Space
from .terminal import StageBar

Images = UInt8[np.ndarray, "n h w c"]
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

    def function(self, shape: Shape, null: Any) -> Callable[..., Any]:
        """`(space, network, cond, keys) -> images`, a pure function of a batch, in uint8."""
        solver, times = (
            make_solver(self.method, self.sampling),
            make_times(self.method, self.sampling),
        )
        diffusion = self.method.diffusion

        def draw(space, network, cond, keys):
            denoiser = guided(network, null, self.sampling, self.dtype)

            def one(cond, key):
                noise_key, solver_key = jax.random.split(key)
                z = diffusion.sample_prior(shape, key=noise_key)
                z = ex.sample(denoiser, diffusion, solver, times, z, cond, key=solver_key)
                return space.decode(z)

            return to_uint8(jax.vmap(one)(cond, keys), pad=self.pad)

        return draw


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
    method, sampling = sampler.method, sampler.sampling
    solver, times = make_solver(method, sampling), make_times(method, sampling)
    shown = np.linspace(0, len(times) - 1, min(COLUMNS, len(times))).round().astype(int)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, None, 0, 0))
    def row(space, network, cond, key):
        denoiser = guided(network, trained.null, sampling, sampler.dtype)
        noise_key, solver_key = jax.random.split(key)
        z = method.diffusion.sample_prior(trained.shape, key=noise_key)
        states, _ = ex.sample_trajectory(
            denoiser, method.diffusion, solver, times, z, cond, key=solver_key
        )
        return jax.vmap(space.decode)(states[shown])

    keys = jax.random.split(key, wanted.count)
    cond = jax.tree.map(jnp.asarray, wanted.cond)
    rows = row(trained.space, trained.denoiser, cond, keys)
    return _grid(rows, len(shown), sampler.pad)


def _grid(rows: Any, columns: int, pad: int) -> Images:
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=pad)
    return image_grid(np.asarray(images), columns)
