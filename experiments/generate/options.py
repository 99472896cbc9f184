"""The options of `make generate`, what they mean when left out, and their way into a picture."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from beartype.door import is_bearable

from ..train.options import Range
from ..train.run import as_dict
from ..train.terminal import UserError

SolverName = Literal[
    "ddim", "ddpm", "euler", "heun", "dpmsolver++", "dpmsolver++3m", "unipc", "sde-dpmsolver++"
]
Edge = Annotated[int, Range(1, 2**14)]  # of a picture, in pixels
WORDS = 2000  # of a prompt; no text encoder reads a quarter of them


@dataclass(frozen=True)
class Generate:
    """Pictures, or clips, from a folder of published weights."""

    # A diffusers folder, with a model_index.json.
    model: Path | None = None
    prompt: str | None = None  # What to draw.
    negative: str | None = None  # What guidance leads away from; by default nothing.
    label: str | None = None  # Of a DiT: a number, or a name that the folder gives.
    steps: Annotated[int, Range(1, 1000)] | None = None  # By default as diffusers.
    guidance: Annotated[float, Range(0, 100)] | None = None  # 1 and below is none.
    rescale: Annotated[float, Range(0, 1)] | None = None  # Guidance rescaled; 0.7 with zero SNR.
    # Of FLUX.1, which is told GUIDANCE: guidance by two calls, away from the negative prompt.
    true_guidance: Annotated[float, Range(1, 100)] | None = None
    skip_layers: tuple[int, ...] | None = None  # Of Stable Diffusion 3.5: 7 8 9.
    skip_scale: Annotated[float, Range(0, 100)] | None = None  # Of these; by default 2.5.
    solver: SolverName | None = None  # By default the one that the folder's scheduler names.
    seed: Annotated[int, Range(0, 2**63 - 1)] | None = (
        None  # Picture i of a seed is always the same.
    )
    n: Annotated[int, Range(1, 10_000)] | None = None  # How many pictures, at once.
    # HEIGHT WIDTH; by default the model's, or that of INIT.
    size: tuple[Edge, Edge] | None = None
    frames: Annotated[int, Range(1, 10_000)] | None = None  # Of a clip: 1 + 4 k; 1 is a picture.
    fps: Annotated[float, Range(1, 240)] | None = None  # Frames a second of a clip; 16 by default.
    init: Path | None = None  # A picture to start from.
    strength: Annotated[float, Range(0, 1, "(]")] | None = None  # How much of it is lost.
    mask: Path | None = None  # What of it is repainted: white.
    lora: Path | None = None  # A LoRA file that is merged into the weights.
    lora_scale: Annotated[float, Range(-10, 10)] | None = None  # Of its change; by default 1.
    # How many of the last layers of CLIP are left out, beside those that the pipeline leaves out.
    clip_skip: Annotated[int, Range(0, 100)] | None = None
    # Weights in 8 bits, of the denoiser: a quarter of float32's memory.
    quantize: Literal["int8", "w8a8", "fp8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # Of the weights.
    mesh: str | None = None  # Devices, as in tensor=4.
    out: Path | None = None  # A PNG, animated for clips; by default the next number in pictures/.
    preview: bool = False  # A small picture every few steps, beside the result.
    # A tiny autoencoder's folder, or tae/taesd for taesd_encoder.safetensors and its other half in
    # tae, for previews.
    tae: Path | None = None
    # A picture that was generated: what is not given again is as it was.
    repeat: Path | None = None


# What is not given, where the folder does not say it.
DEFAULTS: dict[str, Any] = dict(
    rescale=0.0, true_guidance=1.0, skip_scale=2.5, seed=0, n=1, dtype="float32", clip_skip=0
)
# Where a picture is written and how it is watched does not change it.
NOT_KEPT = ("out", "preview", "tae", "repeat")


def complete(options: Generate, written: dict[str, Any] | None) -> Generate:
    """The options with those of a picture, and then the defaults, in the place of what is open.

    >>> complete(Generate(seed=3), {"seed": 1, "n": 2}).n
    2
    """
    given = {
        field.name: value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) is not None and value is not False
    }
    before = {}
    if written is not None:
        before = _from_json(written, options.repeat or Path("picture"))
    return dataclasses.replace(options, **DEFAULTS | before | given)


def _from_json(written: dict[str, Any], where: Path) -> dict[str, Any]:
    """What `to_json` wrote, checked: it comes from a file that anyone may have made."""
    hints = typing.get_type_hints(Generate)
    found = {}
    for name, value in written.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if name in ("model", "init", "mask", "lora") and isinstance(value, str):
            value = Path(value)
        if name not in hints or name in NOT_KEPT or not is_bearable(value, hints[name]):
            raise UserError(f"{where}: its settings are damaged, or another version's: {name}.")
        found[name] = value
    return found


def to_json(options: Generate) -> dict[str, Any]:
    """The options as a picture holds them.

    >>> to_json(Generate(model=Path("a"), n=2))["model"]
    'a'
    """
    return {name: value for name, value in as_dict(options).items() if name not in NOT_KEPT}


def check_request(options: Generate, *, takes_text: bool, makes_clips: bool = False) -> None:
    """Refuses what no folder can make, before anything is loaded."""
    if makes_clips:
        for name in ("init", "mask", "preview", "tae"):
            if getattr(options, name) not in (None, False):
                raise UserError(f"{name.upper()} is for models of pictures; this one makes clips.")
    elif options.fps is not None:
        raise UserError("FPS is for models of clips; this one draws pictures.")
    prompt = options.prompt
    if takes_text:
        if prompt is None or not prompt.strip():
            raise UserError('the prompt is empty: PROMPT="a red fox in the snow".')
        for name, text in (("prompt", prompt), ("negative prompt", options.negative or "")):
            if len(text.split()) > WORDS or len(text) > 20 * WORDS:
                raise UserError(
                    f"the {name} has {len(text.split())} words and {len(text)} characters; text "
                    f"encoders read some hundred words at most, and {WORDS} are accepted."
                )
        if options.label is not None:
            raise UserError("LABEL is for models of classes; this one takes a PROMPT.")
    elif options.label is None:
        raise UserError("this model draws classes: give LABEL=207, or LABEL by its name.")
    elif prompt is not None or options.negative is not None:
        raise UserError("this model takes no PROMPT: it draws classes, LABEL=207.")
    if options.mask is not None and options.init is None:
        raise UserError("MASK needs INIT, the picture of which a part is repainted.")
    if options.lora_scale is not None and options.lora is None:
        raise UserError("LORA_SCALE needs LORA, the file to merge.")
    if options.strength is not None and options.init is None:
        raise UserError("STRENGTH needs INIT, the picture to start from.")
