"""Drawing clips with sound: both, the sound of a clip, clips of a sound, and each alone."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex
from eqxldm.data import caption_bytes

from ..train.terminal import StageBar
from .config import SamplingOptions
from .drawing import Drawing, Drawn, Frames, Trained, known_latents, make_solver
from .networks import sound_shape, to_clips, to_frames
from .training import DIFFUSION

# What is drawn: both parts, the one of the two while the other is given, or each without the other.
What = Literal["both", "sound", "video", "apart"]


def make_drawing(trained: Trained, sampling: SamplingOptions, batch: int) -> Drawing:
    """The one for a run with sound, or without."""
    kind = Drawing if trained.sound is None else SoundDrawing
    return kind(trained, sampling, batch)


class SoundDrawing(Drawing):
    """Draws clips with sound; as a `Drawing` it gives their frames."""

    def __init__(self, trained: Trained, sampling: SamplingOptions, batch: int):
        self.trained, self._batch = trained, batch
        config, solver = trained.config, make_solver(sampling)
        times = ex.shifted_times(sampling.steps, config.diffusion.shift)
        null = trained.null() if trained.captioned else None
        clips = config.clips
        shapes: dict[str, tuple[int, ...]] = {
            "video": trained.autoencoder.latent_shape(clips.frames, *clips.size),
            "sound": sound_shape(config),
        }

        def solve(network: Any, x: Any, cond: Any) -> Any:
            if null is not None and sampling.guidance != 1:
                network = ex.guide(network, {**cond, "text": jnp.asarray(null)}, sampling.guidance)
            return ex.sample(network, DIFFUSION, solver, times, x, cond)

        def latents(denoiser: Any, cond: Any, key: Any, given: Any, what: What) -> Any:
            keys = jax.random.split(key, 4)
            noise = lambda name, k: DIFFUSION.sample_prior(shapes[name], key=keys[k])
            if what == "both":
                made = ex.together(denoiser, shapes)
                x = DIFFUSION.sample_prior((made.size,), key=keys[0])
                return made.split(solve(made.denoiser, x, cond))
            parts = ("video", "sound") if what == "apart" else (what,)
            out = dict(given)
            for k, part in enumerate(parts):
                other = "sound" if part == "video" else "video"
                # Alone: the other is noise, and stays it.
                beside = noise(other, 2 + k) if what == "apart" else given[other]
                time = 1.0 if what == "apart" else 0.0
                network = ex.one_part(denoiser, part, {other: beside}, time=time)
                out[part] = solve(network, noise(part, k), cond)
            return out

        def draw(models: Any, text: Any, first: Any, given: Any, key: Any, at: Any, what: What):
            autoencoder, sound, denoiser = models
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(at)
            known, mask = known_latents(autoencoder, first, shapes["video"])
            cond = {"known": known, "mask": mask} | ({} if text is None else {"text": text})
            z = {}
            if "video" in given:
                z["video"] = jax.vmap(autoencoder.encode)(to_clips(given["video"]))
            if "sound" in given:
                z["sound"] = jax.vmap(lambda mel: sound.encode(mel.T))(given["sound"])
            one = lambda cond, key, z: latents(denoiser, cond, key, z, what)
            z = jax.vmap(one)(cond, keys, z)
            frames = to_frames(jax.vmap(autoencoder.decode)(z["video"]))
            return frames, jax.vmap(lambda s: sound.decode(s).T)(z["sound"])

        self._draw_both = eqx.filter_jit(draw)

    def __call__(self, texts: list[str], key: Any, **options: Any) -> Frames:
        return self.make(texts, key, **options).frames

    def draw(self, texts: list[str], key: Any, **options: Any) -> Drawn:
        return self.make(texts, key, **options)

    def make(
        self,
        texts: list[str],
        key: Any,
        *,
        what: What = "both",
        first: Frames | None = None,
        frames: Frames | None = None,
        mels: Any = None,
        name: str = "samples",
    ) -> Drawn:
        """A clip with sound for each caption.

        `first`: first frames, which stay. `frames` are the clips of `what="sound"`, `mels` the
        spectrograms of `what="video"`; what is given comes back as it is.
        """
        clips, n = self.trained.config.clips, len(texts)
        tokens = caption_bytes(self.trained.config.diffusion.max_length).tokens
        trained = self.trained
        models = trained.autoencoder, trained.sound, trained.denoiser
        if first is None:
            first = np.zeros((n, 0, *clips.size, clips.channels), np.uint8)
        given = {"video": frames} if what == "sound" else {"sound": mels} if what == "video" else {}
        made = []
        with StageBar(name, n, "clip") as bar:
            for i in range(0, n, self._batch):
                at = np.minimum(np.arange(i, i + self._batch), n - 1)
                text = np.stack([tokens(texts[k]) for k in at]) if trained.captioned else None
                part = {name: np.asarray(a)[at] for name, a in given.items()}
                drawn = self._draw_both(models, text, first[at], part, key, at, what)
                made.append([np.asarray(a) for a in drawn])
                bar.update(min(i + self._batch, n))
        found, heard = (np.concatenate(parts)[:n] for parts in zip(*made, strict=True))
        found = np.concatenate([first, found[:, first.shape[1] :]], 1)
        return Drawn(found if frames is None else frames, heard if mels is None else mels)
