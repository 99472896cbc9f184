"""LoRA files merged into a model: `W + scale (alpha / rank) up down` (Hu et al. 2021, section 4.1).

The layers are found by the names that the model's own files have (`io.LAYOUTS`), whatever a LoRA
file makes of them: those of diffusers with peft's `lora_A` and `lora_B`, of older diffusers, and of
kohya's scripts, which write `_` for every dot, also with the original names of Stability AI and
Black Forest Labs.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ..models import CLIPText, T5Encoder, UNet
from .files import open_safetensors
from .io import LAYOUTS
from .layout import Layout, Part, Tensor, WeightsError, array_leaves, tensor_shapes

NETWORK = "network"  # the part of a file that belongs to the denoiser
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# How the names of a part's layers begin; of the first that fits the rest is the layer's name.
PREFIXES: dict[str, str] = {
    "lora_unet_": NETWORK,
    "lora_transformer_": NETWORK,
    "lora_te_": TEXTS[0],
    "lora_te1_": TEXTS[0],
    "lora_te2_": TEXTS[1],
    "lora_te3_": TEXTS[2],
    "base_model.model.": NETWORK,
    "model.diffusion_model.": NETWORK,
    "diffusion_model.": NETWORK,
    "unet.": NETWORK,
    "transformer.": NETWORK,
    "text_encoder_3.": TEXTS[2],
    "text_encoder_2.": TEXTS[1],
    "text_encoder.": TEXTS[0],
}
# The ends of names, and which of the two matrices they are.
DOWN, UP = "down", "up"
ENDS: tuple[tuple[str, str], ...] = (
    (r"\.lora_A(\.\w+)?\.weight", DOWN),
    (r"\.lora_B(\.\w+)?\.weight", UP),
    (r"(\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)down\.weight", DOWN),
    (r"(\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)up\.weight", UP),
    (r"\.alpha", "alpha"),
)
# Of diffusers' files: what peft was told, with the part before each name.
METADATA = "lora_adapter_metadata"


class LoRALayer(NamedTuple):
    """One layer of a file: `up down` times `alpha / rank`; an alpha of None is the rank."""

    down: Tensor
    up: Tensor
    alpha: Any = None
    root: bool = False  # divided by the rank's square root instead (Kalajdzievski 2023)

    @property
    def rank(self) -> int:
        """The number of rows of the one, and of columns of the other."""
        return self.down.shape[0]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `up down` has as many rows and columns as a tensor of this shape."""
        columns = math.prod(self.down.shape[1:])
        rows = math.prod(self.up.shape) == math.prod(shape[:1]) * self.rank
        return rows and self.up.shape[:1] == shape[:1] and columns == math.prod(shape[1:])

    def delta(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to the tensor, before the scale."""
        down = self.down.read().astype(np.float32).reshape(self.rank, -1)
        up = self.up.read().astype(np.float32).reshape(shape[0], self.rank)
        alpha = self.rank if self.alpha is None else float(np.asarray(self.alpha))
        divisor = math.sqrt(self.rank) if self.root else self.rank
        return (np.float32(alpha / divisor) * (up @ down)).reshape(shape)


def merge_lora(
    model: PyTree, path: str | Path, scale: float = 1.0, *, part: str | None = None
) -> PyTree:
    """The model with a LoRA file merged into its weights.

    **Arguments**:

    - `model`: a `UNet`, `MMDiT`, `Flux`, `DiT`, `CLIPText` or `T5Encoder`, in any dtype, wherever
      its arrays lie; they stay there. To merge several files, call it for each.
    - `path`: a safetensors file in the form of diffusers (peft) or of kohya's scripts.
    - `scale`: of the change; 1 is the file's own, and -1 takes it out again.
    - `part`: which part of the file: `network`, `text_encoder`, `text_encoder_2`, ...; None is the
      network for a denoiser and `text_encoder` for a text encoder.

    **Raises** `FileNotFoundError`; `WeightsError` if the file is no LoRA file or has nothing for
    this part, and with the list of all layers that the model has not or that do not fit; for DoRA,
    LoHa and LoKr, which are other methods, and biases.

    >>> import tempfile
    >>> from eqxldm.models import CLIPText
    >>> from eqxldm.pretrained.files import write_safetensors
    >>> clip = CLIPText(8, 1, 2, vocabulary=9, key=jax.random.key(0))
    >>> layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    >>> matrices = {"lora_down.weight": np.ones((2, 8)), "lora_up.weight": np.ones((32, 2))}
    >>> path = Path(tempfile.mkdtemp()) / "lora.safetensors"
    >>> write_safetensors(path, {f"{layer}.{k}": v for k, v in matrices.items()}, {})
    >>> merged = merge_lora(clip, path, 0.5)
    >>> change = merged.blocks.stacked.fc1.weight - clip.blocks.stacked.fc1.weight
    >>> round(float(change.mean()), 5)
    1.0
    """
    if not math.isfinite(scale):
        raise WeightsError(f"merge_lora: scale must be finite, got {scale}.")
    if part is None:
        part = TEXTS[0] if isinstance(model, CLIPText | T5Encoder) else NETWORK
    found = read_lora(path)
    if part not in found:
        raise WeightsError(
            f"{path} has nothing for {part}; it has layers of {', '.join(found) or 'nothing'}."
        )
    places, problems = _places(model, found[part]), []
    changes: dict[str, list[tuple[Part, LoRALayer, tuple[int, ...]]]] = {}
    for name, layer in found[part].items():
        place = places.get(name)
        if place is None:
            problems.append(f"no such layer: {name}")
        elif not layer.fits(place.shape):
            problems.append(
                f"wrong shape: {name} has {tuple(layer.up.shape)} times {tuple(layer.down.shape)},"
                f" the model's is {place.shape}"
            )
        else:
            for leaf, where in place.parts:
                changes.setdefault(leaf, []).append((where, layer, place.shape))
    if problems:
        more = [f"and {len(problems) - 50} more"] if len(problems) > 50 else []
        lines = "\n  ".join(problems[:50] + more)
        raise WeightsError(f"{path} does not fit {type(model).__name__}:\n  {lines}")
    return _changed(model, changes, scale, str(path))


def read_lora(path: str | Path) -> dict[str, dict[str, LoRALayer]]:
    """The layers of a LoRA file by part and name; the matrices are read when they are needed.

    **Raises** as `merge_lora`.
    """
    path = Path(path)
    tensors, header = open_safetensors(path)
    told = _metadata(path, header)
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    odd = []
    for name, tensor in tensors.items():
        split = _split(name)
        if split is None:
            odd.append(name)
            continue
        part, layer, role = split
        layers.setdefault(part, {}).setdefault(layer, {})[role] = tensor
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise WeightsError(
            f"{path} has tensors that are no LoRA's: {', '.join(odd[:5])}{more}. Matrices up and "
            "down of linear layers and convolutions are merged; DoRA, LoHa, LoKr, biases and whole "
            "weights are not."
        )
    if not layers:
        raise WeightsError(f"{path} holds no tensors.")
    found: dict[str, dict[str, LoRALayer]] = {}
    for part, named in layers.items():
        for name, roles in named.items():
            if not {DOWN, UP} <= roles.keys():
                raise WeightsError(f"{path}: {name} lacks its {'up' if DOWN in roles else 'down'}.")
            alpha, root = told.get((part, name), told.get((part, ""), (None, False)))
            alpha = roles["alpha"].read() if "alpha" in roles else alpha
            if roles[DOWN].shape[:1] in ((), (0,)) or (
                alpha is not None and (np.size(alpha) != 1 or not np.isfinite(alpha).all())
            ):
                raise WeightsError(f"{path}: {name} has no rank, or an alpha that is no number.")
            found.setdefault(part, {})[name] = LoRALayer(roles[DOWN], roles[UP], alpha, root)
    return found


class Place(NamedTuple):
    """Where a tensor of a file is in a model: its shape there, and the leaves it is a part of."""

    shape: tuple[int, ...]
    parts: list[tuple[str, Part]]


def _places(model: PyTree, wanted: Iterable[str]) -> dict[str, Place]:
    """Of every weight, by the names of that layout which has most of those wanted, with dots and
    without."""
    if type(model) not in LAYOUTS:
        raise WeightsError(f"merge_lora: {type(model).__name__} is no model of the library.")
    tables = [_table(model, make(model)) for make in LAYOUTS[type(model)]]
    return max(tables, key=lambda table: sum(name in table for name in wanted), default={})


def _table(model: PyTree, layout: Layout) -> dict[str, Place]:
    shapes, places = tensor_shapes(model, layout), {}
    bare = lambda name: name.removesuffix(".weight")
    for leaf, parts in layout.leaves.items():
        for part in parts:
            for name in (part.name, *part.copies):
                if name.endswith(".weight"):
                    place = places.setdefault(bare(name), Place(shapes[name], []))
                    place.parts.append((leaf, part))
    aliases = {bare(alias): bare(name) for alias, name in layout.aliases.items()}
    same = {alias: places[name] for alias, name in aliases.items() if name in places}
    places = same | places
    if isinstance(model, UNet):
        places |= {original_unet_name(n, model.config.blocks): p for n, p in places.items()}
    return {name.replace(".", "_"): place for name, place in places.items()} | places


def original_unet_name(name: str, blocks: int) -> str:
    """What diffusers' U-Net calls a layer, in the names of Stability AI's, with which LoRA files of
    SDXL come; `blocks` is the number of residual blocks a level.

    >>> original_unet_name("down_blocks.1.attentions.0.proj_in", 2)
    'input_blocks.4.1.proj_in'
    >>> original_unet_name("up_blocks.0.upsamplers.0.conv", 2)
    'output_blocks.2.2.conv'
    """
    inner = {
        "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }  # fmt: skip
    ends = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1":
        "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1":
        "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    if name in ends:
        return ends[name]
    found = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if middle is not None:
        kind, i, rest = middle.groups()
        place = 1 if kind == "attentions" else 2 * int(i)
        return f"middle_block.{place}.{inner.get(rest, rest) if kind == 'resnets' else rest}"
    if found is None:
        return name
    side, level, kind, i, rest = found.groups()
    down, first = side == "down_blocks", int(level) * (blocks + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + blocks}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + blocks}.2.conv"
    number = first + int(i) + (1 if down else 0)
    start = f"{'input' if down else 'output'}_blocks.{number}"
    return f"{start}.0.{inner.get(rest, rest)}" if kind == "resnets" else f"{start}.1.{rest}"


def _changed(model: PyTree, changes: Mapping[str, Any], scale: float, source: str) -> PyTree:
    """The model with the changes added, one leaf after the other, in float32 and rounded once."""
    made = {}
    for path, leaf in array_leaves(model).items():
        if path not in changes:
            continue
        array = np.array(jax.device_get(leaf), np.float32)
        for part, layer, shape in changes[path]:
            array[part.where] += np.float32(scale) * part.read(layer.delta(shape))
        with np.errstate(over="ignore"):  # what that leads to is found in the next line
            array = array.astype(leaf.dtype)
        if not np.isfinite(array).all():
            raise WeightsError(
                f"{source}: merged into {path} it gives numbers that are not finite."
            )
        made[path] = jax.device_put(array, getattr(leaf, "sharding", None))
    new = lambda path, leaf: made.get(jax.tree_util.keystr(path), leaf)
    return jax.tree_util.tree_map_with_path(new, model)


def _split(name: str) -> tuple[str, str, str] | None:
    """The part, the layer and the role of a tensor; None if it is no LoRA's."""
    for pattern, role in ENDS:
        end = re.search(rf"{pattern}$", name)
        if end is None:
            continue
        layer, part = name[: end.start()], NETWORK
        for prefix, of in PREFIXES.items():
            if layer.startswith(prefix):
                layer, part = layer.removeprefix(prefix), of
                break
        # Of 2023: the layer is named by the attention's processor.
        layer = layer.replace(".processor.", ".")
        if name[end.start()] == "_" and layer.endswith("to_out"):
            layer += ".0"
        return part, layer, role
    return None


def _metadata(path: Path, header: Mapping[str, str]) -> dict[tuple[str, str], tuple[Any, bool]]:
    """`{(part, layer): (alpha, by the root)}` as peft was told; "" is any layer of the part."""
    if METADATA not in header:
        return {}
    try:
        written = json.loads(header[METADATA])
        found: dict[tuple[str, str], tuple[Any, bool]] = {}
        for key, value in written.items():
            prefix, _, option = key.partition(".")
            part = PREFIXES[f"{prefix}."]
            root = bool(written.get(f"{prefix}.use_rslora", False))
            if option == "use_dora" and value:
                raise WeightsError(f"{path}: DoRA is not LoRA, and is not merged.")
            if option == "lora_alpha":
                found[part, ""] = float(value), root
            if option == "alpha_pattern":
                found |= {(part, str(name)): (float(a), root) for name, a in value.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: its {METADATA} is damaged ({error}).") from error
    return found
