"""WanTransformer: the names of diffusers' WanTransformer3DModel and of Wan's own files."""

from typing import Any, NamedTuple

from ..models import WanTransformer
from ..models.mmdit import FLOW_TIME
from ..nn import RoPE, Sinusoid
from ..nn.patchify import patch_sizes
from .layout import Layout, Part
from .parts import (
    Leaves,
    linear,
    norm,
    patch_conv,
    stacked,
    stacked_linear,
    stacked_qkv,
    stacked_scales,
)
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    patch_size=[1, 2, 2], num_attention_heads=40, attention_head_dim=128, in_channels=16,
    out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40,
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=None,
    added_kv_proj_dim=None, rope_max_seq_len=1024, pos_embed_seq_len=None,
)  # fmt: skip


class Names(NamedTuple):
    """What the layers are called: in a block, after `blocks.{}.`, and around them.

    `attentions` are the prefixes of self- and cross-attention, `projections` what is in them:
    queries, keys, values and output.
    """

    attentions: tuple[str, str]
    projections: tuple[str, str, str, str]
    cross_norm: str
    mlp: tuple[str, str]
    table: str
    time: tuple[str, str]
    modulation: str
    text: tuple[str, str]
    final_table: str
    final_linear: str


_TIME, _TEXT = "condition_embedder.time_embedder", "condition_embedder.text_embedder"
DIFFUSERS = Names(
    attentions=("attn1", "attn2"),
    projections=("to_q", "to_k", "to_v", "to_out.0"),
    cross_norm="norm2",
    mlp=("ffn.net.0.proj", "ffn.net.2"),
    table="scale_shift_table",
    time=(f"{_TIME}.linear_1", f"{_TIME}.linear_2"),
    modulation="condition_embedder.time_proj",
    text=(f"{_TEXT}.linear_1", f"{_TEXT}.linear_2"),
    final_table="scale_shift_table",
    final_linear="proj_out",
)
ORIGINAL = Names(
    attentions=("self_attn", "cross_attn"),
    projections=("q", "k", "v", "o"),
    cross_norm="norm3",
    mlp=("ffn.0", "ffn.2"),
    table="modulation",
    time=("time_embedding.0", "time_embedding.2"),
    modulation="time_projection.1",
    text=("text_embedding.0", "text_embedding.2"),
    final_table="head.modulation",
    final_linear="head.head",
)


def from_diffusers(config: dict[str, Any], *, key) -> WanTransformer:
    """The module of a diffusers `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have: the layers of 2.1's
    image-to-video networks for features of CLIP.

    >>> import jax
    >>> sizes = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, ffn_dim=8)
    >>> from_diffusers(sizes, key=jax.random.key(0)).config.width
    16
    """
    given = DIFFUSERS_DEFAULTS | config
    needed: dict[str, Any] = dict(
        qk_norm="rms_norm_across_heads",
        image_dim=None,
        added_kv_proj_dim=None,
        pos_embed_seq_len=None,
    )
    refuse_options("WanTransformer", given, needed)
    frequencies = given["freq_dim"]
    time = FLOW_TIME if frequencies == FLOW_TIME.size else Sinusoid(offset=0.0, size=frequencies)
    return WanTransformer(
        given["in_channels"],
        depth=given["num_layers"],
        width=given["num_attention_heads"] * given["attention_head_dim"],
        num_heads=given["num_attention_heads"],
        context_size=given["text_dim"],
        hidden=given["ffn_dim"],
        patch_size=tuple(given["patch_size"]),
        out_channels=given["out_channels"],
        cross_norm=given["cross_attn_norm"],
        norm_eps=given["eps"],
        time_embedding=time,
        key=key,
    )


def diffusers_config(wan: WanTransformer) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> sizes = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, ffn_dim=8)
    >>> diffusers_config(from_diffusers(sizes, key=jax.random.key(0)))["num_layers"]
    1
    """
    ours, size = wan.config, wan.config.width // wan.config.num_heads
    side, time = 2 * (size // 6), ours.time_embedding
    of_flow = isinstance(time, Sinusoid) and time == Sinusoid(offset=0.0, size=time.size)
    reasons = {
        "it has an embed_cond": ours.embed_cond is not None,
        "it has a step_embedding": ours.step_embedding is not None,
        f"it reads the time as {time}": not of_flow,
        f"its rope is {ours.rope}": ours.rope != RoPE((size - 2 * side, side, side)),
    }
    refuse_network("WanTransformer", "diffusers", reasons)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="WanTransformer3DModel",
        patch_size=list(patch_sizes(ours.patch_size, 3)),
        num_attention_heads=ours.num_heads,
        attention_head_dim=size,
        in_channels=ours.in_channels,
        out_channels=ours.out_channels or ours.in_channels,
        text_dim=ours.context_size,
        freq_dim=time.size,
        ffn_dim=ours.hidden,
        num_layers=ours.depth,
        cross_attn_norm=ours.cross_norm,
        eps=ours.norm_eps,
    )


def diffusers_layout(wan: WanTransformer) -> Layout:
    """The names of diffusers' WanTransformer3DModel.

    >>> import jax
    >>> wan = WanTransformer(4, depth=1, width=16, num_heads=2, context_size=6,
    ...                      key=jax.random.key(0))
    >>> diffusers_layout(wan).leaves[".final_linear.bias"][0].name
    'proj_out.bias'
    """
    return _layout(wan, DIFFUSERS)


def original_layout(wan: WanTransformer) -> Layout:
    """The names of Wan's own files; in ComfyUI's they begin with `model.diffusion_model.`.

    >>> import jax
    >>> wan = WanTransformer(4, depth=1, width=16, num_heads=2, context_size=6,
    ...                      key=jax.random.key(0))
    >>> original_layout(wan).leaves[".final_linear.bias"][0].name
    'head.head.bias'
    """
    return _layout(wan, ORIGINAL)


def _layout(wan: WanTransformer, names: Names) -> Layout:
    ours, blocks = wan.config, range(wan.config.depth)
    matrix = patch_conv(ours.in_channels, ours.patch_size, 3)
    leaves = linear("patch_embedding", "patch_embedding", matrix)
    for n in (1, 2):
        leaves |= linear(f"time_embedding.linear{n}", names.time[n - 1])
        leaves |= linear(f"text_embedding.fc{n}", names.text[n - 1])
    leaves |= linear("block_modulation.linear", names.modulation)
    leaves |= _table("final_table", names.final_table)
    leaves |= linear("final_linear", names.final_linear)

    at = lambda name: "blocks.{}." + name
    for field, theirs in zip(("attention", "cross_attention"), names.attentions, strict=True):
        mine = f"blocks.stacked.{field}"
        *qkv, proj = (at(f"{theirs}.{name}") for name in names.projections)
        if field == "attention":
            leaves |= stacked_qkv(f"{mine}.qkv", (qkv[0], qkv[1], qkv[2]), blocks)
        else:
            for layer, name in zip(("query", "key", "value"), qkv, strict=True):
                leaves |= stacked_linear(f"{mine}.{layer}", name, blocks)
        leaves |= stacked_linear(f"{mine}.proj", proj, blocks)
        leaves |= stacked_scales(f"{mine}.query_norm", at(f"{theirs}.norm_q.weight"), blocks)
        leaves |= stacked_scales(f"{mine}.key_norm", at(f"{theirs}.norm_k.weight"), blocks)
    for n in (1, 2):
        leaves |= stacked_linear(f"blocks.stacked.fc{n}", at(names.mlp[n - 1]), blocks)
    one = _table("table", at(names.table))
    if ours.cross_norm:
        one |= norm("cross_norm", at(names.cross_norm))
    return Layout(leaves | stacked(one, ours.depth), {})


def _table(ours: str, theirs: str) -> Leaves:
    """A table of modulations, which has an axis for the batch there."""
    return {f".{ours}": (Part(theirs, (), lambda t: t[0], lambda t: t[None]),)}
