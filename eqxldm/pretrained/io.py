"""Loading and saving models: `load`, `load_into`, `load_state`, `save`, `export`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..models import (
    BERT,
    LPIPS,
    AlexLPIPS,
    AutoencoderKL,
    ByteTextEncoder,
    CaptionEncoder,
    CausalVideoAutoencoder,
    CLIPImage,
    CLIPText,
    DINOv2,
    DiT,
    EncodedCaption,
    Flux,
    Inception,
    MMDiT,
    PatchDiscriminator,
    SentenceEncoder,
    SoundAutoencoder,
    T5Encoder,
    TinyAutoencoder,
    TokenTransformer,
    TwoTowers,
    UNet,
    WanTransformer,
)
from . import (
    autoencoder,
    bert,
    clip_text,
    dit,
    flux,
    image_encoders,
    inception,
    llada,
    lpips,
    mmdit,
    t5,
    tiny_autoencoder,
    unet,
    video_autoencoder,
    wan,
)
from .files import (
    TRANSFORMERS,
    WEIGHTS,
    check_seal,
    from_arrays,
    open_folder,
    open_pt,
    open_safetensors,
    read_json,
    write_safetensors,
)
from .layout import (
    Layout,
    ShardingRule,
    Tensor,
    WeightsError,
    array_leaves,
    fill,
    own_layout,
    tensor_shapes,
    unfill,
)
from .limits import check_config, check_count
from .records import from_json, to_json

PYTORCH = (".pt", ".pth", ".bin", ".ckpt")
HEADER = "eqxldm"  # of our files: the model's configuration, in the format's own header


Complete = Callable[[dict[str, Any], Mapping[str, Tensor]], dict[str, Any]]
AS_IT_IS: Complete = lambda config, tensors: config


class Diffusers(NamedTuple):
    """What is known of diffusers' form of a model: its configuration both ways, and its names.

    `complete(config, tensors)` adds to the configuration what only the tensors say; `weights` is
    how the names of the files begin.
    """

    config: Callable[..., dict[str, Any]]
    from_config: Callable[..., Any]
    layout: Callable[..., Layout]
    complete: Complete = AS_IT_IS
    weights: str = WEIGHTS


def _of_diffusers(names: Any, complete: Complete = AS_IT_IS) -> Diffusers:
    """What one of the modules here knows of a model of diffusers."""
    return Diffusers(names.diffusers_config, names.from_diffusers, names.diffusers_layout, complete)


def _of_transformers(names: Any, complete: Complete = AS_IT_IS) -> Diffusers:
    """The same of a text encoder of transformers."""
    functions = names.transformers_config, names.from_transformers, names.transformers_layout
    return Diffusers(*functions, complete, TRANSFORMERS)


# The ways in which the tensors of a model are named in files, besides our own.
LAYOUTS: dict[type, tuple[Callable[..., Layout], ...]] = {
    AlexLPIPS: (lpips.alex_layout, lpips.package_layout),
    AutoencoderKL: (autoencoder.diffusers_layout,),
    BERT: (bert.transformers_layout,),
    ByteTextEncoder: (),
    CaptionEncoder: (),
    CausalVideoAutoencoder: (
        video_autoencoder.original_layout,
        video_autoencoder.diffusers_layout,
    ),
    CLIPText: (clip_text.transformers_layout, clip_text.open_clip_layout),
    CLIPImage: (image_encoders.clip_layout,),
    DINOv2: (image_encoders.dinov2_layout, image_encoders.dinov2_original_layout),
    DiT: (dit.official_layout, dit.diffusers_layout),
    EncodedCaption: (),
    Flux: (flux.original_layout, flux.diffusers_layout),
    Inception: (inception.published_layout,),
    LPIPS: (lpips.published_layout, lpips.package_layout),
    MMDiT: (mmdit.original_layout, mmdit.diffusers_layout),
    PatchDiscriminator: (),
    SentenceEncoder: (),
    SoundAutoencoder: (),
    T5Encoder: (t5.transformers_layout,),
    TinyAutoencoder: (tiny_autoencoder.original_layout, tiny_autoencoder.diffusers_layout),
    TokenTransformer: (llada.llada_layout,),
    TwoTowers: (),
    UNet: (unet.diffusers_layout,),
    WanTransformer: (wan.original_layout, wan.diffusers_layout),
}
DIFFUSERS: dict[type, Diffusers] = {
    AutoencoderKL: _of_diffusers(autoencoder),
    BERT: _of_transformers(bert, bert.with_pooler),
    CausalVideoAutoencoder: _of_diffusers(video_autoencoder),
    CLIPText: _of_transformers(clip_text),
    CLIPImage: Diffusers(
        image_encoders.clip_config,
        image_encoders.from_clip,
        image_encoders.clip_layout,
        weights=TRANSFORMERS,
    ),
    DINOv2: Diffusers(
        image_encoders.dinov2_config,
        image_encoders.from_dinov2,
        image_encoders.dinov2_layout,
        weights=TRANSFORMERS,
    ),
    DiT: _of_diffusers(dit),
    Flux: _of_diffusers(flux),
    MMDiT: _of_diffusers(mmdit, mmdit.with_grid_of_table),
    T5Encoder: _of_transformers(t5),
    TinyAutoencoder: _of_diffusers(tiny_autoencoder),
    UNet: _of_diffusers(unet),
    WanTransformer: _of_diffusers(wan),
}
# The `_class_name` of a config.json, or the one entry of `architectures` in those of transformers.
# Transformer2DModel is the old name of diffusers' DiT.
CLASS_NAMES: dict[str, type] = {
    "DiTTransformer2DModel": DiT,
    "Transformer2DModel": DiT,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLWan": CausalVideoAutoencoder,
    "AutoencoderTiny": TinyAutoencoder,
    "BertModel": BERT,
    "CLIPTextModel": CLIPText,
    "CLIPVisionModelWithProjection": CLIPImage,
    "Dinov2Model": DINOv2,
    "CLIPTextModelWithProjection": CLIPText,
    "FluxTransformer2DModel": Flux,
    "SD3Transformer2DModel": MMDiT,
    "T5EncoderModel": T5Encoder,
    "UMT5EncoderModel": T5Encoder,
    "UNet2DConditionModel": UNet,
    "UNet2DModel": UNet,
    "WanTransformer3DModel": WanTransformer,
}


def load(
    path: str | Path, *, dtype: Any = jnp.float32, sharding: ShardingRule | None = None
) -> PyTree:
    """The module that a file or a folder describes, with its weights.

    **Arguments**:

    - `path`: a `.safetensors` file written by `save`, or a folder of diffusers' format:
      `config.json` with `diffusion_pytorch_model.safetensors`, the same in several files with an
      index, or `.bin`; of a text encoder, transformers' format: `model.safetensors`, likewise.
    - `dtype`: of the parameters, whatever the file's is; None keeps the file's.
    - `sharding`: `(path, shape) -> jax.sharding.Sharding` for each leaf, `path` as
      `jax.tree_util.keystr` gives it. Each leaf goes straight to its devices.

    A model made from a diffusers folder gives diffusers' numbers, at `t = (timestep + 1) / 1000`.

    Every tensor is used once and every parameter is filled once. The memory needed is the model's
    and that of its largest leaf.

    **Raises** `FileNotFoundError`; `WeightsError` if the folder has no `config.json`, names an
    unknown architecture, or the tensors are not exactly those of the model; the message lists all
    that are missing, unexpected or of a wrong shape; if a file of `save` is not what was written.

    >>> import tempfile
    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> path = Path(tempfile.mkdtemp()) / "dit.safetensors"
    >>> save(model, path)
    >>> bool(eqx.tree_equal(load(path), model))
    True
    """
    path = Path(path)
    if path.is_dir():
        make, layout, tensors = _from_folder(path)
    elif path.suffix in PYTORCH:
        raise WeightsError(
            f"{path} does not say what the model is. Make it first: "
            "pretrained.load_into(models.dit_xl_2((4, 32, 32), key=key), path)."
        )
    else:
        make, layout, tensors = _from_file(path)
    try:
        model = eqx.filter_eval_shape(make, key=jax.random.key(0))
        check_count(model, tensors, str(path))
        table = layout(model)
        tensor_shapes(model, table)
    except WeightsError as error:
        if len(str(error)) < 5000:
            raise
        raise WeightsError(f"{str(error)[:5000]} ...") from None
    except Exception as error:  # whatever a constructor raises for a number that makes no sense
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{path}: no model can be made of its configuration: {reason}"
        ) from error
    return fill(model, table, tensors, source=str(path), dtype=dtype, sharding=sharding)


def load_into(
    model: PyTree,
    path: str | Path,
    *,
    prefix: str = "",
    dtype: Any = jnp.float32,
    sharding: ShardingRule | None = None,
) -> PyTree:
    """The model with the weights of a file, which need not say what the model is.

    For the official DiT `.pt` files (read without running any code in them; needs torch), for
    safetensors files without our header, and for folders. By which convention the tensors are
    named is seen from the names. Only the shapes of `model` matter, so it may come from
    `eqx.filter_eval_shape`, which takes no memory. Arguments and errors as in `load`; of a file
    that holds several networks only the tensors count whose names begin with `prefix`, such as
    `model.diffusion_model.` for the denoiser in Stability AI's.

    >>> import tempfile
    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> path = Path(tempfile.mkdtemp()) / "dit.safetensors"
    >>> save(model, path)
    >>> bool(eqx.tree_equal(load_into(model, path), model))
    True
    """
    path = Path(path)
    if path.is_dir():
        known = DIFFUSERS.get(type(model))
        tensors = open_folder(path, WEIGHTS if known is None else known.weights)
    elif path.suffix in PYTORCH:
        tensors = open_pt(path)
    else:
        tensors, header = open_safetensors(path)
        check_seal(path, header)
    tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    layout = _recognised(model, tensors)
    return fill(model, layout, tensors, source=str(path), dtype=dtype, sharding=sharding)


def load_state(
    model: PyTree,
    state: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    sharding: ShardingRule | None = None,
) -> PyTree:
    """The model with the weights of a dict of arrays: `load_into` for what is read already.

    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> state = to_state(model, dit.official_layout)
    >>> bool(eqx.tree_equal(load_state(model, state), model))
    True
    """
    tensors = from_arrays(state)
    layout = _recognised(model, tensors)
    return fill(model, layout, tensors, source="the state", dtype=dtype, sharding=sharding)


def to_state(model: PyTree, layout: Callable[[Any], Layout] = own_layout) -> dict[str, np.ndarray]:
    """The weights as a dict of NumPy arrays, named as `layout` says.

    `pretrained.official_layout` adds the fixed position table, as the official files have it:
    `torch.save` of these makes one.

    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> to_state(model, dit.official_layout)["pos_embed"].shape
    (1, 16, 16)
    """
    return unfill(model, layout(model))


def save(model: PyTree, path: str | Path) -> None:
    """Writes a model to one safetensors file with its configuration in the header.

    `load` gives back the identical module: bit for bit, with the same options (with `dtype=None`
    also for other dtypes than float32). Nothing in the file is code: functions are written by
    their names. A checksum in the header covers tensors and configuration.

    **Raises** `WeightsError` if the configuration cannot describe the model, or if the name ends
    like a PyTorch file.

    >>> import tempfile
    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> save(model, Path(tempfile.mkdtemp()) / "dit.safetensors")
    """
    path = Path(path)
    if path.suffix in PYTORCH:
        raise WeightsError(
            f"pretrained.save: {path} ends like a PyTorch file, but is to be safetensors: name it "
            f"{path.with_suffix('.safetensors').name}."
        )
    _check_known(model)
    config = to_json(model.config)
    again = eqx.filter_eval_shape(from_json(config).build, key=jax.random.key(0))
    if _described(again) != _described(model):
        raise WeightsError(
            f"pretrained.save: the configuration of {type(model).__name__} does not describe this "
            "one, which was changed after it was made. Write its arrays with "
            "equinox.tree_serialise_leaves."
        )
    write_safetensors(path, to_state(model), {HEADER: json.dumps(config)}, sealed=True)


def export(model: PyTree, folder: str | Path) -> None:
    """Writes a folder for `from_pretrained` of diffusers, or, for text encoders, of transformers.

    It holds `config.json` and the weights as safetensors.

    **Raises** `WeightsError` if diffusers has no such network; the message says why.

    >>> import tempfile
    >>> from eqxldm.models import DiT
    >>> model = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, num_classes=3,
    ...             key=jax.random.key(0))
    >>> folder = Path(tempfile.mkdtemp())
    >>> export(dit.with_diffusers_time(model), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'diffusion_pytorch_model.safetensors']
    """
    _check_known(model)
    if type(model) not in DIFFUSERS:
        raise WeightsError(
            f"diffusers has no {type(model).__name__}; write it with pretrained.save."
        )
    folder, known = Path(folder), DIFFUSERS[type(model)]
    config = known.config(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = unfill(model, known.layout(model))
    write_safetensors(folder / f"{known.weights}.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _from_folder(folder: Path) -> tuple[Callable[..., Any], Callable, dict[str, Tensor]]:
    if not (folder / "config.json").exists():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" Load one of its folders: {', '.join(parts)}." if parts else ""
        raise WeightsError(f"{folder} has no config.json, which says what the model is.{hint}")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) and architectures else [None]
    name = config.get("_class_name", listed[0])
    if not isinstance(name, str) or name not in CLASS_NAMES:
        raise WeightsError(
            f"{folder}: unknown architecture {name!r}; known are {', '.join(CLASS_NAMES)}."
        )
    known = DIFFUSERS[CLASS_NAMES[name]]
    tensors = open_folder(folder, known.weights)
    check_config(config, tensors, str(folder / "config.json"))
    config = known.complete(config, tensors)
    make = lambda *, key: known.from_config(config, key=key)
    return make, known.layout, tensors


def _from_file(path: Path) -> tuple[Callable[..., Any], Callable, dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"pretrained.load: {path} does not exist.")
    tensors, header = open_safetensors(path)
    if f"{HEADER}.quantized" in header:
        raise WeightsError(f"{path} holds 8-bit weights: read it with eqxldm.quantization.load.")
    if HEADER not in header:
        raise WeightsError(
            f"{path} has no configuration of ours in its header. Load its folder, if it has a "
            "config.json, or make the model first: pretrained.load_into(model, path)."
        )
    check_seal(path, header)
    try:
        written = json.loads(header[HEADER])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the configuration in its header is damaged.") from error
    check_config(written, tensors, str(path))
    try:
        config = from_json(written)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return config.build, own_layout, tensors


def _recognised(model: PyTree, tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of which the file has most names."""
    _check_known(model)
    layouts = [layout(model) for layout in (own_layout, *LAYOUTS[type(model)])]
    return max(layouts, key=lambda layout: sum(name in tensors for name in layout.names()))


def _check_known(model: PyTree) -> None:
    if type(model) not in LAYOUTS:
        known = ", ".join(kind.__name__ for kind in LAYOUTS)
        raise WeightsError(f"pretrained: unknown model {type(model).__name__}; known are {known}.")


def _described(model: PyTree) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """What a configuration determines: the structure with its options, and the shapes."""
    shapes = {path: tuple(leaf.shape) for path, leaf in array_leaves(model).items()}
    return jax.tree.structure(model), shapes
