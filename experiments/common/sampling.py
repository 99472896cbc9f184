"""Drawing images from a trained model, and the pictures that show how they come about."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Int, UInt8

import eqxldm as ex
from eqxldm.data import to_float, to_uint8

from .batching import BATCH
from .diffusion import Diffusion, SamplingConfig, guided, make_solver, make_times
from .figures import image_grid
from .spaces import Trained
from .terminal import StageBar

Images = UInt8[np.ndarray, "n h w c"]
COLUMNS = 11  # of the pictures of both processes


class Generator(NamedTuple):
    """A trained model and how it is sampled.

    `pad` is the border that its images have, `dtype` what the network computes in.
    """

    trained: Trained
    diffusion: Diffusion
    sampling: SamplingConfig
    pad: int = 0
    dtype: Any = jnp.float32


def make_sampler(
    diffusion: Diffusion,
    sampling: SamplingConfig,
    shape: tuple[int, int, int],
    *,
    pad: int = 0,
    dtype: Any = jnp.float32,
) -> Callable[..., Any]:
    """`(space, network, labels, keys) -> images`, a pure function of a batch, in uint8."""
    solver, times = make_solver(diffusion, sampling), make_times(diffusion, sampling)

    def draw(space, network, labels, keys):
        denoiser = guided(network, sampling, dtype)

        def one(label, key):
            noise_key, solver_key = jax.random.split(key)
            z = diffusion.diffusion.sample_prior(shape, key=noise_key)
            z = ex.sample(denoiser, diffusion.diffusion, solver, times, z, label, key=solver_key)
            return space.decode(z)

        return to_uint8(jax.vmap(one)(labels, keys), pad=pad)

    return draw


def draw_samples(
    generator: Generator,
    labels: Int[np.ndarray, " n"],
    key: Any,
    *,
    first: int = 0,
    batch: int = BATCH,
    sharding: Sharding | None = None,
) -> Images:
    """One image a label. Image `first + i` depends on the key, its number and its label alone.

    `sharding` divides a batch over devices, to which the model must have been copied.
    """
    trained, diffusion, sampling, pad, dtype = generator
    sampler = make_sampler(diffusion, sampling, trained.shape, pad=pad, dtype=dtype)

    @eqx.filter_jit
    def draw(space, network, labels, indices):
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
        return sampler(space, network, labels, keys)

    place = (lambda a: a) if sharding is None else lambda a: jax.device_put(a, sharding)
    images, n = [], len(labels)
    size = min(batch, n) if sharding is None else batch  # which divides over the devices
    with StageBar("samples", n, "image") as bar:
        for i in range(0, n, size):
            indices = np.arange(i, i + size) % n  # the last batch wraps around
            drawn = draw(
                trained.space, trained.denoiser, place(labels[indices]), place(first + indices)
            )
            images.append(np.asarray(drawn))
            bar.update(min(i + size, n))
    return np.concatenate(images)[:n]


def class_rows(samples: Images, labels: Int[np.ndarray, " n"], columns: int) -> Images:
    """The first `columns` samples of each class, or as many as each has, one row a class."""
    found, counts = np.unique(labels, return_counts=True)
    columns = min(columns, int(counts.min()))
    rows = [samples[labels == label][:columns] for label in found]
    return image_grid(np.concatenate(rows), columns)


def forward_process(generator: Generator, originals: Images, key: Any) -> Images:
    """Each row one image, itself or its latent noised at evenly spaced t and decoded."""
    trained, diffusion, _, pad, _ = generator
    times = jnp.linspace(0.0, 1.0, COLUMNS)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0))
    def row(space, x, key):
        z = space.encode(x)
        eps = jax.random.normal(key, z.shape)
        noised = jax.vmap(lambda t: ex.q_sample(diffusion.path, z, t, eps))(times)
        return jax.vmap(space.decode)(noised)

    keys = jax.random.split(key, len(originals))
    rows = row(trained.space, to_float(jnp.asarray(originals), pad=pad), keys)
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=pad)
    return image_grid(np.asarray(images), COLUMNS)


def reverse_process(generator: Generator, labels: Int[np.ndarray, " n"], key: Any) -> Images:
    """Each row one label, the states of its denoising trajectory decoded, noise first."""
    trained, diffusion, sampling, pad, dtype = generator
    solver, times = make_solver(diffusion, sampling), make_times(diffusion, sampling)
    shown = np.linspace(0, len(times) - 1, min(COLUMNS, len(times))).round().astype(int)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, None, 0, 0))
    def row(space, network, label, key):
        denoiser = guided(network, sampling, dtype)
        noise_key, solver_key = jax.random.split(key)
        z = diffusion.diffusion.sample_prior(trained.shape, key=noise_key)
        states, _ = ex.sample_trajectory(
            denoiser,
            diffusion.diffusion,
            solver,
            times,
            z,
            label,
            key=solver_key,
        )
        return jax.vmap(space.decode)(states[shown])

    keys = jax.random.split(key, len(labels))
    rows = row(trained.space, trained.denoiser, jnp.asarray(labels), keys)
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=pad)
    return image_grid(np.asarray(images), len(shown))
