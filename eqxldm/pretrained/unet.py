"""UNet: the names of diffusers' UNet2DConditionModel and UNet2DModel, and the configurations.

The two differ in their attention: with a `context_size` ours is the first, without the second.
"""

from dataclasses import replace
from typing import Any

from ..models import UNet
from ..models.unet import UNetLevel
from ..nn import (
    AttentionBlock,
    LabelEmbedding,
    Labels,
    Sinusoid,
    SpatialTransformer,
    TransformerBlock,
)
from .layout import Layout, Part
from .parts import (
    Leaves,
    attention_block,
    conv,
    conv_or_linear,
    linear,
    norm,
    old_attention_names,
    resnet,
)
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
BOTH_DEFAULTS: dict[str, Any] = dict(
    act_fn="silu", attention_head_dim=8, center_input_sample=False, class_embed_type=None,
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32, num_class_embeds=None,
    resnet_time_scale_shift="default", time_embedding_dim=None, time_embedding_type="positional",
)  # fmt: skip
CONDITION_DEFAULTS: dict[str, Any] = BOTH_DEFAULTS | dict(
    in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    mid_block_type="UNetMidBlock2DCrossAttn", only_cross_attention=False,
    cross_attention_dim=1280, transformer_layers_per_block=1, num_attention_heads=None,
    reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
    dual_cross_attention=False, use_linear_projection=False, addition_embed_type=None,
    addition_time_embed_dim=None, projection_class_embeddings_input_dim=None,
    resnet_skip_time_act=False, resnet_out_scale_factor=1.0, time_embedding_act_fn=None,
    timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3,
    attention_type="default", class_embeddings_concat=False, cross_attention_norm=None,
    mid_block_only_cross_attention=None,
)  # fmt: skip
PLAIN_DEFAULTS: dict[str, Any] = BOTH_DEFAULTS | dict(
    in_channels=3, out_channels=3, block_out_channels=[224, 448, 672, 896],
    down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    up_block_types=["AttnUpBlock2D"] * 3 + ["UpBlock2D"], mid_block_type="UNetMidBlock2D",
    add_attention=True, attn_norm_num_groups=None, downsample_type="conv", upsample_type="conv",
)  # fmt: skip
# The options of which any value will do; all others are compared with the defaults above.
FREE = {
    "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
    "attention_head_dim", "layers_per_block", "downsample_padding", "flip_sin_to_cos",
    "freq_shift", "norm_eps", "norm_num_groups", "num_class_embeds", "time_embedding_dim",
    "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection",
    "add_attention", "addition_embed_type", "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
}  # fmt: skip
PLAIN_DOWN, PLAIN_UP = "DownBlock2D", "UpBlock2D"


def from_diffusers(config: dict[str, Any], *, key) -> UNet:
    """The module of a diffusers `config.json`, with random weights.

    Dropout is left out: it is off when a network is used. A table of `num_class_embeds` rows gives
    as many classes and no null label, since nothing says which row would be the null one.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(_class_name="UNet2DModel", block_out_channels=[8], norm_num_groups=4,
    ...              down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    >>> from_diffusers(sizes, key=jax.random.key(0)).config.time_embedding.size
    8
    """
    crossed = config.get("_class_name") != "UNet2DModel"
    defaults = CONDITION_DEFAULTS if crossed else PLAIN_DEFAULTS
    given = defaults | config
    channels, levels = given["block_out_channels"], len(given["block_out_channels"])
    only, wrong = {name: defaults[name] for name in sorted(defaults.keys() - FREE)}, []
    kind = "CrossAttn" if crossed else "Attn"
    downs, ups = given["down_block_types"], given["up_block_types"]
    wanted = [[plain, kind + plain] for plain in (PLAIN_DOWN, PLAIN_UP)]
    for name, types, known in (("down", downs, wanted[0]), ("up", ups, wanted[1])):
        if not set(types) <= set(known) or len(types) != levels:
            wrong.append(f"{name}_block_types = {types!r} ({levels} of {known})")
    attention = tuple(name != PLAIN_DOWN for name in downs)
    if attention != tuple(name != PLAIN_UP for name in reversed(ups)):
        wrong.append(f"up_block_types = {ups!r} (the mirror of down_block_types)")
    for name in ("layers_per_block", "cross_attention_dim"):
        if crossed and not isinstance(given[name], int):
            wrong.append(f"{name} = {given[name]!r} (one number)")
    if crossed:
        wrong += _wrong_depths_or_additions(given, levels)
    if given["downsample_padding"] not in (0, 1):
        wrong.append(f"downsample_padding = {given['downsample_padding']!r} (0 or 1)")
    refuse_options("UNet", given, only, wrong)
    width = given["time_embedding_dim"] or 4 * channels[0]
    rows = given["num_class_embeds"]
    return UNet(
        given["in_channels"],
        out_channels=given["out_channels"],
        channels=tuple(channels),
        blocks=given["layers_per_block"],
        attention_levels=attention,
        middle_attention=crossed or given["add_attention"],
        context_size=given["cross_attention_dim"] if crossed else None,
        num_heads=_given_heads(given["attention_head_dim"], channels, crossed),
        transformer_depth=_tupled(given["transformer_layers_per_block"]) if crossed else 1,
        **_added(given),
        linear_projection=crossed and given["use_linear_projection"],
        embed_cond=None if rows is None else Labels(rows, width, has_null=False, stddev=1.0),
        groups=given["norm_num_groups"],
        norm_eps=given["norm_eps"],
        time_width=width,
        time_embedding=Sinusoid(
            size=channels[0],
            freq_shift=given["freq_shift"],
            sin_first=not given["flip_sin_to_cos"],
        ),
        downsample_padding=(1, 1) if given["downsample_padding"] else (0, 1),
        key=key,
    )


def diffusers_config(unet: UNet) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    `sample_size`, which only its pipelines read, is left open: the network takes any size.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> unet = UNet(1, channels=(8, 16), blocks=1, attention_levels=(False, True), groups=4,
    ...             key=jax.random.key(0))
    >>> diffusers_config(unet)["down_block_types"]
    ['DownBlock2D', 'AttnDownBlock2D']
    """
    ours, time = unet.config, unet.config.time_embedding
    crossed, channels = ours.context_size is not None, ours.channels
    num_heads: Any = ours.num_heads
    levels = zip(channels, num_heads, ours.attention_levels, strict=True)
    sizes = {width // n for width, n, at in levels if at}
    sizes |= {channels[-1] // num_heads[-1]} if ours.middle_attention else set()
    sizes = (
        set() if len(sizes) > 1 and set(num_heads) == {1} else sizes
    )  # None there: one head each
    padding = ours.downsample_padding
    plain = Sinusoid(size=channels[0])
    reasons = {
        "it has a step_embedding": ours.step_embedding is not None,
        "its condition is not a label": not isinstance(unet.embed_cond, LabelEmbedding | None),
        f"it reads the time as {time}": (
            not isinstance(time, Sinusoid) or replace(time, freq_shift=0, sin_first=False) != plain
        ),
        f"its downsample_padding is {padding}, not (1, 1) or (0, 1)": (
            padding not in ((1, 1), (0, 1))
        ),
        "it has a context but no attention in the middle": (crossed and not ours.middle_attention),
        f"its heads have different sizes: {sorted(sizes)}": not crossed and len(sizes) > 1,
    }
    refuse_network("UNet", "diffusers", reasons)
    kind = "CrossAttn" if crossed else "Attn"
    name = lambda plain, at: kind + plain if at else plain
    table: Any = unet.embed_cond
    common = dict(
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        block_out_channels=list(channels),
        layers_per_block=ours.blocks,
        down_block_types=[name(PLAIN_DOWN, at) for at in ours.attention_levels],
        up_block_types=[name(PLAIN_UP, at) for at in reversed(ours.attention_levels)],
        downsample_padding=int(padding == (1, 1)),
        flip_sin_to_cos=not time.sin_first,
        freq_shift=time.freq_shift,
        norm_eps=ours.norm_eps,
        norm_num_groups=ours.groups,
        num_class_embeds=None if table is None else table.table.shape[0],
        time_embedding_dim=ours.time_width,
    )
    if not crossed:
        return PLAIN_DEFAULTS | dict(
            _class_name="UNet2DModel",
            add_attention=ours.middle_attention,
            attention_head_dim=next(iter(sizes), None),
            **common,
        )
    in_order: Any = ours.transformer_depth
    depths = set(in_order)
    additions = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=ours.number_size,
        projection_class_embeddings_input_dim=ours.added_size,
    )
    return CONDITION_DEFAULTS | dict(
        _class_name="UNet2DConditionModel",
        attention_head_dim=list(num_heads),  # the number of heads, in spite of its name
        cross_attention_dim=ours.context_size,
        transformer_layers_per_block=depths.pop() if len(depths) == 1 else list(in_order),
        use_linear_projection=ours.linear_projection,
        **(additions if ours.added_size is not None else {}),
        **common,
    )


def diffusers_layout(unet: UNet) -> Layout:
    """The names of diffusers' U-Nets, those of its old versions as well.

    >>> import jax
    >>> unet = UNet(1, channels=(8, 16), blocks=1, attention_levels=(False, True), groups=4,
    ...             key=jax.random.key(0))
    >>> diffusers_layout(unet).leaves[".downs[0].resnets[0].shift.weight"][0].name
    'down_blocks.0.resnets.0.time_emb_proj.weight'
    """
    leaves = conv("stem", "conv_in")
    for n in (1, 2):
        leaves |= linear(f"time_embedding.linear{n}", f"time_embedding.linear_{n}")
    if unet.added_embedding is not None:
        for n in (1, 2):
            leaves |= linear(f"added_embedding.linear{n}", f"add_embedding.linear_{n}")
    if isinstance(unet.embed_cond, LabelEmbedding):
        leaves[".embed_cond.table"] = (Part("class_embedding.weight"),)
    sides = {
        "downs": (unet.downs, "down_blocks.{}", "downsamplers"),
        "ups": (unet.ups, "up_blocks.{}", "upsamplers"),
        "middle": ([unet.middle], "mid_block", ""),
    }
    aliases: dict[str, str] = {}
    for ours, (levels, theirs, resampler) in sides.items():
        for i, level in enumerate(levels):
            here = ours if ours == "middle" else f"{ours}[{i}]"
            there = theirs.format(i)
            leaves |= _level(level, here, there)
            if level.resample is not None:
                leaves |= conv(f"{here}.resample", f"{there}.{resampler}.0.conv")
            for j, block in enumerate(level.attentions):
                if isinstance(block, AttentionBlock):
                    aliases |= old_attention_names(f"{there}.attentions.{j}")
    leaves |= norm("norm", "conv_norm_out") | conv("head", "conv_out")
    return Layout(leaves, {}, aliases)


def _level(level: UNetLevel, ours: str, theirs: str) -> Leaves:
    leaves: Leaves = {}
    for j, block in enumerate(level.resnets):
        here, there = f"{ours}.resnets[{j}]", f"{theirs}.resnets.{j}"
        leaves |= resnet(block.block, f"{here}.block", there)
        leaves |= linear(f"{here}.shift", f"{there}.time_emb_proj")
    for j, block in enumerate(level.attentions):
        here, there = f"{ours}.attentions[{j}]", f"{theirs}.attentions.{j}"
        if isinstance(block, AttentionBlock):
            leaves |= attention_block(here, there)
        else:
            leaves |= _spatial_transformer(block, here, there)
    return leaves


def _spatial_transformer(block: SpatialTransformer, ours: str, theirs: str) -> Leaves:
    leaves = norm(f"{ours}.norm", f"{theirs}.norm")
    for name in ("proj_in", "proj_out"):
        leaves |= conv_or_linear(getattr(block, name), f"{ours}.{name}", f"{theirs}.{name}")
    for k, inner in enumerate(block.blocks):
        leaves |= _transformer(inner, f"{ours}.blocks[{k}]", f"{theirs}.transformer_blocks.{k}")
    return leaves


def _transformer(block: TransformerBlock, ours: str, theirs: str) -> Leaves:
    leaves: Leaves = {
        f".{ours}.self_attention.qkv.weight": tuple(
            Part(f"{theirs}.attn1.to_{letter}.weight", (k,)) for k, letter in enumerate("qkv")
        )
    }
    for n in (1, 2, 3):
        leaves |= norm(f"{ours}.norm{n}", f"{theirs}.norm{n}")
    for layer, name in {"query": "to_q", "key": "to_k", "value": "to_v"}.items():
        leaves |= linear(f"{ours}.cross_attention.{layer}", f"{theirs}.attn2.{name}", bias=False)
    for layer, name in {"self_attention": "attn1", "cross_attention": "attn2"}.items():
        leaves |= linear(f"{ours}.{layer}.proj", f"{theirs}.{name}.to_out.0")
    leaves |= linear(f"{ours}.fc1", f"{theirs}.ff.net.0.proj")
    leaves |= linear(f"{ours}.fc2", f"{theirs}.ff.net.2")
    return leaves


def _given_heads(given: Any, channels: list[int], crossed: bool) -> tuple[int, ...]:
    """The number of heads a level. In the one class the option is their number, in the other
    their size, whatever it is called."""
    if crossed:
        return tuple(given) if isinstance(given, list | tuple) else (given,) * len(channels)
    return tuple(1 if given is None else max(1, width // given) for width in channels)


def _wrong_depths_or_additions(given: dict[str, Any], levels: int) -> list[str]:
    """What our network has not of `transformer_layers_per_block` and of SDXL's additions."""
    wrong, depths = [], given["transformer_layers_per_block"]
    whole = isinstance(depths, int) or (
        len(depths) == levels and all(isinstance(depth, int) for depth in depths)
    )
    if not whole:
        wrong.append(f"transformer_layers_per_block = {depths!r} (a number, or {levels} of them)")
    kind = given["addition_embed_type"]
    if kind not in (None, "text_time"):
        wrong.append(f"addition_embed_type = {kind!r} (None or 'text_time')")
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if kind == "text_time" and not isinstance(given[name], int):
            wrong.append(f"{name} = {given[name]!r} (a number)")
    return wrong


def _added(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make SDXL's additions."""
    if given.get("addition_embed_type") is None:
        return {}
    return dict(
        added_size=given["projection_class_embeddings_input_dim"],
        number_size=given["addition_time_embed_dim"],
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
