"""Weights of the autoencoder; tests/test_autoencoder.py has its parity with diffusers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.models import kl_f8
from eqxldm.pretrained.files import open_safetensors
from eqxldm.pretrained.layout import tensor_shapes

from helpers import reference, relative_error, small_autoencoder
from pretrained_files import (
    FILE,
    SD_CONFIG,
    TINY_SD,
    equal,
    levels,
    state_of_diffusers,
    tiny_autoencoder,
    write_folder,
)

AUTOENCODERS = {
    "stable diffusion": dict(),
    "plain": dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    "attention": dict(
        down_block_types=["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    ),
    "shifted": dict(shift_factor=0.125, scaling_factor=0.25),
    "per channel": dict(latents_mean=[0.0, 1.0, 2.0, -1.0], latents_std=[1.0, 2.0, 0.5, 0.25]),
}
each_autoencoder = pytest.mark.parametrize(
    "changes", AUTOENCODERS.values(), ids=AUTOENCODERS.keys()
)


@each_autoencoder
def test_autoencoders_come_back_identical_from_both_formats(changes, tmp_path):
    ae = tiny_autoencoder(**changes)
    pretrained.save(ae, tmp_path / "a.safetensors")
    assert equal(pretrained.load(tmp_path / "a.safetensors"), ae)
    pretrained.export(ae, tmp_path / "out")
    if "latents_std" not in changes:
        assert equal(pretrained.load(tmp_path / "out"), ae)
    else:  # the scale is written as 1 / std
        again = pretrained.load(tmp_path / "out")
        np.testing.assert_allclose(again.scale, ae.scale)
        assert again.shift == ae.shift == (0.0, 1.0, 2.0, -1.0)


def test_attention_in_a_level_of_the_autoencoder_has_diffusers_names():
    ae = tiny_autoencoder(**AUTOENCODERS["attention"])
    names = tensor_shapes(ae, pretrained.autoencoder.diffusers_layout(ae))
    assert {n for n in names if "attentions" in n and n.endswith("group_norm.bias")} == {
        f"{half}.attentions.{i}.group_norm.bias"
        for half, n in [
            ("encoder.down_blocks.0", 1), ("encoder.mid_block", 1),
            ("decoder.up_blocks.1", 2), ("decoder.mid_block", 1),
        ]
        for i in range(n)
    }  # fmt: skip


def test_an_autoencoder_of_our_own_sizes(tmp_path):
    ae = small_autoencoder(patch_size=2, attention=True).with_latent_stats((0.1, 0.2), (3.0, 4.0))
    pretrained.save(ae, tmp_path / "a.safetensors")
    assert equal(pretrained.load(tmp_path / "a.safetensors"), ae)
    with pytest.raises(
        pretrained.WeightsError, match="patch_size is 2, not 1; its decoder has 1 blocks"
    ):
        pretrained.export(ae, tmp_path / "out")


@pytest.mark.parametrize("name, channels, blocks, groups, quant", [
    ("attention", (4, 8, 8), 1, 2, True), ("plain", (4, 8), 2, 2, False),
])  # fmt: skip
def test_autoencoder_weights_of_diffusers(name, channels, blocks, groups, quant, tmp_path):
    """Also under the names of 2022; and what is exported has the same names and values."""
    state = state_of_diffusers(name)
    config = TINY_SD | dict(
        in_channels=3 if quant else 1, out_channels=3 if quant else 1,
        latent_channels=4 if quant else 2, block_out_channels=channels, layers_per_block=blocks,
        norm_num_groups=groups, use_quant_conv=quant, use_post_quant_conv=quant,
        mid_block_add_attention=quant, **levels(len(channels)),
    )  # fmt: skip
    ae = pretrained.load(write_folder(tmp_path / "new", config=config, tensors=state))
    file = reference(f"autoencoder_{name}")
    posterior = eqx.filter_jit(lambda ae, x: ae.posterior(x))(ae, jnp.asarray(file["x"]))
    assert relative_error(posterior.mean, np.split(file["moments"], 2)[0]) < 2e-5
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, name_then in old.items():
            key = key.replace(new, name_then)
        renamed[key] = value
    assert (renamed.keys() != state.keys()) == quant
    assert equal(
        pretrained.load(write_folder(tmp_path / "old", config=config, tensors=renamed)), ae
    )
    pretrained.export(ae, tmp_path / "out")
    tensors, _ = open_safetensors(tmp_path / "out" / FILE)
    assert tensors.keys() == state.keys()
    assert all(np.array_equal(tensors[n].read(), state[n]) for n in state)
    if quant:  # both names of one tensor: one of them is too many
        both = state | {k: v for k, v in renamed.items() if "query.weight" in k}
        with pytest.raises(pretrained.WeightsError, match=r"unexpected: encoder.*query\.weight"):
            pretrained.load_state(ae, both)


def test_every_name_of_the_full_stable_diffusion_autoencoder():
    make = lambda key: pretrained.autoencoder.from_diffusers(SD_CONFIG, key=key)
    ae = eqx.filter_eval_shape(make, jax.random.key(0))
    assert jax.tree.structure(ae) == jax.tree.structure(
        eqx.filter_eval_shape(kl_f8, key=jax.random.key(0))
    )
    shapes = tensor_shapes(ae, pretrained.autoencoder.diffusers_layout(ae))
    assert len(shapes) == 248
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.conv_out.weight"] == (8, 512, 3, 3)
    assert shapes["post_quant_conv.weight"] == (4, 4, 1, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "relu"}, r"act_fn = 'relu' \('silu'\)"),
        ({"use_quant_conv": False}, r"use_post_quant_conv = True \(False\)"),
        (levels(1), r"down_block_types = \['DownEncoderBlock2D'\] \(2 of"),
        ({"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]}, "down_block_types = "),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            r"up_block_types = .* \(the mirror of down_block_types\)",
        ),
    ],
)
def test_autoencoder_options_that_the_network_does_not_have(change, message, tmp_path):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(write_folder(tmp_path / "ae", config=TINY_SD | change))
