"""MMDiT against diffusers' SD3Transformer2DModel, both ways, and its two layouts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from eqxldm import models, nn, pretrained
from eqxldm.pretrained.layout import tensor_shapes

from harness import (
    Draw,
    Pair,
    check_dtypes,
    check_original,
    compare,
    compare_back,
    each_configuration,
    flow_times,
    randomise,
    save,
)


def configuration(draw):
    heads, size = draw.one(1, 2, 3), draw.one(4, 8)
    depth, patch = draw.one(1, 2, 2, 2, 3), draw.one(1, 2, 2)
    return dict(
        sample_size=patch * draw.between(2, 6),
        patch_size=patch,
        in_channels=draw.between(1, 4),
        out_channels=draw.between(1, 4),
        num_layers=depth,
        attention_head_dim=size,
        num_attention_heads=heads,
        joint_attention_dim=draw.between(1, 9),
        caption_projection_dim=heads * size,
        pooled_projection_dim=draw.between(1, 9),
        pos_embed_max_size=draw.between(4, 7),
        dual_attention_layers=tuple(range(draw.one(0, 0, 1, depth))),
        qk_norm=draw.one(None, "rms_norm"),
    )


def draw_inputs(draw, config):
    sides = [config["patch_size"] * draw.between(1, config["pos_embed_max_size"]) for _ in "hw"]
    return flow_times(draw) | dict(
        x=draw.normal(2, config["in_channels"], *sides),
        tokens=draw.normal(2, draw.between(1, 6), config["joint_attention_dim"]),
        pooled=draw.normal(2, config["pooled_projection_dim"]),
    )


def pair_of(inputs, skip=()):
    def theirs(module, x, t, timestep, tokens, pooled):
        return {"out": module(x, tokens, pooled, timestep, skip_layers=list(skip)).sample}

    def ours(mmdit, x, t, timestep, tokens, pooled):
        cond = nn.Conditioning(vector=pooled, tokens=tokens)
        return {"out": jax.vmap(lambda *args: mmdit(*args, skip=skip))(x, t, cond)}

    fixed = ("t", "timestep")
    return Pair(theirs, ours, pretrained.mmdit.diffusers_layout, inputs, fixed=fixed)


@each_configuration
def test_mmdit(number, tmp_path, record_property):
    draw = Draw("mmdit", number)
    config, form = configuration(draw), draw.form()
    made = SD3Transformer2DModel(**config)
    module = save(randomise(made, draw), tmp_path / "theirs", form)
    module.pos_embed.pos_embed = made.pos_embed.pos_embed  # a half-precision file has it rounded
    check_dtypes(tmp_path / "theirs", form)
    mmdit = pretrained.load(tmp_path / "theirs")
    pair = pair_of(draw_inputs(draw, config))
    errors = compare(module, mmdit, pair)
    errors["exported"] = compare_back(type(module), module, mmdit, tmp_path / "ours", pair)
    record_property("MMDiT", errors)
    convert = convert_sd3_transformer_checkpoint_to_diffusers
    check_original(mmdit, module, convert, "model.diffusion_model.")


@pytest.mark.parametrize("skip", [(1, 2), (2, 0)])
def test_blocks_are_skipped(skip):
    draw = Draw("mmdit skip", skip[0])
    config = configuration(draw) | dict(num_layers=3, dual_attention_layers=(0,))
    module = randomise(SD3Transformer2DModel(**config), draw)
    mmdit = read_state(module)
    inputs = {name: torch.from_numpy(value) for name, value in draw_inputs(draw, config).items()}
    pair = pair_of(inputs, skip)
    with torch.no_grad():
        out = pair.theirs(module, **inputs)["out"].numpy()
    found = pair.ours(mmdit, **{name: jnp.asarray(value) for name, value in inputs.items()})["out"]
    assert np.max(np.abs(found - out)) <= 2e-5 * np.max(np.abs(out))


def read_state(module):
    """Our model of a module, without files."""
    config = dict(module.config)
    make = lambda: pretrained.mmdit.from_diffusers(config, key=jax.random.key(0))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    return pretrained.load_state(eqx.filter_eval_shape(make), state)


PUBLISHED = {
    "mmdit_sd3_medium": dict(num_layers=24, pos_embed_max_size=192),
    "mmdit_sd35_medium": dict(
        num_layers=24,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ),
    "mmdit_sd35_large": dict(num_layers=38, pos_embed_max_size=192, qk_norm="rms_norm"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_diffusers_names(name):
    config = PUBLISHED[name]
    heads = config["num_layers"]
    config = config | dict(num_attention_heads=heads, caption_projection_dim=64 * heads)
    with torch.device("meta"):
        module = SD3Transformer2DModel(**config)
    expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    shapes = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.mmdit.diffusers_layout(shapes)) == expected
    made = eqx.filter_eval_shape(
        lambda key: pretrained.mmdit.from_diffusers(dict(module.config), key=key),
        jax.random.key(0),
    )
    assert made.config == shapes.config
    count = sum(value.numel() for value in module.parameters())
    assert models.parameter_count(shapes) == count
    print(f"{name}: {count:,}")


@pytest.mark.parametrize("size, base", [(192, 64), (384, 64), (384, 128)])
def test_the_table_of_positions_at_full_size(size, base):
    """That of diffusers, float32 from float32 coordinates, which is read without being told."""
    patch = SD3Transformer2DModel(
        sample_size=2 * base, num_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=1, caption_projection_dim=8, pooled_projection_dim=1,
        pos_embed_max_size=size,
    )  # fmt: skip
    state = {name: value.numpy() for name, value in patch.state_dict().items()}
    tensors = pretrained.files.from_arrays(state)
    config = dict(patch.config) | dict(sample_size=7)
    config = pretrained.mmdit.with_grid_of_table(config, tensors)
    assert config["sample_size"] == 2 * base
    make = lambda key: pretrained.mmdit.from_diffusers(config, key=key)
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    pretrained.load_state(model, state)
    wrong = state | {"pos_embed.pos_embed": state["pos_embed.pos_embed"] * np.float32(1.001)}
    with pytest.raises(pretrained.WeightsError, match="not the constant"):
        pretrained.load_state(model, wrong)
