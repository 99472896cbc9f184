"""DiT: the names of the official `.pt` files and of diffusers, and the configurations.

diffusers' DiTTransformer2DModel is not the official network: its timestep frequencies are
`10000^(-i / 127)`, the official ones `10000^(-i / 128)`. A model that is made from a diffusers
folder computes as diffusers does; the same file read into `models.dit_xl_2(...)` computes as the
official code does. (The other difference, `norm_eps` of one of three norms, 1e-5 and 1e-6, is kept
at the official 1e-6: it changes outputs by parts in a million.)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np

from ..models import DiT
from ..nn.attention import NormedSelfAttention, RMSNorm
from ..nn.embeddings import LabelEmbedding, sincos_positions
from ..nn.fields import with_fields
from .layout import Layout, Part, Transform, WeightsError, identity
from .options import ATTENTION, label_table, name_of, policies
from .parts import Leaves, linear

QK_NORM = {None: None, "RMSNorm": RMSNorm}
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
    >>> with_diffusers_time(dit).time_embedding.freq_shift
    1
    """
    time = with_fields(dit.time_embedding, freq_shift=1)
    return eqx.tree_at(lambda d: d.time_embedding, dit, time)


def config(dit: DiT) -> dict[str, Any]:
    """What `build` needs, as JSON: the arguments of `DiT`.

    **Raises** `WeightsError` for a function that has no name here.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> config(dit)["width"], config(dit)["remat"]
    (16, 'dots_with_no_batch_dims_saveable')
    """
    depth, hidden, width = dit.blocks.fc1.weight.shape
    table, attention = label_table(dit.label_embedding, "DiT"), dit.blocks.attention
    norm = type(attention.query_norm) if isinstance(attention, NormedSelfAttention) else None
    return dict(
        shape=list(dit.shape),
        patch_size=dit.patch_size,
        depth=depth,
        width=width,
        num_heads=attention.qkv.num_heads,
        num_classes=None if table is None else table.num_classes,
        learn_sigma=_learns_sigma(dit),
        mlp_ratio=_ratio(width, hidden),
        qk_norm=name_of(norm, QK_NORM, "DiT: qk_norm"),
        attention=name_of(attention.attention, ATTENTION, "DiT: attention"),
        remat=name_of(dit.remat, policies(), "DiT: remat"),
        unroll=dit.unroll,
        freq_shift=dit.time_embedding.freq_shift,
    )


def build(config: dict[str, Any], *, key) -> DiT:
    """The module that `config` describes, with random weights.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> jax.tree.structure(build(config(dit), key=jax.random.key(0))) == jax.tree.structure(dit)
    True
    """
    options = dict(config)
    for option, table in (("qk_norm", QK_NORM), ("attention", ATTENTION), ("remat", policies())):
        options[option] = table[options[option]]
    return DiT(tuple(options.pop("shape")), **options, key=key)


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
    wrong = [f"{k} = {given[k]!r} ({v!r})" for k, v in DIFFUSERS_ONLY.items() if given[k] != v]
    channels, out = given["in_channels"], given["out_channels"]
    if out not in (None, channels, 2 * channels):
        wrong.append(f"out_channels = {out} ({channels} or {2 * channels})")
    if given["norm_eps"] not in (1e-5, 1e-6):
        wrong.append(f"norm_eps = {given['norm_eps']} (1e-05 or 1e-06)")
    if wrong:
        raise WeightsError(
            "DiT: config.json has what DiT has not (in brackets): " + ", ".join(wrong)
        )
    num_heads, size = given["num_attention_heads"], given["sample_size"]
    return DiT(
        (channels, size, size),
        patch_size=given["patch_size"],
        depth=given["num_layers"],
        width=num_heads * given["attention_head_dim"],
        num_heads=num_heads,
        num_classes=given["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        freq_shift=1,
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
    ours = config(dit)
    channels, height, wide = ours["shape"]
    reasons = {
        "its latent is not square": height != wide,
        "it has no labels": ours["num_classes"] is None,
        "it has a QK-norm": ours["qk_norm"] is not None,
        f"its mlp_ratio is {ours['mlp_ratio']}, not 4": ours["mlp_ratio"] != 4,
        "its timestep frequencies are the official ones; pretrained.with_diffusers_time(model) has "
        "diffusers', with slightly other outputs": ours["freq_shift"] != 1,
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        raise WeightsError("DiT: diffusers cannot hold this network: " + "; ".join(why) + ".")
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="DiTTransformer2DModel",
        num_attention_heads=ours["num_heads"],
        attention_head_dim=ours["width"] // ours["num_heads"],
        in_channels=channels,
        out_channels=channels * (1 + ours["learn_sigma"]),
        num_layers=ours["depth"],
        sample_size=height,
        patch_size=ours["patch_size"],
        num_embeds_ada_norm=ours["num_classes"],
        norm_eps=1e-6,
    )


def official_layout(dit: DiT) -> Layout:
    """The names of the official `.pt` files; `pos_embed` is fixed.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, key=jax.random.key(0))
    >>> [part.name for part in official_layout(dit).leaves[".blocks.fc1.bias"]]
    ['blocks.0.mlp.fc1.bias', 'blocks.1.mlp.fc1.bias']
    """
    leaves = linear("patch_embedding", "x_embedder.proj", _patch_conv(dit))
    leaves |= linear("time_embedding.linear1", "t_embedder.mlp.0")
    leaves |= linear("time_embedding.linear2", "t_embedder.mlp.2")
    if isinstance(dit.label_embedding, LabelEmbedding):
        table = Part("y_embedder.embedding_table.weight")
        leaves[".label_embedding.table"] = (table,)
    for ours, theirs in {
        "attention.proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "modulation.linear": "adaLN_modulation.1",
    }.items():
        leaves |= _stacked(dit, ours, f"blocks.{{}}.{theirs}")
    three, one = lambda a: a.reshape(3, -1, *a.shape[1:]), lambda a: a.reshape(-1, *a.shape[2:])
    leaves |= _stacked(dit, "attention.qkv", "blocks.{}.attn.qkv", three, one)
    leaves |= _qk_norms(dit)
    leaves |= linear("final_modulation.linear", "final_layer.adaLN_modulation.1")
    leaves |= linear("final_linear", "final_layer.linear")
    return Layout(leaves, {"pos_embed": lambda: _positions(dit)})


def diffusers_layout(dit: DiT) -> Layout:
    """The names of diffusers' DiTTransformer2DModel.

    There every block has its own copy of the embeddings of time and label; ours has one, so all
    the copies must be equal. Queries, keys and values are three tensors.

    >>> import jax
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, key=jax.random.key(0))
    >>> [part.name for part in diffusers_layout(dit).leaves[".blocks.attention.qkv.bias"]][:2]
    ['transformer_blocks.0.attn1.to_q.bias', 'transformer_blocks.0.attn1.to_k.bias']
    """
    depth = dit.blocks.fc1.weight.shape[0]

    def copied(theirs: str) -> Part:
        names = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)]
        return Part(names[0], copies=tuple(names[1:]))

    leaves = linear("patch_embedding", "pos_embed.proj", _patch_conv(dit))
    for n in (1, 2):
        for kind in ("weight", "bias"):
            part = copied(f"timestep_embedder.linear_{n}.{kind}")
            leaves[f".time_embedding.linear{n}.{kind}"] = (part,)
    if isinstance(dit.label_embedding, LabelEmbedding):
        leaves[".label_embedding.table"] = (copied("class_embedder.embedding_table.weight"),)
    for ours, theirs in {
        "attention.proj": "attn1.to_out.0",
        "fc1": "ff.net.0.proj",
        "fc2": "ff.net.2",
        "modulation.linear": "norm1.linear",
    }.items():
        leaves |= _stacked(dit, ours, f"transformer_blocks.{{}}.{theirs}")
    for kind in ("weight", "bias"):
        leaves[f".blocks.attention.qkv.{kind}"] = tuple(
            Part(
                f"transformer_blocks.{i}.attn1.to_{letter}.{kind}",
                (i, k),
            )
            for i in range(depth)
            for k, letter in enumerate("qkv")
        )
    leaves |= linear("final_modulation.linear", "proj_out_1")
    leaves |= linear("final_linear", "proj_out_2")
    # Files of old versions of diffusers hold the table.
    return Layout(leaves, {"pos_embed.pos_embed": lambda: _positions(dit)})


def _stacked(
    dit: DiT, ours: str, theirs: str, read: Transform = identity, write: Transform = identity
) -> Leaves:
    """A linear layer of every block; `theirs` has a place for the block's number."""
    depth = dit.blocks.fc1.weight.shape[0]
    return {
        f".blocks.{ours}.{kind}": tuple(
            Part(f"{theirs.format(i)}.{kind}", (i,), read, write) for i in range(depth)
        )
        for kind in ("weight", "bias")
    }


def _qk_norms(dit: DiT) -> Leaves:
    """timm's names, as later DiT code bases have them; the published models have no QK-norm."""
    if not isinstance(dit.blocks.attention, NormedSelfAttention):
        return {}
    depth = dit.blocks.fc1.weight.shape[0]
    return {
        f".blocks.attention.{ours}.scale": tuple(
            Part(f"blocks.{i}.attn.{theirs}.weight", (i,)) for i in range(depth)
        )
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm"))
    }


def _patch_conv(dit: DiT) -> tuple[Callable, Callable]:
    """A strided convolution `(d, c, p, q)` to the matrix on patchify's `(c p q)` and back."""
    channels, patch_size = dit.shape[0], dit.patch_size
    return (
        lambda conv: conv.reshape(conv.shape[0], -1),
        lambda matrix: matrix.reshape(-1, channels, patch_size, patch_size),
    )


def _positions(dit: DiT) -> np.ndarray:
    _, height, wide = dit.shape
    width = dit.blocks.fc1.weight.shape[-1]
    table = sincos_positions(height // dit.patch_size, wide // dit.patch_size, width)
    return table.astype(np.float32)[None]


def _learns_sigma(dit: DiT) -> bool:
    return dit.final_linear.weight.shape[0] == 2 * dit.patch_embedding.weight.shape[1]


def _ratio(width: int, hidden: int) -> float:
    """A ratio that `int(width * ratio)` takes back to `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else float(np.nextafter(ratio, np.inf))
