"""AutoencoderKL against diffusers', both ways, encoder and decoder."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

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
    save,
)
from helpers import relative_error


def stats(config):
    """`(shift, scale)` of diffusers' pipelines: `z = (z_raw - shift) scale`."""
    mean, std = config.latents_mean, config.latents_std
    channel = lambda v: torch.tensor(v)[:, None, None]
    shift = channel(mean) if mean else config.shift_factor or 0.0
    return shift, config.scaling_factor / (channel(std) if std else 1.0)


def theirs(module, x, z):
    shift, scale = stats(module.config)
    posterior = module.encode(x).latent_dist
    image = module.decode(z / scale + shift).sample
    return dict(
        mean=posterior.mean,
        logvar=posterior.logvar,
        z=(posterior.mean - shift) * scale,
        image=image,
    )


def ours(ae, x, z):
    posterior = jax.vmap(ae.posterior)(x)
    return dict(
        mean=posterior.mean,
        logvar=posterior.logvar,
        z=jax.vmap(ae.normalise)(posterior).mean,
        image=jax.vmap(ae.decode)(z),
    )


def configuration(draw):
    levels, groups = draw.one(1, 1, 1, 1, 2, 2, 2, 3, 4), draw.one(1, 2, 3, 4)
    widths = [groups * draw.between(2, max(2, 12 // groups)) for _ in range(levels)]
    channels, latent, quant = draw.between(1, 4), draw.between(1, 5), draw.one(True, False)
    latents = draw.one(
        {},
        dict(scaling_factor=0.18215),
        dict(scaling_factor=0.3611, shift_factor=0.1159),
        dict(
            scaling_factor=draw.one(1.0, 0.5),
            latents_mean=draw.normal(latent).tolist(),
            latents_std=(1 + draw.rng.random(latent)).tolist(),
        ),
    )
    return dict(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=widths,
        layers_per_block=draw.one(1, 1, 2, 3) if levels == 1 else 1,
        norm_num_groups=groups,
        mid_block_add_attention=draw.one(True, True, False),
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **latents,
    )


def with_old_names(folder):
    """The same folder with the names of attention of 2022, which most published files have."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for path in folder.glob("*.safetensors"):
        renamed = {}
        for name, value in load_file(path).items():
            layer = next((new for new in old if f"attentions.0.{new}." in name), None)
            renamed[name.replace(layer, old[layer]) if layer else name] = value
        save_file(renamed, path, {"format": "pt"})


@each_configuration
def test_diffusers(number, tmp_path, record_property):
    draw = Draw("autoencoder", number)
    module = randomise(AutoencoderKL(**configuration(draw)), draw)
    form, folder = draw.form(), tmp_path / "theirs"
    module = save(module, folder, form)
    if form in ("float32", "fp16", "bf16") and draw.one(True, False):
        with_old_names(folder)
    check_dtypes(folder, form)
    ae = pretrained.load(folder)
    # A norm over too few numbers amplifies rounding: no side of a latent is 1.
    latent = (module.config.latent_channels, draw.between(2, 5), draw.between(2, 5))
    image = (module.config.in_channels, *(side * ae.factor for side in latent[1:]))
    values = dict(x=draw.normal(2, *image), z=draw.normal(2, *latent))
    pair = Pair(theirs, ours, pretrained.autoencoder.diffusers_layout, values)
    errors = compare(module, ae, pair)
    errors["exported"] = compare_back(AutoencoderKL, module, ae, tmp_path / "ours", pair)
    record_property("AutoencoderKL", errors)


def test_in_slices_and_in_one_tile(tmp_path):
    """Nothing changes where tiling is asked for and the image is no larger than a tile."""
    draw = Draw("autoencoder", 0)
    options = configuration(draw) | dict(block_out_channels=[8, 8], norm_num_groups=2)
    options |= dict(down_block_types=["DownEncoderBlock2D"] * 2)
    options |= dict(up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1)
    module = randomise(AutoencoderKL(**options, sample_size=32), draw)
    module = save(module, tmp_path, "float32")
    ae = pretrained.load(tmp_path)
    x = draw.normal(3, ae.in_channels, 16, 24)
    z = draw.normal(3, ae.latent_channels, 8, 12)
    with torch.no_grad():
        module.enable_slicing()
        module.enable_tiling()
        expected = theirs(module, torch.from_numpy(x), torch.from_numpy(z))
    x, z = jnp.asarray(x), jnp.asarray(z)
    assert relative_error(models.encode_sliced(ae, x, 2), expected["z"]) <= BOUND
    assert relative_error(models.decode_sliced(ae, z, 2), expected["image"]) <= BOUND
    encoded = models.encode_tiled(ae, x[0], tile=32, overlap=8)
    decoded = models.decode_tiled(ae, z[0], tile=32, overlap=8)
    assert relative_error(encoded, expected["z"][0]) <= BOUND
    assert relative_error(decoded, expected["image"][0]) <= BOUND


@pytest.mark.parametrize(
    "name, shift, scale", [("SD3", 0.0609, 1.5305), ("FLUX.1", 0.1159, 0.3611)]
)
def test_the_autoencoders_of_sixteen_channels_have_diffusers_names(name, shift, scale):
    """Those of SD3 and FLUX.1: the shape of Stable Diffusion's, without the quant convolutions."""
    with torch.device("meta"):
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    config = json.loads(module.to_json_string())
    make = lambda key: pretrained.autoencoder.from_diffusers(config, key=key)
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert tensor_shapes(shapes, pretrained.autoencoder.diffusers_layout(shapes)) == expected
    assert models.parameter_count(shapes) == 83_819_683
    assert shapes.shift == (shift,) * 16 and shapes.scale == (scale,) * 16
    ours = eqx.filter_eval_shape(
        lambda key: models.kl_f8(3, 16, quant_convs=False, key=key).with_latent_stats(shift, scale),
        jax.random.key(0),
    )
    assert ours.config == shapes.config
