"""CausalVideoAutoencoder against diffusers' AutoencoderKLWan: both ways, whole and in chunks."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from eqxldm import models, pretrained
from eqxldm.pretrained.layout import tensor_shapes

from harness import (
    BOUND,
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    randomise,
    same_bits,
    save,
)
from helpers import relative_error


def configuration(draw):
    levels = draw.one(1, 2, 2, 2, 3)
    # A norm over too few channels amplifies rounding.
    base, latent, residual = 2 * draw.between(3, 5), draw.between(1, 4), draw.one(True, False)
    patch = draw.one(None, None, 2)
    channels = draw.between(1, 3) * (patch or 1) ** 2
    # The last level of those with shortcuts is as wide as the one before.
    mult = [[1], [1, 1], [1, 2, 2]][levels - 1] if residual else [1, 2, 4][:levels]
    return dict(
        base_dim=base,
        decoder_base_dim=draw.one(None, 2 * draw.between(3, 5)),
        z_dim=latent,
        dim_mult=mult,
        num_res_blocks=1,
        temperal_downsample=[draw.one(True, False) for _ in range(levels - 1)],
        latents_mean=draw.normal(latent).tolist(),
        latents_std=(1 + draw.rng.random(latent)).tolist(),
        is_residual=residual,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
    )


def theirs(module, x, z):
    """Always in chunks: without its cache the module leaves time alone."""
    channel = lambda values: torch.tensor(values)[:, None, None, None]
    mean, std = channel(module.config.latents_mean), channel(module.config.latents_std)
    posterior = module.encode(x).latent_dist
    return dict(
        mean=posterior.mean,
        logvar=posterior.logvar,
        z=(posterior.mean - mean) / std,
        clip=module.decode(z * std + mean).sample,
    )


def ours(ae, x, z, chunked=False):
    posterior = jax.vmap(lambda x: ae.posterior(x, chunked=chunked))(x)
    clip = jax.vmap(lambda z: ae.decode(z, chunked=chunked))(z)
    return dict(
        mean=posterior.mean,
        logvar=posterior.logvar,
        z=jax.vmap(ae.normalise)(posterior).mean,
        clip=clip.clip(-1, 1),
    )


@each_configuration
def test_diffusers(number, tmp_path, record_property):
    draw = Draw("video autoencoder", number)
    config, form = configuration(draw), draw.form()
    module = save(randomise(AutoencoderKLWan(**config), draw), tmp_path / "theirs", form)
    check_dtypes(tmp_path / "theirs", form)
    ae = pretrained.load(tmp_path / "theirs")
    # One frame leaves the layers of time without a gradient, which torch refuses. More come four
    # at a time in diffusers, whatever the compression.
    frames = draw.one(5, 9) if ae.time_factor > 1 else draw.one(1, 5)
    latent = (1 + (frames - 1) // ae.time_factor, draw.between(2, 3), draw.between(2, 3))
    clip = (frames, *(side * ae.factor for side in latent[1:]))
    values = dict(
        x=draw.normal(1, ae.in_channels, *clip), z=draw.normal(1, ae.latent_channels, *latent)
    )
    pair = Pair(theirs, ours, pretrained.video_autoencoder.diffusers_layout, values)
    errors = compare(module, ae, pair)
    errors["chunked"] = in_chunks(module, ae, values) if number % 3 == 0 else 0.0
    errors["exported"] = compare_back(AutoencoderKLWan, module, ae, tmp_path / "ours", pair)
    record_property("CausalVideoAutoencoder", errors)


def in_chunks(module, ae, values):
    """The largest error of our chunks against theirs."""
    with torch.no_grad():
        expected = theirs(module, *(torch.from_numpy(v) for v in values.values()))
    found = eqx.filter_jit(lambda ae, x, z: ours(ae, x, z, chunked=True))(ae, **values)
    errors = {name: float(relative_error(found[name], value)) for name, value in expected.items()}
    assert max(errors.values()) <= BOUND, errors
    return max(errors.values())


def test_one_frame_is_a_clip(tmp_path):
    draw = Draw("video autoencoder image", 0)
    config = configuration(draw) | dict(dim_mult=[1, 1], temperal_downsample=[True])
    module = save(randomise(AutoencoderKLWan(**config), draw), tmp_path, "float32")
    ae = pretrained.load(tmp_path)
    side = 2 * ae.factor
    values = dict(
        x=draw.normal(1, ae.in_channels, 1, side, side),
        z=draw.normal(1, ae.latent_channels, 1, 2, 2),
    )
    in_chunks(module, ae, values)


@pytest.mark.parametrize("base", [4, 6])
def test_wans_own_names(base):
    """By diffusers' conversion, which knows the published depth alone."""
    draw = Draw("video autoencoder names", base)
    module = randomise(AutoencoderKLWan(base_dim=base, z_dim=2, **stats(2)), draw)
    config = json.loads(module.to_json_string())
    make = lambda: pretrained.video_autoencoder.from_diffusers(config, key=jax.random.key(0))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    arrays = {name: value.numpy() for name, value in expected.items()}
    ae = pretrained.load_state(eqx.filter_eval_shape(make), arrays)
    state = pretrained.to_state(ae, pretrained.video_autoencoder.original_layout)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    same_bits(convert_wan_vae_to_diffusers(tensors), expected)
    assert eqx.tree_equal(pretrained.load_state(ae, state), ae)


def stats(n):
    return dict(latents_mean=[0.0] * n, latents_std=[1.0] * n)


WAN22 = dict(
    base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
    out_channels=12, patch_size=2, scale_factor_spatial=16, **stats(48),
)  # fmt: skip


@pytest.mark.parametrize("name, config", [("wan21", {}), ("wan22", WAN22)])
def test_the_published_networks_have_diffusers_names(name, config):
    with torch.device("meta"):
        module = AutoencoderKLWan(**config)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    make = getattr(models, f"{name}_autoencoder")
    shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.video_autoencoder.diffusers_layout(shapes)) == expected
    count = sum(value.numel() for value in module.parameters())
    assert models.parameter_count(shapes) == count
    again = pretrained.video_autoencoder.diffusers_config(shapes)
    given = json.loads(module.to_json_string())
    for field in ("base_dim", "decoder_base_dim", "dim_mult", "temperal_downsample", "patch_size"):
        assert again[field] == given[field], field
    if name == "wan21":
        np.testing.assert_allclose(again["latents_std"], given["latents_std"], rtol=1e-6)
        assert again["latents_mean"] == given["latents_mean"]
