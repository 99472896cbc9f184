"""What a finished run leaves: its networks, numbers and pictures."""

import time
from typing import Any

import numpy as np

from eqxldm import pretrained

from ..train.run import METRICS, RunFolder, write_json
from ..train.streams import stream_key
from ..train.terminal import say
from .data import some_clips
from .drawing import Drawing, Trained
from .listening import measured_sound
from .measuring import Measure, psnr_by_frame, reconstruct
from .pictures import can_write_mp4, grid_frames, save_animation, save_filmstrip
from .sound_drawing import SoundDrawing, make_drawing
from .training import Job

SOUND = "sound-autoencoder.safetensors"
AUTOENCODER, DENOISER, TEXTS = "autoencoder.safetensors", "denoiser.safetensors", "texts.json"
COUNTS = ("clips", "onsets", "bounces")
SHOWN = 8  # clips in the pictures
LONGER = 20  # clips of two windows


def finish(job: Job, trained: Trained, measure: Measure) -> None:
    """Saves the networks, draws, measures, and leaves the pictures."""
    if not job.run.primary:
        return
    run, command = job.run, job.command
    pretrained.save(trained.autoencoder, run.file(AUTOENCODER))
    pretrained.save(trained.denoiser.network, run.file(DENOISER))
    if trained.sound is not None:
        pretrained.save(trained.sound, run.file(SOUND))
    count = min(command.samples, len(job.clips.test))
    real, texts = some_clips(job.clips.test, max(command.clips.test, count), command.clips)
    write_json(run.file(TEXTS), {"texts": texts[:1000] if job.captioned else None})
    drawing = make_drawing(trained, command.sampling, command.sampling_batch)
    key, begin = stream_key(command.seed, "samples"), time.monotonic()
    texts_of = [texts[i % len(texts)] for i in range(command.samples)]
    made = drawing.draw(texts_of, key)
    samples = made.frames
    job.stages.timings["sampling"] = {"seconds": time.monotonic() - begin}
    metrics = {"autoencoder": measured_autoencoder(job, trained, real[:count])}
    metrics["diffusion"] = measured_samples(job, measure, real, texts, samples, texts_of)
    metrics["prediction"] = measured_prediction(job, drawing, real[:count], texts[:count])
    if isinstance(drawing, SoundDrawing):
        metrics["sound"] = measured_sound(job, drawing, made, texts_of)
    elif command.clips.frames > 1:
        metrics["longer"] = measured_longer(job, measure, drawing, texts_of[:LONGER])
    metrics["timings"] = job.stages.timings
    write_json(run.file(METRICS), metrics)
    with open(run.file("samples.npz"), "wb") as file:
        np.savez_compressed(file, clips=samples, texts=np.array(texts_of))
    save_pictures(run, "samples", samples[:SHOWN], command.clips.rate)
    save_pictures(run, "real", real[:SHOWN], command.clips.rate)
    say(summary(metrics))
    if job.captioned:
        say("samples, row by row: " + "; ".join(texts_of[:SHOWN]))
    say(f"Animations, filmstrips and metrics.json are in {run.path}.")


def save_pictures(run: RunFolder, name: str, clips: Any, fps: float) -> None:
    """An animation, and MP4 where it can be written, and a filmstrip."""
    frames = grid_frames(clips)
    save_animation(run.file(f"{name}.png"), frames, fps)
    if can_write_mp4():
        save_animation(run.file(f"{name}.mp4"), frames, fps)
    save_filmstrip(run.file(f"{name}-strip.png"), clips)


def measured_autoencoder(job: Job, trained: Trained, real: Any) -> dict[str, Any]:
    again = reconstruct(trained.autoencoder, real, job.command.sampling_batch)
    both = np.stack([real[:4], again[:4]], 1).reshape(-1, *real.shape[1:])
    save_filmstrip(job.run.file("reconstructions-strip.png"), both)
    by_frame = psnr_by_frame(real, again)
    return {"psnr": float(by_frame.mean()), "psnr_by_frame": by_frame.round(2).tolist()}


def measured_samples(
    job: Job, measure: Measure, real: Any, texts: Any, samples: Any, texts_of: Any
) -> dict[str, Any]:
    """The samples' numbers, and beside them those of as many real clips."""
    n = len(samples)
    others, _ = some_clips(job.clips.train, n, job.command.clips)
    found: dict[str, Any] = {
        "samples": n,
        "reference": len(real),
        "frechet_distance": measure.distance(real, samples),
        "frechet_distance_real": measure.distance(real, others),
    }
    if measure.digits is not None:
        found["tracked"] = tracked(job, measure, samples, texts_of)
        found["tracked_real"] = measure.tracked(real[:n], texts[:n])
    return found


def tracked(job: Job, measure: Measure, drawn: Any, texts: list[str]) -> dict[str, float]:
    """What is tracked in clips that were drawn; as in the caption only if it was told."""
    found = measure.tracked(drawn, texts)
    untold = () if job.captioned else ("digits", "directions", "pairs")
    return {name: value for name, value in found.items() if name not in untold}


def measured_prediction(job: Job, drawing: Drawing, real: Any, texts: Any) -> dict[str, Any]:
    """What follows the first frames: beside the truth, and beside a clip that stands still."""
    clips, found = job.command.clips, {}
    for given in (1, 5):
        if given >= clips.frames:
            continue
        key = stream_key(job.command.seed, "prediction")
        drawn = drawing(texts, key, first=real[:, :given], name=f"after {given}")
        still = np.concatenate(
            [real[:, :given], real[:, given - 1 : given].repeat(clips.frames - given, 1)], 1
        )
        cut = lambda x, given=given: x[:, given:]
        found[f"after_{given}"] = {
            "psnr_by_frame": psnr_by_frame(cut(real), cut(drawn)).round(2).tolist(),
            "psnr_standing_still": psnr_by_frame(cut(real), cut(still)).round(2).tolist(),
        }
        both = np.stack([real[:4], drawn[:4]], 1).reshape(-1, *real.shape[1:])
        save_filmstrip(job.run.file(f"after-{given}-strip.png"), both)
    return found


def measured_longer(
    job: Job, measure: Measure, drawing: Drawing, texts: list[str]
) -> dict[str, Any]:
    """Clips of two windows, the second of which knows the last frames of the first."""
    clips = job.command.clips
    overlap = 5 if clips.frames > 5 else 1
    frames = 2 * clips.frames - overlap
    key = stream_key(job.command.seed, "longer")
    drawn = drawing.long(texts, key, frames, overlap=overlap)
    save_pictures(job.run, "longer", drawn[:SHOWN], clips.rate)
    found = {"clips": len(drawn), "frames": frames}
    return found | ({"tracked": tracked(job, measure, drawn, texts)} if measure.digits else {})


def summary(metrics: dict[str, Any]) -> str:
    """The numbers that one wants first."""
    ae, d = metrics["autoencoder"], metrics["diffusion"]
    lines = [
        f"autoencoder: PSNR {ae['psnr']:.2f} dB, of the frames {min(ae['psnr_by_frame']):.1f} to "
        f"{max(ae['psnr_by_frame']):.1f}",
        f"samples: Frechet distance {d['frechet_distance']:.2f} (real clips: "
        f"{d['frechet_distance_real']:.2f})",
    ]
    for name, row in metrics.get("sound", {}).items():
        shares = (f"{k.replace('_', ' ')} {v:.3f}" for k, v in row.items() if k not in COUNTS)
        lines.append(f"sound, {name}: {', '.join(shares) or 'nothing to compare'}")
    for name in ("tracked", "tracked_real"):
        if name in d:
            shown = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in d[name].items())
            lines.append(f"{'real clips' if name.endswith('real') else 'samples'}: {shown}")
    return "\n".join(lines)
