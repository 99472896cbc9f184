"""UNet against diffusers' UNet2DConditionModel and UNet2DModel, both ways."""

import json

import equinox as eqx
import jax
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from eqxldm import models, nn, pretrained
from eqxldm.pretrained.layout import tensor_shapes

from harness import (
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    randomise,
    save,
    times,
)


def theirs_with_context(module, x, timestep, t, context, label=None):
    return {"out": module(x, timestep, context, class_labels=label).sample}


def theirs_added(module, x, timestep, t, context, pooled, numbers):
    added = dict(text_embeds=pooled, time_ids=numbers)
    return {"out": module(x, timestep, context, added_cond_kwargs=added).sample}


def ours_added(unet, x, timestep, t, context, pooled, numbers):
    cond = nn.Conditioning(vector=pooled, tokens=context, numbers=numbers)
    return {"out": jax.vmap(unet)(x, t, cond)}


def theirs_plain(module, x, timestep, t, label=None):
    return {"out": module(x, timestep, class_labels=label).sample}


def ours(unet, x, timestep, t, context=None, label=None):
    given = tuple(value for value in (label, context) if value is not None)
    cond = given if len(given) == 2 else given[0] if given else None
    return {"out": jax.vmap(unet)(x, t, cond)}


def common(draw):
    """Options of both, and the attention of each level."""
    levels, groups = draw.one(1, 1, 1, 1, 2, 2, 3), draw.one(1, 2, 4)
    return [draw.one(True, False) for _ in range(levels)], dict(
        in_channels=draw.between(1, 4),
        out_channels=draw.between(1, 5),
        block_out_channels=[4 * draw.between(2, 4) for _ in range(levels)],
        layers_per_block=draw.one(1, 1, 2) if levels == 1 else 1,
        downsample_padding=draw.one(0, 1),
        flip_sin_to_cos=draw.one(True, False),
        freq_shift=draw.one(0, 1),
        norm_num_groups=groups,
        norm_eps=draw.one(1e-5, 1e-6),
        num_class_embeds=draw.one(None, None, 1, 10),
    )


def check(draw, module, theirs, folder, *, ours=ours, context=None, more=None):
    """Saved, loaded, compared, exported and read again; the errors."""
    form = draw.form()
    module = save(randomise(module, draw), folder / "theirs", form)
    check_dtypes(folder / "theirs", form)
    unet = pretrained.load(folder / "theirs")
    factor = 2 ** (len(module.config.block_out_channels) - 1)
    sides = [factor * draw.between(2, 4) for _ in range(2)]
    timestep = draw.timesteps(2)
    timestep[0] = draw.one(timestep[0], 0, 999)
    values = dict(x=draw.normal(2, module.config.in_channels, *sides), timestep=timestep)
    values["t"] = times(timestep)
    if context:
        values["context"] = draw.normal(2, *context)
    values |= more or {}
    if classes := module.config.num_class_embeds:
        values["label"] = draw.rng.integers(0, classes, 2)
    pair = Pair(theirs, ours, pretrained.unet.diffusers_layout, values, fixed=("t", "numbers"))
    errors = compare(module, unet, pair)
    errors["exported"] = compare_back(type(module), module, unet, folder / "ours", pair)
    return errors


@each_configuration
def test_condition(number, tmp_path, record_property):
    draw = Draw("unet condition", number)
    attention, options = common(draw)
    name = lambda plain, at: f"CrossAttn{plain}" if at else plain
    width = draw.between(1, 12)
    num_heads = draw.one(1, 2, 4, [draw.one(1, 2, 4) for _ in attention])
    module = UNet2DConditionModel(
        **options,
        down_block_types=[name("DownBlock2D", at) for at in attention],
        up_block_types=[name("UpBlock2D", at) for at in reversed(attention)],
        attention_head_dim=num_heads,
        cross_attention_dim=width,
        transformer_layers_per_block=draw.one(1, 1, 2) if len(attention) == 1 else 1,
        use_linear_projection=draw.one(True, False),
        time_embedding_dim=draw.one(None, 24),
    )
    context = (draw.between(1, 7), width)
    errors = check(draw, module, theirs_with_context, tmp_path, context=context)
    record_property("UNet, condition", errors)


@each_configuration
def test_added(number, tmp_path, record_property):
    """SDXL's form: a pooled vector and numbers beside the time, other depths at other levels."""
    draw = Draw("unet added", number)
    attention, options = common(draw)
    # Two transformers in a row, each with norms over the channels: over 8 they amplify rounding.
    options["block_out_channels"] = [2 * n for n in options["block_out_channels"]]
    name = lambda plain, at: f"CrossAttn{plain}" if at else plain
    width, pooled, count, size = (draw.between(1, 8) for _ in range(4))
    module = UNet2DConditionModel(
        **options | dict(num_class_embeds=None),
        down_block_types=[name("DownBlock2D", at) for at in attention],
        up_block_types=[name("UpBlock2D", at) for at in reversed(attention)],
        attention_head_dim=[draw.one(1, 2, 4) for _ in attention],
        cross_attention_dim=width,
        transformer_layers_per_block=[draw.one(1, 2) for _ in attention],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2 * size + 2,
        projection_class_embeddings_input_dim=pooled + count * (2 * size + 2),
    )
    numbers = draw.rng.integers(0, 1025, (2, count)).astype("float32")
    more = dict(pooled=draw.normal(2, pooled), numbers=numbers)
    context = (draw.between(1, 7), width)
    how = dict(ours=ours_added, context=context, more=more)
    record_property("UNet, added", check(draw, module, theirs_added, tmp_path, **how))


PUBLISHED = {
    "unet_sd2": dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    ),
    "unet_sdxl": dict(
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_diffusers_names(name):
    with torch.device("meta"):
        module = UNet2DConditionModel(**PUBLISHED[name])
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.unet.diffusers_layout(shapes)) == expected
    config = json.loads(module.to_json_string())
    make = lambda key: pretrained.unet.from_diffusers(config, key=key)
    assert eqx.filter_eval_shape(make, jax.random.key(0)).config == shapes.config
    count = sum(value.numel() for value in module.parameters())
    assert models.parameter_count(shapes) == count
    print(f"{name}: {count:,}")


@each_configuration
def test_plain(number, tmp_path, record_property):
    draw = Draw("unet plain", number)
    attention, options = common(draw)
    name = lambda plain, at: f"Attn{plain}" if at else plain
    module = UNet2DModel(
        **options,
        down_block_types=[name("DownBlock2D", at) for at in attention],
        up_block_types=[name("UpBlock2D", at) for at in reversed(attention)],
        attention_head_dim=draw.one(2, 4, None),
        add_attention=draw.one(True, True, False),
        time_embedding_dim=draw.one(None, 24),
    )
    record_property("UNet, plain", check(draw, module, theirs_plain, tmp_path))
