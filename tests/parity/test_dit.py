"""DiT against diffusers and against the official network, both ways."""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import official_dit
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from eqxldm import models, pretrained

from harness import (
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    randomise,
    same_bits,
    save,
    times,
)


def of_diffusers(module, x, timestep, t, label):
    return {"out": module(x, timestep, label).sample}


def of_official(module, x, timestep, t, label):
    return {"out": module(x, timestep, label)}


def ours(dit, x, timestep, t, label):
    return {"out": jax.vmap(dit)(x, t, label)}


def heads_and_size(draw):
    """A norm over too few numbers amplifies rounding: the width is at least 16."""
    num_heads = draw.between(1, 4)
    return num_heads, 4 * draw.between(-(-4 // num_heads), 5)


def inputs(draw, shape, classes):
    """A batch with a label of no class, and every other time the first and the last timestep."""
    timestep = draw.timesteps(4)
    timestep[:2] = draw.one(timestep[:2], (0, 999))
    label = draw.rng.integers(0, classes, 4)
    label[draw.between(0, 3)] = classes
    x, t = draw.normal(4, *shape), times(timestep)
    return dict(x=x, timestep=timestep, t=t, label=label)


@each_configuration
def test_diffusers(number, tmp_path, record_property):
    draw = Draw("dit", number)
    channels, patch_size, classes = (
        draw.between(1, 5),
        draw.one(1, 2, 2, 3),
        draw.one(1, 2, 10, 1000),
    )
    num_heads, size = heads_and_size(draw)
    module = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=size,
        in_channels=channels,
        out_channels=draw.one(None, channels, 2 * channels, 2 * channels),
        num_layers=draw.between(1, 4),
        sample_size=patch_size * draw.between(1, 6),
        patch_size=patch_size,
        num_embeds_ada_norm=classes,
        norm_eps=draw.one(1e-5, 1e-6),
    )
    randomise(module, draw)
    for block in module.transformer_blocks[1:]:  # as converted models have it
        block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    form = draw.form()
    module = save(module, tmp_path / "theirs", form)
    check_dtypes(tmp_path / "theirs", form)
    dit = pretrained.load(tmp_path / "theirs")
    values = inputs(draw, dit.shape, classes)
    pair = Pair(of_diffusers, ours, pretrained.diffusers_layout, values, fixed=("t",))
    errors = compare(module, dit, pair)
    errors["exported"] = compare_back(DiTTransformer2DModel, module, dit, tmp_path / "ours", pair)
    record_property("DiT, diffusers", errors)


@each_configuration
def test_official(number, tmp_path, record_property):
    """Latents that are not square, MLPs of any width, and the official `.pt` files."""
    draw = Draw("official", number)
    patch_size, classes, (num_heads, size) = (
        draw.one(1, 2, 2, 4),
        draw.one(1, 3, 1000),
        heads_and_size(draw),
    )
    shape = (draw.between(1, 5), patch_size * draw.between(1, 6), patch_size * draw.between(1, 6))
    sizes = dict(patch_size=patch_size, depth=draw.between(1, 4), width=num_heads * size)
    sizes |= dict(num_heads=num_heads, learn_sigma=draw.one(False, True))
    ratio = draw.one(4.0, 2.0, 2.7)
    make = lambda: official_dit.DiT(shape, **sizes, classes=classes, ratio=ratio)
    module = randomise(make(), draw)

    dtype = draw.one(torch.float32, torch.float32, torch.float16, torch.bfloat16)
    state = {name: value.to(dtype) for name, value in module.state_dict().items()}
    # A published file is a state dict; a checkpoint of training has more around it.
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    options = argparse.Namespace(model="DiT", lr=1e-4)
    checkpoint = dict(model=other, ema=state, opt={"state": {}, "lr": 1e-4}, args=options)
    torch.save(draw.one(state, checkpoint), tmp_path / "dit.pt")
    module.load_state_dict({name: value.float() for name, value in state.items()})
    if dtype != torch.float32:  # the table of positions is computed, not read
        module.pos_embed.data = make().pos_embed

    empty = eqx.filter_eval_shape(
        models.DiT, shape, num_classes=classes, mlp_ratio=ratio, **sizes, key=jax.random.key(0)
    )
    dit = pretrained.load_into(empty, tmp_path / "dit.pt")
    values = inputs(draw, shape, classes)
    pair = Pair(of_official, ours, pretrained.official_layout, values, fixed=("t",))
    errors = compare(module, dit, pair)

    back = pretrained.to_state(dit, pretrained.official_layout)
    back = {name: torch.from_numpy(np.array(value)) for name, value in back.items()}
    again = make()
    again.load_state_dict(back)
    torch.testing.assert_close(again.pos_embed, module.pos_embed, rtol=0, atol=1e-6)
    again.pos_embed.data = module.pos_embed
    same_bits(again.state_dict(), module.state_dict())
    record_property("DiT, official", errors)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_waves_of_all_timesteps(shift, record_property):
    """Of the official network, and of diffusers (`shift` 1)."""
    timesteps = torch.arange(1000)
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
    expected = theirs(timesteps) if shift else official_dit.waves(timesteps, 256)
    dit = models.DiT(
        (1, 2, 2), patch_size=2, depth=1, width=256, num_heads=1, key=jax.random.key(0)
    )
    dit = pretrained.with_diffusers_time(dit) if shift else dit
    eye, zero = jnp.eye(256), jnp.zeros(256)
    layers = lambda time: [getattr(time, f"linear{n}") for n in (1, 2)]
    # The sum of the two layers' outputs undoes the silu: silu(x) - silu(-x) = x.
    time = dit.time_embedding
    both = lambda sign: eqx.tree_at(
        lambda time: [leaf for layer in layers(time) for leaf in (layer.weight, layer.bias)],
        time,
        [sign * eye, zero, sign * eye, zero],
    )
    t = times(np.arange(1000))
    found = sum(jax.jit(jax.vmap(both(sign)))(t) for sign in (1, -1))
    error = float(np.max(np.abs(np.asarray(found) - expected.numpy())))
    record_property(f"waves of time, {'diffusers' if shift else 'official'}", {"largest": error})
    # In float32 neighbours of 999 are 2^-14 apart, and so may be two angles.
    assert error <= 2**-14
