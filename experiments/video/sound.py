"""The autoencoder of a run's sounds: trained, and its latents normalised."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqxldm.data import no_condition
from eqxldm.models import SoundAutoencoder
from eqxldm.objectives import kl_to_standard_normal
from eqxldm.sharding import batch_vmap
from eqxldm.training import adamw, measure_latents

from ..train.methods import warmup_cosine
from .data import FOLD, WithSound, spectrogram_of
from .training import STATISTICS, Job


def train_sound(job: Job) -> SoundAutoencoder:
    """The averaged autoencoder of spectrograms, with the shift and scale of its latents."""
    config, options = job.command.config, job.command.sound
    mel = spectrogram_of(config.clips)

    def build() -> SoundAutoencoder:
        return SoundAutoencoder(
            mel.bands,
            options.latent_channels,
            width=options.width,
            blocks=options.blocks,
            fold=FOLD,
            key=job.stages.key("sound/model"),
        )

    def loss(model: Any, batch: Any, key: Any, context: Any) -> Any:
        y = jnp.swapaxes(batch["cond"]["mel"], 1, 2)

        def one(y: Any, key: Any) -> Any:
            posterior = model.posterior(y)
            error = jnp.mean((model.decode_raw(posterior.sample(key)) - y) ** 2)
            return error, kl_to_standard_normal(posterior.mean, posterior.logvar) / y.size

        error, kl = batch_vmap(one)(y, jax.random.split(key, len(y)))
        error, kl = jnp.mean(error), jnp.mean(kl)
        return error + options.kl_weight * kl, {"error": error, "kl": kl}

    rate = warmup_cosine(options.learning_rate, options.steps, min(50, options.steps // 2))
    optimizer = adamw(rate, b2=0.99, clip_norm=1.0)
    batches = job.batches("sound", options.batch_size, WithSound(no_condition, mel))
    decay = options.ema_decay
    model = job.stages.average("sound", build, optimizer, loss, batches, options, ema_decay=decay)
    sounds = [job.clips.train[i].sound for i in range(min(STATISTICS, len(job.clips.train)))]
    heard = np.stack([mel(wave).T for wave in sounds if wave is not None])
    posterior = jax.jit(jax.vmap(model.posterior))(heard)
    shift, scale = measure_latents(np.asarray(posterior.mean), np.asarray(posterior.logvar))
    return model.with_latent_stats(shift, scale)
