"""Measuring a run: its samples drawn and scored, its reconstructions, and the pictures."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqxldm.distributed import from_primary, is_primary, local_mesh
from eqxldm.durable import replacing
from eqxldm.metrics import frechet_distance

from .classifier import Described, Features, Images
from .conditions import SHOWN, Labels, Wanted
from .config import Config, SamplingConfig
from .few_steps import variants
from .figures import image_grid, save_curves, save_png
from .job import Job
from .methods import check_sampling
from .networks import Autoencoder
from .reconstructions import lpips_score, pixel_scores, reconstruct
from .reference import Reference
from .run import METRICS, RunFolder, as_dict, versions
from .sampling import Drawing, Sampler, Trained, forward_process, reverse_process
from .scores import EVALUATORS, Comparison, Evaluator
from .streams import stream_key

COLUMNS = 10  # of samples.png
PAIRS = 16  # images in reconstructions.png
RECONSTRUCTED = 1000  # images whose reconstructions are measured
PART = 2048  # samples, or a batch, that an interruption costs at most


class Measuring:
    """What measures a run: its real images, its features, and how its samples are drawn."""

    def __init__(
        self,
        job: Job,
        sampling: SamplingConfig,
        reference: Reference,
        features: Features,
        evaluators: Sequence[Evaluator] = EVALUATORS,
    ):
        self._job, self._config, self._run = job, job.config, job.run
        self._reference, self._features, self._evaluators = reference, features, evaluators
        self._sampling, self._sampler = sampling, Sampler.of(job.config, sampling)
        self._drawing: Drawing | None = None
        self._real: tuple[Described, dict[str, float]] | None = None

    def _wanted(self, count: int, *, others: bool = False) -> Wanted:
        return self._job.condition.wanted(count, *self._reference.texts(count, others=others))

    def _shown(self, count: int) -> Wanted:
        """One image of each class in the pictures, or as many of what else there is."""
        condition = self._job.condition
        if isinstance(condition, Labels):
            return condition.of(condition.shown())
        return self._wanted(count)

    def _draw(self, trained: Trained, wanted: Wanted, key: Any, **options: Any) -> Images:
        if self._drawing is None:
            batch = min(self._job.compute.sampling_batch, wanted.count)
            self._drawing = Drawing(self._sampler, trained.shape, trained.null, batch=batch)
        return self._drawing(trained, wanted, key, **options)

    def _scores(self, images: Images, wanted: Wanted) -> dict[str, float]:
        if self._real is None:
            self._real = self._reference.described(self._features)
        names = self._job.source.class_names
        compared = Comparison(self._real[0], self._features(images), wanted.labels, names)
        return {name: x for function in self._evaluators for name, x in function(compared).items()}

    def along(self, trained: Trained, step: int) -> tuple[dict[str, float], Any]:
        """Scores and a picture of few samples while the run trains, always of the same noise."""
        wanted = self._wanted(self._job.compute.eval_samples)
        with jax.set_mesh(local_mesh()):  # in place of that of the training
            key = stream_key(self._config.seed, "evaluation")
            images = self._draw(trained, wanted, key, name=f"step {step}")
            if not is_primary():
                return {}, None
            return self._scores(images, wanted), samples_grid(images, wanted)

    def final(
        self, trained: Trained, count: int, *, sigma_rel: float | None = None
    ) -> dict[str, Any]:
        """Draws `count` samples, writes samples.npz and samples.png, and measures them.

        `sigma_rel` is the width of the network's average where it is a post-hoc one. Returns the
        parts of metrics.json that this determines; only the primary process has them.
        """
        wanted, begin = self._wanted(count), time.monotonic()
        images = self._all_samples(trained, wanted, sigma_rel)
        seconds = time.monotonic() - begin
        known = self._known(trained, count)
        if not is_primary():
            return {}
        arrays: dict[str, Any] = {"arr_0": images}
        arrays |= {} if wanted.labels is None else {"arr_1": wanted.labels}
        arrays |= {} if wanted.texts is None else {"texts": np.array(wanted.texts)}
        with replacing(self._run.file("samples.npz")) as temporary:
            np.savez(temporary, **arrays)
        shutil.rmtree(self._run.path / "parts", ignore_errors=True)
        save_png(self._run.file("samples.png"), samples_grid(images, wanted))
        begin = time.monotonic()
        scores = self._scores(images, wanted)
        assert self._real is not None
        real, right = self._real
        others = self._reference.others(self._features, count)
        return {
            "diffusion": {
                **scores,
                **known,
                "fd_real": frechet_distance(real.features, others.features),
                **right,
                "samples": count,
                "reference": len(real.features),
                "solver": self._sampling.solver,
                "steps": self._sampling.steps,
                "network_calls": check_sampling(self._sampler.method, self._sampling),
                "guidance_scale": 1.0 if trained.null is None else self._sampling.guidance,
                "guidance_schedule": self._sampling.guidance_schedule,
                "guidance_interval": list(self._sampling.guidance_interval),
                "sigma_rel": sigma_rel,
            },
            "timings": {
                "sampling": {"seconds": seconds, "images_per_second": count / seconds},
                "measuring": {"seconds": time.monotonic() - begin},
            },
        }

    def few_steps(self, trained: Trained, count: int) -> dict[str, Any]:
        """A network of few calls at 1, 2, 4 and 8, and its ODE beside; writes few-steps.png.

        A row of the picture is one class, or one condition, of the same noise in each column.
        """
        key, rows, columns = stream_key(self._config.seed, "samples"), [], []
        wanted, shown = self._wanted(count), self._shown(min(SHOWN, count))
        for calls, sampling in variants(self._config, self._sampling).items():
            sampler = Sampler.of(self._config, sampling)
            batch = min(self._job.compute.sampling_batch, count)
            drawing = Drawing(sampler, trained.shape, trained.null, batch=batch)
            picture = drawing(trained, shown, key, name=f"{calls} calls")  # which compiles, too
            begin = time.monotonic()
            images = drawing(trained, wanted, key, name=f"{calls} calls")
            seconds = time.monotonic() - begin
            if is_primary():
                columns.append(picture)
                scores = self._scores(images, wanted)
                about = {"calls": calls, "solver": sampling.solver}
                rows.append({**about, **scores, "images_per_second": count / seconds})
        if is_primary():
            grid = np.stack(columns, 1)
            grid = image_grid(grid.reshape(-1, *grid.shape[2:]), len(columns))
            save_png(self._run.file("few-steps.png"), grid)
        return {"few_steps": rows}

    def _known(self, trained: Trained, count: int) -> dict[str, float]:
        """The accuracies for captions of the training, where those that count were held out."""
        if not self._reference.held_out:
            return {}
        wanted = self._wanted(count, others=True)
        key = stream_key(self._config.seed, "samples/known")
        images = self._draw(trained, wanted, key, name="captions of the training")
        if not is_primary() or wanted.labels is None:
            return {}
        scores = self._scores(images, wanted)
        return {f"{k}_known": x for k, x in scores.items() if k.startswith("accuracy")}

    def _all_samples(self, trained: Trained, wanted: Wanted, sigma_rel: float | None) -> Images:
        """Samples in parts that stay until all are there, so that little is drawn twice."""
        folder, config = self._run.file("parts"), self._config
        about = f"{as_dict(self._sampling)} {config.diffusion.steps} {sigma_rel} {wanted.count}"
        key, samples = stream_key(config.seed, "samples"), []
        size = self._job.compute.sampling_batch * -(-PART // self._job.compute.sampling_batch)
        if self._run.primary:
            about = hashlib.sha256(about.encode()).hexdigest()
            if folder.exists() and not (folder / about).exists():
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            (folder / about).touch()
        for i in range(0, wanted.count, size):
            path, part = folder / f"{i:07d}.npy", range(i, min(i + size, wanted.count))
            there = _load(path, len(part)) if self._run.primary else None
            if not from_primary(there is not None):
                there = self._draw(trained, wanted.take(part), key, first=i)
                if self._run.primary and wanted.count > size:
                    with replacing(path) as temporary:
                        np.save(temporary, there)
            if self._run.primary and there is not None:
                samples.append(there)
        return np.concatenate(samples) if samples else np.zeros((0, 1, 1, 1), np.uint8)

    def autoencoder(self, autoencoder: Autoencoder) -> dict[str, float]:
        """PSNR, SSIM and Fréchet distance of reconstructions, and reconstructions.png.

        And LPIPS, where its weights were given, whether or not it was trained on.
        """
        originals = self._reference.first(RECONSTRUCTED)
        rebuilt = reconstruct(autoencoder, originals, self._config.pictures.pad)
        pairs = np.concatenate([originals[:PAIRS], rebuilt[:PAIRS]])
        grid = image_grid(pairs, min(PAIRS, len(originals)))
        save_png(self._run.file("reconstructions.png"), grid)
        real, fake = (self._features(images).features for images in (originals, rebuilt))
        lpips = self._job.lpips
        return {
            **pixel_scores(originals, rebuilt),
            **({} if lpips is None else lpips_score(originals, rebuilt, lpips)),
            "reconstruction_fd": frechet_distance(real, fake),
        }

    def pictures(self, trained: Trained) -> None:
        """forward.png, reverse.png and curves.png."""
        config = self._config
        one_device = jax.tree.map(
            lambda a: np.asarray(a) if isinstance(a, jax.Array) else a, trained
        )
        originals = self._reference.first(SHOWN)
        key = stream_key(config.seed, "pictures/forward")
        forward = forward_process(self._sampler, one_device, originals, key)
        save_png(self._run.file("forward.png"), forward)
        key = stream_key(config.seed, "pictures/reverse")
        reverse = reverse_process(self._sampler, one_device, self._shown(SHOWN), key)
        save_png(self._run.file("reverse.png"), reverse)
        write_curves(self._run)


def _load(path: Path, count: int) -> Images | None:
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.uint8 and len(found) == count else None


def samples_grid(images: Images, wanted: Wanted) -> Images:
    """Some samples: one row a class, or the first ones."""
    if wanted.labels is None or wanted.texts is not None:
        return image_grid(images[: COLUMNS * SHOWN], min(COLUMNS, len(images)))
    found, counts = np.unique(wanted.labels, return_counts=True)
    spread = np.unique(np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int))
    columns = min(COLUMNS, int(counts.min()))
    rows = [images[wanted.labels == label][:columns] for label in found[spread]]
    return image_grid(np.concatenate(rows), columns)


def write_curves(run: RunFolder) -> None:
    """The losses of the stages that were trained, and what was measured along the way."""
    losses = {"classifier": ["loss"], "autoencoder": ["nll", "kl", "discriminator"]}
    losses |= {"diffusion": ["loss"], "evaluation": ["fd"]}
    entries = run.log_entries()
    logged = {e["stage"] for e in entries if "step" in e}
    shown = {stage: names for stage, names in losses.items() if stage in logged}
    save_curves(run.file("curves.png"), entries, shown)


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """What the job says at its end, of whatever was measured."""
    parts, lines = {"autoencoder": "autoencoder", "diffusion": "samples"}, []
    for part, name in parts.items():
        found = metrics.get(part) or {}
        shown = [f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float)]
        about = ""
        if found.keys() >= {"samples", "solver", "steps"}:
            about = f" ({found['samples']}, {found['solver']}, {found['steps']} steps)"
        if shown:
            lines.append(f"{name}{about}: {', '.join(shown)}")
    for row in metrics.get("few_steps", []):
        shown = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
        lines.append(f"{row['calls']} calls ({row['solver']}): {', '.join(shown)}")
    return "\n".join([*lines, f"pictures and {METRICS} are in {folder}"])


def describe(config: Config) -> dict[str, Any]:
    """The parts of metrics.json that say what was run."""
    return {"config": as_dict(config), "versions": versions(), "seed": config.seed}
