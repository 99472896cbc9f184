"""What can be set, the presets, and what they are turned into."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from eqxldm import models, nn
from eqxldm.models import AutoencoderKL, DiT
from eqxldm.sharding import check_batch
from eqxldm.training import (
    constant,
    exponential,
    l1_distance,
    l2_distance,
    power_function,
)
from experiments.common.classifier import ConvClassifier

from ..common import options
from ..common.diffusion import (
    Diffusion,
    PathName,
    PredictionName,
    SamplingConfig,
    WeightName,
    named_diffusion,
)
from ..common.stages import make_autoencoder, make_discriminator
from ..common.streams import stage_key
from ..common.terminal import UserError

PresetName = Literal["imagenet256", "cifar10", "smoke"]
ModelName = Literal[
    "dit_s_2", "dit_s_4", "dit_s_8", "dit_b_2", "dit_b_4", "dit_b_8",
    "dit_l_2", "dit_l_4", "dit_l_8", "dit_xl_2", "dit_xl_4", "dit_xl_8",
]  # fmt: skip
DTypeName = Literal["float32", "bfloat16"]
RematName = Literal["everything", "narrow", "matmuls", "nothing"]
AttentionName = Literal["xla", "cudnn"]

MODELS: dict[str, Callable[..., DiT]] = {
    make.__name__: make
    for make in (
        models.dit_s_2, models.dit_s_4, models.dit_s_8, models.dit_b_2, models.dit_b_4,
        models.dit_b_8, models.dit_l_2, models.dit_l_4, models.dit_l_8, models.dit_xl_2,
        models.dit_xl_4, models.dit_xl_8,
    )
}  # fmt: skip
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CHANNELS = 3


@dataclass(frozen=True)
class ClassifierConfig:
    """The judge: a small classifier of the images, at most 64 x 64, that measures the samples."""

    steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    channels: int = 64
    features: int = 256


@dataclass(frozen=True)
class AutoencoderConfig:
    """The VAE and its discriminator, where none is given by --vae."""

    steps: int = 200_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    """The width of each level; each further one halves the resolution."""
    patch_size: int = 1
    """Space-to-depth before the first and after the last layer."""
    blocks: int = 2
    """Residual blocks a level."""
    groups: int = 32
    latent_channels: int = 4
    attention: bool = True
    distance: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = 1.0
    """Of LPIPS, where --lpips gives its weights."""
    kl_weight: float = 1e-6
    ema_decay: float = 0.999
    gan_weight: float = 0.5
    """Times the adaptive weight; 0 trains without the discriminator."""
    gan_start: int = 50_000
    """The step at which the discriminator sets in."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_learning_rate: float = 1e-4
    crop_from: int | None = None
    """Random crops out of a centre crop of this side; by default the centre crop itself."""
    dtype: DTypeName = "float32"


@dataclass(frozen=True)
class LatentsConfig:
    """The latent cache."""

    batch_size: int = 64
    """Images encoded at once, by each process."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    images_per_shard: int | None = None
    """What an interruption costs at most; by default what makes 256 shards, at least 1024."""
    statistics: int = 4096
    """Images from which shift and scale of one's own autoencoder are measured."""


@dataclass(frozen=True)
class DiTConfig:
    """The transformer's size: a published one, and what differs from it."""

    model: ModelName = "dit_xl_2"
    depth: int | None = None
    width: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    qk_norm: bool = False
    """Normalise queries and keys."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion, and the training of its network. The defaults are DiT's."""

    steps: int = 400_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    warmup: int = 0
    cosine_decay: bool = False
    """Let the rate fall to 0 as a cosine; otherwise it stays."""
    weight_decay: float = 0.0
    b2: float = 0.999
    clip_norm: float | None = None
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays of the averages of the weights; the first one is sampled."""
    ema_warmup: bool = False
    """Let the averages forget the random start: a decay of at most (1 + step) / (10 + step)."""
    posthoc: tuple[float, ...] = ()
    """Averages by power functions of these widths (sigma_rel), for averages of any length later."""
    snapshot_every: int = 5000
    """Steps between the snapshots of those that are kept."""
    label_dropout: float = 0.1
    path: PathName = "ddpm"
    prediction: PredictionName = "eps"
    learned_range: bool = True
    """The network chooses the variance of its steps too, by the hybrid loss; "ddpm" path only."""
    weight: WeightName = "constant"
    """Of the loss; min-snr (gamma = 5) means the same loss for every prediction."""
    time_mean: float = 0.0
    """Of the logit-normal training times; positive favours noise. The "ddpm" path has its own."""
    time_stddev: float = 1.0
    flip: bool = True
    """Half of the latents are those of the mirror image."""
    dtype: DTypeName = "bfloat16"
    """What the network computes in; its weights stay float32."""


@dataclass(frozen=True)
class Config:
    """One training run; the run folder belongs to it."""

    size: int = 256
    """The images' side, after ADM's centre crop."""
    num_classes: int | None = None
    """Labels of the network; by default as many as the images have classes."""
    seed: int = 0
    checkpoint_every: int = 2500
    """Steps between checkpoints."""
    reference: int = 10_000
    """Real images, at most, that samples are measured against."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)


@dataclass(frozen=True)
class Preset:
    """A configuration, and how its run is sampled."""

    config: Config
    sampling: SamplingConfig
    samples: int


def imagenet256() -> Preset:
    """DiT's recipe (Peebles & Xie 2023): XL/2, batch 256, 400,000 steps, 250 DDPM steps, w 1.5."""
    return Preset(
        Config(autoencoder=AutoencoderConfig(crop_from=288)),
        SamplingConfig("ddpm", 250, 1.5, (0.0, 1.0)),
        50_000,
    )


def cifar10() -> Preset:
    """32 x 32 colour images on two CPU cores in some 27 minutes."""
    return Preset(
        Config(
            size=32,
            checkpoint_every=500,
            classifier=ClassifierConfig(steps=1500, batch_size=128, channels=32, features=128),
            autoencoder=AutoencoderConfig(
                steps=1500,
                batch_size=32,
                learning_rate=3e-3,
                channels=(32, 64),
                patch_size=2,
                blocks=1,
                groups=8,
                latent_channels=8,
                attention=False,
                distance="l2",
                kl_weight=3e-3,
                ema_decay=0.99,
                gan_weight=0.25,
                gan_start=1000,
                discriminator_channels=32,
                discriminator_layers=2,
                discriminator_learning_rate=1e-3,
            ),
            latents=LatentsConfig(batch_size=250),
            diffusion=DiffusionConfig(
                steps=10_000,
                batch_size=64,
                learning_rate=4e-3,
                warmup=100,
                cosine_decay=True,
                b2=0.99,
                clip_norm=1.0,
                ema_decays=(0.999,),
                ema_warmup=True,
                path="cosine",
                prediction="v",
                learned_range=False,
                dtype="float32",
            ),
            dit=DiTConfig("dit_s_2", depth=6, width=128, num_heads=4),
        ),
        SamplingConfig("ddim", 25, 1.6, (0.0, 0.8)),
        2000,
    )


def smoke() -> Preset:
    """Everything tiny: all stages in some minutes on two CPU cores, on images that it makes."""
    big = cifar10()
    c = big.config
    return Preset(
        replace(
            c,
            checkpoint_every=100,
            reference=200,
            classifier=replace(c.classifier, steps=60, batch_size=32, channels=8, features=32),
            autoencoder=replace(
                c.autoencoder,
                steps=200,
                batch_size=16,
                learning_rate=4e-3,
                channels=(16, 32),
                latent_channels=4,
                gan_start=150,
                discriminator_channels=8,
            ),
            latents=LatentsConfig(batch_size=100, images_per_shard=100),
            diffusion=replace(
                c.diffusion, steps=600, batch_size=32, learning_rate=4e-3, warmup=20,
                ema_decays=(0.99,),
            ),
            dit=DiTConfig("dit_s_2", depth=4, width=96, num_heads=3),
        ),
        SamplingConfig("ddim", 20, 1.5, (0.0, 0.8)),
        80,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset for preset in (imagenet256, cifar10, smoke)
}


def from_dict(values: dict[str, Any]) -> Config:
    """The `Config` that a run folder's config.json describes."""
    return options.from_dict(Config, values)


def check_sizes(
    config: Config,
    images: int,
    num_classes: int,
    mesh: Any,
    grad_accum_steps: int,
    given: AutoencoderKL | None,
    stages: tuple[str, ...],
) -> None:
    """Refuses sizes that do not fit each other, before anything is written or allocated."""
    for stage in stages:
        batch = getattr(config, stage).batch_size
        if batch > images:
            raise UserError(
                f"--{stage}.batch-size {batch} is more than the {images} training images."
            )
        try:
            check_batch(batch, mesh, grad_accum_steps if stage == "diffusion" else 1)
        except ValueError as error:
            raise UserError(f"--{stage}.batch-size: {error}") from None
    crop = config.autoencoder.crop_from
    if crop is not None and crop < config.size:
        raise UserError(f"--autoencoder.crop-from {crop} is less than --size {config.size}.")
    if config.size < 11:
        raise UserError(f"--size {config.size}: SSIM needs at least 11 x 11 pixels.")
    x = jax.ShapeDtypeStruct((CHANNELS, config.size, config.size), jnp.float32)

    def denoise():
        ae = given or make_autoencoder(config, config.autoencoder, CHANNELS)
        dit = make_dit(config, ae.latent_shape(config.size, config.size), num_classes)
        return dit(jnp.zeros(dit.shape), jnp.array(0.5), dit.null)

    def discriminate(x):
        ae = make_autoencoder(config, config.autoencoder, CHANNELS)
        return make_discriminator(config, config.autoencoder, CHANNELS)(ae.decode(ae.encode(x)))

    try:
        if "diffusion" in stages:
            eqx.filter_eval_shape(denoise)
        logits = None if given else eqx.filter_eval_shape(discriminate, x)
    except ValueError as error:
        raise UserError(f"{config.size} x {config.size} images: {error}") from None
    if logits is not None and 0 in logits.shape:
        raise UserError(
            f"--autoencoder.discriminator-layers {config.autoencoder.discriminator_layers} leave "
            f"nothing of a {config.size} x {config.size} image."
        )


def judge_size(size: int) -> int:
    """What the judge sees of images of this side: the largest part of it up to 64 pixels.

    >>> judge_size(32), judge_size(256), judge_size(96)
    (32, 64, 48)
    """
    return next(size // k for k in range(1, size + 1) if size % k == 0 and size // k <= 64)


def make_classifier(config: Config, num_classes: int) -> ConvClassifier:
    side = judge_size(config.size)
    return ConvClassifier(
        (CHANNELS, side, side),
        num_classes,
        channels=config.classifier.channels,
        features=config.classifier.features,
        key=stage_key(config, "classifier", "model"),
    )


def make_diffusion(config: Config) -> Diffusion:
    return named_diffusion(config.diffusion, learned_range=config.diffusion.learned_range)


def make_distance(config: AutoencoderConfig) -> Callable[[Any, Any], Any]:
    return {"l1": l1_distance, "l2": l2_distance}[config.distance]


def make_averages(config: DiffusionConfig) -> tuple[Callable[[Any], Any], ...]:
    """The decay of each average: those that were named, then those by power functions."""
    decay = exponential if config.ema_warmup else constant
    return (*map(decay, config.ema_decays), *map(power_function, config.posthoc))


def check_diffusion(config: Config) -> None:
    """Refuses names and widths that do not go together."""
    make_diffusion(config)
    try:
        make_averages(config.diffusion)
    except ValueError as error:
        raise UserError(f"--diffusion.posthoc: {error}") from None


def dit_sizes(config: DiTConfig) -> dict[str, Any]:
    """The published size's depth, width, heads and patch, or what was given instead."""
    dit = eqx.filter_eval_shape(MODELS[config.model], (4, 32, 32), key=jax.random.key(0))
    published = dit.config
    given = {name: getattr(config, name) for name in ("depth", "width", "num_heads", "patch_size")}
    return {name: getattr(published, name) if n is None else n for name, n in given.items()}


def make_dit(
    config: Config,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    remat: RematName = "narrow",
    attention: AttentionName = "xla",
) -> DiT:
    """The denoiser for latents of this shape."""
    return DiT(
        shape,
        num_classes=num_classes,
        learn_sigma=config.diffusion.learned_range,
        qk_norm=nn.RMSNorm if config.dit.qk_norm else None,
        remat={
            "everything": jax.checkpoint_policies.nothing_saveable,
            "narrow": models.save_narrow,
            "matmuls": models.save_matmuls,
            "nothing": None,
        }[remat],
        attention={"xla": nn.attend, "cudnn": nn.cudnn_attend}[attention],
        key=stage_key(config, "diffusion", "model"),
        **dit_sizes(config.dit),
    )
