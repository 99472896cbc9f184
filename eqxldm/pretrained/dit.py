"""DiT: the names of the official `.pt` files and of diffusers, and the configurations.

diffusers' DiTTransformer2DModel is not the official network: its timestep frequencies are
`10000^(-i / 127)`, the official ones `10000^(-i / 128)`. A model that is made from a diffusers
folder computes as diffusers does; the same file read into `models.dit_xl_2(...)` computes as the
official code does. (The other difference, `norm_eps` of one of three norms, 1e-5 and 1e-6, is kept
at the official 1e-6: it changes outputs by parts in a million.)
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .. import nn
from ..models import DiT, DiTBlock
from ..nn import LabelEmbedding, patch_grid, sincos_positions, with_fields
from .layout import Layout, Part, WeightsError
from .parts import (
    Leaves,
    join_thirds,
    linear,
    patch_conv,
    split_thirds,
    stacked_linear,
    stacked_qkv,
    stacked_scales,
)
from .refusals import refuse_network, refuse_options

STACK = "blocks.stacked"
DIFFUSERS_TIME = nn.Sinusoid(freq_shift=1)
# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=None,
    num_layers=28, attention_bias=True, sample_size=32, patch_size=2,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    norm_elementwise_affine=False, norm_eps=1e-5,
)  # fmt: skip
# What our network can be; any other value is refused.
DIFFUSERS_ONLY = dict(
    attention_bias=True,
    activation_fn="gelu-approximate",
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
)


def with_diffusers_time(dit: DiT) -> DiT:
    """The same network and weights, but with the timestep frequencies of diffusers.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> with_diffusers_time(dit).config.time_embedding.freq_shift
    1
    """
    sinusoid = replace(dit.config.time_embedding, freq_shift=1)
    time: Any = dit.time_embedding
    time = with_fields(time, config=sinusoid)
    config = replace(dit.config, time_embedding=sinusoid)
    return with_fields(dit, time_embedding=time, config=config)


def from_diffusers(config: dict[str, Any], *, key) -> DiT:
    """The module of a diffusers `config.json`, with random weights and diffusers' frequencies.

    Dropout is left out: it is off when a network is used.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    >>> from_diffusers(sizes, key=jax.random.key(0)).shape
    (4, 8, 8)
    """
    given = DIFFUSERS_DEFAULTS | config
    wrong = []
    channels, out = given["in_channels"], given["out_channels"]
    if out not in (None, channels, 2 * channels):
        wrong.append(f"out_channels = {out} ({channels} or {2 * channels})")
    if given["norm_eps"] not in (1e-5, 1e-6):
        wrong.append(f"norm_eps = {given['norm_eps']} (1e-05 or 1e-06)")
    refuse_options("DiT", given, DIFFUSERS_ONLY, wrong)
    num_heads, size = given["num_attention_heads"], given["sample_size"]
    return DiT(
        (channels, size, size),
        patch_size=given["patch_size"],
        depth=given["num_layers"],
        width=num_heads * given["attention_head_dim"],
        num_heads=num_heads,
        num_classes=given["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        time_embedding=DIFFUSERS_TIME,
        key=key,
    )


def diffusers_config(dit: DiT) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    >>> diffusers_config(from_diffusers(sizes, key=jax.random.key(0)))["num_layers"]
    1
    """
    ours, shape = dit.config, dit.shape
    reasons = {
        f"its latent has {len(shape) - 1} spatial axes": len(shape) != 3,
        "its latent is not square": len(set(shape[1:])) > 1,
        "its patches are not square": not isinstance(ours.patch_size, int),
        "it has no labels": ours.num_classes is None,
        "it has a QK-norm": ours.qk_norm is not None,
        "it has a rope": ours.rope is not None,
        "it has a step_embedding": ours.step_embedding is not None,
        "its blocks are not DiTBlock": ours.block is not DiTBlock,
        f"its mlp_ratio is {ours.mlp_ratio}, not 4": ours.mlp_ratio != 4,
        "its timestep frequencies are the official ones; pretrained.with_diffusers_time(model) has "
        "diffusers', with slightly other outputs": ours.time_embedding == nn.Sinusoid(),
        f"it reads the time as {ours.time_embedding}": (
            ours.time_embedding not in (nn.Sinusoid(), DIFFUSERS_TIME)
        ),
    }
    refuse_network("DiT", "diffusers", reasons)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="DiTTransformer2DModel",
        num_attention_heads=ours.num_heads,
        attention_head_dim=ours.width // ours.num_heads,
        in_channels=shape[0],
        out_channels=shape[0] * (1 + ours.learn_sigma),
        num_layers=ours.depth,
        sample_size=shape[1],
        patch_size=ours.patch_size,
        num_embeds_ada_norm=ours.num_classes,
        norm_eps=1e-6,
    )


def official_layout(dit: DiT) -> Layout:
    """The names of the official `.pt` files; `pos_embed` is fixed.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, key=jax.random.key(0))
    >>> [part.name for part in official_layout(dit).leaves[".blocks.stacked.fc1.bias"]]
    ['blocks.0.mlp.fc1.bias', 'blocks.1.mlp.fc1.bias']
    """
    blocks = range(dit.config.depth)
    leaves = linear(
        "patch_embedding",
        "x_embedder.proj",
        patch_conv(dit.shape[0], dit.patch_size, len(dit.shape) - 1),
    )
    leaves |= linear("time_embedding.linear1", "t_embedder.mlp.0")
    leaves |= linear("time_embedding.linear2", "t_embedder.mlp.2")
    if isinstance(dit.embed_cond, LabelEmbedding):
        table = Part("y_embedder.embedding_table.weight")
        leaves[".embed_cond.table"] = (table,)
    for ours, theirs in {
        "attention.proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "modulation.linear": "adaLN_modulation.1",
    }.items():
        leaves |= stacked_linear(f"{STACK}.{ours}", f"blocks.{{}}.{theirs}", blocks)
    qkv = f"{STACK}.attention.qkv", "blocks.{}.attn.qkv", blocks
    leaves |= stacked_linear(*qkv, split_thirds, join_thirds)
    leaves |= _qk_norms(dit)
    leaves |= linear("final_modulation.linear", "final_layer.adaLN_modulation.1")
    leaves |= linear("final_linear", "final_layer.linear")
    return Layout(leaves, {"pos_embed": lambda: _positions(dit)}, writes_fixed=True)


def diffusers_layout(dit: DiT) -> Layout:
    """The names of diffusers' DiTTransformer2DModel.

    There every block has its own copy of the embeddings of time and label; ours has one, so all
    the copies must be equal. Queries, keys and values are three tensors.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, key=jax.random.key(0))
    >>> parts = diffusers_layout(dit).leaves[".blocks.stacked.attention.qkv.bias"]
    >>> [part.name for part in parts][:2]
    ['transformer_blocks.0.attn1.to_q.bias', 'transformer_blocks.0.attn1.to_k.bias']
    """
    blocks = range(dit.config.depth)

    def copied(theirs: str) -> Part:
        names = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in blocks]
        return Part(names[0], copies=tuple(names[1:]))

    leaves = linear(
        "patch_embedding",
        "pos_embed.proj",
        patch_conv(dit.shape[0], dit.patch_size, len(dit.shape) - 1),
    )
    for n in (1, 2):
        for kind in ("weight", "bias"):
            part = copied(f"timestep_embedder.linear_{n}.{kind}")
            leaves[f".time_embedding.linear{n}.{kind}"] = (part,)
    if isinstance(dit.embed_cond, LabelEmbedding):
        leaves[".embed_cond.table"] = (copied("class_embedder.embedding_table.weight"),)
    for ours, theirs in {
        "attention.proj": "attn1.to_out.0",
        "fc1": "ff.net.0.proj",
        "fc2": "ff.net.2",
        "modulation.linear": "norm1.linear",
    }.items():
        leaves |= stacked_linear(f"{STACK}.{ours}", f"transformer_blocks.{{}}.{theirs}", blocks)
    q, k, v = (f"transformer_blocks.{{}}.attn1.to_{letter}" for letter in "qkv")
    leaves |= stacked_qkv(f"{STACK}.attention.qkv", (q, k, v), blocks)
    leaves |= linear("final_modulation.linear", "proj_out_1")
    leaves |= linear("final_linear", "proj_out_2")
    # Files of old versions of diffusers hold the table.
    return Layout(leaves, {"pos_embed.pos_embed": lambda: _positions(dit)})


def _qk_norms(dit: DiT) -> Leaves:
    """timm's names, as later DiT code bases have them; the published models have no QK-norm."""
    if dit.config.qk_norm is None:
        return {}
    leaves: Leaves = {}
    for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        name = f"{STACK}.attention.{ours}"
        leaves |= stacked_scales(name, f"blocks.{{}}.attn.{theirs}.weight", range(dit.config.depth))
    return leaves


def _positions(dit: DiT) -> np.ndarray:
    grid, _ = patch_grid(dit.shape[1:], dit.patch_size)
    if math.prod(grid) * dit.config.width > 2**28:  # the published ones have 2^18 or 2^20
        raise WeightsError(f"DiT: no file has a table of positions for shape {dit.shape}.")
    return sincos_positions(grid, dit.config.width).astype(np.float32)[None]
