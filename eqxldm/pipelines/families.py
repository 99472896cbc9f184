"""What is known of diffusers' pipeline classes: their parts, their text, their defaults."""

from typing import NamedTuple

from .errors import PipelineError
from .text import (
    Encode,
    encode_clip,
    encode_clip_and_t5,
    encode_clips_and_t5,
    encode_two_clips,
    encode_umt5,
)


class Family(NamedTuple):
    """How the pipelines of one kind are put together.

    `network` is its part's name; `texts` are pairs of tokenizer and text encoder, those from
    `required` on may be absent; `encode` reads them; `every_nth` is that of `read_schedule`,
    `round_up` that of `steps_of_strength`; `steps` and `guidance` are diffusers' defaults; `sizes`:
    the network is told the picture's; `packed`: its tokens are 2 x 2 latent pixels, whatever its
    configuration calls them, and it may be told a guidance scale instead of being called twice;
    `size`: of a clip that is made by default, frames, height and width; None where pictures are.
    """

    network: str
    texts: tuple[tuple[str, str], ...]
    encode: Encode | None
    steps: int
    guidance: float
    required: int = 2
    every_nth: bool = False
    round_up: bool = False
    sizes: bool = False
    packed: bool = False
    size: tuple[int, int, int] | None = None

    @property
    def video(self) -> bool:
        """Whether clips are made."""
        return self.size is not None

    @property
    def needed(self) -> tuple[str, ...]:
        """The parts without which nothing is made."""
        texts = [name for pair in self.texts[: self.required] for name in pair]
        return (*texts, self.network, "vae", "scheduler")


_TEXTS = (
    ("tokenizer", "text_encoder"),
    ("tokenizer_2", "text_encoder_2"),
    ("tokenizer_3", "text_encoder_3"),
)
STABLE_DIFFUSION = Family("unet", _TEXTS[:1], encode_clip, 50, 7.5)
STABLE_DIFFUSION_XL = Family("unet", _TEXTS[:2], encode_two_clips, 50, 5.0, sizes=True)
STABLE_DIFFUSION_3 = Family("transformer", _TEXTS, encode_clips_and_t5, 28, 7.0, round_up=True)
FLUX = Family(
    "transformer", _TEXTS[:2], encode_clip_and_t5, 28, 3.5,
    every_nth=True, round_up=True, packed=True,
)  # fmt: skip
DIT = Family("transformer", (), None, 50, 4.0)
WAN = Family("transformer", _TEXTS[:1], encode_umt5, 50, 5.0, size=(81, 480, 832))

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLInpaintPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3InpaintPipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": FLUX,
    "FluxInpaintPipeline": FLUX,
    "DiTPipeline": DIT,
    "WanPipeline": WAN,
}


def family_of(class_name: str) -> Family:
    """The family of a pipeline class; `PipelineError` with all that are known.

    >>> family_of("FluxPipeline").needed[-3:]
    ('transformer', 'vae', 'scheduler')
    """
    if class_name not in FAMILIES:
        raise PipelineError(
            f"the pipeline {class_name} is not one of those known here: {', '.join(FAMILIES)}."
        )
    return FAMILIES[class_name]
