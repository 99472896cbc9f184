"""WanTransformer against diffusers' WanTransformer3DModel, both ways, and its two layouts."""

from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from eqxldm import models, nn, pretrained
from eqxldm.pretrained.layout import tensor_shapes

from harness import (
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    flow_times,
    randomise,
    same_bits,
    save,
)


@pytest.fixture(autouse=True)
def loaded_as_others_are(monkeypatch):
    """diffusers refuses to read, as the other tests do, what it keeps in float32: all is, here."""
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)


def configuration(draw):
    return dict(
        patch_size=draw.one((1, 2, 2), (1, 2, 2), (1, 1, 1), (2, 1, 2)),
        num_attention_heads=draw.one(1, 2, 3),
        attention_head_dim=draw.one(6, 8, 12),
        in_channels=draw.between(1, 4),
        out_channels=draw.between(1, 4),
        text_dim=draw.between(1, 9),
        freq_dim=draw.one(256, 256, 8),
        ffn_dim=draw.between(1, 12),
        num_layers=draw.one(1, 2),
        cross_attn_norm=draw.one(True, True, False),
        eps=draw.one(1e-6, 1e-5),
    )


def pair_of(draw, config):
    def theirs(module, x, t, timestep, tokens):
        return {"out": module(x, timestep, tokens).sample}

    def ours(wan, x, t, timestep, tokens):
        return {"out": jax.vmap(wan)(x, t, nn.Conditioning(tokens=tokens))}

    grid = [draw.between(1, 3) for _ in range(3)]
    inputs = flow_times(draw)
    if draw.one(True, False):  # a time for each frame
        t = draw.rng.random((2, grid[0]), np.float32)
        per_token = np.repeat(np.float32(1000) * t, grid[1] * grid[2], axis=1)
        inputs = dict(t=t, timestep=per_token)
    inputs |= dict(
        x=draw.normal(2, config["in_channels"], *np.multiply(grid, config["patch_size"])),
        tokens=draw.normal(2, draw.between(1, 6), config["text_dim"]),
    )
    fixed = ("t", "timestep")
    return Pair(theirs, ours, pretrained.wan.diffusers_layout, inputs, fixed=fixed)


@each_configuration
def test_wan(number, tmp_path, record_property):
    draw = Draw("wan", number)
    config, form = configuration(draw), draw.form()
    module = randomise(WanTransformer3DModel(**config), draw)
    module = save(module, tmp_path / "theirs", form)
    check_dtypes(tmp_path / "theirs", form)
    wan = pretrained.load(tmp_path / "theirs")
    pair = pair_of(draw, config)
    errors = compare(module, wan, pair)
    errors["exported"] = compare_back(type(module), module, wan, tmp_path / "ours", pair)
    record_property("WanTransformer", errors)
    state = pretrained.to_state(wan, pretrained.wan.original_layout)
    tensors = {f"model.diffusion_model.{n}": torch.from_numpy(v.copy()) for n, v in state.items()}
    same_bits(convert_wan_transformer_to_diffusers(tensors), dict(module.state_dict()))
    assert eqx.tree_equal(pretrained.load_state(wan, state), wan)


PUBLISHED = {
    "wan_t2v_1_3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan_t2v_14b": {},
    "wan_ti2v_5b": dict(
        num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_diffusers_names(name):
    with torch.device("meta"):
        module = WanTransformer3DModel(**PUBLISHED[name])
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.wan.diffusers_layout(shapes)) == expected
    make = lambda key: pretrained.wan.from_diffusers(dict(module.config), key=key)
    made = eqx.filter_eval_shape(make, jax.random.key(0))
    assert replace(made.config, out_channels=None) == shapes.config
    assert models.parameter_count(shapes) == sum(v.numel() for v in module.parameters())
