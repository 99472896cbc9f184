"""What is refused before anything is written: all that a run needs up to its end."""

import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eqxldm.data import ImageSource
from eqxldm.sharding import check_batch, make_mesh, parse_mesh

from .conditions import Condition
from .config import AttentionName, Config, SamplingConfig
from .data import count_readable
from .few_steps import DIFFERENTIATED, FEW_STEP
from .figures import FORMAT_ERRORS, check_format
from .job import Compute
from .methods import check_sampling, make_decays, make_method
from .networks import (
    Autoencoder,
    Pixels,
    Space,
    make_autoencoder,
    make_denoiser,
    make_discriminator,
)
from .sampling import Sampler
from .streams import stream_order
from .terminal import UserError, user_errors

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def mesh_of(text: str) -> Mesh:
    """The mesh that `--mesh` names."""
    with user_errors(ValueError, what="--mesh"):
        return make_mesh(parse_mesh(text))


def check_out(path: Path, image: Any) -> None:
    """That a picture like this one can be written there, before it is drawn."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--out {path}: a picture's name ends with one of {', '.join(PICTURES)}.")
    check_writable(path, "--out")
    try:
        check_format(path.suffix.lower(), image)
    except FORMAT_ERRORS as error:
        h, w, c = image.shape
        raise UserError(
            f"--out {path}: {h} x {w} pixels of {c} channels cannot be written as "
            f"{path.suffix}: {error}. Use .png, or fewer images."
        ) from None


def check_writable(path: Path, option: str) -> None:
    """That a file can be put there, without leaving anything."""
    try:
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder.")
        # As long as the longest name that stands beside it while it is written.
        path.with_name(f".{path.name}-{'0' * 8}{path.suffix}").exists()
        above = next((p for p in path.absolute().parents if p.exists()), Path("/"))
        if not above.is_dir():
            raise UserError(f"{option} {path}: {above} is no folder.")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}.") from None


def check_options(
    config: Config, sampling: SamplingConfig, compute: Compute, prefix: str = "sampling."
) -> None:
    """Refuses options that do not go together, whatever the images are."""
    options = config.diffusion
    check_sampling(make_method(config), sampling, prefix)
    _check_few_steps(config, compute)
    _check_form(config)
    make_decays(options)
    if options.warmup >= options.steps and options.warmup:
        raise UserError(
            f"--diffusion.warmup {options.warmup} must be below --diffusion.steps {options.steps}."
        )
    check_attention(compute.attention, options.dtype)
    crop = config.autoencoder.crop_from
    if crop is not None and crop < min(config.size):
        h, w = config.size
        raise UserError(f"--autoencoder.crop-from {crop} is less than --size {h} {w}.")


def check_attention(attention: AttentionName, dtype: str) -> None:
    """Refuses a kernel that this machine, or a network of this type, does not have."""
    here = jax.default_backend(), dtype
    if attention == "cudnn" and here != ("gpu", "bfloat16"):
        raise UserError(
            "--attention cudnn: needs a GPU and --diffusion.dtype bfloat16; here are "
            f"{' and '.join(here)}."
        )
    if attention == "flash" and here[0] != "tpu":
        raise UserError(f"--attention flash: needs a TPU; here is {here[0]}.")


def _check_form(config: Config) -> None:
    if config.form != "published" and config.denoiser != "dit":
        raise UserError(f"--form {config.form}: it is of --denoiser dit.")
    if config.form == "jit" and config.space != "pixel":
        raise UserError("--form jit: it is for --space pixel.")
    inside = [n for n in ("early", "dispersive") if getattr(config.diffusion, n)]
    if inside and (config.dit.early_depth is None or config.denoiser != "dit"):
        raise UserError(
            f"--diffusion.{inside[0]}: it needs --denoiser dit and --dit.early-depth, the block "
            "after which it looks."
        )


def _check_few_steps(config: Config, compute: Compute) -> None:
    few, steps = config.few, config.diffusion.steps
    if few.conditioned and (config.objective, config.denoiser) != ("imf", "dit"):
        raise UserError("--few.conditioned: it is of --objective imf and --denoiser dit.")
    if config.objective not in FEW_STEP:
        return
    low, high = few.guidance_interval
    if not low < high:
        raise UserError(
            f"--few.guidance-interval must be LOW HIGH with LOW < HIGH, got {low} {high}."
        )
    if few.pretrain >= steps:
        raise UserError(
            f"--few.pretrain {few.pretrain} must be below --diffusion.steps {steps}, which counts "
            "those steps, too."
        )
    if compute.attention != "xla" and config.objective in DIFFERENTIATED:
        raise UserError(
            f"--objective {config.objective}: its loss has the network's derivative in it, which "
            f"--attention {compute.attention} does not have. Use --attention xla, or --objective "
            "shortcut."
        )


def check_readable(config: Config, source: ImageSource, *, strict: bool) -> None:
    """Refuses a batch of latents for which too few images can be read: others take no place."""
    enough = config.diffusion.batch_size
    order = stream_order(config.seed, "diffusion/data", len(source))
    found = count_readable(source, order, config, enough=enough, strict=strict)
    if found < enough:
        raise UserError(
            f"--diffusion.batch-size {enough} is more than the {found} training images that can be "
            "read."
        )


def check_batches(
    config: Config, source: ImageSource, mesh: Mesh, compute: Compute, stages: tuple[str, ...]
) -> None:
    """Refuses batches that the images or the devices are too few for."""
    for stage in stages:
        batch = getattr(config, stage).batch_size
        if batch > len(source):
            raise UserError(
                f"--{stage}.batch-size {batch} is more than the {len(source)} training images."
            )
        with user_errors(ValueError, what=f"--{stage}.batch-size"):
            check_batch(batch, mesh, compute.grad_accum_steps if stage == "diffusion" else 1)


def check_networks(
    config: Config,
    sampling: SamplingConfig,
    condition: Condition,
    vae: Autoencoder | None,
    *,
    diffusion: bool = True,
    attention: AttentionName = "xla",
) -> None:
    """Refuses sizes that do not fit each other: the networks and the sampler, as shapes only."""
    h, w = config.padded
    sampler = Sampler.of(config, sampling)
    if config.space == "pixel" and vae is not None:
        raise UserError("--vae: --space pixel has no autoencoder; leave one of them out.")
    if config.space == "latent" and min(config.size) < 11:
        raise UserError("--size: SSIM, by which autoencoders are measured, needs 11 x 11 pixels.")

    def make_space() -> Space:
        if config.space == "pixel":
            return Pixels(config.pictures.channels)
        return vae or make_autoencoder(config)

    def draw() -> Any:
        space = make_space()
        shape = space.latent_shape(*config.padded)
        network = make_denoiser(config, shape, condition, attention=attention)
        cond = jax.tree.map(lambda a: jnp.asarray(a)[None], condition.null)
        draw = sampler.function(shape, condition.null)
        return draw(space, network, cond, jax.random.split(jax.random.key(0), 1))

    def discriminate() -> Any:
        x = jnp.zeros((config.pictures.channels, h, w))
        ae = make_autoencoder(config)
        return make_discriminator(config)(ae.decode(ae.encode(x)))

    border = f" with a border of {config.pictures.pad}" if config.pictures.pad else ""
    with user_errors(ValueError, what=f"{config.size[0]} x {config.size[1]} images{border}"):
        if diffusion:
            eqx.filter_eval_shape(draw)
        trained = config.space == "latent" and vae is None
        logits = eqx.filter_eval_shape(discriminate) if trained else None
    if logits is not None and 0 in logits.shape:
        raise UserError(
            f"--autoencoder.discriminator-layers {config.autoencoder.discriminator_layers} leave "
            f"nothing of a {h} x {w} image."
        )
