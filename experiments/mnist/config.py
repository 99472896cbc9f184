"""What can be set, the defaults, and what they are turned into."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import equinox as eqx
import jax

from eqxldm.models import DiT, UNet
from experiments.common.classifier import ConvClassifier

from ..common import options
from ..common.diffusion import Diffusion, PathName, PredictionName, WeightName, named_diffusion
from ..common.spaces import Pixels
from ..common.stages import make_autoencoder, make_discriminator
from ..common.streams import stage_key
from ..common.terminal import UserError
from .data import Digits

Dataset = Literal["mnist", "fashion-mnist"]
SpaceName = Literal["latent", "pixel"]
DenoiserName = Literal["dit", "unet"]


@dataclass(frozen=True)
class ClassifierConfig:
    """The judge: a small classifier whose features and logits measure the samples."""

    steps: int = 700
    batch_size: int = 256
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class AutoencoderConfig:
    """The VAE and its discriminator."""

    steps: int = 700
    batch_size: int = 32
    learning_rate: float = 4e-3
    pad: int = 2
    """Black pixels around the image: 28 + 2 * 2 = 32 divides by the factor and the patch."""
    channels: tuple[int, ...] = (32, 64)
    """The width of each level; each further one halves the resolution."""
    patch_size: int = 2
    """Space-to-depth before the first and after the last layer."""
    blocks: int = 1
    """Residual blocks a level."""
    groups: int = 8
    latent_channels: int = 4
    attention: bool = False
    kl_weight: float = 1e-2
    ema_decay: float = 0.99
    gan_weight: float = 0.25
    """Times the adaptive weight; 0 trains without the discriminator."""
    gan_start: int = 450
    """The step at which the discriminator sets in."""
    discriminator_channels: int = 32
    discriminator_layers: int = 2
    discriminator_learning_rate: float = 1e-3


@dataclass(frozen=True)
class DiTConfig:
    """The transformer's size."""

    depth: int = 6
    width: int = 128
    num_heads: int = 4
    patch_size: int | None = None
    """By default 2 for latents, 4 for pixels."""


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's size."""

    channels: tuple[int, ...] | None = None
    """The width of each level; by default 64 128 for latents, 16 32 64 for pixels."""
    blocks: int = 1
    """Residual blocks a level, one more on the way up."""
    num_heads: int = 4
    """Of the attention, which is in the deepest level and the middle."""
    groups: int = 8


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion, and the training of its network."""

    steps: int | None = None
    """By default what takes some six minutes on two cores."""
    batch_size: int = 64
    learning_rate: float | None = None
    """By default 4e-3 for the DiT, 2e-3 for the U-Net."""
    warmup: int = 50
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    label_dropout: float = 0.1
    path: PathName = "cosine"
    prediction: PredictionName = "v"
    weight: WeightName = "constant"
    """Of the loss; min-snr (gamma = 5) means the same loss for every prediction."""
    time_mean: float = 0.0
    """Of the logit-normal training times; positive favours noise. The "ddpm" path has its own."""
    time_stddev: float = 1.0


@dataclass(frozen=True)
class Config:
    """One training run; the run folder belongs to it."""

    dataset: Dataset = "mnist"
    space: SpaceName = "latent"
    """What is diffused: an autoencoder's latents or the pixels."""
    denoiser: DenoiserName = "dit"
    seed: int = 0
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)


# What None stands for.
STEPS = {
    ("latent", "dit"): 3200,
    ("latent", "unet"): 1600,
    ("pixel", "dit"): 2000,
    ("pixel", "unet"): 800,
}
RATES = {"dit": 4e-3, "unet": 2e-3}
PATCHES = {"latent": 2, "pixel": 4}
CHANNELS = {"latent": (64, 128), "pixel": (16, 32, 64)}


def resolved(config: Config) -> Config:
    """The configuration with nothing left open."""
    or_else = lambda value, default: default if value is None else value
    diffusion, dit, unet = config.diffusion, config.dit, config.unet
    return replace(
        config,
        diffusion=replace(
            diffusion,
            steps=or_else(diffusion.steps, STEPS[config.space, config.denoiser]),
            learning_rate=or_else(diffusion.learning_rate, RATES[config.denoiser]),
        ),
        dit=replace(dit, patch_size=or_else(dit.patch_size, PATCHES[config.space])),
        unet=replace(unet, channels=or_else(unet.channels, CHANNELS[config.space])),
    )


def run_name(dataset: Dataset, space: SpaceName, denoiser: DenoiserName) -> str:
    """The run folder's name: the dataset, and what is not the default."""
    return "-".join(
        [dataset, *(["pixel"] * (space == "pixel")), *(["unet"] * (denoiser == "unet"))]
    )


def from_dict(values: dict[str, Any]) -> Config:
    """The `Config` that a run folder's config.json describes."""
    return options.from_dict(Config, values)


def image_shape(digits: Digits) -> tuple[int, int, int]:
    """`(c, h, w)` of the images."""
    h, w, c = digits.train_images.shape[1:]
    return c, h, w


def check_sizes(config: Config, digits: Digits, devices: int) -> None:
    """Refuses sizes that do not fit each other, before anything is written or allocated."""
    for stage in ("classifier", "autoencoder", "diffusion"):
        batch = getattr(config, stage).batch_size
        if batch > len(digits.train_images):
            raise UserError(
                f"--{stage}.batch-size {batch} is more than the {len(digits.train_images)} "
                "training images."
            )
        if batch % devices:
            raise UserError(f"--{stage}.batch-size {batch} does not divide over {devices} devices.")
    c, h, w = image_shape(digits)
    pad = 2 * config.autoencoder.pad

    def build():
        x = jax.numpy.zeros((c, h + pad, w + pad))
        space = (
            Pixels(c)
            if config.space == "pixel"
            else make_autoencoder(config, config.autoencoder, c)
        )
        z = space.encode(x)
        shape = space.latent_shape(h + pad, w + pad)
        denoiser = make_network(config, shape, digits.num_classes)
        disc = make_discriminator(config, config.autoencoder, c)
        return denoiser(z, jax.numpy.array(0.5), denoiser.null), disc(x)

    try:
        logits = eqx.filter_eval_shape(build)[1]
    except ValueError as error:
        raise UserError(f"{h} x {w} images with a border of {pad // 2}: {error}") from None
    if config.space == "latent" and 0 in logits.shape:
        raise UserError(
            f"--autoencoder.discriminator-layers {config.autoencoder.discriminator_layers} leave "
            f"nothing of a {h + pad} x {w + pad} image."
        )


def make_diffusion(config: Config) -> Diffusion:
    return named_diffusion(config.diffusion)


def make_classifier(config: Config, shape: tuple[int, int, int], num_classes: int):
    return ConvClassifier(shape, num_classes, key=stage_key(config, "classifier", "model"))


def make_network(config: Config, shape: tuple[int, int, int], num_classes: int) -> DiT | UNet:
    """The denoiser for inputs of this shape; `config` is `resolved`."""
    dit, unet = config.dit, config.unet
    key = stage_key(config, "diffusion", "model")
    if config.denoiser == "unet":
        assert unet.channels is not None
        deepest = len(unet.channels) - 1
        return UNet(
            shape[0],
            channels=unet.channels,
            blocks=unet.blocks,
            attention_levels=tuple(i == deepest for i in range(len(unet.channels))),
            num_heads=unet.num_heads,
            groups=unet.groups,
            num_classes=num_classes,
            key=key,
        )
    assert dit.patch_size is not None
    return DiT(
        shape,
        patch_size=dit.patch_size,
        depth=dit.depth,
        width=dit.width,
        num_heads=dit.num_heads,
        num_classes=num_classes,
        remat=jax.checkpoint_policies.nothing_saveable,
        key=key,
    )
