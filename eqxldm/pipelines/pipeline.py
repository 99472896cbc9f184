"""`load`: a published pipeline as parts and functions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Key

from .. import pretrained
from ..diffusion import Diffusion
from ..predictions import LearnedRange
from ..pretrained.files import read_json
from ..pretrained.layout import ShardingRule, WeightsError
from ..pretrained.lora import NETWORK, read_lora
from ..sharding import partition_spec
from ..solvers import AbstractSolver
from ..times import Grid
from .denoisers import NetworkDenoiser
from .errors import PipelineError
from .families import Family, family_of
from .folder import Folder, describe_part, open_pipeline_folder
from .schedules import Schedule, load_schedule
from .text import Encoding, TextPart, TextSizes

DEFAULT_SIDE = 128  # of a latent, where a network's configuration has no sample_size


@dataclass(frozen=True)
class Pipeline:
    """The parts of a published pipeline, and the functions that connect them.

    Made by `load`. Parts that were not loaded are None, and what needs them says so.

    - `encode(prompts)` gives conditions with a leading axis, `null()` the one that guidance leads
      away from.
    - `denoiser`, `diffusion`, `solver` and `times(steps)` are the arguments of `eqxldm.sample`, of
      `sample_steps` and of every guidance; any other solver or grid does as well.
    - `noise(keys, height, width, times)` is where a run over `times` begins, and `decode` makes
      pictures in [-1, 1] of where it ends. `encode_image` is the way back, for image-to-image.
    """

    folder: Folder
    family: Family
    schedule: Schedule
    network: Any = None
    autoencoder: Any = None
    texts: tuple[TextPart, ...] = ()

    @property
    def diffusion(self) -> Diffusion:
        """The path and what the network predicts on it."""
        diffusion, out = self.schedule.diffusion, self._config(self.family.network, "out_channels")
        if out is not None and out == 2 * (self._config(self.family.network, "in_channels") or 0):
            return Diffusion(diffusion.path, LearnedRange(diffusion.prediction))
        return diffusion

    @property
    def solver(self) -> AbstractSolver:
        """The folder's scheduler as a solver."""
        return self.schedule.solver

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser, a PyTree."""
        schedule = self.schedule
        return NetworkDenoiser(self._part("network"), schedule.timesteps, schedule.whole)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the network was trained on."""
        if self.family.size is not None:
            return self.family.size[1:]
        side = self._config(self.family.network, "sample_size")
        height, width = side if isinstance(side, list) else (side, side)
        return (height or DEFAULT_SIDE) * self.factor, (width or DEFAULT_SIDE) * self.factor

    @property
    def default_frames(self) -> int | None:
        """How many frames a clip has by default; None where pictures are made."""
        return None if self.family.size is None else self.family.size[0]

    @property
    def time_factor(self) -> int:
        """How many frames a latent frame but the first stands for; 1 for pictures."""
        return self._config("vae", "scale_factor_temporal") or 4 if self.family.video else 1

    @property
    def factor(self) -> int:
        """How many pixels a latent's pixel is wide."""
        if self.family.video:
            return self._config("vae", "scale_factor_spatial") or 8
        return 2 ** (len(self._config("vae", "block_out_channels") or [0] * 4) - 1)

    @property
    def multiple(self) -> int:
        """What heights and widths must divide by."""
        if self.family.packed:
            return 2 * self.factor
        levels = self._config(self.family.network, "block_out_channels")
        patch = self._config(self.family.network, "patch_size") or 2
        patch = patch[-1] if isinstance(patch, list) else patch
        return self.factor * (patch if levels is None else 2 ** (len(levels) - 1))

    @property
    def network_channels(self) -> int:
        """Of what the network is given: those of the latent, and more for inpainting."""
        config = self._part("network").config
        return config.in_channels if hasattr(config, "in_channels") else config.shape[0]

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """`PipelineError`, with the nearest that does, for a size that does not divide.

        `frames` are those of a clip, by default the family's number.

        A DiT has one size only: its positions are those of one grid.
        """
        if self.family.encode is None and (height, width) != self.default_size:
            raise PipelineError(
                f"a picture of {height} x {width} does not do: this model draws "
                f"{self.default_size[0]} x {self.default_size[1]} only."
            )
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            nearest = [
                max(1, round(side / self.multiple)) * self.multiple for side in (height, width)
            ]
            raise PipelineError(
                f"a picture of {height} x {width} does not do: both must be multiples of "
                f"{self.multiple} for this model. The nearest is {nearest[0]} x {nearest[1]}."
            )
        if frames is not None and not self.family.video:
            raise PipelineError(f"this model draws pictures, and not clips of {frames} frames.")
        time = self.time_factor
        if frames is not None and (frames < 1 or (frames - 1) % time):
            below = 1 + time * max(0, (frames - 1) // time)
            raise PipelineError(
                f"a clip of {frames} frames does not do: this model makes 1 + {time} k, such as "
                f"{below} or {below + time}; 1 is a picture."
            )

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """The latent's shape of a picture or clip; `PipelineError` if the size does not divide."""
        self.check_size(height, width, frames)
        clip = (frames or self.default_frames,) if self.family.video else ()
        return self._part("autoencoder").latent_shape(*clip, height, width)

    def times(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        """The folder's grid of so many steps; FLUX.1's looks at the size of the picture."""
        if height is None or width is None:
            return self.schedule.times(steps)
        self.check_size(height, width)
        if self.family.video:
            return self.schedule.times(steps)  # no published scheduler looks at a clip's size
        patch = 2 if self.family.packed else self._config(self.family.network, "patch_size") or 1
        patch = patch * self.factor
        return self.schedule.times(steps, (height // patch) * (width // patch))

    def noise(
        self,
        keys: Key[Array, " n"],
        height: int,
        width: int,
        times: Any,
        *,
        frames: int | None = None,
    ) -> Float[Array, "n c *space"]:
        """Where runs over `times` begin: one latent of noise a key, of a clip with `frames`."""
        shape = self.latent_shape(height, width, frames)
        draw = jax.vmap(lambda key: jax.random.normal(key, shape))
        return self.schedule.start_std(times) * draw(keys)

    def encode(
        self,
        prompts: Sequence[str] | Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        guidance: float | None = None,
        clip_skip: int = 0,
    ) -> Any:
        """Prompts to conditions, with a leading axis; of a DiT, labels.

        **Arguments**:

        - `size`: height and width, which SDXL is told; None is its default.
        - `guidance`: the scale that FLUX.1 dev is told; None is 3.5.
        - `clip_skip`: how many of the last layers of CLIP are left out, beside those that the
          model's pipeline leaves out anyway; some models are trained with 1. As in diffusers the
          negative prompt (`null`) is read by all. Not of FLUX.1, which takes no tokens of CLIP.

        **Raises** `PipelineError` if the text encoders were not loaded or were dropped, and for a
        `clip_skip` of more layers than there are.
        """
        told: dict[str, Any] = dict(size=size, guidance=guidance, clip_skip=clip_skip)
        return self.encode_and_tell(prompts, **told).cond

    def encode_and_tell(
        self,
        prompts: Sequence[str] | Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        guidance: float | None = None,
        clip_skip: int = 0,
    ) -> Encoding:
        """As `encode`, with what of each prompt was cut off because it is too long."""
        if self.family.encode is None:
            labels = np.asarray(prompts)
            if not np.issubdtype(labels.dtype, np.integer):
                raise PipelineError(f"this model takes labels, integers, not {prompts!r}.")
            return Encoding(jnp.asarray(labels, jnp.int32), ())
        if len(self.texts) != len(self.family.texts):
            raise PipelineError(
                "encode: the text encoders are not loaded. Encode all prompts before "
                "without_texts(), or load them again: load(folder, parts=...)."
            )
        width = self._config(self.family.network, "joint_attention_dim") or 4096
        # FLUX.1 dev and Wan were made with 512 tokens, schnell with 256, as Stable Diffusion 3.
        longer = self._config(self.family.network, "guidance_embeds") or self.family.video
        length = 512 if longer else 256
        if clip_skip < 0 or (clip_skip and (self.family.packed or self.family.video)):
            raise PipelineError(
                f"clip_skip = {clip_skip}: it is at least 0, and 0 where no tokens of CLIP are "
                "taken, as by FLUX.1 and Wan."
            )
        sizes = TextSizes(width, length, clip_skip)
        cond, cut = self.family.encode(self.texts, [str(p) for p in prompts], sizes)
        return Encoding(self.with_numbers(cond, size=size, guidance=guidance), cut)

    def null(
        self,
        negative: str | None = None,
        *,
        size: tuple[int, int] | None = None,
        guidance: float | None = None,
    ) -> Any:
        """The condition that guidance leads away from, of one example.

        That of the negative prompt; None is the empty one, which for SDXL are zeros if the folder
        says so, and a DiT's label of "none".
        """
        if self.family.encode is None:
            return self._part("network").null
        cond = self.encode([negative or ""], size=size, guidance=guidance)
        cond = jax.tree.map(lambda a: a[0], cond)
        if negative is None and self.folder.options.get("force_zeros_for_empty_prompt"):
            parts = lambda c: [a for a in (c.vector, c.tokens) if a is not None]
            cond = eqx.tree_at(parts, cond, [jnp.zeros_like(a) for a in parts(cond)])
        return cond

    def decode(self, z: Float[Array, "n c *space"]) -> Float[Array, "n channels *Space"]:
        """Latents to pictures in about [-1, 1], one after the other, so that memory is one's.

        Clips `(c, f, h, w)` go through the decoder a latent frame at a time.
        """
        autoencoder = self._part("autoencoder")
        return jnp.stack([_decode(autoencoder, latent) for latent in z])

    def encode_image(
        self, image: Float[Array, "channels H W"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "c h w"]:
        """A picture in [-1, 1] to its latent: a sample with a `key`, else the mode."""
        self.latent_shape(*image.shape[1:])
        return _encode(self._part("autoencoder"), image, key)

    def without_texts(self) -> "Pipeline":
        """The pipeline without its tokenizers and text encoders; their memory goes with the last
        pipeline that holds them."""
        return dataclasses.replace(self, texts=())

    def with_numbers(
        self, cond: Any, *, size: tuple[int, int] | None = None, guidance: float | None = None
    ) -> Any:
        """Conditions with the numbers that some networks are told beside the text: SDXL the
        picture's size, FLUX.1 dev the guidance scale. `encode` has added them already."""
        n = cond.tokens.shape[0]
        if self.family.sizes:
            height, width = self.default_size if size is None else size
            numbers = [height, width, 0, 0, height, width]
        elif self.family.packed and self._config(self.family.network, "guidance_embeds"):
            numbers = [3.5 if guidance is None else guidance]
        else:
            return cond
        numbers = jnp.tile(jnp.asarray(numbers, jnp.float32), (n, 1))
        return dataclasses.replace(cond, numbers=numbers)

    def _config(self, part: str, option: str) -> Any:
        """A number of a part's configuration, a list of some, a switch; None if there is none."""
        path = self.folder.part(part) / "config.json"
        value = read_json(path).get(option)
        if value is None or isinstance(value, bool):
            return value
        numbers = value if isinstance(value, list) else [value]
        known = {"sample_size": (1, 2), "block_out_channels": range(1, 20), "patch_size": (1, 3)}
        sound = len(numbers) in known.get(option, (1,))
        sound &= isinstance(value, list) or option != "block_out_channels"
        if not sound or not all(type(n) is int and 0 < n < 2**20 for n in numbers):
            raise PipelineError(f"{path}: {option} cannot be {repr(value)[:100]}.")
        return value

    def _part(self, name: str) -> Any:
        part = getattr(self, name)
        if part is None:
            raise PipelineError(f"the {name} is not loaded: load(folder, parts=...) without it.")
        return part


def load(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    parts: Sequence[str] | None = None,
) -> Pipeline:
    """The pipeline of a diffusers folder, one part after the other.

    **Arguments**:

    - `folder`: with a `model_index.json`; safetensors, sharded or not, `fp16` variants too.
    - `dtype`: of the weights; None keeps the files'. The autoencoder is float32 whatever is asked:
      it is small, and Stable Diffusion XL's overflows in float16. So does T5, which is bfloat16 if
      float16 is asked for.
    - `mesh`: over which the weights are divided by the library's rules (`sharding`).
    - `parts`: the names of those with weights to load, as the folder has them (`["text_encoder"]`;
      all of them and the tokenizers come together); None is all.

    Peak memory is the model's, and that of one tensor of its files.

    **Raises** `PipelineError` that lists what is missing, and for a pipeline, a scheduler or an
    option that is not known here; `WeightsError` if a part's tensors do not fit its configuration.
    """
    found = open_pipeline_folder(folder)
    family = family_of(found.class_name)
    texts_too = parts is None or any(encoder in parts for _, encoder in family.texts)
    found = open_pipeline_folder(folder, family.needed if texts_too else family.needed[-3:])
    if "transformer_2" in found.parts:
        raise PipelineError(
            f"{found.path} has two networks, for much noise and for little, as Wan 2.2's 14B has. "
            "Read here are those with one: Wan 2.1 and Wan 2.2's 5B."
        )
    schedule = load_schedule(found.part("scheduler"), every_nth=family.every_nth)
    wanted = set(part_names(found)) if parts is None else set(parts)
    if unknown := sorted(wanted - set(part_names(found))):
        raise PipelineError(
            f"{found.path} has no part {', '.join(unknown)}; it has {', '.join(part_names(found))}."
        )
    for name in wanted:  # before the first gigabyte is read
        describe_part(found.part(name), found.parts[name])
    texts = tuple(_text_part(found, pair, dtype, mesh) for pair in family.texts if texts_too)
    network = autoencoder = None
    if family.network in wanted:
        network = _load_part(found.part(family.network), dtype, mesh)
    if "vae" in wanted:
        autoencoder = _load_part(found.part("vae"), jnp.float32, mesh)
    return Pipeline(found, family, schedule, network, autoencoder, texts)


def merge_lora(pipe: Pipeline, path: str | Path, scale: float = 1.0) -> Pipeline:
    """The pipeline with a LoRA file merged into the parts that are loaded.

    As `pretrained.merge_lora`, for the denoiser and all text encoders of which the file has layers.

    **Raises** as that function, and `PipelineError` if the file has layers of a text encoder that
    the model has not.
    """
    held = check_lora(pipe.family, path)
    texts = []
    for text, (_, name) in zip(pipe.texts, pipe.family.texts, strict=False):
        if name in held and text.encoder is not None:
            merged = pretrained.merge_lora(text.encoder, path, scale, part=name)
            text = text._replace(encoder=merged)
        texts.append(text)
    network = pipe.network
    if NETWORK in held and network is not None:
        network = pretrained.merge_lora(network, path, scale)
    return dataclasses.replace(pipe, network=network, texts=tuple(texts))


def check_lora(family: Family, path: str | Path) -> tuple[str, ...]:
    """The parts that a LoRA file has layers of, from the file's header alone.

    **Raises** `WeightsError` if it is no such file; `PipelineError` if such pipelines have
    no such part.
    """
    held = tuple(read_lora(path))
    known = {NETWORK, *(name for _, name in family.texts)}
    if unknown := sorted(set(held) - known):
        raise PipelineError(
            f"{path} is for another model: it has layers of {', '.join(unknown)}, and this one has "
            f"{', '.join(sorted(known))}."
        )
    return held


def part_names(folder: Folder) -> tuple[str, ...]:
    """The parts of a folder that have weights and are used, in the order in which they are loaded.

    >>> names = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", text_encoder="CLIPTextModel")
    >>> part_names(Folder(Path("x"), "StableDiffusionPipeline", names, {}))
    ('text_encoder', 'unet', 'vae')
    """
    family = family_of(folder.class_name)
    names = (*(encoder for _, encoder in family.texts), family.network, "vae")
    return tuple(name for name in names if name in folder.parts)


def describe(folder: str | Path) -> dict[str, Any]:
    """What `load` would load, as `{part: PartFiles}`, read from the files' headers alone."""
    found = open_pipeline_folder(folder)
    found = open_pipeline_folder(folder, family_of(found.class_name).needed)
    return {name: describe_part(found.part(name), found.parts[name]) for name in part_names(found)}


def _text_part(folder: Folder, pair: tuple[str, str], dtype: Any, mesh: Mesh | None) -> TextPart:
    from ..text import load_tokenizer

    tokenizer, encoder = pair
    if encoder not in folder.parts:
        return TextPart(None, None)
    half = dtype is not None and jnp.dtype(dtype) == jnp.float16
    if half and folder.parts[encoder].startswith(("T5", "UMT5")):
        dtype = jnp.bfloat16  # its feed-forward layers overflow in float16
    try:
        read = load_tokenizer(folder.part(tokenizer))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{folder.part(tokenizer)}: {error}") from error
    return TextPart(read, _load_part(folder.part(encoder), dtype, mesh))


def _load_part(path: Path, dtype: Any, mesh: Mesh | None) -> Any:
    rule: ShardingRule | None = None
    if mesh is not None:
        rule = lambda leaf, shape: NamedSharding(mesh, partition_spec(leaf, shape, mesh.shape))
    try:
        return pretrained.load(path, dtype=dtype, sharding=rule)
    except (WeightsError, OSError) as error:
        raise PipelineError(str(error)) from error


@eqx.filter_jit
def _decode(autoencoder, latent):
    chunked = dict(chunked=True) if latent.ndim == 4 else {}
    return autoencoder.decode(latent, **chunked)


@eqx.filter_jit
def _encode(autoencoder, image, key):
    return autoencoder.encode(image, key=key)
