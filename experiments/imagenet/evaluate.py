"""Sampling a trained run, measuring it, and the pictures."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from eqxldm.data import ImageSource, to_float, to_uint8
from eqxldm.durable import replacing
from eqxldm.models import AutoencoderKL
from eqxldm.sharding import batch_sharding
from experiments.common.classifier import ConvClassifier

from ..common.batching import map_images
from ..common.diffusion import SamplingConfig, check_sampling
from ..common.figures import image_grid, save_curves, save_png
from ..common.judge import Judged, judge, reconstruction_scores, sample_scores
from ..common.processes import agreed, concatenated, copied, is_primary, local_mesh, own_share
from ..common.run import RunFolder, as_dict, read_json, versions, write_json
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
from .images import decoded, shrunk

Images = UInt8[np.ndarray, "n h w c"]
ROWS, COLUMNS = 10, 10  # of samples.png
SHOWN = 16  # images in reconstructions.png
RECONSTRUCTED = 1000  # images whose reconstructions are measured
PART = 2048  # samples that an interruption costs at most


def reconstruct(autoencoder: AutoencoderKL, images: Images, batch: int = 64) -> Images:
    """Decodes the posterior's mode of each image, on all devices of this process."""
    mesh = local_mesh()

    def through(autoencoder, images):
        x = to_float(images)
        return to_uint8(jax.vmap(lambda x: autoencoder.decode(autoencoder.encode(x)))(x))

    return map_images(
        through,
        copied(autoencoder, mesh),
        images,
        batch=-(-min(batch, len(images)) // mesh.size) * mesh.size,
        sharding=batch_sharding(mesh),
    )


def draw(
    config: Config,
    sampling: SamplingConfig,
    trained: Trained,
    labels: Int[np.ndarray, " n"],
    seed: int,
    *,
    batch: int,
    first: int = 0,
) -> Images:
    """One image a label, each process drawing its part; all of them in every process."""
    mesh, mine = local_mesh(), own_share(len(labels))
    generator = Generator(
        trained._replace(
            space=copied(trained.space, mesh), denoiser=copied(trained.denoiser, mesh)
        ),
        cfg.make_diffusion(config),
        sampling,
        dtype=cfg.DTYPES[config.diffusion.dtype],
    )
    if mine:
        part = draw_samples(
            generator,
            labels[mine.start : mine.stop],
            sampling_key(seed),
            first=first + mine.start,
            batch=-(-min(batch, len(mine)) // mesh.size) * mesh.size,
            sharding=batch_sharding(mesh),
        )
    else:
        part = np.zeros((0, config.size, config.size, cfg.CHANNELS), np.uint8)
    return concatenated(part, len(labels))


def all_samples(
    config: Config,
    sampling: SamplingConfig,
    run: RunFolder,
    trained: Trained,
    labels: Int[np.ndarray, " n"],
    *,
    batch: int,
    weights: dict[str, Any],
) -> Images:
    """Samples in parts that are kept until all are there, so that little is drawn twice.

    `weights` says which of the run's weights are sampled. Only the primary process gets them all.
    """
    folder = run.path / "parts"
    about = {**as_dict(sampling), "seed": config.seed, **weights, "count": len(labels)}
    if run.primary:
        if folder.exists() and read_json(folder / "about.json") != about:
            shutil.rmtree(folder)
        write_json(folder / "about.json", about)
    count = len(labels) if run.primary else 0
    samples = np.empty((count, config.size, config.size, cfg.CHANNELS), np.uint8)
    for i in range(0, len(labels), PART):
        path = folder / f"{i:07d}.npy"
        kept = _load(path) if run.primary else None
        if not agreed(kept is not None):
            kept = draw(
                config, sampling, trained, labels[i : i + PART], config.seed, batch=batch, first=i
            )
            if run.primary and len(labels) > PART:
                with replacing(path) as temporary:
                    np.save(temporary, kept)
        if run.primary and kept is not None:
            samples[i : i + PART] = kept
    return samples


def _load(path: Path) -> Images | None:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        return None


class Reference:
    """Real images: those that samples are measured against, and as many others for the floor."""

    def __init__(
        self, config: Config, source: ImageSource, test: ImageSource | None, *, strict: bool
    ):
        self._config, self._strict = config, strict
        order = np.random.default_rng(config.seed).permutation(len(source))
        if test is None:
            n = min(config.reference, len(source) // 2)
            self._real, self._others = (source, order[:n]), (source, order[n:])
        else:
            n = min(config.reference, len(test))
            chosen = np.random.default_rng(config.seed).permutation(len(test))[:n]
            self._real, self._others = (test, chosen), (source, order)

    def _images(self, part: tuple[ImageSource, Any], n: int) -> Iterator[Any]:
        source, indices = part
        return decoded(source, np.sort(indices[:n]), self._config.size, strict=self._strict)

    def first(self, n: int) -> Images:
        """Some of the real images at full size, mixed over the classes."""
        source, indices = self._real
        found = decoded(source, indices[:n], self._config.size, strict=self._strict)
        return np.concatenate([images for images, _ in found])

    def judged(self, classifier: ConvClassifier) -> tuple[Judged, float]:
        """What the judge says of the real images, and how often it is right."""
        images, labels = self._small(self._real, len(self._real[1]))
        found = judge(classifier, images)
        return found, float(np.mean(found.classes == labels))

    def floor(self, classifier: ConvClassifier, n: int) -> Judged:
        """The same of `n` other real images, or as many as there are."""
        return judge(classifier, self._small(self._others, n)[0])

    def _small(self, part: tuple[ImageSource, Any], n: int) -> tuple[Images, Any]:
        side = cfg.judge_size(self._config.size)
        found = [(shrunk(images, side), labels) for images, labels in self._images(part, n)]
        images, labels = zip(*found, strict=True)
        return np.concatenate(images), np.concatenate(labels)


def measure_autoencoder(
    config: Config,
    run: RunFolder,
    autoencoder: AutoencoderKL,
    classifier: ConvClassifier,
    reference: Reference,
) -> dict[str, float]:
    """PSNR, SSIM and Fréchet distance of reconstructed real images, and reconstructions.png."""
    originals = reference.first(RECONSTRUCTED)
    rebuilt = reconstruct(autoencoder, originals)
    shown = originals[:SHOWN], rebuilt[:SHOWN]
    save_png(run.path / "reconstructions.png", image_grid(np.concatenate(shown), len(shown[0])))
    side = cfg.judge_size(config.size)
    return reconstruction_scores(classifier, originals, rebuilt, lambda u: shrunk(u, side))


def shown_classes(classes: int) -> Int[np.ndarray, " n"]:
    """The classes in the pictures: all, or some spread over them."""
    return np.unique(np.linspace(0, classes - 1, min(ROWS, classes)).round().astype(np.int32))


def evaluate(
    config: Config,
    sampling: SamplingConfig,
    run: RunFolder,
    trained: Trained,
    classifier: ConvClassifier,
    reference: Reference,
    classes: int,
    count: int,
    *,
    batch: int,
    sigma_rel: float | None = None,
) -> dict[str, Any]:
    """Samples `count` images, as many of each class, and writes samples.npz and samples.png.

    `sigma_rel` is the width of the network's average where it is a post-hoc one. Returns the parts
    of metrics.json that this determines; only the primary process has them.
    """
    labels = np.arange(count, dtype=np.int32) % classes
    begin = time.monotonic()
    samples = all_samples(
        config,
        sampling,
        run,
        trained,
        labels,
        batch=batch,
        weights={"step": config.diffusion.steps, "sigma_rel": sigma_rel},
    )
    seconds = time.monotonic() - begin
    if not is_primary():
        return {}
    with replacing(run.path / "samples.npz") as temporary:
        np.savez(temporary, arr_0=samples, arr_1=labels)
    shutil.rmtree(run.path / "parts", ignore_errors=True)
    shown = np.isin(labels, shown_classes(classes))
    save_png(run.path / "samples.png", class_rows(samples[shown], labels[shown], COLUMNS))
    begin = time.monotonic()
    real, accuracy = reference.judged(classifier)
    floor = reference.floor(classifier, count)
    fake = judge(classifier, shrunk(samples, cfg.judge_size(config.size)))
    scores = {
        **sample_scores(real, floor, fake, labels),
        "judge_accuracy": accuracy,
        "samples": count,
        "reference": len(real.classes),
        "solver": sampling.solver,
        "steps": sampling.steps,
        "network_calls": check_sampling(cfg.make_diffusion(config), sampling),
        "guidance_scale": sampling.guidance,
        "guidance_interval": list(sampling.guidance_interval),
        "sigma_rel": sigma_rel,
    }
    return {
        "diffusion": scores,
        "timings": {
            "sampling": {"seconds": seconds, "images_per_second": count / seconds},
            "measuring": {"seconds": time.monotonic() - begin},
        },
    }


def write_pictures(
    config: Config,
    sampling: SamplingConfig,
    run: RunFolder,
    trained: Trained,
    reference: Reference,
    classes: int,
) -> None:
    """forward.png, reverse.png and curves.png."""
    chosen = shown_classes(classes)
    one_device = jax.tree.map(lambda a: np.asarray(a) if isinstance(a, jax.Array) else a, trained)
    dtype = cfg.DTYPES[config.diffusion.dtype]
    generator = Generator(one_device, cfg.make_diffusion(config), sampling, dtype=dtype)
    key = stage_key(config, "sampling", "step")
    save_png(run.path / "forward.png", forward_process(generator, reference.first(ROWS), key))
    key = stage_key(config, "sampling", "data")
    save_png(run.path / "reverse.png", reverse_process(generator, chosen, key))
    write_curves(run, "diffusion")


def write_curves(run: RunFolder, *more: str) -> None:
    """The losses of the stages that were trained."""
    losses = {"classifier": ["loss"], "autoencoder": ["nll", "kl", "discriminator"]}
    losses |= {stage: ["loss"] for stage in more}
    entries = run.log_entries()
    trained = {e["stage"] for e in entries if "step" in e}
    save_curves(run.path / "curves.png", entries, {k: v for k, v in losses.items() if k in trained})


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """What the job says at its end."""
    ae, dm = metrics["autoencoder"], metrics.get("diffusion")
    lines = [
        f"autoencoder: PSNR {ae['psnr_db']:.2f} dB, SSIM {ae['ssim']:.3f}, "
        f"reconstruction FD {ae['reconstruction_fd']:.2f}"
    ]
    if dm:
        lines.append(
            f"samples ({dm['samples']}, {dm['solver']}, {dm['steps']} steps, guidance "
            f"{dm['guidance_scale']}): FD {dm['fd']:.2f} (real images: {dm['fd_floor']:.2f}), "
            f"accuracy {dm['accuracy']:.3f} (real images: {dm['judge_accuracy']:.3f}), precision "
            f"{dm['precision']:.3f}, recall {dm['recall']:.3f}"
        )
    what = "pictures, samples.npz and metrics.json are" if dm else "pictures and metrics.json are"
    return "\n".join([*lines, f"{what} in {folder}"])


def describe(config: Config) -> dict[str, Any]:
    """The parts of metrics.json that say what was run."""
    return {"config": as_dict(config), "versions": versions(), "seed": config.seed}
