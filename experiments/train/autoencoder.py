"""The stage of the autoencoder: the one given, or one trained here; and encoding with it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import pretrained
from eqxldm.data import ImageSource, no_condition
from eqxldm.data.pixels import to_float
from eqxldm.digests import digest
from eqxldm.distributed import all_gather, barrier, from_primary, local_mesh, replicate
from eqxldm.models import LPIPS, AutoencoderKL, TinyAutoencoder
from eqxldm.sharding import batch_sharding, build_placed, place
from eqxldm.training import (
    AutoencoderState,
    MeanDistance,
    adamw,
    exponential,
    init_state,
    l1_distance,
    l2_distance,
    make_autoencoder_step,
    measure_latents,
)

from .config import Config
from .data import decoded
from .job import Job
from .methods import DTYPES, warmup_cosine
from .networks import (
    Autoencoder,
    GreyThroughColour,
    lpips_of,
    make_autoencoder,
    make_discriminator,
)
from .run import file_digest, read_json, write_json
from .streams import stream_order
from .terminal import UserError, user_errors

_HALF = re.compile(r"(?<=_)(en|de)coder\.(?=safetensors$|pth$)")  # in the names of TAESD
AUTOENCODER, ABOUT = "autoencoder.safetensors", "autoencoder.json"
PREPARE = 2**31 - 1  # no step's number: the keys of what is done before a step


def load_vae(path: Path, channels: int, option: str = "--vae") -> Autoencoder:
    """The autoencoder of a file, a diffusers folder, or another run's folder.

    Of TAESD's two files either one is given. Grey images go through one of colour as three equal
    channels.
    """
    if (path / AUTOENCODER).exists():
        _check_written(path)
        path = path / AUTOENCODER
    try:
        model = _load_tiny(path) if _HALF.search(path.name) else pretrained.load(path)
    except (pretrained.WeightsError, OSError) as error:
        raise UserError(
            f"{option} {path}: {error} Needed is a diffusers folder of an AutoencoderKL "
            f"or AutoencoderTiny (config.json and weights), an {AUTOENCODER}, the run folder that "
            "holds it, or one of TAESD's two files, ..._encoder and ..._decoder.safetensors."
        ) from None
    if not isinstance(model, AutoencoderKL | TinyAutoencoder):
        raise UserError(
            f"{option} {path}: is a {type(model).__name__}; needed is an AutoencoderKL or a "
            "TinyAutoencoder."
        )
    if channels == 1 and model.in_channels == 3:
        return GreyThroughColour(model)
    if model.in_channels != channels:
        raise UserError(
            f"{option} {path}: is for {model.in_channels} channels; the images have {channels}."
        )
    return model


def _load_tiny(path: Path) -> TinyAutoencoder:
    both = (path.with_name(_HALF.sub(half, path.name)) for half in ("encoder.", "decoder."))
    return pretrained.load_tiny_autoencoder(*both)


def _check_written(folder: Path) -> None:
    """That a run's autoencoder is the file that was written, where the run has noted which."""
    repair = "Train again with --overwrite, or restore the file."
    try:
        expected = read_json(folder / ABOUT, {"sha256": str}, repair=repair)["sha256"]
    except FileNotFoundError:
        return
    if file_digest(folder / AUTOENCODER) != expected:
        raise UserError(f"{folder / AUTOENCODER} is damaged: not what was written. {repair}")


def load_lpips(folder: Path) -> LPIPS:
    with user_errors(pretrained.WeightsError, OSError, ImportError, what="--lpips"):
        return pretrained.load_lpips(folder)


def identity(model: Autoencoder | LPIPS) -> str:
    """What the latent cache knows an autoencoder by, and a run its LPIPS."""
    return digest(eqx.filter(model, eqx.is_array))


def obtain_autoencoder(job: Job) -> Autoencoder:
    """The run's autoencoder: that of the run folder, else the one given, else one trained here.

    Whichever it is, it stays in the run folder, with the shift and scale of its latents.
    """
    run, vae, channels = job.run, job.vae, job.config.pictures.channels
    if not from_primary((run.path / AUTOENCODER).exists()):
        trained = _train_autoencoder(job) if vae is None else None
        if run.primary:
            model = vae if trained is None else _measured(job, trained)
            stored = model.colour if isinstance(model, GreyThroughColour) else model
            pretrained.save(stored, run.file(AUTOENCODER))
            spent = job.timings.get("autoencoder", {"seconds": 0.0})
            write_json(
                run.file(ABOUT), {"sha256": file_digest(run.path / AUTOENCODER), "timings": spent}
            )
        barrier("autoencoder")
    try:
        about = read_json(run.path / ABOUT, {"timings": dict}, repair="Delete it.")
    except FileNotFoundError:  # killed in between
        about = {}
    spent = about.get("timings", {}).get("seconds")
    spent = spent if isinstance(spent, int | float) else 0.0
    job.timings["autoencoder"] = {**about.get("timings", {}), "seconds": spent}
    model = load_vae(run.path, channels, option="run")
    if vae is not None:
        of = lambda ae: (ae.shift, ae.scale, identity(ae))
        if of(model) != of(vae):
            shape = lambda ae: ae.latent_shape(*job.config.padded)
            raise UserError(
                f"the run in {run.path} has another autoencoder than --vae: {identity(model)[:12]} "
                f"with latents {shape(model)}, given {identity(vae)[:12]} with latents "
                f"{shape(vae)}. Leave --vae out, use another --run-dir, or --overwrite."
            )
    return model


def autoencoder_state(config: Config):
    """`(state, statics, optimizers)` of the autoencoder and its discriminator."""
    options = config.autoencoder
    rate = warmup_cosine(options.learning_rate, options.steps, min(50, options.steps // 2))
    optimizers = (
        adamw(rate, b2=0.99, clip_norm=1.0),
        adamw(options.discriminator_learning_rate, b1=0.5, b2=0.9),
    )
    ae_state, ae_static = init_state(make_autoencoder(config), optimizers[0], num_emas=1)
    disc_state, disc_static = init_state(make_discriminator(config), optimizers[1])
    return AutoencoderState(ae_state, disc_state), (ae_static, disc_static), optimizers


def autoencoder_phases(config: Config, statics: Any, optimizers: Any) -> list[tuple[int, Any]]:
    """The train steps of random crops: without the discriminator, then with it."""
    options = config.autoencoder

    def step_fn(adversarial: bool):
        step = make_autoencoder_step(
            *statics,
            *optimizers,
            distance={"l1": l1_distance, "l2": l2_distance}[options.distance],
            kl_weight=options.kl_weight,
            gan_weight=options.gan_weight,
            adversarial=adversarial,
            ema_decays=(exponential(options.ema_decay),),
            dtype=DTYPES[options.dtype],
        )

        def run(state, batch, key, *perceptual):
            own = jax.random.fold_in(jax.random.fold_in(key, PREPARE), state.autoencoder.step)
            crops = random_crop(batch["image"], config.size, own)
            return step(state, to_float(crops, pad=config.pictures.pad), key, *perceptual)

        return run

    start = min(options.gan_start, options.steps) if options.gan_weight > 0 else options.steps
    phases = [(start, step_fn(False)), (options.steps, step_fn(True))]
    return [phase for phase in phases[:-1] if phase[0]] + phases[-1:]


def crop_size(config: Config) -> tuple[int, int]:
    """What random crops are cut from."""
    short = config.autoencoder.crop_from or min(config.size)
    h, w = (round(side * short / min(config.size)) for side in config.size)
    return h, w


def random_crop(images: Any, size: tuple[int, int], key: Any) -> Any:
    """A part of this size of each image, `(b, h, w, c)`; the image itself where it has that size.

    >>> random_crop(jnp.zeros((2, 6, 6, 3), jnp.uint8), (4, 4), jax.random.key(0)).shape
    (2, 4, 4, 3)
    """
    b, h, w, c = images.shape
    if (h, w) == tuple(size):
        return images
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - size[0] + 1, w - size[1] + 1]))
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (*size, c))
    return jax.vmap(cut)(images, corners)


def _train_autoencoder(job: Job) -> AutoencoderKL:
    """The averaged autoencoder, its latents not yet normalised."""
    config, options = job.config, job.config.autoencoder
    _, statics, optimizers = eqx.filter_eval_shape(lambda: autoencoder_state(config))
    state = build_placed(lambda: autoencoder_state(config)[0], job.mesh)
    phases = autoencoder_phases(config, statics, optimizers)
    # A network's weights are an argument of the step: as constants they would be compiled in.
    perceptual = []
    if job.lpips is not None and options.perceptual_weight > 0:
        lpips = lpips_of(job.lpips, config.pictures.channels)
        perceptual = [place(MeanDistance(lpips, options.perceptual_weight), job.mesh)]
    batches = job.images(
        "autoencoder", options.batch_size, size=crop_size(config), condition=no_condition
    )
    state = job.stages.train("autoencoder", phases, state, batches, options.batch_size, *perceptual)
    return eqx.combine(all_gather(state.autoencoder.ema[0], job.mesh), statics[0])


class Encoder:
    """`encode(batch) -> (mean, logvar)`, divided over this process's devices.

    `read(batch)` makes the autoencoder's inputs of it.
    """

    def __init__(self, autoencoder: Any, batch_size: int, read: Callable[[Any], Any]):
        mesh = local_mesh()
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._sharding = batch_sharding(mesh)
        params, static = eqx.partition(autoencoder, eqx.is_array)
        self._params = replicate(params, mesh)

        @jax.jit
        def posterior(params, batch):
            found = jax.vmap(eqx.combine(params, static).posterior)(read(batch))
            return found.mean, found.logvar

        self._posterior = posterior

    def __call__(self, batch: np.ndarray) -> tuple[Any, Any]:
        return self._posterior(self._params, jax.device_put(batch, self._sharding))

    def of_images(
        self, source: ImageSource, indices: Any, config: Config, *, strict: bool
    ) -> Iterator[tuple[list[np.ndarray], Any]]:
        """`(mean, logvar)` and the labels of images that can be read, on the host, a batch at a
        time."""
        size = self.batch_size
        for images, labels in decoded(source, indices, config, strict=strict, at_once=size):
            padded = np.pad(images, [(0, size - len(images))] + [(0, 0)] * 3, mode="edge")
            yield [np.asarray(m)[: len(images)] for m in self(padded)], labels


def image_encoder(autoencoder: Autoencoder, config: Config) -> Encoder:
    pad = config.pictures.pad
    return Encoder(autoencoder, config.latents.batch_size, lambda x: to_float(x, pad=pad))


def _measured(job: Job, autoencoder: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with the shift and scale that some training images' latents have."""
    config = job.config
    encode = image_encoder(autoencoder, config)
    order = stream_order(config.seed, "autoencoder/statistics", len(job.source))
    indices = np.sort(order[: config.latents.statistics])
    found = encode.of_images(job.source, indices, config, strict=job.inputs.strict)
    moments = zip(*(moments for moments, _ in found), strict=True)
    shift, scale = measure_latents(*map(np.concatenate, moments))
    return autoencoder.with_latent_stats(shift, scale)
