"""The options of a run over clips."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from eqxldm.data import Wanted
from eqxldm.text import MERGES

from ..train.config import AttentionName
from ..train.options import (
    Batch,
    Count,
    Depth,
    Few,
    MaybeSteps,
    OptimizerName,
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
from ..train.telemetry import LogOptions

FramesCount = Annotated[int, Range(1, 1025)]
FPS = 8.0  # where the clips have no rate of their own


@dataclass(frozen=True)
class ClipOptions:
    """What a clip is. The number of frames is 4 k + 1: the first is a latent frame of its own, and
    four others share one."""

    frames: FramesCount = 17  # Frames of a clip, 4 k + 1.
    size: tuple[Side, Side] = (64, 64)  # Height and width, multiples of 16.
    channels: Literal[1, 3] = 1  # 1 for grey, 3 for colour.
    # Frames a second; frames of files are taken as they come, unless it is given.
    fps: Annotated[float, Range(0, 1000, "(]")] | None = None
    # The network is told the caption, or nothing; auto: the caption if the clips have any.
    condition: Literal["auto", "text", "none"] = "auto"
    digits: Annotated[int, Range(1, 9)] = 2  # Digits in a clip that is made.
    sound: bool = False  # Digits sound when they bounce, and clips are made with their sound.
    count: Samples = 4096  # Clips that are made to learn from, where no folder is given.
    test: Samples = 400  # Clips to measure against; of a folder at most a tenth of its clips.
    # Of a folder: these are of files of their own, or any clips, also of files that teach.
    test_by: Literal["files", "clips"] = "files"

    @property
    def rate(self) -> float:
        """Frames a second at which clips are made and played."""
        return self.fps or FPS

    def wanted(self, frames: int) -> Wanted:
        """So many frames of a file; with sound, which goes by the clock, they have the rate."""
        return Wanted(frames, self.size, self.channels, self.rate if self.sound else self.fps)


@dataclass(frozen=True)
class ClassifierOptions:
    """The networks that measure: of digits, where digits move, and of whole clips."""

    steps: Steps = 600  # Training steps of each.
    batch_size: Batch = 64  # Examples in a step.
    learning_rate: Rate = 3e-3  # The peak, after a tenth of the steps; then a cosine to 0.
    channels: Width = 32  # Of the first convolution; the second has twice as many.
    features: Width = 128  # Units of the layer whose values are the features.


@dataclass(frozen=True)
class AutoencoderOptions:
    """The causal autoencoder, 4 x 8 x 8: a latent pixel is 8 x 8 pixels of four frames."""

    steps: Steps = 2000  # Training steps.
    batch_size: Batch = 4  # Crops in a step.
    crop: Annotated[int, Range(16, 8192)] = 32  # The crops' height and width.
    # The crops' frames, 4 k + 1; by default all of a clip: later ones would be worse.
    crop_frames: FramesCount | None = None
    optimizer: OptimizerName = "muon"
    learning_rate: Rate = 1e-2  # The peak, after 50 steps; then a cosine to 0.
    channels: tuple[Width, Width, Width] = (16, 32, 64)  # Of the levels, of half the side each.
    cell_map: bool = (
        True  # A linear map of 4 x 8 x 8 pixels beside the convolutions, learned first.
    )
    patch_size: Literal[2] = 2  # The side of the squares that are folded into channels first.
    blocks: Few = 1  # Residual blocks in a level.
    latent_channels: Width = 16  # Numbers in a latent pixel.
    kl_weight: Weight = 1e-3  # Of the KL divergence, in nats a pixel.
    ema_decay: Share = 0.99  # Of the average of the weights, which is what is used.


@dataclass(frozen=True)
class DiffusionOptions:
    """The spacetime transformer and how it learns."""

    steps: Steps = 7000  # Training steps.
    batch_size: Batch = 16  # Clips in a step.
    # Steps before these of the first frames alone, which are pictures; 0: none, as with `--sound`
    # and where a token is of several latent frames.
    image_steps: MaybeSteps = 4000
    image_batch_size: Batch = 48  # Pictures in such a step.
    image_weight: Weight = 0.25  # Of the loss of `--images` beside that of as many clips.
    optimizer: OptimizerName = "adamw"
    learning_rate: Rate = 4e-3  # The peak, after the warm-up; then a cosine to 0.
    warmup: MaybeSteps = 100  # Steps in which the rate rises from 0.
    weight_decay: Weight = 0.01  # Of matrices.
    ema_decay: Share = 0.995  # Of the average of the weights, which is what is used.
    shift: Annotated[float, Range(0, 100, "(]")] = 2.0  # Of the time: above 1, more of the noisy.
    caption_dropout: Share = 0.1  # The share of the clips whose caption is not told.
    # What the network's output means; the loss is that of the velocity which it says.
    prediction: Literal["v", "x0", "velocity"] = "v"
    known_share: Share = 0.3  # The share of the clips whose first frames are told.
    depth: Depth = 6  # Blocks.
    width: Width = 144  # Numbers in a token, a multiple of six.
    num_heads: Width = 6  # Heads of the attention.
    swiglu: bool = False  # MLPs with a gate, of as many parameters.
    patch_size: tuple[Few, Few, Few] = (1, 2, 2)  # Latent frames, rows and columns in a token.
    text_depth: Depth = 1  # Blocks of the encoder of captions' tokens.
    # What is read of a caption: the digits and directions that it names, of clips that are made; or
    # its tokens: byte pairs as CLIP does (the extra "text"), the default of --videos, or its bytes.
    tokens: Literal["digits", "clip", "bytes"] = "digits"
    # Of CLIP's list of byte pairs, the commonest first: fewer cut rare words into more tokens.
    merges: Annotated[int, Range(0, MERGES)] = 4096
    # Tokens of a caption that are read, with those of start and end.
    max_length: Annotated[int, Range(2, 10**4)] = 16
    dtype: Literal["float32", "bfloat16"] = "float32"  # What the transformer computes in.


@dataclass(frozen=True)
class SoundOptions:
    """Sound: its autoencoder, and which times of the two parts are learned. Needs `--sound`."""

    steps: Steps = 800  # Training steps of the autoencoder.
    batch_size: Batch = 32  # Spectrograms in a step.
    learning_rate: Rate = 2e-3  # The peak, after 50 steps; then a cosine to 0.
    width: Width = 128  # Channels of its convolutions over time.
    blocks: Few = 2  # Residual blocks of the encoder, and of the decoder.
    latent_channels: Width = 16  # Numbers in a step of the latent, a sixteenth of a second.
    kl_weight: Weight = 1e-3  # Of the KL divergence, in nats a number of the spectrogram.
    ema_decay: Share = 0.99  # Of the average of the weights, which is what is used.
    given: Share = 0.4  # The share of the clips of which one part is given and the other learned.
    alone: Share = 0.1  # The share of which one part is learned and the other is noise.
    apart: Share = 0.1  # The share of which each part has a time of its own.


@dataclass(frozen=True)
class SamplingOptions:
    """How clips are drawn."""

    solver: Literal["euler", "heun", "dpmsolver++", "unipc"] = "dpmsolver++"
    steps: Annotated[int, Range(1, 10_000)] = 20  # Of the solver.
    guidance: Annotated[float, Range(0, 100)] = 4.0  # By the caption; 1 is none.


@dataclass(frozen=True)
class Config:
    """What a run's results depend on: the run folder belongs to it."""

    clips: OmitArgPrefixes[ClipOptions] = field(default_factory=ClipOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    # (`--sound` itself, which is true or false, is of the clips.)
    sound: SoundOptions = field(default_factory=SoundOptions)
    seed: Seed = 0  # Of everything that is random.

    @property
    def pictures_first(self) -> bool:
        """Whether there is a stage of first frames alone. These must be tokens of their own."""
        possible = self.clips.frames > 1 and self.diffusion.patch_size[0] == 1
        return self.diffusion.image_steps > 0 and possible and not self.clips.sound


def earlier(*, files: bool = False) -> Config:
    """What options stand for that a run of an earlier version does not have; `files`: one over
    `--videos`, which was divided by clips."""
    autoencoder = AutoencoderOptions(optimizer="adamw", cell_map=False)
    return Config(
        clips=ClipOptions(test_by="clips" if files else "files"),
        autoencoder=autoencoder,
        diffusion=DiffusionOptions(image_steps=0, prediction="velocity", tokens="bytes"),
    )


SMOKE = """
    --count 64 --test 20 --size 32 32 --frames 9 --classifier.steps 40 --classifier.channels 8
    --classifier.features 16 --classifier.batch-size 16 --autoencoder.steps 60
    --autoencoder.batch-size 4 --autoencoder.crop 16 --autoencoder.crop-frames 5
    --autoencoder.channels 8 8 8 --autoencoder.latent-channels 4 --diffusion.steps 60
    --diffusion.batch-size 8 --diffusion.image-steps 20 --diffusion.image-batch-size 16
    --diffusion.depth 2 --diffusion.width 48 --diffusion.num-heads 2 --diffusion.warmup 10
    --sound.steps 60 --sound.batch-size 8 --sound.width 32 --sound.latent-channels 8
    --sampling.steps 4 --samples 12 --run-dir runs/video-smoke
"""


LARGE = """
    --count 40000 --autoencoder.steps 3000 --autoencoder.batch-size 16
    --diffusion.steps 17000 --diffusion.batch-size 64 --diffusion.image-steps 2500
    --diffusion.image-batch-size 256 --diffusion.learning-rate 1e-3 --diffusion.warmup 500
    --diffusion.ema-decay 0.999 --diffusion.depth 8 --diffusion.width 384
    --diffusion.patch-size 1 1 1 --diffusion.dtype bfloat16 --checkpoint-every 2000
    --run-dir runs/video-large
"""


@dataclass(frozen=True)
class Train(Config):
    """Train everything on clips, draw some and measure them.

    Goes on where an interrupted run stopped.
    """

    # A folder of clips (mp4, webm, gif, webp, folders of frames), with captions.json or in folders
    # by class; by default moving digits, made of MNIST.
    videos: Path | None = None
    # Images that are learned before the clips, in place of first frames, and then beside them: as
    # for training on images, with captions, or in folders by class. With `--videos`.
    images: Path | None = None
    mnist: Path | None = None  # A folder with MNIST's four files, which are fetched otherwise.
    run_dir: Path = Path("runs/video")  # The run folder.
    samples: Samples = 100  # Clips that are drawn and measured at the end.
    overwrite: bool = False  # Delete what the run in the folder wrote, and start anew.
    strict: bool = False  # Stop at a file that cannot be used; by default it is listed.
    mesh: str = ""  # How devices share the work: data=2,fsdp=4. By default all are on data.
    checkpoint_every: Steps = 400  # Steps between checkpoints.
    sampling_batch: Batch = 20  # Clips drawn or encoded at once.
    # Of the transformer in training: cudnn is for bfloat16 on a GPU, flash for a thousand tokens
    # and more on a TPU.
    attention: AttentionName = "xla"
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def config(self) -> Config:
        """The part of the options that the run folder belongs to."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


@dataclass(frozen=True)
class Sample:
    """Draw clips with a finished run."""

    run_dir: Path = Path("runs/video")  # The run folder.
    prompt: str | None = None  # The caption, of a run with captions; by default those of the test.
    n: Count = 8  # How many clips.
    # A picture, which is the first frame, or a clip, whose first frames are told: 4 k + 1 of them.
    first: Path | None = None
    first_frames: FramesCount | None = None  # How many; by default one of a picture, 5 of a clip.
    # Of a run with sound: a clip, to which the sound is drawn, or a WAV file, to which clips are.
    clip: Path | None = None
    wav: Path | None = None
    # Frames of longer clips, by windows that begin with the last frames of the one before.
    frames: FramesCount | None = None
    overlap: FramesCount = 5  # Frames, 4 k + 1, that a window shares with the one before.
    seed: Seed = 0  # Another one draws other clips.
    out: Path | None = None  # The animation: .png, .gif, .webp, .mp4; by default in the run folder.
    sampling_batch: Batch = 20  # Clips drawn at once.
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)


def check_clips(clips: ClipOptions) -> str | None:
    """What is wrong with the numbers of a clip, or None."""
    if (clips.frames - 1) % 4:
        return (
            f"--frames {clips.frames}: must be 4 k + 1, such as {(clips.frames - 1) // 4 * 4 + 1}."
        )
    if any(side % 16 for side in clips.size):
        h, w = clips.size
        return f"--size {h} {w}: both must be multiples of 16: 8 pixels of the latent's, twice."
    fps = clips.rate
    if clips.sound and (1000 / fps != round(1000 / fps) or not 4 <= fps <= 100):
        return (
            f"--fps {fps:g}: with sound it must lie in [4, 100] and divide 1000, such as 8 or 10."
        )
    return None


# By the option that comes before all else.
PRESETS = {"--smoke": SMOKE, "--large": LARGE}


def preset(name: str, train: Train) -> Any:
    """The options with those of `PRESETS[name]`."""
    import tyro

    return tyro.cli(Train, args=PRESETS[name].split(), default=train)
