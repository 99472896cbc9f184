"""Drawing clips: from a caption, from first frames, and longer ones by sliding windows."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

import eqxldm as ex
from eqxldm.models import CausalVideoAutoencoder, SoundAutoencoder

from ..train.methods import SOLVERS
from ..train.terminal import StageBar
from .config import Config, SamplingOptions
from .data import captions_of
from .networks import KnownFrames, SoundingClips, to_clips, to_frames

Frames = UInt8[np.ndarray, "n f h w c"]


class Trained(NamedTuple):
    """A run's networks; `captioned` says whether the denoiser takes captions, `sound` is the
    autoencoder of a run with sound."""

    autoencoder: CausalVideoAutoencoder
    denoiser: KnownFrames | SoundingClips
    config: Config
    captioned: bool
    sound: SoundAutoencoder | None = None

    def null(self) -> Any:
        """The ids of a caption that says nothing."""
        return captions_of(self.config).null


class Drawn(NamedTuple):
    """Clips, and of a run with sound their spectrograms."""

    frames: Frames
    mels: Float[np.ndarray, "n m bands"] | None = None


class Drawing:
    """Draws clips, some at once, compiled once for each number of known frames.

    Clip `i` depends on the key, its number, its caption and its first frames alone.
    """

    def __init__(self, trained: Trained, sampling: SamplingOptions, batch: int):
        self.trained, self._batch, self._guidance = trained, batch, sampling.guidance
        self._null = trained.null() if trained.captioned else None
        self._solver = SOLVERS[sampling.solver]
        self._times = ex.shifted_times(sampling.steps, trained.config.diffusion.shift)
        clips = trained.config.clips
        self._shape = trained.autoencoder.latent_shape(clips.frames, *clips.size)

        def draw(models: Any, text: Any, first: Any, key: Any, indices: Any) -> Any:
            autoencoder, denoiser = models

            def one(cond: Any, key: Any) -> Any:
                noise_key, solver_key = jax.random.split(key)
                z = denoiser.diffusion.sample_prior(self._shape, key=noise_key)
                return autoencoder.decode(self._end(denoiser, z, cond, solver_key))

            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
            return to_frames(jax.vmap(one)(self._conditions(autoencoder, text, first), keys))

        self._draw = eqx.filter_jit(draw)

    def _end(self, network: Any, x: Any, cond: Any, key: Any = None) -> Any:
        """Where the noise `x` leads, guided by the caption."""
        diffusion = self.trained.denoiser.diffusion
        if self._null is not None and self._guidance != 1:
            network = ex.guide(network, {**cond, "text": jnp.asarray(self._null)}, self._guidance)
        return ex.sample(network, diffusion, self._solver, self._times, x, cond, key=key)

    def _conditions(self, autoencoder: Any, text: Any, first: Any) -> dict[str, Any]:
        known, mask = known_latents(autoencoder, first, self._shape)
        return {"known": known, "mask": mask} | ({} if text is None else {"text": text})

    def __call__(self, texts: list[str], key: Any, **options: Any) -> Frames:
        """The frames of `draw`."""
        return self.draw(texts, key, **options).frames

    def draw(
        self, texts: list[str], key: Any, *, first: Frames | None = None, name: str = "samples"
    ) -> Drawn:
        """A clip for each caption. `first`: their first frames, 4 k + 1 of them, which stay."""
        models = self.trained.autoencoder, self.trained.denoiser
        draw = lambda text, first, _, at: (self._draw(models, text, first, key, at),)
        return Drawn(*self._some_at_once(draw, texts, first, {}, name))

    def _some_at_once(
        self, draw: Any, texts: list[str], first: Frames | None, given: dict[str, Any], name: str
    ) -> list[Any]:
        """What `draw(text, first, given, numbers)` makes of all, a batch after the other: frames,
        the first of which are those that are known, and whatever else."""
        config, n, made = self.trained.config, len(texts), []
        tokens = captions_of(config).read.tokens
        if first is None:
            first = np.zeros((n, 0, *config.clips.size, config.clips.channels), np.uint8)
        with StageBar(name, n, "clip") as bar:
            for i in range(0, n, self._batch):
                at = np.minimum(np.arange(i, i + self._batch), n - 1)
                text = np.stack([tokens(texts[k]) for k in at]) if self.trained.captioned else None
                part = {name: np.asarray(a)[at] for name, a in given.items()}
                made.append([np.asarray(a) for a in draw(text, first[at], part, at)])
                bar.update(min(i + self._batch, n))
        frames, *others = (np.concatenate(parts)[:n] for parts in zip(*made, strict=True))
        return [np.concatenate([first, frames[:, first.shape[1] :]], 1), *others]

    def long(
        self, texts: list[str], key: Any, frames: int, *, overlap: int, **options: Any
    ) -> Frames:
        """Clips of any length: each further window knows the last `overlap` frames so far.

        A window's frames are encoded anew, so that the first of them is a latent frame of its own,
        as the network knows it from training.
        """
        found = self(texts, key, **options)
        for window in range(1, 10**6):
            if found.shape[1] >= frames:
                break
            next_key = jax.random.fold_in(key, window)
            end = self(texts, next_key, first=found[:, -overlap:], name=f"window {window + 1}")
            found = np.concatenate([found, end[:, overlap:]], 1)
        return found[:, :frames]


def known_latents(autoencoder: Any, first: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The latents of first frames and where they are: nothing, for none of them."""
    known = jnp.zeros((len(first), *shape))
    if first.shape[1] == 0:
        return known, jnp.zeros((len(first), shape[1]))
    z = jax.vmap(autoencoder.encode)(to_clips(first))
    mask = jnp.broadcast_to(jnp.arange(shape[1]) < z.shape[2], (len(first), shape[1]))
    return known.at[:, :, : z.shape[2]].set(z), mask.astype(jnp.float32)
