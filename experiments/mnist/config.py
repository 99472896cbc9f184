"""What can be set, the defaults, and what they are turned into."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import equinox as eqx
import jax

import eqxldm as ex
from eqxldm.data import Digits
from eqxldm.models import AutoencoderKL, ConvClassifier, DiT, PatchDiscriminator, UNet

from ..common.terminal import UserError
from .spaces import Pixels

Dataset = Literal["mnist", "fashion-mnist"]
SpaceName = Literal["latent", "pixel"]
DenoiserName = Literal["dit", "unet"]
PathName = Literal["flow", "cosine", "ddpm"]
PredictionName = Literal["velocity", "eps", "v", "x0"]
WeightName = Literal["constant", "min-snr"]
SolverName = Literal[
    "ddim", "ddpm", "euler", "heun", "euler-maruyama", "dpmsolver++", "sde-dpmsolver++"
]

TIMESTEPS = 1000  # of the "ddpm" path's table


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
    patch: int = 2
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
    heads: int = 4
    patch: int | None = None
    """By default 2 for latents, 4 for pixels."""


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's size."""

    channels: tuple[int, ...] | None = None
    """The width of each level; by default 64 128 for latents, 16 32 64 for pixels."""
    blocks: int = 1
    """Residual blocks a level, one more on the way up."""
    heads: int = 4
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
class SamplingConfig:
    """How the finished model is sampled."""

    solver: SolverName = "ddim"
    steps: int = 20
    guidance: float = 1.6
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    """Guide only for t between these two (0 is data); outside, the conditional network alone."""


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
        dit=replace(dit, patch=or_else(dit.patch, PATCHES[config.space])),
        unet=replace(unet, channels=or_else(unet.channels, CHANNELS[config.space])),
    )


def run_name(dataset: Dataset, space: SpaceName, denoiser: DenoiserName) -> str:
    """The run folder's name: the dataset, and what is not the default."""
    return "-".join(
        [dataset, *(["pixel"] * (space == "pixel")), *(["unet"] * (denoiser == "unet"))]
    )


def from_dict(values: dict[str, Any]) -> Config:
    """The `Config` that a run folder's config.json describes."""
    try:
        parts = dict(values)
        parts["classifier"] = ClassifierConfig(**parts["classifier"])
        for name, kind in (("autoencoder", AutoencoderConfig), ("unet", UNetConfig)):
            part = dict(parts[name])
            part["channels"] = tuple(part["channels"])
            parts[name] = kind(**part)
        parts["diffusion"] = DiffusionConfig(**parts["diffusion"])
        parts["dit"] = DiTConfig(**parts["dit"])
        return Config(**parts)
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json was written by another version: {error}") from None


POSITIVE = {
    "steps", "batch_size", "learning_rate", "patch", "blocks", "groups", "latent_channels",
    "depth", "width", "heads", "clip_norm", "time_stddev", "discriminator_channels",
    "discriminator_layers", "discriminator_learning_rate", "checkpoint_every", "samples", "n",
}  # fmt: skip
NOT_NEGATIVE = {"pad", "kl_weight", "gan_weight", "gan_start", "warmup", "weight_decay", "seed"}
SHARES = {"ema_decay", "label_dropout"}


def check(config: Any, prefix: str = "") -> None:
    """Refuses numbers that make no sense, by the option's name."""
    for f in dataclasses.fields(config):
        value, option = getattr(config, f.name), f"--{prefix}{f.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{f.name}.")
        elif value is None:
            continue
        elif isinstance(value, (int, float)) and value != value:
            raise UserError(f"{option} must be a number, got {value}.")
        elif f.name in POSITIVE and not value > 0:
            raise UserError(f"{option} must be positive, got {value}.")
        elif f.name in NOT_NEGATIVE and value < 0:
            raise UserError(f"{option} must not be negative, got {value}.")
        elif f.name in SHARES and not 0 <= value < 1:
            raise UserError(f"{option} must lie in [0, 1), got {value}.")
    if isinstance(config, DiffusionConfig) and config.warmup >= (config.steps or 10**9):
        raise UserError(
            f"--diffusion.warmup {config.warmup} must be below --diffusion.steps {config.steps}."
        )
    if isinstance(config, SamplingConfig):
        if not 0 <= config.guidance <= 100:
            raise UserError(f"--{prefix}guidance must lie in [0, 100], got {config.guidance}.")
        low, high = config.guidance_interval
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--{prefix}guidance-interval must be LOW HIGH with 0 <= LOW < HIGH <= 1, "
                f"got {low} {high}."
            )


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
        space = Pixels(c) if config.space == "pixel" else make_autoencoder(config, c)
        z = space.encode(x)
        shape = space.latent_shape(h + pad, w + pad)
        denoiser = make_network(config, shape, digits.num_classes)
        return denoiser(z, jax.numpy.array(0.5), denoiser.null), make_discriminator(config, c)(x)

    try:
        logits = eqx.filter_eval_shape(build)[1]
    except ValueError as error:
        raise UserError(f"{h} x {w} images with a border of {pad // 2}: {error}") from None
    if config.space == "latent" and 0 in logits.shape:
        raise UserError(
            f"--autoencoder.discriminator-layers {config.autoencoder.discriminator_layers} leave "
            f"nothing of a {h + pad} x {w + pad} image."
        )


def make_path(config: DiffusionConfig) -> ex.AbstractPath:
    if config.path == "flow":
        return ex.LinearFlow()
    if config.path == "cosine":
        return ex.CosineVP()
    return ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(TIMESTEPS)))


def make_prediction(config: DiffusionConfig) -> ex.Prediction:
    table = {
        "velocity": ex.predict_velocity,
        "eps": ex.predict_eps,
        "v": ex.predict_v,
        "x0": ex.predict_x0,
    }
    return table[config.prediction]


def make_weight(config: DiffusionConfig) -> Callable:
    if config.weight == "min-snr":
        return ex.min_snr_weight(make_prediction(config))
    return ex.constant_weight


def make_time_sampler(config: DiffusionConfig):
    if config.path == "ddpm":
        return ex.discrete_time(TIMESTEPS)
    return ex.logit_normal_time(config.time_mean, config.time_stddev)


def make_solver(sampling: SamplingConfig) -> ex.AbstractSolver:
    table = {
        "ddim": ex.DDIM(),
        "ddpm": ex.DDPM(),
        "euler": ex.Euler(),
        "heun": ex.Heun(),
        "euler-maruyama": ex.EulerMaruyama(lambda at: at.sigma),  # finite at t = 1
        "dpmsolver++": ex.DPMSolverPP2M(),
        "sde-dpmsolver++": ex.DPMSolverPP2M(1.0),
    }
    return table[sampling.solver]


def make_denoiser(network: DiT | UNet, sampling: SamplingConfig) -> ex.Denoiser:
    """The network with the guidance asked for."""
    if sampling.guidance == 1:
        return network
    return ex.guide(network, network.null, sampling.guidance, interval=sampling.guidance_interval)


def make_times(config: DiffusionConfig, sampling: SamplingConfig):
    """The time grid: the kept timesteps of the table, or evenly spaced times."""
    if config.path != "ddpm":
        return ex.uniform_times(sampling.steps)
    if sampling.steps > TIMESTEPS:
        raise UserError(f"--steps {sampling.steps}: the table has {TIMESTEPS} timesteps.")
    return ex.timestep_times(TIMESTEPS, ex.respace(TIMESTEPS, [sampling.steps]))


def check_sampling(config: DiffusionConfig, sampling: SamplingConfig) -> int:
    """Refuses what cannot be sampled, before anything is trained; returns the network calls."""
    path, solver, times = make_path(config), make_solver(sampling), make_times(config, sampling)
    try:
        ex.check_combination(path, make_prediction(config), solver, times)
    except ValueError as error:
        raise UserError(
            f"--diffusion.path {config.path}, --diffusion.prediction {config.prediction} and "
            f"--sampling.solver {sampling.solver} do not go together: {error}"
        ) from None
    return ex.evaluations(path, solver, times)


def make_classifier(config: Config, shape: tuple[int, int, int], num_classes: int):
    return ConvClassifier(shape, num_classes, key=stage_key(config, "classifier", "model"))


def make_autoencoder(config: Config, channels: int) -> AutoencoderKL:
    c = config.autoencoder
    return AutoencoderKL(
        channels,
        c.latent_channels,
        channels=c.channels,
        blocks=c.blocks,
        patch=c.patch,
        groups=c.groups,
        attention=c.attention,
        key=stage_key(config, "autoencoder", "model"),
    )


def make_discriminator(config: Config, channels: int) -> PatchDiscriminator:
    c = config.autoencoder
    return PatchDiscriminator(
        channels,
        channels=c.discriminator_channels,
        layers=c.discriminator_layers,
        groups=c.groups,
        key=stage_key(config, "discriminator", "model"),
    )


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
            heads=unet.heads,
            groups=unet.groups,
            num_classes=num_classes,
            key=key,
        )
    assert dit.patch is not None
    return DiT(
        shape,
        patch=dit.patch,
        depth=dit.depth,
        width=dit.width,
        heads=dit.heads,
        num_classes=num_classes,
        remat=jax.checkpoint_policies.nothing_saveable,
        key=key,
    )


STREAMS = ("classifier", "autoencoder", "discriminator", "diffusion", "sampling", "floor")
USES = ("model", "step", "data")


def stage_key(config: Config, stream: str, use: str):
    """An independent random stream for each use in each stage, all from the run's seed."""
    number = len(USES) * STREAMS.index(stream) + USES.index(use)
    return jax.random.fold_in(jax.random.key(config.seed), number)


def data_seed(config: Config, stream: str) -> int:
    """The same, as an integer for the shuffling of data."""
    return int(jax.random.randint(stage_key(config, stream, "data"), (), 0, 2**31 - 1))
