"""The options of a run over text."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from ..train.options import (
    Batch,
    Count,
    Depth,
    MaybeSteps,
    Range,
    Rate,
    Seed,
    Share,
    Steps,
    Weight,
    Width,
)
from ..train.telemetry import LogOptions


@dataclass(frozen=True)
class Config:
    """What a run's results depend on: the run folder belongs to it."""

    # What a token is: characters, bytes, or a file of the tokenizers library (extra `text`).
    tokens: str = "characters"
    length: Annotated[int, Range(4, 10**6)] = 128  # Tokens in a window.
    # The bound's estimator: a number of masked tokens, a time, or blocks one after the other.
    objective: Literal["count", "time", "block"] = "count"
    block_size: Annotated[int, Range(1, 10**6)] = 16  # Of --objective block; divides the length.
    steps: Steps = 4000  # Training steps of each of the two networks.
    batch_size: Batch = 16  # Windows in a step.
    learning_rate: Rate = 3e-3  # The peak, after the warm-up; then a cosine to 0.
    warmup: MaybeSteps = 100  # Steps in which the rate rises from 0.
    weight_decay: Weight = 0.03  # Of matrices.
    ema_decay: Share = 0.995  # Of the average of the weights, which is what is measured.
    depth: Depth = 3  # Blocks.
    width: Width = 128  # Numbers in a token.
    num_heads: Width = 4  # Heads of the attention; divides the width.
    seed: Seed = 0  # Of everything that is random.


SamplerName = Literal[
    "ancestral", "confidence", "drawn", "random", "margin", "entropy-bounded", "threshold", "blocks"
]
SAMPLERS: tuple[SamplerName, ...] = SamplerName.__args__


@dataclass(frozen=True)
class Measure:
    """What is measured at the end."""

    windows: Count = 256  # Windows of the held-out text whose likelihood is bounded.
    draws: Count = 16  # Masks drawn for each of them.
    samples: Count = 32  # Texts that each sampler writes.
    samplers: tuple[SamplerName, ...] = SAMPLERS  # Those that are compared.
    # Network calls of the samplers.
    calls: tuple[Annotated[int, Range(1, 10**5)], ...] = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Train(Config):
    """Train a masked diffusion model and its autoregressive twin on a text, measure both, write.

    Goes on where an interrupted run stopped.
    """

    text: Path | None = None  # A text file in UTF-8; by default 2.9 M characters of Wikipedia.
    run_dir: Path = Path("runs/words")  # The run folder.
    overwrite: bool = False  # Delete what the run in the folder wrote, and start anew.
    mesh: str = ""  # How devices share the work: data=2,fsdp=4. By default all are on data.
    checkpoint_every: Steps = 500  # Steps between checkpoints.
    measure: OmitArgPrefixes[Measure] = field(default_factory=Measure)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def config(self) -> Config:
        """The part of the options that the run folder belongs to."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


@dataclass(frozen=True)
class Generate:
    """Write with a finished run's network, or one of LLaDA's folders."""

    # A run's folder, or a folder with config.json, model*.safetensors and tokenizer.json of LLaDA.
    model: Path = Path("runs/words")
    prompt: str = ""  # What the text begins with.
    infill: bool = False  # In the prompt "_" is a blank to be filled in; nothing follows it.
    length: Annotated[int, Range(1, 10**6)] | None = None  # Tokens of the whole; by default all.
    calls: Annotated[int, Range(1, 10**6)] | None = None  # Steps; by default one for two tokens.
    sampler: SamplerName = "random"  # Which tokens are revealed first.
    block_size: Annotated[int, Range(1, 10**6)] = 16  # Of the sampler "blocks".
    temperature: Annotated[float, Range(0, 100)] = 1.0  # 0 takes the likeliest token.
    top_p: Annotated[float, Range(0, 1, "(]")] = 1.0  # The share of the likeliest tokens.
    guidance: Annotated[float, Range(0, 100)] = 1.0  # The scale of guidance by the prompt.
    n: Annotated[int, Range(1, 10**4)] = 1  # How many texts.
    seed: Seed = 0  # Another one writes other texts.
    mesh: str = ""  # How devices share a network: tensor=8.
    bfloat16: bool = False  # Compute in bfloat16, as the published networks do.
    out: Path | None = None  # Also write the text appearing, an HTML page.
