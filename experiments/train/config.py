"""What can be set: dataclasses whose fields have a sentence and a range each."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from eqxldm.text import MERGES

from .options import (
    Batch,
    Depth,
    Few,
    MaybeSteps,
    Range,
    Rate,
    Samples,
    Seed,
    Share,
    Side,
    Steps,
    Weight,
    Width,
)

GuidanceScheduleName = Literal["fixed", "linear", "cosine", "bounded"]
PresetName = Literal["mnist", "fashion-mnist", "cifar10", "text", "imagenet256", "images", "smoke"]
DataName = Literal["images", "mnist", "fashion-mnist", "emoji", "shapes"]
SpaceName = Literal["latent", "pixel"]
DenoiserName = Literal["dit", "unet"]
TokenName = Literal["bytes", "clip", "frozen"]
ConditionName = Literal["auto", "label", "text", "none"]
ObjectiveName = Literal["denoising", "flow", "meanflow", "imf", "shortcut", "scm"]
FormName = Literal["published", "modern", "jit"]
NormName = Literal["layer", "rms"]
PathName = Literal["flow", "cosine", "ddpm"]
PredictionName = Literal["velocity", "eps", "v", "x0"]
WeightName = Literal["constant", "min-snr", "velocity"]
SolverName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "heun",
    "euler-maruyama",
    "dpmsolver++",
    "dpmsolver++3m",
    "unipc",
    "sde-dpmsolver++",
    "map",
]
ModelName = Literal[
    "dit_s_2", "dit_s_4", "dit_s_8", "dit_b_2", "dit_b_4", "dit_b_8",
    "dit_l_2", "dit_l_4", "dit_l_8", "dit_xl_2", "dit_xl_4", "dit_xl_8",
]  # fmt: skip
DTypeName = Literal["float32", "bfloat16"]
RematName = Literal["everything", "narrow", "matmuls", "nothing"]
AttentionName = Literal["xla", "cudnn", "flash"]
Time = Annotated[float, Range(0, 1)]
Interval = tuple[Time, Time]


def default_form(preset: PresetName, space: SpaceName, denoiser: DenoiserName) -> FormName:
    """The form that a preset has where none is named: the one that won there (docs/modern.md).

    >>> default_form("cifar10", "latent", "dit"), default_form("cifar10", "latent", "unet")
    ('modern', 'published')
    """
    won = preset == "cifar10" and space == "latent" and denoiser == "dit"
    return "modern" if won else "published"


@dataclass(frozen=True)
class PictureOptions:
    """The images, and what a network is told of them."""

    # Where they come from: --images, or MNIST's files or emoji (--images, or fetched), or made.
    data: DataName = "images"
    # 1 for grey, 3 for colour, 4 for colour with transparency; files are converted.
    channels: Annotated[int, Range(1, 4)] = 3
    # Black pixels around each image while it is in a network: MNIST's 28 + 2 * 2 divide by 8.
    pad: Annotated[int, Range(0, 64)] = 0
    flip: bool = True  # Half of the images, drawn anew each epoch, are mirrored.
    # The network is told the class, the caption or nothing; auto: the first of text and label that
    # the images have.
    condition: ConditionName = "auto"
    # Labels of the network; by default as many as the images have classes.
    num_classes: Annotated[int, Range(1, 10**7)] | None = None
    # Real images, at most, that samples are measured against.
    reference: Samples = 10_000


@dataclass(frozen=True)
class ClassifierConfig:
    """The small classifier of these images, at most 64 x 64, whose features measure the samples.

    Without labels it learns which way up an image was turned.
    """

    steps: Steps = 20_000  # Training steps.
    batch_size: Batch = 256  # Images in a step.
    learning_rate: Rate = 1e-3  # The peak, after a tenth of the steps; then a cosine to 0.
    channels: Width = 64  # Of the first convolution; the second has twice as many.
    features: Width = 256  # Units of the last layer before the classes: the features.


@dataclass(frozen=True)
class AutoencoderConfig:
    """The VAE and its discriminator, where none is given by --vae."""

    steps: Steps = 200_000  # Training steps.
    batch_size: Batch = 32  # Images in a step.
    learning_rate: Rate = 1e-4  # The peak, after at most 50 steps; then a cosine to 0.
    # The width of each level; each further one halves the resolution.
    channels: tuple[Width, ...] = (128, 256, 512, 512)
    patch_size: Few = 1  # Space-to-depth before the first and after the last layer.
    blocks: Few = 2  # Residual blocks a level.
    groups: Width = 32  # Of every group norm; divides every width.
    latent_channels: Width = 4  # Channels of a latent.
    attention: bool = True  # Self-attention in the deepest level.
    # Between image and reconstruction: absolute or squared error.
    distance: Literal["l1", "l2"] = "l1"
    # Of LPIPS, where --lpips gives its weights; 0 only measures by it.
    perceptual_weight: Weight = 1.0
    kl_weight: Weight = 1e-6  # Of the posterior's divergence from N(0, I), in nats a pixel value.
    ema_decay: Share = 0.999  # Of the average of the weights, which is what encodes and decodes.
    gan_weight: Weight = 0.5  # Times the adaptive weight; 0 trains without the discriminator.
    gan_start: MaybeSteps = 50_000  # The step at which the discriminator sets in.
    # Of the discriminator's first layer; each further one doubles them.
    discriminator_channels: Width = 64
    discriminator_layers: Few = 3  # Layers that halve the resolution.
    discriminator_learning_rate: Rate = 1e-4  # Constant.
    # Random crops out of a centre crop whose short side is this; by default the centre crop.
    crop_from: Side | None = None
    dtype: DTypeName = "float32"  # What the networks compute in; their weights stay float32.


@dataclass(frozen=True)
class LatentsConfig:
    """The latent cache."""

    batch_size: Batch = 64  # Images encoded at once, by each process.
    dtype: Literal["float16", "bfloat16"] = "float16"  # What is stored.
    # What an interruption costs at most; by default what makes 256 shards, at least 1024.
    images_per_shard: Batch | None = None
    # Images from which shift and scale of one's own autoencoder are measured.
    statistics: Annotated[int, Range(2, 10**7)] = 4096


@dataclass(frozen=True)
class DiTConfig:
    """The transformer's size: a published one, and what differs from it."""

    # A size of Peebles & Xie 2023: S, B, L or XL with patches of 2, 4 or 8.
    model: ModelName = "dit_xl_2"
    depth: Depth | None = None  # Blocks.
    width: Width | None = None  # Numbers in a token.
    num_heads: Width | None = None  # Heads of the attention; divides the width.
    # The side of what makes a token; divides the sides of latents or images.
    patch_size: Few | None = None
    qk_norm: bool = False  # Normalise queries and keys.
    # Before attention and MLP: a layer norm without parameters, or RMSNorm.
    norm: NormName = "layer"
    swiglu: bool = False  # MLPs with a gate, of as many parameters.
    rope: bool = False  # Rotate queries and keys by their patch's place.
    # Condition and time shift and scale every block; otherwise they come as tokens alone.
    modulated: bool = True
    # Tokens of the class or the caption's vector that stand before the patches.
    condition_tokens: Annotated[int, Range(0, 1024)] = 0
    time_tokens: Annotated[int, Range(0, 1024)] = 0  # The same of the time.
    # The block from which on these tokens are there.
    tokens_start: Annotated[int, Range(0, 1000)] = 0
    # After so many blocks comes the auxiliary head of --diffusion.early, and --diffusion.dispersive
    # looks at the tokens.
    early_depth: Depth | None = None
    # A patch goes through so few numbers before it is a token.
    bottleneck: Width | None = None


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's size."""

    # The width of each level; each further one halves the resolution.
    channels: tuple[Width, ...] = (128, 256, 256, 512)
    blocks: Few = 2  # Residual blocks a level, one more on the way up.
    num_heads: Width = 4  # Of the attention, which is in the deepest level and the middle.
    groups: Width = 32  # Of every group norm; divides every width.


@dataclass(frozen=True)
class TextConfig:
    """The encoder of captions: a small transformer that is trained along, or a frozen one."""

    # What a caption is cut into: its bytes, or byte pairs as CLIP does (the extra "text"); frozen:
    # a published encoder, --text-encoder, encodes all captions once, and is not trained.
    tokens: TokenName = "bytes"
    # Of CLIP's list of byte pairs, the commonest first: fewer cut rare words into more tokens.
    merges: Annotated[int, Range(0, MERGES)] = MERGES
    # Tokens of a caption that are read, with those of start and end.
    max_length: Annotated[int, Range(2, 1024)] = 96
    depth: Depth = 2  # Blocks.
    width: Width | None = None  # Numbers in a token; by default the DiT's.
    num_heads: Width = 4  # Heads of the attention.
    # The DiT looks at the tokens by cross-attention; otherwise they join the image's own.
    cross_attention: bool = False


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion, and the training of its network. The defaults are DiT's."""

    steps: Steps = 400_000  # Training steps.
    batch_size: Batch = 256  # Images in a step, of all devices together.
    learning_rate: Rate = 1e-4  # The peak, after the warm-up.
    warmup: MaybeSteps = 0  # Steps in which the rate rises from 0.
    cosine_decay: bool = False  # Let the rate fall to 0 as a cosine; otherwise it stays.
    weight_decay: Weight = 0.0  # Of matrices and convolutions.
    b2: Share = 0.999  # AdamW's decay of squared gradients.
    # The largest norm of a gradient; by default any.
    clip_norm: Annotated[float, Range(0, 1e6, "(]")] | None = None
    # Decays of the averages of the weights; the first one is sampled.
    ema_decays: tuple[Share, ...] = (0.9999,)
    # Let the averages forget the random start: a decay of at most (1 + step) / (10 + step).
    ema_warmup: bool = False
    # Averages by power functions of these widths (sigma_rel), for averages of any length later.
    posthoc: tuple[Annotated[float, Range(0, 1, "()")], ...] = ()
    snapshot_every: Steps = 5000  # Steps between the snapshots of those that are kept.
    # The share of examples whose condition is hidden, which guidance needs.
    cond_dropout: Annotated[float, Range(0, 1)] = 0.1
    # The noising: linear flow, cosine or DDPM's table of 1000 linear betas.
    path: PathName = "ddpm"
    prediction: PredictionName = "eps"  # What the network outputs.
    # The network chooses the variance of its steps too, by the hybrid loss; "ddpm" path only.
    learned_range: bool = True
    # Of the loss; min-snr (gamma = 5) means the same loss for every prediction, velocity that of
    # the velocity.
    weight: WeightName = "constant"
    cosine: Weight = 0.0  # Of a term on the velocity's direction.
    early: Weight = 0.0  # Of the same loss of an auxiliary head at --dit.early-depth.
    dispersive: Weight = 0.0  # Of a term that pushes the examples' tokens there apart.
    # Moves training times towards noise; 1: not. Of data of d numbers sqrt(d / 4096) is common.
    time_shift: Annotated[float, Range(0, 100, "(]")] = 1.0
    # Of the logit-normal training times; positive favours noise. The "ddpm" path has its own.
    time_mean: Annotated[float, Range(-20, 20)] = 0.0
    time_stddev: Annotated[float, Range(0, 20, "(]")] = 1.0  # Of the logit-normal training times.
    dtype: DTypeName = "bfloat16"  # What the network computes in; its weights stay float32.


@dataclass(frozen=True)
class FewStepConfig:
    """Training for one or few network calls: the objectives meanflow, imf, shortcut and scm."""

    # Steps at the start that learn the denoiser itself; 0 with --start-from.
    pretrain: MaybeSteps = 0
    # The scale of guidance that the network learns to have in it; 1 for none.
    guidance: Annotated[float, Range(1, 100)] = 1.6
    # Learn it only for t between these two.
    guidance_interval: Interval = (0.0, 0.8)
    # The share of examples with a step of 0, which learn the velocity.
    flow_share: Annotated[float, Range(0, 1)] = 0.5
    # Of the times, which are logit-normal; of scm that of log(sigma / alpha).
    time_mean: Annotated[float, Range(-20, 20)] = -0.4
    time_stddev: Annotated[float, Range(0, 20, "(]")] = 1.0  # Of the same.
    # Of scm: steps in which the unstable part of its tangent comes in.
    warmup: MaybeSteps = 200
    # Of imf with classes: scale and interval of guidance are conditions of the network, drawn in
    # training and chosen when it is sampled, in place of --few.guidance.
    conditioned: bool = False
    largest: Annotated[float, Range(1, 100, "(]")] = 4.0  # The largest of these scales.


@dataclass(frozen=True)
class SamplingConfig:
    """How the finished model is sampled."""

    # What takes the steps; map: each is one call of a network that was trained for few.
    solver: SolverName = "ddim"
    steps: Annotated[int, Range(1, 10_000)] = 20  # Steps from noise to image.
    # The scale of classifier-free guidance: 1 is the conditional network alone.
    guidance: Annotated[float, Range(0, 100)] = 1.6
    # The scale over time: fixed; rising from 1 at noise to 2 scale - 1 at data, by a line or a
    # cosine; or that end's value where the two outputs are close, less where they are far apart.
    guidance_schedule: GuidanceScheduleName = "fixed"
    # Guide only for t between these two (0 is data); outside, the conditional network alone.
    guidance_interval: Interval = (0.0, 0.8)
    # The scale of guidance by the auxiliary head of --diffusion.early; 1 for none.
    internal_guidance: Annotated[float, Range(0, 100)] = 1.0
    # Guide by it only for t between these two.
    internal_interval: Interval = (0.3, 1.0)
    # Moves the times of the steps towards noise, as --diffusion.time-shift those of training.
    shift: Annotated[float, Range(0, 100, "(]")] = 1.0


@dataclass(frozen=True)
class Config:
    """What a run's results depend on: the run folder belongs to it."""

    size: tuple[Side, Side] = (64, 64)  # Height and width, after a centre crop.
    space: SpaceName = "latent"  # What is diffused: an autoencoder's latents, or the pixels.
    denoiser: DenoiserName = "dit"  # The network: a transformer or a U-Net.
    # Of the transformer: DiT as published; modern, with what newer ones added; jit, for pixels.
    form: FormName = "published"
    # What is learned: to denoise, with the options of --diffusion; the velocity of the linear flow;
    # or, for one or few network calls, average velocities or a consistency function.
    objective: ObjectiveName = "denoising"
    seed: Seed = 0  # Of everything that is random.
    pictures: OmitArgPrefixes[PictureOptions] = field(default_factory=PictureOptions)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    few: FewStepConfig = field(default_factory=FewStepConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of what networks see."""
        h, w = self.size
        return h + 2 * self.pictures.pad, w + 2 * self.pictures.pad
