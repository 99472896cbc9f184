"""Sampling a finished run, measuring it, and the pictures."""

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

import eqxldm as ex
from eqxldm.data import Digits
from eqxldm.data.images import to_float, to_uint8
from eqxldm.metrics import frechet_distance, precision_recall, psnr, ssim
from eqxldm.models import AutoencoderKL, ConvClassifier

from ..common.figures import image_grid, save_curves, save_png
from ..common.run import RunFolder, as_dict, replacing, versions
from ..common.terminal import StageBar
from . import config as cfg
from .batching import BATCH, map_images
from .config import Config, SamplingConfig
from .spaces import Pixels, Trained

Images = UInt8[np.ndarray, "n h w c"]


def draw_samples(
    config: Config,
    sampling: SamplingConfig,
    trained: Trained,
    labels: Int[np.ndarray, " n"],
    seed: int,
) -> Images:
    """One image a label. Image `i` depends on the seed, `i` and its label, not on the batch."""
    path, prediction = cfg.make_path(config.diffusion), cfg.make_prediction(config.diffusion)
    solver, times = cfg.make_solver(sampling), cfg.make_times(config.diffusion, sampling)
    base = jax.random.fold_in(jax.random.key(seed), cfg.STREAMS.index("sampling"))

    @eqx.filter_jit
    def draw(space, network, labels, indices):
        denoiser = cfg.make_denoiser(network, sampling)

        def one(label, index):
            noise_key, solver_key = jax.random.split(jax.random.fold_in(base, index))
            z = jax.random.normal(noise_key, trained.shape)
            z = ex.sample(denoiser, path, prediction, solver, times, z, label, key=solver_key)
            return space.decode(z)

        return to_uint8(jax.vmap(one)(labels, indices), pad=config.autoencoder.pad)

    images = []
    size = min(BATCH, len(labels))
    with StageBar("samples", len(labels), "image") as bar:
        for i in range(0, len(labels), size):
            indices = np.arange(i, i + size) % len(labels)  # the last batch wraps around
            drawn = draw(trained.space, trained.denoiser, labels[indices], indices)
            images.append(np.asarray(drawn))
            bar.update(min(i + size, len(labels)))
    return np.concatenate(images)[: len(labels)]


def reconstruct(config: Config, autoencoder: AutoencoderKL, images: Images) -> Images:
    """Decodes the posterior's mode of each image."""
    pad = config.autoencoder.pad

    def through(autoencoder, images):
        x = to_float(images, pad=pad)
        return to_uint8(jax.vmap(lambda x: autoencoder.decode(autoencoder.encode(x)))(x), pad=pad)

    return map_images(through, autoencoder, images)


def judge(
    classifier: ConvClassifier, images: Images
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """The classifier's features and predicted classes."""
    apply = lambda classifier, images: jax.vmap(classifier)(to_float(images))
    features, logits = map_images(apply, classifier, images)
    return features, logits.argmax(1)


def measure_autoencoder(
    config: Config, autoencoder: AutoencoderKL, classifier: ConvClassifier, digits: Digits
) -> dict[str, float]:
    """PSNR, SSIM and Fréchet distance of the reconstructed test images."""
    rebuilt = reconstruct(config, autoencoder, digits.test_images)
    as_unit = lambda u: jnp.asarray(np.moveaxis(u, -1, 1), jnp.float32) / 255
    x, y = as_unit(digits.test_images), as_unit(rebuilt)
    real, fake = judge(classifier, digits.test_images)[0], judge(classifier, rebuilt)[0]
    return {
        "psnr_db": float(jnp.mean(psnr(x, y))),
        "ssim": float(jnp.mean(ssim(x, y))),
        "reconstruction_fd": frechet_distance(real, fake),
    }


def measure_samples(
    config: Config,
    sampling: SamplingConfig,
    classifier: ConvClassifier,
    digits: Digits,
    samples: Images,
    labels: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """The samples against the test set, and as many real training images for comparison."""
    key = cfg.stage_key(config, "floor", "data")
    n = min(len(samples), len(digits.train_images))
    chosen = np.asarray(jax.random.permutation(key, len(digits.train_images)))[:n]
    real, _ = judge(classifier, digits.test_images)
    floor, _ = judge(classifier, digits.train_images[np.sort(chosen)])
    fake, classes = judge(classifier, samples)
    precision, recall = precision_recall(real, fake)
    return {
        "fd": frechet_distance(real, fake),
        "fd_floor": frechet_distance(real, floor),
        "accuracy": float(np.mean(classes == labels)),
        "precision": precision,
        "recall": recall,
        "samples": len(samples),
        "solver": sampling.solver,
        "steps": sampling.steps,
        "network_calls": cfg.check_sampling(config.diffusion, sampling),
        "guidance_scale": sampling.guidance,
        "guidance_interval": list(sampling.guidance_interval),
    }


def class_rows(samples: Images, labels: Int[np.ndarray, " n"], columns: int) -> Images:
    """The first `columns` samples of each class, one row a class."""
    rows = [samples[labels == label][:columns] for label in np.unique(labels)]
    return image_grid(np.concatenate(rows), columns)


def write_pictures(
    config: Config,
    sampling: SamplingConfig,
    run: RunFolder,
    trained: Trained,
    digits: Digits,
) -> None:
    """forward.png, reverse.png, curves.png, and for latents reconstructions.png."""
    firsts = [int(np.argmax(digits.test_labels == k)) for k in range(digits.num_classes)]
    originals = digits.test_images[np.array(firsts)]
    if isinstance(trained.space, AutoencoderKL):
        rebuilt = reconstruct(config, trained.space, originals)
        pairs = image_grid(np.concatenate([originals, rebuilt]), len(firsts))
        save_png(run.path / "reconstructions.png", pairs)
    save_png(run.path / "forward.png", _forward(config, trained.space, originals))
    save_png(run.path / "reverse.png", _reverse(config, sampling, trained, digits))
    losses = {
        "classifier": ["loss"],
        "autoencoder": ["nll", "kl", "discriminator"],
        "diffusion": ["loss"],
    }
    save_curves(run.path / "curves.png", run.log_entries(), losses)


COLUMNS = 11  # of forward.png and reverse.png


def _forward(config: Config, space: AutoencoderKL | Pixels, originals: Images) -> Images:
    """Each row one image, itself or its latent noised at evenly spaced t and decoded."""
    path, pad = cfg.make_path(config.diffusion), config.autoencoder.pad
    times = jnp.linspace(0.0, 1.0, COLUMNS)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0))
    def row(space, x, key):
        z = space.encode(x)
        eps = jax.random.normal(key, z.shape)
        noised = jax.vmap(lambda t: ex.q_sample(path, z, t, eps))(times)
        return jax.vmap(space.decode)(noised)

    keys = jax.random.split(cfg.stage_key(config, "sampling", "step"), len(originals))
    rows = row(space, to_float(jnp.asarray(originals), pad=pad), keys)
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=pad)
    return image_grid(np.asarray(images), COLUMNS)


def _reverse(
    config: Config,
    sampling: SamplingConfig,
    trained: Trained,
    digits: Digits,
) -> Images:
    """Each row one class, the states of its denoising trajectory decoded, noise first."""
    path, prediction = cfg.make_path(config.diffusion), cfg.make_prediction(config.diffusion)
    solver, times = cfg.make_solver(sampling), cfg.make_times(config.diffusion, sampling)
    shown = np.linspace(0, len(times) - 1, min(COLUMNS, len(times))).round().astype(int)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, None, 0, 0))
    def row(space, network, label, key):
        denoiser = cfg.make_denoiser(network, sampling)
        noise_key, solver_key = jax.random.split(key)
        z = jax.random.normal(noise_key, trained.shape)
        states, _ = ex.sample_trajectory(
            denoiser, path, prediction, solver, times, z, label, key=solver_key
        )
        return jax.vmap(space.decode)(states[shown])

    keys = jax.random.split(cfg.stage_key(config, "sampling", "data"), digits.num_classes)
    rows = row(trained.space, trained.denoiser, jnp.arange(digits.num_classes), keys)
    images = to_uint8(rows.reshape(-1, *rows.shape[2:]), pad=config.autoencoder.pad)
    return image_grid(np.asarray(images), len(shown))


def evaluate(
    config: Config,
    sampling: SamplingConfig,
    run: RunFolder,
    trained: Trained,
    classifier: ConvClassifier,
    digits: Digits,
    count: int,
) -> dict[str, Any]:
    """Samples `count` images, as many of each class, and writes samples.npz and samples.png.

    Returns the parts of metrics.json that this determines.
    """
    labels = np.arange(count, dtype=np.int32) % digits.num_classes
    begin = time.monotonic()
    samples = draw_samples(config, sampling, trained, labels, config.seed)
    seconds = time.monotonic() - begin
    with replacing(run.path / "samples.npz") as temporary:
        np.savez(temporary, arr_0=samples, arr_1=labels)
    save_png(run.path / "samples.png", class_rows(samples, labels, 10))
    begin = time.monotonic()
    diffusion = measure_samples(config, sampling, classifier, digits, samples, labels)
    return {
        "diffusion": diffusion,
        "timings": {
            "sampling": {"seconds": seconds, "images_per_second": count / seconds},
            "measuring": {"seconds": time.monotonic() - begin},
        },
    }


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """What the job says at its end."""
    ae, dm = metrics.get("autoencoder"), metrics["diffusion"]
    reconstruction = ae and (
        f"autoencoder: PSNR {ae['psnr_db']:.2f} dB, SSIM {ae['ssim']:.3f}, "
        f"reconstruction FD {ae['reconstruction_fd']:.2f}\n"
    )
    return (reconstruction or "") + (
        f"samples ({dm['samples']}, {dm['solver']}, {dm['steps']} steps, guidance "
        f"{dm['guidance_scale']}): FD {dm['fd']:.2f} (real images: {dm['fd_floor']:.2f}), accuracy "
        f"{dm['accuracy']:.3f}, precision {dm['precision']:.3f}, recall {dm['recall']:.3f}\n"
        f"pictures, samples.npz and metrics.json are in {folder}"
    )


def describe(config: Config) -> dict[str, Any]:
    """The parts of metrics.json that say what was run."""
    return {"config": as_dict(config), "versions": versions(), "seed": config.seed}
