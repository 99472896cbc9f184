"""TinyAutoencoder against diffusers' AutoencoderTiny, and TAESD's two files in torch."""

import equinox as eqx
import jax
import pytest
import torch
from diffusers import AutoencoderTiny

from eqxldm import models, pretrained
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
)


def theirs(module, x, z):
    return {"z": module.encode(x).latents, "image": module.decode(z).sample}


def ours(ae, x, z):
    return {"z": jax.vmap(ae.encode)(x), "image": jax.vmap(ae.decode)(z)}


def draw_inputs(draw, channels, latent, levels):
    factor = 2 ** (levels - 1)
    sides = [draw.between(1, 3) for _ in "hw"]
    x = draw.normal(2, channels, *(factor * side for side in sides))
    return dict(x=x, z=2 * draw.normal(2, latent, *sides))


@each_configuration
def test_diffusers(number, tmp_path, record_property):
    draw = Draw("tiny autoencoder", number)
    levels, width, form = draw.one(1, 2, 2, 3), draw.between(2, 8), draw.form()
    channels, latent = draw.between(1, 4), draw.one(2, 4, 5)
    counts = lambda: tuple(draw.one(1, 1, 2) for _ in range(levels))
    module = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        latent_channels=latent,
        num_encoder_blocks=counts(),
        num_decoder_blocks=counts(),
    )
    module = save(randomise(module, draw), tmp_path / "theirs", form)
    check_dtypes(tmp_path / "theirs", form)
    ae = pretrained.load(tmp_path / "theirs")
    inputs = draw_inputs(draw, channels, latent, levels)
    pair = Pair(theirs, ours, pretrained.tiny_autoencoder.diffusers_layout, inputs)
    errors = compare(module, ae, pair)
    errors["exported"] = compare_back(type(module), module, ae, tmp_path / "ours", pair)
    record_property("TinyAutoencoder", errors)


def test_the_published_form_has_diffusers_names():
    with torch.device("meta"):
        module = AutoencoderTiny()
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = eqx.filter_eval_shape(models.TinyAutoencoder, key=jax.random.key(0))
    assert tensor_shapes(shapes, pretrained.tiny_autoencoder.diffusers_layout(shapes)) == expected


class Block(torch.nn.Module):
    """TAESD's block, with what the one for FLUX.2 has more."""

    def __init__(self, width, pool):
        super().__init__()
        conv = lambda: torch.nn.Conv2d(width, width, 3, padding=1)
        relu = torch.nn.ReLU()
        self.conv = torch.nn.Sequential(conv(), relu, conv(), relu, conv())
        if pool:
            self.pool = torch.nn.Sequential(
                torch.nn.Conv2d(width, 4 * width, 1, bias=False),
                torch.nn.GroupNorm(4, 4 * width),
                torch.nn.ReLU(),
                torch.nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return torch.relu(x + self.conv(x))


class Bound(torch.nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


class Halves(torch.nn.Module):
    """Encoder and decoder as plain sequences, whose numbers are the names in TAESD's files."""

    def __init__(self, latent, width, pool):
        super().__init__()
        conv = lambda a, b, **options: torch.nn.Conv2d(a, b, 3, padding=1, **options)
        down = lambda: conv(width, width, stride=2, bias=False)
        plain = lambda count: [Block(width, False) for _ in range(count)]
        deep = lambda: [Block(width, pool) for _ in range(3)]
        self.encoder = torch.nn.Sequential(
            conv(3, width), *plain(1), down(), *plain(3), down(), *plain(3), down(), *deep(),
            conv(width, latent),
        )  # fmt: skip
        up = lambda: [torch.nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
        self.decoder = torch.nn.Sequential(
            Bound(), conv(latent, width), torch.nn.ReLU(), *deep(), *up(), *plain(3), *up(),
            *plain(3), *up(), *plain(1), conv(width, 3),
        )  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("pool", [False, True])
def test_the_two_files_of_taesd(suffix, pool, tmp_path):
    draw = Draw("taesd", pool)
    module = randomise(Halves(5, 4, pool), draw)
    paths = [tmp_path / f"{half}.{suffix}" for half in ("encoder", "decoder")]
    for path, half in zip(paths, (module.encoder, module.decoder), strict=True):
        state = dict(half.state_dict())
        if suffix == "pth":
            torch.save(state, path)
        else:
            arrays = {name: value.numpy() for name, value in state.items()}
            pretrained.files.write_safetensors(path, arrays, {})
    ae = pretrained.load_tiny_autoencoder(*paths)
    assert ae.config.pool == pool and ae.config.width == 4 and ae.latent_channels == 5
    if suffix == "pth":
        return

    def theirs(module, x, z):
        return {"z": module.encoder((x + 1) / 2), "image": 2 * module.decoder(z) - 1}

    inputs = draw_inputs(draw, 3, 5, 4)
    compare(module, ae, Pair(theirs, ours, pretrained.tiny_autoencoder.original_layout, inputs))
