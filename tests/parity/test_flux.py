"""Flux against diffusers' FluxTransformer2DModel and its pipeline's packing, both ways."""

from types import FunctionType

import equinox as eqx
import jax
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

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


def theirs(module, x, t, timestep, tokens, pooled, guidance=None):
    """As the pipeline calls it: packed, with the ids of text and image."""
    batch, channels, height, width = x.shape
    packed = FluxPipeline._pack_latents(x, batch, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", x.dtype)
    text = torch.zeros(tokens.shape[1], 3)
    guidance = None if guidance is None else guidance[:, 0]
    out = module(packed, tokens, pooled, t, ids, text, guidance).sample
    return {"out": FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)}


def ours(flux, x, t, timestep, tokens, pooled, guidance=None):
    return {"out": jax.vmap(flux)(x, t, nn.Conditioning(pooled, tokens, numbers=guidance))}


def configuration(draw):
    axes = draw.one((2, 2, 4), (4, 2, 2), (2, 6, 4))
    channels = draw.between(1, 3)
    return dict(
        in_channels=4 * channels,
        out_channels=draw.one(None, None, 4 * draw.between(1, 3)),
        num_layers=draw.one(1, 1, 2),
        num_single_layers=draw.one(1, 1, 2),
        attention_head_dim=sum(axes),
        num_attention_heads=draw.one(1, 2),
        joint_attention_dim=draw.between(1, 9),
        pooled_projection_dim=draw.between(1, 9),
        guidance_embeds=draw.one(True, False),
        axes_dims_rope=axes,
    )


def conversion(width):
    """diffusers' function from the original names to its own, which is written for 3072."""
    function = convert_flux_transformer_checkpoint_to_diffusers
    constants = function.__code__.co_consts
    assert constants.count(3072) == 1
    code = function.__code__.replace(
        co_consts=tuple(width if value == 3072 else value for value in constants)
    )
    return FunctionType(code, function.__globals__)


@each_configuration
def test_flux(number, tmp_path, record_property):
    draw = Draw("flux", number)
    config, form = configuration(draw), draw.form()
    module = FluxTransformer2DModel(**config)
    module = save(randomise(module, draw), tmp_path / "theirs", form)
    check_dtypes(tmp_path / "theirs", form)
    flux = pretrained.load(tmp_path / "theirs")
    sides = [2 * draw.between(1, 4) for _ in "hw"]
    inputs = flow_times(draw) | dict(
        x=draw.normal(2, config["in_channels"] // 4, *sides),
        tokens=draw.normal(2, draw.between(1, 6), config["joint_attention_dim"]),
        pooled=draw.normal(2, config["pooled_projection_dim"]),
    )
    if config["guidance_embeds"]:
        # Small: of an angle of 3500, which 3.5 gives, the last bit alone is above the bound.
        inputs["guidance"] = 0.1 * draw.rng.random((2, 1), "float32")
    fixed = ("t", "timestep", "guidance")
    pair = Pair(theirs, ours, pretrained.flux.diffusers_layout, inputs, fixed=fixed)
    errors = compare(module, flux, pair)
    errors["exported"] = compare_back(type(module), module, flux, tmp_path / "ours", pair)
    record_property("Flux", errors)
    check_original(flux, module, conversion(flux.config.width), "model.diffusion_model.")


@pytest.mark.parametrize("name, guidance", [("flux1_dev", True), ("flux1_schnell", False)])
def test_the_published_networks_have_diffusers_names(name, guidance):
    with torch.device("meta"):
        module = FluxTransformer2DModel(guidance_embeds=guidance)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.flux.diffusers_layout(shapes)) == expected
    make = lambda key: pretrained.flux.from_diffusers(dict(module.config), key=key)
    assert eqx.filter_eval_shape(make, jax.random.key(0)).config == shapes.config
    count = sum(value.numel() for value in module.parameters())
    assert models.parameter_count(shapes) == count
    print(f"{name}: {count:,}")
