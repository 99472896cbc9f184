"""Sampling a finished run, measuring it, and the pictures."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from eqxldm.data import to_float, to_uint8
from eqxldm.durable import replacing
from eqxldm.models import AutoencoderKL
from experiments.common.classifier import ConvClassifier

from ..common.batching import map_images
from ..common.diffusion import SamplingConfig, check_sampling
from ..common.figures import image_grid, save_curves, save_png
from ..common.judge import judge, reconstruction_scores, sample_scores
from ..common.run import RunFolder, as_dict, versions
from ..common.sampling import (
    Generator,
    class_rows,
    draw_samples,
    forward_process,
    reverse_process,
)
from ..common.spaces import Trained
from ..common.streams import sampling_key, stage_key
from . import config as cfg
from .config import Config
from .data import Digits

Images = UInt8[np.ndarray, "n h w c"]


def generator(config: Config, sampling: SamplingConfig, trained: Trained) -> Generator:
    return Generator(trained, cfg.make_diffusion(config), sampling, config.autoencoder.pad)


def reconstruct(config: Config, autoencoder: AutoencoderKL, images: Images) -> Images:
    """Decodes the posterior's mode of each image."""
    pad = config.autoencoder.pad

    def through(autoencoder, images):
        x = to_float(images, pad=pad)
        return to_uint8(jax.vmap(lambda x: autoencoder.decode(autoencoder.encode(x)))(x), pad=pad)

    return map_images(through, autoencoder, images)


def measure_autoencoder(
    config: Config, autoencoder: AutoencoderKL, classifier: ConvClassifier, digits: Digits
) -> dict[str, float]:
    """PSNR, SSIM and Fréchet distance of the reconstructed test images."""
    rebuilt = reconstruct(config, autoencoder, digits.test_images)
    return reconstruction_scores(classifier, digits.test_images, rebuilt)


def measure_samples(
    config: Config,
    sampling: SamplingConfig,
    classifier: ConvClassifier,
    digits: Digits,
    samples: Images,
    labels: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """The samples against the test set, and as many real training images for comparison."""
    key = stage_key(config, "floor", "data")
    n = min(len(samples), len(digits.train_images))
    chosen = np.asarray(jax.random.permutation(key, len(digits.train_images)))[:n]
    others = digits.train_images[np.sort(chosen)]
    real, floor, fake = (judge(classifier, i) for i in (digits.test_images, others, samples))
    return {
        **sample_scores(real, floor, fake, labels),
        "samples": len(samples),
        "solver": sampling.solver,
        "steps": sampling.steps,
        "network_calls": check_sampling(cfg.make_diffusion(config), sampling),
        "guidance_scale": sampling.guidance,
        "guidance_interval": list(sampling.guidance_interval),
    }


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
    drawn = generator(config, sampling, trained)
    key = stage_key(config, "sampling", "step")
    save_png(run.path / "forward.png", forward_process(drawn, originals, key))
    labels, key = np.arange(digits.num_classes), stage_key(config, "sampling", "data")
    save_png(run.path / "reverse.png", reverse_process(drawn, labels, key))
    losses = {
        "classifier": ["loss"],
        "autoencoder": ["nll", "kl", "discriminator"],
        "diffusion": ["loss"],
    }
    save_curves(run.path / "curves.png", run.log_entries(), losses)


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
    samples = draw_samples(generator(config, sampling, trained), labels, sampling_key(config.seed))
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
