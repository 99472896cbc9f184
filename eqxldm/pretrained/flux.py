"""Flux: the names of diffusers' FluxTransformer2DModel and of Black Forest Labs' files."""

from typing import Any

from ..models import Flux
from ..models.mmdit import FLOW_TIME
from ..nn import RoPE
from .joint_blocks import DIFFUSERS_IMAGE, DIFFUSERS_TEXT, StreamNames, joint_stack
from .layout import Layout, Part
from .mmdit import final_modulation
from .parts import (
    Leaves,
    join_thirds,
    linear,
    split_thirds,
    stacked_linear,
    stacked_qkv,
    stacked_scales,
)
from .refusals import refuse_network, refuse_options

PATCH = 2  # packed by diffusers' pipeline and by the original sampler, before the network
# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    patch_size=1, in_channels=64, out_channels=None, num_layers=19, num_single_layers=38,
    attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
    pooled_projection_dim=768, guidance_embeds=False, axes_dims_rope=[16, 56, 56],
)  # fmt: skip
_DOUBLE, _SINGLE = "double_blocks.{}", "single_blocks.{}"
_SINGLE_THERE = "single_transformer_blocks.{}"
ORIGINAL = {
    side: StreamNames(
        modulation=f"{_DOUBLE}.{name}_mod.lin",
        qkv=(f"{_DOUBLE}.{name}_attn.qkv",),
        norms=(
            f"{_DOUBLE}.{name}_attn.norm.query_norm.scale",
            f"{_DOUBLE}.{name}_attn.norm.key_norm.scale",
        ),
        proj=f"{_DOUBLE}.{name}_attn.proj",
        fc1=f"{_DOUBLE}.{name}_mlp.0",
        fc2=f"{_DOUBLE}.{name}_mlp.2",
    )
    for side, name in (("text", "txt"), ("image", "img"))
}
EMBEDDINGS = {
    "time_embedding": ("time_text_embed.timestep_embedder", "time_in"),
    "guidance_embedding": ("time_text_embed.guidance_embedder", "guidance_in"),
    "pooled_embedding": ("time_text_embed.text_embedder", "vector_in"),
}


def from_diffusers(config: dict[str, Any], *, key) -> Flux:
    """The module of a diffusers `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=2,
    ...              attention_head_dim=8, axes_dims_rope=[4, 2, 2])
    >>> from_diffusers(sizes, key=jax.random.key(0)).config.in_channels
    16
    """
    given = DIFFUSERS_DEFAULTS | config
    area = PATCH * PATCH
    axes, head = tuple(given["axes_dims_rope"]), given["attention_head_dim"]
    inside, out = given["in_channels"], given["out_channels"] or given["in_channels"]
    wrong = [f"patch_size = {given['patch_size']} (1)"] if given["patch_size"] != 1 else []
    for name, channels in (("in_channels", inside), ("out_channels", out)):
        if channels % area:
            wrong.append(f"{name} = {channels} (a multiple of {area}, for patches of 2 x 2)")
    if len(axes) != 3 or sum(axes) != head:
        wrong.append(f"axes_dims_rope = {list(axes)} (three numbers with the sum {head})")
    refuse_options("Flux", given, {}, wrong)
    return Flux(
        inside // area,
        depth=given["num_layers"],
        single_depth=given["num_single_layers"],
        width=given["num_attention_heads"] * head,
        num_heads=given["num_attention_heads"],
        context_size=given["joint_attention_dim"],
        pooled_size=given["pooled_projection_dim"],
        guidance=given["guidance_embeds"],
        out_channels=out // area,
        rope=RoPE(axes),
        key=key,
    )


def diffusers_config(flux: Flux) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> flux = Flux(4, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
    ...             pooled_size=5, rope=RoPE((4, 2, 2)), key=jax.random.key(0))
    >>> diffusers_config(flux)["in_channels"]
    16
    """
    ours = flux.config
    head = ours.width // ours.num_heads
    out: Any = ours.out_channels
    reasons = {
        "it has an embed_cond": ours.embed_cond is not None,
        "it has a step_embedding": ours.step_embedding is not None,
        f"its mlp_ratio is {ours.mlp_ratio}, not 4": ours.mlp_ratio != 4,
        f"its patch_size is {ours.patch_size}, not {PATCH}": ours.patch_size != PATCH,
        f"it reads the time as {ours.time_embedding}": ours.time_embedding != FLOW_TIME,
        f"its rope is {ours.rope}": (
            sum(ours.rope.sizes) != head or ours.rope != RoPE(ours.rope.sizes)
        ),
    }
    refuse_network("Flux", "diffusers", reasons)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="FluxTransformer2DModel",
        in_channels=PATCH * PATCH * ours.in_channels,
        out_channels=None if out == ours.in_channels else PATCH * PATCH * out,
        num_layers=ours.depth,
        num_single_layers=ours.single_depth,
        attention_head_dim=head,
        num_attention_heads=ours.num_heads,
        joint_attention_dim=ours.context_size,
        pooled_projection_dim=ours.pooled_size,
        guidance_embeds=ours.guidance,
        axes_dims_rope=list(ours.rope.sizes),
    )


def diffusers_layout(flux: Flux) -> Layout:
    """The names of diffusers' FluxTransformer2DModel, whose final modulation has the scale first.

    >>> import jax
    >>> flux = Flux(4, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
    ...             pooled_size=5, rope=RoPE((4, 2, 2)), key=jax.random.key(0))
    >>> diffusers_layout(flux).leaves[".single_blocks.stacked.fc1.bias"][0].name
    'single_transformer_blocks.0.proj_mlp.bias'
    """
    leaves = linear("patch_embedding", "x_embedder")
    leaves |= linear("context_embedding", "context_embedder")
    for field, (theirs, _) in EMBEDDINGS.items():
        if getattr(flux, field) is not None:
            for n in (1, 2):
                leaves |= linear(f"{field}.linear{n}", f"{theirs}.linear_{n}")
    streams = dict(text=DIFFUSERS_TEXT, image=DIFFUSERS_IMAGE)
    leaves |= joint_stack("blocks", flux.blocks, 0, streams, scale_first=True)
    ours, blocks = "single_blocks.stacked", range(flux.config.single_depth)
    leaves |= stacked_linear(f"{ours}.modulation.linear", f"{_SINGLE_THERE}.norm.linear", blocks)
    q, k, v = (f"{_SINGLE_THERE}.attn.to_{letter}" for letter in "qkv")
    leaves |= stacked_qkv(f"{ours}.attention.qkv", (q, k, v), blocks)
    for norm, name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        scale = f"{_SINGLE_THERE}.attn.{name}.weight"
        leaves |= stacked_scales(f"{ours}.attention.{norm}", scale, blocks)
    leaves |= stacked_linear(f"{ours}.fc1", f"{_SINGLE_THERE}.proj_mlp", blocks)
    leaves |= _outputs(flux, f"{_SINGLE_THERE}.proj_out")
    leaves |= final_modulation("norm_out.linear", scale_first=True)
    return Layout(leaves | linear("final_linear", "proj_out"), {})


def original_layout(flux: Flux) -> Layout:
    """The names of Black Forest Labs' own files.

    A block of one stream has two matrices: queries, keys, values and the MLP's first layer from
    the one, what attention and the MLP give back by the other.

    >>> import jax
    >>> flux = Flux(4, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
    ...             pooled_size=5, rope=RoPE((4, 2, 2)), key=jax.random.key(0))
    >>> original_layout(flux).leaves[".single_blocks.stacked.fc1.bias"][0].name
    'single_blocks.0.linear1.bias'
    """
    leaves = linear("patch_embedding", "img_in") | linear("context_embedding", "txt_in")
    for field, (_, theirs) in EMBEDDINGS.items():
        if getattr(flux, field) is not None:
            for n, layer in ((1, "in_layer"), (2, "out_layer")):
                leaves |= linear(f"{field}.linear{n}", f"{theirs}.{layer}")
    leaves |= joint_stack("blocks", flux.blocks, 0, ORIGINAL, scale_first=False)
    ours, blocks = "single_blocks.stacked", range(flux.config.single_depth)
    leaves |= stacked_linear(f"{ours}.modulation.linear", f"{_SINGLE}.modulation.lin", blocks)
    for norm in ("query_norm", "key_norm"):
        scale = f"{_SINGLE}.norm.{norm}.scale"
        leaves |= stacked_scales(f"{ours}.attention.{norm}", scale, blocks)
    leaves |= _inputs(flux, f"{_SINGLE}.linear1") | _outputs(flux, f"{_SINGLE}.linear2")
    leaves |= final_modulation("final_layer.adaLN_modulation.1", scale_first=False)
    return Layout(leaves | linear("final_linear", "final_layer.linear"), {})


def _inputs(flux: Flux, theirs: str) -> Leaves:
    """One matrix there: the rows of queries, keys and values, then those of the MLP."""
    rows, ours = 3 * flux.config.width, "single_blocks.stacked"
    leaves: Leaves = {}
    for kind in ("weight", "bias"):
        qkv, mlp = [], []
        for i in range(flux.config.single_depth):
            name = f"{theirs.format(i)}.{kind}"
            first = lambda a: split_thirds(a[:rows])
            qkv.append(Part(name, (i,), first, join_thirds, joined=(0, 0)))
            mlp.append(Part(name, (i,), lambda a: a[rows:], joined=(0, 1)))
        leaves[f".{ours}.attention.qkv.{kind}"] = tuple(qkv)
        leaves[f".{ours}.fc1.{kind}"] = tuple(mlp)
    return leaves


def _outputs(flux: Flux, theirs: str) -> Leaves:
    """One matrix there: the columns of what attention gives, then those of the MLP; one bias."""
    width, ours, blocks = (
        flux.config.width,
        "single_blocks.stacked",
        range(flux.config.single_depth),
    )
    names = [theirs.format(i) for i in blocks]
    first, rest = (lambda a: a[:, :width]), (lambda a: a[:, width:])
    weight = lambda i, read, place: Part(f"{names[i]}.weight", (i,), read, joined=(1, place))
    return {
        f".{ours}.attention.proj.weight": tuple(weight(i, first, 0) for i in blocks),
        f".{ours}.fc2.weight": tuple(weight(i, rest, 1) for i in blocks),
        f".{ours}.fc2.bias": tuple(Part(f"{names[i]}.bias", (i,)) for i in blocks),
    }
