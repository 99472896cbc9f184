"""The stages of training: networks that measure, the autoencoder, the latents, the diffusion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import eqxldm as ex
from eqxldm.data import (
    Latents,
    image_batches,
    label_condition,
    latent_batches,
    latent_header,
    no_condition,
    open_latents,
    write_latents,
)
from eqxldm.digests import digest
from eqxldm.distributed import barrier
from eqxldm.models import CausalVideoAutoencoder, SoundAutoencoder
from eqxldm.objectives import Denoising, JointDenoising, kl_to_standard_normal
from eqxldm.sharding import batch_vmap
from eqxldm.training import make_loss, measure_latents

from ..train.autoencoder import Encoder
from ..train.classifier import ConvClassifier, classifier_loss, classifier_optimizer
from ..train.diffusion import draw_latents
from ..train.methods import OPTIMIZERS, warmup_cosine
from ..train.run import RunFolder
from ..train.stages import Stages
from ..train.streams import stream_seed
from ..train.terminal import Signals, StageBar
from .classifier import ClipClassifier, halved, turned_clips
from .config import Train
from .data import Clips, Said, frames_of, strip_size
from .images import both_batches, both_loss
from .networks import make_autoencoder, make_denoiser, make_diffusion, to_clips

PARTS = ("video", "sound")
BEGINNING = 5  # frames


@dataclass
class Job:
    """What every stage needs."""

    command: Train
    clips: Clips
    condition: Any  # what is told of a clip's frames: the caption or nothing; and its sound
    run: RunFolder
    mesh: Mesh
    signals: Signals
    stages: Stages = field(init=False)

    def __post_init__(self):
        command, unit = self.command, "clips"
        every, log, mesh = command.checkpoint_every, command.log, self.mesh
        self.stages = Stages(command.seed, self.run, mesh, self.signals, log, every, unit=unit)

    @property
    def captioned(self) -> bool:
        return getattr(self.condition, "text", self.condition) is not no_condition

    def batches(self, stage: str, batch_size: int, condition: Any) -> Any:
        """Batches of strips of the clips to learn from."""
        return image_batches(
            self.clips.train,
            batch_size,
            size=strip_size(self.command.clips),
            channels=self.command.clips.channels,
            condition=condition,
            flip=False,
            **self.stages.order(stage, batch_size),
        )


def train_digits(job: Job) -> ConvClassifier | None:
    """The classifier of single digits, each shifted by up to two pixels; None of other clips."""
    digits, options = job.clips.digits, job.command.classifier
    if digits is None:
        return None

    def build() -> ConvClassifier:
        sizes = dict(channels=options.channels, features=options.features)
        return ConvClassifier((1, 28, 28), 10, **sizes, key=job.stages.key("digits/model"))

    def loss(model: Any, batch: Any, key: Any, context: Any) -> Any:
        shift = jax.random.randint(key, (len(batch["image"]), 2), -2, 3)
        shifted = jax.vmap(lambda x, s: jnp.roll(x, (s[0], s[1]), (0, 1)))(batch["image"], shift)
        return classifier_loss(model, {"image": shifted, "cond": batch["cond"]}, key, context)

    batches = image_batches(
        digits,
        options.batch_size,
        size=28,
        channels=1,
        condition=label_condition,
        flip=False,
        **job.stages.order("digits", options.batch_size),
    )
    return job.stages.average(
        "digits",
        build,
        classifier_optimizer(options),
        loss,
        batches,
        options,
    )


def train_clip_classifier(job: Job) -> ClipClassifier:
    """Learns which digits fly and where or, of other clips, how they were turned.

    Its features are those of the Frechet distance: they see motion. Captions say where digits fly
    at the beginning, before walls turn them, so that is what is looked at in training.
    """
    options, clips = job.command.classifier, job.command.clips
    said = job.clips.digits is not None

    def build() -> ClipClassifier:
        sizes = dict(channels=options.channels, features=options.features)
        outputs = 14 if said else 8
        return ClipClassifier(clips.channels, outputs, **sizes, key=job.stages.key("clips/model"))

    def loss(model: Any, batch: Any, key: Any, context: Any) -> Any:
        seen = halved(frames_of(batch["image"], clips))
        if said:
            logits = jax.vmap(model)(seen[:, :, :BEGINNING])[1]
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["cond"])), {}
        seen, target = turned_clips(seen, key)
        logits = jax.vmap(model)(seen)[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.mean(losses), {}

    condition = Said() if said else no_condition
    batches = job.batches("clips", options.batch_size, condition)
    return job.stages.average(
        "clips",
        build,
        classifier_optimizer(options),
        loss,
        batches,
        options,
    )


def train_autoencoder(job: Job) -> CausalVideoAutoencoder:
    """The averaged autoencoder, trained on crops in space and time, its latents not normalised."""
    config, options = job.command.config, job.command.autoencoder

    build = lambda: make_autoencoder(config, key=job.stages.key("autoencoder/model"))
    rate = warmup_cosine(options.learning_rate, options.steps, min(50, options.steps // 2))
    optimizer = OPTIMIZERS[options.optimizer](rate, b2=0.99, clip_norm=1.0)

    def loss(model: Any, batch: Any, key: Any, context: Any) -> Any:
        crop_key, key = jax.random.split(key)
        frames = cropped(frames_of(batch["image"], config.clips), options, crop_key)
        x = to_clips(frames)

        def one(x: Any, key: Any) -> Any:
            posterior = model.posterior(x)
            error = jnp.mean((model.decode(posterior.sample(key)) - x) ** 2)
            return error, kl_to_standard_normal(posterior.mean, posterior.logvar) / x.size

        error, kl = batch_vmap(one)(x, jax.random.split(key, len(x)))
        error, kl = jnp.mean(error), jnp.mean(kl)
        return error + options.kl_weight * kl, {"error": error, "kl": kl}

    batches = job.batches("autoencoder", options.batch_size, no_condition)
    decay = options.ema_decay
    return job.stages.average(
        "autoencoder", build, optimizer, loss, batches, options, ema_decay=decay
    )


def cropped(frames: Any, options: Any, key: Any) -> Any:
    """A random part of each clip `(n, f, h, w, c)`, or the clip itself where it is no larger."""
    n, f, h, w, c = frames.shape
    part = min(f, options.crop_frames or f), min(h, options.crop), min(w, options.crop)
    room = jnp.array([f - part[0] + 1, h - part[1] + 1, w - part[2] + 1])
    corners = jax.random.randint(key, (n, 3), 0, room)
    cut = lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (*part, c))
    return jax.vmap(cut)(frames, corners)


def clip_encoder(job: Job, autoencoder: CausalVideoAutoencoder) -> Encoder:
    clips = job.command.clips
    read = lambda strips: to_clips(frames_of(strips, clips))
    return Encoder(autoencoder, job.command.sampling_batch, read)


STATISTICS = 200  # clips whose latents are measured


def with_stats(job: Job, autoencoder: CausalVideoAutoencoder) -> CausalVideoAutoencoder:
    """The autoencoder with the shift and scale that some training clips' latents have."""
    encode, source = clip_encoder(job, autoencoder), job.clips.train
    rng = np.random.default_rng(stream_seed(job.command.seed, "autoencoder/statistics"))
    chosen = rng.permutation(len(source))[: max(STATISTICS, encode.batch_size)]
    moments = []
    for i in range(0, len(chosen), encode.batch_size):
        at = np.resize(chosen[i : i + encode.batch_size], encode.batch_size)
        moments.append(encode(np.stack([np.asarray(source[int(k)].image) for k in at])))
    shift, scale = measure_latents(*(np.concatenate(m) for m in zip(*moments, strict=True)))
    return autoencoder.with_latent_stats(shift, scale)


def latent_shape(job: Job, autoencoder: CausalVideoAutoencoder) -> tuple[int, int, int, int]:
    clips = job.command.clips
    return autoencoder.latent_shape(clips.frames, *clips.size)


def cache_latents(job: Job, autoencoder: CausalVideoAutoencoder) -> Latents:
    """The posteriors of all clips to learn from, written once."""
    clips = job.command.clips
    shape = latent_shape(job, autoencoder)
    return _cached(job, autoencoder, job.clips.train, strip_size(clips), shape, "latents", "clip")


def cache_images(job: Job, autoencoder: CausalVideoAutoencoder) -> Latents | None:
    """Those of the images beside the clips, as clips of one frame."""
    source, size = job.clips.images, job.command.clips.size
    if source is None:
        return None
    shape = autoencoder.latent_shape(1, *size)
    return _cached(job, autoencoder, source, size, shape, "image-latents", "image")


def _cached(
    job: Job, autoencoder: Any, source: Any, size: Any, shape: Any, name: str, unit: str
) -> Latents:
    clips, folder = job.command.clips, job.run.file(name)
    header = latent_header(
        source,
        size=size,
        channels=clips.channels,
        shape=shape,
        autoencoder=digest(eqx.filter(autoencoder, eqx.is_array)),
        shift=autoencoder.shift,
        scale=autoencoder.scale,
        condition=job.condition,
        mirrored=False,
    )
    encode = clip_encoder(job, autoencoder)
    with StageBar(name, len(source) // jax.process_count(), unit) as bar:
        write_latents(
            source,
            encode,
            folder,
            header,
            batch_size=encode.batch_size,
            condition=job.condition,
            progress=lambda done, total: bar.update(done),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    barrier(name)
    return open_latents(folder, header)


def null_text(job_condition: Any) -> Any:
    """The ids of a caption that says nothing."""
    return getattr(job_condition, "text", job_condition).tokens("")


def make_prepare(
    job: Job,
    autoencoder: CausalVideoAutoencoder,
    sound: SoundAutoencoder | None = None,
    frames: int | None = None,
) -> Callable[[Any, Any], Any]:
    """`prepare(batch, key)`: fresh latents of the cached posteriors, and what is told of them: the
    caption, at times not, and at times the first latent frames. With `sound` the latents are of
    both, as a dict. `frames`: only so many latent frames of each clip, the first ones."""
    options = job.command.diffusion
    null = null_text(job.condition) if job.captioned else None

    def prepare(batch: Any, key: Any) -> dict[str, Any]:
        draw_key, drop_key, known_key, count_key = jax.random.split(key, 4)
        z = draw_latents(autoencoder, batch, draw_key)[:, :, :frames]
        n, _, f = z.shape[:3]
        told = jax.random.bernoulli(known_key, options.known_share, (n,))
        count = jax.random.randint(count_key, (n,), 1, max(f, 2)) * told * (f > 1)
        mask = (jnp.arange(f) < count[:, None]).astype(jnp.float32)
        cond = {"known": z * mask[:, None, :, None, None], "mask": mask}
        if null is not None:
            dropped = jax.random.bernoulli(drop_key, options.caption_dropout, (n, 1))
            text = batch["cond"] if sound is None else batch["cond"]["text"]
            cond["text"] = jnp.where(dropped, null, text)
        if sound is None:
            return {"x0": z, "cond": cond}
        encode = sound.encode
        heard = jax.vmap(lambda mel: encode(mel.T))(batch["cond"]["mel"])
        return {"x0": {"video": z, "sound": heard}, "cond": cond}

    return prepare


def train_diffusion(
    job: Job,
    autoencoder: CausalVideoAutoencoder,
    latents: Latents,
    sound: SoundAutoencoder | None = None,
    images: Latents | None = None,
) -> Any:
    """The averaged denoiser: flow matching at logit-normal times, shifted to the noisy end.

    At first of pictures, the clips' first frames, which are a fraction of a clip's tokens: of what
    digits look like, and which words mean them, four times as many a second are seen there. With
    `images` of these, which are then learned beside the clips, too.
    """
    config, options = job.command.config, job.command.diffusion
    shape = latent_shape(job, autoencoder)
    key, captioned = job.stages.key("diffusion/model"), job.captioned
    plain = ex.logit_normal_time()
    times = lambda key, n: ex.shift_time(plain(key, n), options.shift)
    diffusion = make_diffusion(config)
    weight = ex.velocity_weight(diffusion.prediction)
    objective: Any = Denoising(diffusion, weight, times)
    if sound is not None:
        shares = {name: getattr(config.sound, name) for name in ("given", "alone", "apart")}
        objective = JointDenoising(diffusion, PARTS, times, **shares, weight=weight)

    def loss_of(frames: int | None) -> Any:
        return make_loss(objective, prepare=make_prepare(job, autoencoder, sound, frames))

    def stage(name: str, build: Any, length: Any, loss: Any, batches: Any) -> Any:
        warmup = min(options.warmup, length.steps - 1)
        rate = warmup_cosine(options.learning_rate, length.steps, warmup)
        make = OPTIMIZERS[options.optimizer]
        optimizer = make(rate, b2=0.99, weight_decay=options.weight_decay, clip_norm=1.0)
        batches = batches(length.batch_size, **job.stages.order(name, length.batch_size))
        decay = options.ema_decay
        return job.stages.average(name, build, optimizer, loss, batches, length, ema_decay=decay)

    network = partial(make_denoiser, config, shape, captioned=captioned, key=key)
    build: Callable[[], Any] = lambda: network(attention=job.command.attention)
    if config.pictures_first:
        stills = latents if images is None else images
        enough = options.image_batch_size <= len(stills)
        size = options.image_batch_size if enough else options.batch_size
        pictures = Pictures(options.image_steps, size)
        first = partial(latent_batches, stills, flip=False)
        image = stage("images", lambda: build().with_frames(1), pictures, loss_of(1), first)
        build = lambda: image.with_frames(shape[1])
    if images is None or not options.image_weight:
        order = partial(latent_batches, latents, flip=False)
        trained = stage("diffusion", build, options, loss_of(None), order)
    else:
        loss = both_loss(loss_of(None), loss_of(1), options.image_weight)
        order = partial(both_batches, latents, images)
        trained = stage("diffusion", build, options, loss, order)
    # What draws, here and elsewhere, has the attention that every device has.
    return like(eqx.filter_eval_shape(network), trained)


def like(form: Any, network: Any) -> Any:
    """The arrays of a network in another form, which has as many in the same order."""
    return jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(network))


class Pictures(NamedTuple):
    """The length of the stage of pictures."""

    steps: int
    batch_size: int
