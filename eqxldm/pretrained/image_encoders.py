"""DINOv2 and CLIP's image encoder: the names of transformers and of DINOv2's own files."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..models import CLIPImage, DINOv2
from .activations import ACTIVATIONS, NAMES, foreign_activation, wrong_activation
from .files import TRANSFORMERS, open_folder, read_json
from .layout import Layout, Part, WeightsError, fill
from .limits import check_config, check_count
from .parts import (
    Leaves,
    join_thirds,
    linear,
    norm,
    patch_conv,
    split_thirds,
    stacked,
    stacked_linear,
    stacked_qkv,
)
from .refusals import refuse_network, refuse_options
from .torch_files import open_torch

# What transformers assumes where a configuration is silent.
DINOV2: dict[str, Any] = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, hidden_act="gelu",
    layer_norm_eps=1e-6, image_size=224, patch_size=14, num_channels=3, qkv_bias=True,
    use_swiglu_ffn=False, use_mask_token=True,
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, projection_dim=512, num_hidden_layers=12,
    num_attention_heads=12, num_channels=3, image_size=224, patch_size=32,
    hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip
# What a DINOv2 of ours has, and no other.
FIXED = dict(
    hidden_act="gelu", num_channels=3, qkv_bias=True, use_swiglu_ffn=False, use_mask_token=True
)


def from_dinov2(config: dict[str, Any], *, key) -> DINOv2:
    """The module of a transformers `config.json`, with random weights.

    **Raises** `WeightsError` for what it cannot have: the giant's gated MLPs, for one.

    >>> import jax
    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    >>> from_dinov2(sizes, key=jax.random.key(0)).config.grid
    2
    """
    given = DINOV2 | config
    refuse_options("DINOv2", given, FIXED)
    return DINOv2(
        given["hidden_size"],
        given["num_hidden_layers"],
        given["num_attention_heads"],
        grid=_grid("DINOv2", given),
        patch_size=given["patch_size"],
        hidden=given["hidden_size"] * given["mlp_ratio"],
        norm_eps=given["layer_norm_eps"],
        key=key,
    )


def dinov2_config(network: DINOv2) -> dict[str, Any]:
    """The `config.json` with which transformers makes the same network.

    >>> import jax
    >>> network = DINOv2(16, 1, 2, grid=2, key=jax.random.key(0))
    >>> dinov2_config(network)["image_size"]
    28
    """
    ours = network.config
    ratio, rest = divmod(ours.hidden or 4 * ours.width, ours.width)
    refuse_network(
        "DINOv2", "transformers", {"its hidden units are no multiple of width": rest > 0}
    )
    return DINOV2 | dict(
        architectures=["Dinov2Model"],
        model_type="dinov2",
        hidden_size=ours.width,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        mlp_ratio=ratio,
        image_size=ours.grid * ours.patch_size,
        patch_size=ours.patch_size,
        layer_norm_eps=ours.norm_eps,
    )


def from_clip(config: dict[str, Any], *, key) -> CLIPImage:
    """The module of a transformers `config.json`, of the encoder alone or of a whole CLIP.

    **Raises** `WeightsError` for an activation that it cannot have.

    >>> import jax
    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64)
    >>> from_clip(sizes, key=jax.random.key(0)).config.grid
    2
    """
    whole = {k: config[k] for k in ("projection_dim",) if k in config}
    given = CLIP | (config["vision_config"] | whole if "vision_config" in config else config)
    refuse_options("CLIPImage", given, dict(num_channels=3), wrong_activation(given))
    return CLIPImage(
        given["hidden_size"],
        given["num_hidden_layers"],
        given["num_attention_heads"],
        given["projection_dim"],
        grid=_grid("CLIPImage", given),
        patch_size=given["patch_size"],
        hidden=given["intermediate_size"],
        activation=ACTIVATIONS[given["hidden_act"]],
        norm_eps=given["layer_norm_eps"],
        key=key,
    )


def load_clip_image(folder: str | Path) -> CLIPImage:
    """The image encoder of a transformers folder that holds it alone or a whole CLIP.

    Of a whole one, such as openai/clip-vit-large-patch14-336, the tensors of the images are taken:
    from `model.safetensors`, or from `pytorch_model.bin`, in which no code is run.

    **Raises** `WeightsError` for a folder without weights, or with others than the configuration's.

    >>> import tempfile
    >>> load_clip_image(tempfile.mkdtemp())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: ...config.json cannot be read: No such file or directory.
    """
    folder = Path(folder)
    config, pickled = read_json(folder / "config.json"), folder / "pytorch_model.bin"
    alone = not any(folder.glob("model*.safetensors*"))
    tensors = (
        open_torch(pickled) if alone and pickled.exists() else open_folder(folder, TRANSFORMERS)
    )
    ours = ("vision_model.", "visual_projection.")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(ours)}
    check_config(config, tensors, str(folder))
    like = eqx.filter_eval_shape(lambda key: from_clip(config, key=key), jax.random.key(0))
    check_count(like, tensors, str(folder))
    return fill(like, clip_layout(like), tensors, source=str(folder))


def clip_config(network: CLIPImage) -> dict[str, Any]:
    """The `config.json` with which transformers makes the same network.

    >>> import jax
    >>> network = CLIPImage(16, 1, 2, 8, grid=2, patch_size=4, key=jax.random.key(0))
    >>> clip_config(network)["image_size"]
    8
    """
    ours = network.config
    refuse_network("CLIPImage", "transformers", foreign_activation(ours.activation))
    return CLIP | dict(
        architectures=["CLIPVisionModelWithProjection"],
        model_type="clip_vision_model",
        hidden_size=ours.width,
        intermediate_size=ours.hidden or 4 * ours.width,
        projection_dim=ours.projection,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        image_size=ours.side,
        patch_size=ours.patch_size,
        hidden_act=NAMES[ours.activation],
        layer_norm_eps=ours.norm_eps,
    )


def dinov2_layout(network: DINOv2) -> Layout:
    """The names of transformers' `Dinov2Model`.

    >>> import jax
    >>> layout = dinov2_layout(DINOv2(16, 1, 2, grid=2, key=jax.random.key(0)))
    >>> layout.leaves[".blocks.stacked.layer_scale1"][0].name
    'encoder.layer.0.layer_scale1.lambda1'
    """
    there, depth = "encoder.layer.{}", network.config.depth
    patches = patch_conv(3, network.config.patch_size)
    leaves: Leaves = {
        ".class_token": (Part("embeddings.cls_token", (), np.ravel, _to_11d),),
        ".mask_token": (Part("embeddings.mask_token", (), np.ravel, _to_1d),),
        ".positions": (Part("embeddings.position_embeddings", (), _first, _batch_of_one),),
    }
    leaves |= linear("patch_embedding", "embeddings.patch_embeddings.projection", patches)
    attention = f"{there}.attention"
    query, key, value = (f"{attention}.attention.{k}" for k in ("query", "key", "value"))
    leaves |= stacked_qkv("blocks.stacked.attention.qkv", (query, key, value), range(depth))
    leaves |= stacked(linear("attention.proj", f"{attention}.output.dense"), depth)
    leaves |= _blocks(there, "mlp.fc{}", "norm{}", depth)
    leaves |= _layer_scales(f"{there}.layer_scale{{}}.lambda1", depth)
    return Layout(leaves | norm("norm", "layernorm"), {})


def dinov2_original_layout(network: DINOv2) -> Layout:
    """The names of DINOv2's own files, `dinov2_vitl14_pretrain.pth`.

    >>> import jax
    >>> layout = dinov2_original_layout(DINOv2(16, 1, 2, grid=2, key=jax.random.key(0)))
    >>> layout.leaves[".blocks.stacked.attention.qkv.weight"][0].name
    'blocks.0.attn.qkv.weight'
    """
    there, depth = "blocks.{}", network.config.depth
    patches = patch_conv(3, network.config.patch_size)
    leaves: Leaves = {
        ".class_token": (Part("cls_token", (), np.ravel, _to_11d),),
        ".mask_token": (Part("mask_token", (), np.ravel, _to_1d),),
        ".positions": (Part("pos_embed", (), _first, _batch_of_one),),
    }
    leaves |= linear("patch_embedding", "patch_embed.proj", patches)
    leaves |= stacked_linear(
        "blocks.stacked.attention.qkv", f"{there}.attn.qkv", range(depth), split_thirds, join_thirds
    )
    leaves |= stacked(linear("attention.proj", f"{there}.attn.proj"), depth)
    leaves |= _blocks(there, "mlp.fc{}", "norm{}", depth)
    leaves |= _layer_scales(f"{there}.ls{{}}.gamma", depth)
    return Layout(leaves | norm("norm", "norm"), {})


def clip_layout(network: CLIPImage) -> Layout:
    """The names of transformers' `CLIPVisionModelWithProjection`.

    >>> import jax
    >>> network = CLIPImage(16, 1, 2, 8, grid=2, patch_size=4, key=jax.random.key(0))
    >>> clip_layout(network).leaves[".pre_norm.scale"][0].name
    'vision_model.pre_layrnorm.weight'
    """
    prefix, depth = "vision_model", network.config.depth
    there = f"{prefix}.encoder.layers.{{}}"
    patches = patch_conv(3, network.config.patch_size)
    leaves: Leaves = {
        ".class_token": (Part(f"{prefix}.embeddings.class_embedding"),),
        ".positions": (Part(f"{prefix}.embeddings.position_embedding.weight"),),
    }
    leaves |= linear("patch_embedding", f"{prefix}.embeddings.patch_embedding", patches, bias=False)
    query, key, value = (f"{there}.self_attn.{k}_proj" for k in "qkv")
    leaves |= stacked_qkv("blocks.stacked.attention.qkv", (query, key, value), range(depth))
    leaves |= stacked(linear("attention.proj", f"{there}.self_attn.out_proj"), depth)
    leaves |= _blocks(there, "mlp.fc{}", "layer_norm{}", depth)
    leaves |= norm("pre_norm", f"{prefix}.pre_layrnorm") | norm("norm", f"{prefix}.post_layernorm")
    leaves |= linear("project", "visual_projection", bias=False)
    count = network.config.grid**2 + 1
    fixed = {f"{prefix}.embeddings.position_ids": lambda: np.arange(count)[None]}
    return Layout(leaves, fixed)


def _blocks(there: str, mlp: str, norms: str, depth: int) -> Leaves:
    leaves: Leaves = {}
    for n in (1, 2):
        leaves |= stacked(norm(f"norm{n}", f"{there}.{norms.format(n)}"), depth)
        leaves |= stacked(linear(f"fc{n}", f"{there}.{mlp.format(n)}"), depth)
    return leaves


def _layer_scales(there: str, depth: int) -> Leaves:
    return {
        f".blocks.stacked.layer_scale{n}": tuple(
            Part(there.format(i, n), (i,)) for i in range(depth)
        )
        for n in (1, 2)
    }


def _grid(name: str, given: dict[str, Any]) -> int:
    side, patch = given["image_size"], given["patch_size"]
    if not isinstance(side, int) or not isinstance(patch, int) or patch < 1 or side < patch:
        raise WeightsError(f"{name}: image_size = {side!r} and patch_size = {patch!r} (numbers)")
    return side // patch


def _to_11d(a: np.ndarray) -> np.ndarray:
    return a.reshape(1, 1, -1)


def _to_1d(a: np.ndarray) -> np.ndarray:
    return a.reshape(1, -1)


def _first(a: np.ndarray) -> np.ndarray:
    return a[0]


def _batch_of_one(a: np.ndarray) -> np.ndarray:
    return a[None]
