"""Drawing clips with sound: both, the sound of a clip, clips of a sound, and each alone."""

from typing import Any, Literal

import equinox as eqx
import jax

import eqxldm as ex

from .config import SamplingOptions
from .drawing import Drawing, Drawn, Frames, Trained
from .networks import sound_shape, to_clips, to_frames

# What is drawn: both parts, the one of the two while the other is given, or each without the other.
What = Literal["both", "sound", "video", "apart"]


def make_drawing(trained: Trained, sampling: SamplingOptions, batch: int) -> Drawing:
    """The one for a run with sound, or without."""
    kind = Drawing if trained.sound is None else SoundDrawing
    return kind(trained, sampling, batch)


class SoundDrawing(Drawing):
    """Draws clips with sound; as a `Drawing` it gives their frames."""

    def __init__(self, trained: Trained, sampling: SamplingOptions, batch: int):
        super().__init__(trained, sampling, batch)
        shapes = {"video": self._shape, "sound": sound_shape(trained.config)}

        def latents(denoiser: Any, cond: Any, key: Any, given: Any, what: What) -> Any:
            keys = jax.random.split(key, 4)
            noise = lambda name, k: denoiser.diffusion.sample_prior(shapes[name], key=keys[k])
            if what == "both":
                made = ex.together(denoiser, shapes)
                x = denoiser.diffusion.sample_prior((made.size,), key=keys[0])
                return made.split(self._end(made.denoiser, x, cond))
            parts = ("video", "sound") if what == "apart" else (what,)
            out = dict(given)
            for k, part in enumerate(parts):
                other = "sound" if part == "video" else "video"
                # Alone: the other is noise, and stays it.
                beside = noise(other, 2 + k) if what == "apart" else given[other]
                time = 1.0 if what == "apart" else 0.0
                network = ex.one_part(denoiser, part, {other: beside}, time=time)
                out[part] = self._end(network, noise(part, k), cond)
            return out

        def draw(models: Any, text: Any, first: Any, given: Any, key: Any, at: Any, what: What):
            autoencoder, sound, denoiser = models
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(at)
            cond, z = self._conditions(autoencoder, text, first), {}
            if "video" in given:
                z["video"] = jax.vmap(autoencoder.encode)(to_clips(given["video"]))
            if "sound" in given:
                z["sound"] = jax.vmap(lambda mel: sound.encode(mel.T))(given["sound"])
            one = lambda cond, key, z: latents(denoiser, cond, key, z, what)
            z = jax.vmap(one)(cond, keys, z)
            frames = to_frames(jax.vmap(autoencoder.decode)(z["video"]))
            return frames, jax.vmap(lambda s: sound.decode(s).T)(z["sound"])

        self._draw_both = eqx.filter_jit(draw)

    def draw(
        self,
        texts: list[str],
        key: Any,
        *,
        first: Frames | None = None,
        name: str = "samples",
        what: What = "both",
        frames: Frames | None = None,
        mels: Any = None,
    ) -> Drawn:
        """A clip with sound for each caption.

        `first`: first frames, which stay. `frames` are the clips of `what="sound"`, `mels` the
        spectrograms of `what="video"`; what is given comes back as it is.
        """
        trained = self.trained
        models = trained.autoencoder, trained.sound, trained.denoiser
        given = {"video": frames} if what == "sound" else {"sound": mels} if what == "video" else {}
        draw = lambda text, first, part, at: self._draw_both(
            models, text, first, part, key, at, what
        )
        found, heard = self._some_at_once(draw, texts, first, given, name)
        return Drawn(found if frames is None else frames, heard if mels is None else mels)
