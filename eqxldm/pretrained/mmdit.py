"""MMDiT: the names of diffusers' SD3Transformer2DModel and of Stability AI's files."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import nn
from ..models import MMDiT
from ..models.mmdit import FLOW_TIME, scaled_places
from .joint_blocks import DIFFUSERS_IMAGE, DIFFUSERS_TEXT, StreamNames, joint_stack
from .layout import Layout, Tensor, WeightsError
from .parts import Leaves, linear, patch_conv, swap_halves
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=18, attention_head_dim=64,
    num_attention_heads=18, joint_attention_dim=4096, caption_projection_dim=1152,
    pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=96,
    dual_attention_layers=[], qk_norm=None,
)  # fmt: skip
TABLE = "pos_embed.pos_embed"
_X, _TEXT = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
ORIGINAL = dict(
    text=StreamNames(
        modulation=f"{_TEXT}.adaLN_modulation.1",
        qkv=(f"{_TEXT}.attn.qkv",),
        norms=(f"{_TEXT}.attn.ln_q.weight", f"{_TEXT}.attn.ln_k.weight"),
        proj=f"{_TEXT}.attn.proj",
        fc1=f"{_TEXT}.mlp.fc1",
        fc2=f"{_TEXT}.mlp.fc2",
    ),
    image=StreamNames(
        modulation=f"{_X}.adaLN_modulation.1",
        qkv=(f"{_X}.attn.qkv",),
        norms=(f"{_X}.attn.ln_q.weight", f"{_X}.attn.ln_k.weight"),
        proj=f"{_X}.attn.proj",
        fc1=f"{_X}.mlp.fc1",
        fc2=f"{_X}.mlp.fc2",
        dual_qkv=(f"{_X}.attn2.qkv",),
        dual_norms=(f"{_X}.attn2.ln_q.weight", f"{_X}.attn2.ln_k.weight"),
        dual_proj=f"{_X}.attn2.proj",
    ),
)


def from_diffusers(config: dict[str, Any], *, key) -> MMDiT:
    """The module of a diffusers `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8,
    ...              caption_projection_dim=16)
    >>> from_diffusers(sizes, key=jax.random.key(0)).config.width
    16
    """
    given = DIFFUSERS_DEFAULTS | config
    width = given["num_attention_heads"] * given["attention_head_dim"]
    duals, norms = list(given["dual_attention_layers"] or []), {None: None, "rms_norm": nn.RMSNorm}
    wrong = []
    if duals != list(range(len(duals))):
        wrong.append(f"dual_attention_layers = {duals} (the first blocks: 0, 1, ...)")
    if given["qk_norm"] not in norms:
        wrong.append(f"qk_norm = {given['qk_norm']!r} ({' or '.join(map(repr, norms))})")
    if given["caption_projection_dim"] != width:
        wrong.append(f"caption_projection_dim = {given['caption_projection_dim']} ({width})")
    if not given["pos_embed_max_size"]:
        wrong.append("pos_embed_max_size = None (a number)")
    refuse_options("MMDiT", given, {}, wrong)
    return MMDiT(
        given["in_channels"],
        depth=given["num_layers"],
        width=width,
        num_heads=given["num_attention_heads"],
        context_size=given["joint_attention_dim"],
        pooled_size=given["pooled_projection_dim"],
        patch_size=given["patch_size"],
        out_channels=given["out_channels"],
        dual_depth=len(duals),
        qk_norm=norms[given["qk_norm"]],
        max_grid=given["pos_embed_max_size"],
        base_grid=given["sample_size"] // given["patch_size"],
        key=key,
    )


def with_grid_of_table(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration with the `sample_size` for which the file's table of positions was made.

    Nothing else in a folder says how far apart the positions lie. The first step along a row of
    the table has the sine of that distance as its first feature.

    >>> with_grid_of_table({"sample_size": 64}, {})
    {'sample_size': 64}
    """
    if TABLE not in tensors:
        return config
    given = DIFFUSERS_DEFAULTS | config
    table, size = tensors[TABLE].read(), given["pos_embed_max_size"]
    if table.shape[1] < 2 or size != round(table.shape[1] ** 0.5):
        return config
    base = round(size * float(np.arcsin(np.float64(table[0, 1, 0]))))
    return config if base < 1 else config | dict(sample_size=base * given["patch_size"])


def diffusers_config(mmdit: MMDiT) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> mmdit = MMDiT(4, depth=2, width=16, num_heads=2, context_size=6, pooled_size=5,
    ...               key=jax.random.key(0))
    >>> diffusers_config(mmdit)["num_layers"]
    2
    """
    ours = mmdit.config
    reasons = {
        "it has no pooled vector": ours.pooled_size is None,
        "it has an embed_cond": ours.embed_cond is not None,
        "it has a step_embedding": ours.step_embedding is not None,
        f"its mlp_ratio is {ours.mlp_ratio}, not 4": ours.mlp_ratio != 4,
        f"it reads the time as {ours.time_embedding}": ours.time_embedding != FLOW_TIME,
        "its qk_norm is not nn.RMSNorm": ours.qk_norm not in (None, nn.RMSNorm),
    }
    refuse_network("MMDiT", "diffusers", reasons)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="SD3Transformer2DModel",
        sample_size=ours.base_grid * ours.patch_size,
        patch_size=ours.patch_size,
        in_channels=ours.in_channels,
        num_layers=ours.depth,
        attention_head_dim=ours.width // ours.num_heads,
        num_attention_heads=ours.num_heads,
        joint_attention_dim=ours.context_size,
        caption_projection_dim=ours.width,
        pooled_projection_dim=ours.pooled_size,
        out_channels=ours.out_channels,
        pos_embed_max_size=ours.max_grid,
        dual_attention_layers=list(range(ours.dual_depth)),
        qk_norm=None if ours.qk_norm is None else "rms_norm",
    )


def diffusers_layout(mmdit: MMDiT) -> Layout:
    """The names of diffusers' SD3Transformer2DModel.

    Its final modulation, and that of the last block's text, have the scale before the shift. The
    fixed table of positions is compared and not loaded: of a half-precision file diffusers computes
    with a rounded one.

    >>> import jax
    >>> mmdit = MMDiT(4, depth=2, width=16, num_heads=2, context_size=6, key=jax.random.key(0))
    >>> diffusers_layout(mmdit).leaves[".final_linear.bias"][0].name
    'proj_out.bias'
    """
    names = {
        "patch_embedding": "pos_embed.proj",
        "time_embedding": ("time_text_embed.timestep_embedder.linear_{}", (1, 2)),
        "pooled_embedding": ("time_text_embed.text_embedder.linear_{}", (1, 2)),
        "final_modulation.linear": "norm_out.linear",
        "final_linear": "proj_out",
    }
    streams = dict(text=DIFFUSERS_TEXT, image=DIFFUSERS_IMAGE)
    return _layout(mmdit, names, streams, TABLE, scale_first=True)


def original_layout(mmdit: MMDiT) -> Layout:
    """The names of Stability AI's own files, with the shift before the scale everywhere.

    In files that hold other networks too they begin with `model.diffusion_model.`: give it to
    `load_into` as its `prefix`.

    >>> import jax
    >>> mmdit = MMDiT(4, depth=2, width=16, num_heads=2, context_size=6, key=jax.random.key(0))
    >>> original_layout(mmdit).leaves[".final_linear.bias"][0].name
    'final_layer.linear.bias'
    """
    names = {
        "patch_embedding": "x_embedder.proj",
        "time_embedding": ("t_embedder.mlp.{}", (0, 2)),
        "pooled_embedding": ("y_embedder.mlp.{}", (0, 2)),
        "final_modulation.linear": "final_layer.adaLN_modulation.1",
        "final_linear": "final_layer.linear",
    }
    return _layout(mmdit, names, ORIGINAL, "pos_embed", scale_first=False)


def _layout(
    mmdit: MMDiT,
    names: dict[str, Any],
    streams: dict[str, StreamNames],
    table: str,
    *,
    scale_first: bool,
) -> Layout:
    """`names` are of what is not in the blocks; an MLP's has a place for its two numbers."""
    ours = mmdit.config
    conv = patch_conv(ours.in_channels, ours.patch_size)
    leaves = linear("patch_embedding", names["patch_embedding"], conv)
    for field in ("time_embedding", "pooled_embedding"):
        if getattr(mmdit, field) is not None:
            name, numbers = names[field]
            for n, number in enumerate(numbers, 1):
                leaves |= linear(f"{field}.linear{n}", name.format(number))
    leaves |= linear("context_embedding", "context_embedder")
    leaves |= final_modulation(names["final_modulation.linear"], scale_first=scale_first)
    leaves |= linear("final_linear", names["final_linear"])
    for field, stack, first in mmdit.stacks():
        leaves |= joint_stack(field, stack, first, streams, scale_first=scale_first)
    return Layout(leaves, {table: lambda: _positions(mmdit)}, writes_fixed=True)


def final_modulation(theirs: str, *, scale_first: bool) -> Leaves:
    """The final modulation, the halves swapped where the file has the scale first.

    >>> [leaf for leaf in final_modulation("norm_out.linear", scale_first=True)]
    ['.final_modulation.linear.weight', '.final_modulation.linear.bias']
    """
    leaves = linear("final_modulation.linear", theirs)
    if not scale_first:
        return leaves
    return {
        path: tuple(part._replace(read=swap_halves, write=swap_halves) for part in parts)
        for path, parts in leaves.items()
    }


def _positions(mmdit: MMDiT) -> np.ndarray:
    """`cut_positions` of the whole square, its axes apart: for SD3.5 medium, 2 x 10^8 numbers."""
    side, width = mmdit.config.max_grid, mmdit.config.width
    if side * side * width > 2**29:
        raise WeightsError(f"MMDiT: no file has a table of positions for max_grid = {side}.")
    places = scaled_places(mmdit.config, np.arange(side)[:, None])
    columns = 2 * ((width // 2 + 1) // 2)  # the features of the last axis: half, or a pair more
    column = nn.sincos_features(places, columns).astype(np.float32)
    row = nn.sincos_features(places, width - columns).astype(np.float32)
    table = np.empty((side, side, width), np.float32)
    table[..., :columns], table[..., columns:] = column, row[:, None]
    return table.reshape(1, side * side, width)
