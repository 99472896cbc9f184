"""Drawing clips: from a caption, from first frames, and longer ones by sliding windows."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

import eqxldm as ex
from eqxldm.data import caption_bytes
from eqxldm.models import CausalVideoAutoencoder, SoundAutoencoder

from ..train.terminal import StageBar
from .config import Config, SamplingOptions
from .networks import KnownFrames, SoundingClips, to_clips, to_frames
from .training import DIFFUSION

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
        return caption_bytes(self.config.diffusion.max_length).tokens("")


def make_solver(sampling: SamplingOptions) -> Any:
    return {
        "euler": ex.Euler(),
        "heun": ex.Heun(),
        "dpmsolver++": ex.DPMSolverPP2M(),
        "unipc": ex.UniPC(),
    }[sampling.solver]


class Drawn(NamedTuple):
    """Clips, and of a run with sound their spectrograms."""

    frames: Frames
    mels: Float[np.ndarray, "n m bands"] | None = None


class Drawing:
    """Draws clips, some at once, compiled once for each number of known frames.

    Clip `i` depends on the key, its number, its caption and its first frames alone.
    """

    def __init__(self, trained: Trained, sampling: SamplingOptions, batch: int):
        self.trained, self._batch = trained, batch
        config, solver = trained.config, make_solver(sampling)
        times = ex.shifted_times(sampling.steps, config.diffusion.shift)
        null = trained.null() if trained.captioned else None
        clips = config.clips
        shape = trained.autoencoder.latent_shape(clips.frames, *clips.size)

        def one(models: Any, cond: Any, key: Any) -> Any:
            autoencoder, denoiser = models
            network: Any = denoiser
            if null is not None and sampling.guidance != 1:
                network = ex.guide(denoiser, {**cond, "text": jnp.asarray(null)}, sampling.guidance)
            noise_key, solver_key = jax.random.split(key)
            z = DIFFUSION.sample_prior(shape, key=noise_key)
            z = ex.sample(network, DIFFUSION, solver, times, z, cond, key=solver_key)
            return autoencoder.decode(z)

        def draw(models: Any, text: Any, first: Any, key: Any, indices: Any) -> Any:
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
            known, mask = known_latents(models[0], first, shape)
            cond = {"known": known, "mask": mask}
            cond |= {} if text is None else {"text": text}
            return to_frames(jax.vmap(lambda cond, key: one(models, cond, key))(cond, keys))

        self._draw = eqx.filter_jit(draw)

    def __call__(
        self,
        texts: list[str],
        key: Any,
        *,
        first: Frames | None = None,
        name: str = "samples",
    ) -> Frames:
        """A clip for each caption. `first`: their first frames, 4 k + 1 of them, which stay."""
        clips = self.trained.config.clips
        tokens = caption_bytes(self.trained.config.diffusion.max_length).tokens
        made, n = [], len(texts)
        if first is None:
            first = np.zeros((n, 0, *clips.size, clips.channels), np.uint8)
        with StageBar(name, n, "clip") as bar:
            for i in range(0, n, self._batch):
                at = np.minimum(np.arange(i, i + self._batch), n - 1)
                text = np.stack([tokens(texts[k]) for k in at]) if self.trained.captioned else None
                models = self.trained.autoencoder, self.trained.denoiser
                made.append(np.asarray(self._draw(models, text, first[at], key, at)))
                bar.update(min(i + self._batch, n))
        frames = np.concatenate(made)[:n]
        return np.concatenate([first, frames[:, first.shape[1] :]], 1)

    def draw(self, texts: list[str], key: Any, **options: Any) -> Drawn:
        """The same, and the sounds of a run that has them."""
        return Drawn(self(texts, key, **options))

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
