"""LoRA files of several forms, merged: `W + scale alpha / rank up down`, and nothing else."""

import functools
import json
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.models import CLIPText, Flux, MMDiT, UNet
from eqxldm.nn import RoPE
from eqxldm.pretrained import WeightsError, lora, merge_lora, to_state
from eqxldm.pretrained.files import write_safetensors

from helpers import filled

KEY = jax.random.key(0)


def unet():
    sizes: dict[str, Any] = dict(
        channels=(8, 16), blocks=1, attention_levels=(False, True), num_heads=2
    )
    return UNet(4, **sizes, context_size=6, groups=4, key=KEY)


def mmdit():
    return MMDiT(4, depth=2, width=16, num_heads=2, context_size=6, pooled_size=5, key=KEY)


def flux():
    sizes = dict(depth=1, single_depth=2, width=16, num_heads=2, context_size=6, pooled_size=5)
    return Flux(4, **sizes, rope=RoPE((4, 2, 2)), key=KEY)


def clip():
    return CLIPText(8, 2, 2, projection=6, vocabulary=9, key=KEY)


LORA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
OLD = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
flat = lambda name: name.replace(".", "_")
plain = lambda name: name
sgm = lambda name: flat(lora.original_unet_name(name, 1))
# The model, the names of its layers, how a file begins and ends them, and whether it has alphas.
FORMS = {
    "unet, kohya": (unet, pretrained.unet.diffusers_layout, "lora_unet_", flat, LORA, True),
    "unet, Stability AI": (unet, pretrained.unet.diffusers_layout, "lora_unet_", sgm, LORA, True),
    "unet, peft": (unet, pretrained.unet.diffusers_layout, "unet.", plain, PEFT, False),
    "mmdit, peft": (mmdit, pretrained.mmdit.diffusers_layout, "transformer.", plain, PEFT, False),
    "mmdit, kohya": (mmdit, pretrained.mmdit.original_layout, "lora_unet_", flat, LORA, True),
    "flux, peft": (flux, pretrained.flux.diffusers_layout, "transformer.", plain, PEFT, False),
    "flux, kohya": (flux, pretrained.flux.original_layout, "lora_unet_", flat, LORA, True),
    "flux, original": (
        flux, pretrained.flux.original_layout, "diffusion_model.", plain, PEFT, True,
    ),
    "clip, kohya": (clip, pretrained.clip_text.transformers_layout, "lora_te_", flat, LORA, True),
    "clip, 2023": (
        clip, pretrained.clip_text.transformers_layout, "text_encoder.", plain, OLD, False,
    ),
}  # fmt: skip


@functools.cache
def random(make):
    return filled(make)


def weights_of(model, layout):
    """Every matrix and kernel by its name in files; tables are looked up, and have no LoRA."""
    state = to_state(model, layout)
    skipped = ("embedding.weight", "pos_embed.pos_embed", "pos_embed")
    return state, {
        name: array
        for name, array in state.items()
        if array.ndim > 1 and not name.endswith(skipped) and name.endswith(".weight")
    }


@pytest.mark.parametrize("form", FORMS)
def test_all_layers_of_a_file_are_merged(form, tmp_path):
    make, layout, prefix, named, ends, has_alpha = FORMS[form]
    model, rng = random(make), np.random.default_rng(0)
    state, weights = weights_of(model, layout)
    tensors, expected = {}, dict(state)
    for i, (name, weight) in enumerate(weights.items()):
        rank, layer = 1 + i % 3, prefix + named(name.removesuffix(".weight"))
        down = rng.normal(size=(rank, *weight.shape[1:])).astype(np.float32)
        up = rng.normal(size=(weight.shape[0], rank)).astype(np.float32)
        alpha = 2.0 if has_alpha else rank
        expected[name] = weight + 0.5 * alpha / rank * np.tensordot(up, down, 1)
        if weight.ndim == 4 and has_alpha:
            up = up[..., None, None]
        tensors |= {f"{layer}.{ends['down']}": down, f"{layer}.{ends['up']}": up}
        if has_alpha:
            tensors[f"{layer}.alpha"] = np.array(alpha, np.float32)
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    merged = merge_lora(model, tmp_path / "a.safetensors", 0.5)
    found = to_state(merged, layout)
    assert len(tensors) > 10
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    back = to_state(merge_lora(merged, tmp_path / "a.safetensors", -0.5), layout)
    assert all(np.allclose(back[name], state[name], atol=1e-5) for name in state)


def write_clip(path, header=(), *, more=(), rank=2, layer="text_model.encoder.layers.0.mlp.fc1"):
    """A file with one layer of the text encoder, of ones."""
    matrices = {"lora_A.weight": np.ones((rank, 8)), "lora_B.weight": np.ones((32, rank))}
    tensors = {f"text_encoder.{layer}.{k}": v.astype(np.float32) for k, v in matrices.items()}
    write_safetensors(path, tensors | dict(more), dict(header))
    return path


def change(model, path, **options):
    merged = merge_lora(model, path, **options)
    return merged.blocks.stacked.fc1.weight - model.blocks.stacked.fc1.weight


def test_the_dtype_stays_and_the_sum_is_rounded_once(tmp_path):
    half = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), random(clip))
    found = change(half, write_clip(tmp_path / "a.safetensors"), scale=1 / 3)
    assert found.dtype == jnp.bfloat16
    assert np.all(np.asarray(found[0]) == np.asarray(2 / 3, jnp.bfloat16)) and not found[1].any()


def test_what_peft_was_told_is_in_the_header(tmp_path):
    model = random(clip)
    layer = "text_model.encoder.layers.0.mlp.fc1"
    for told, factor in (
        ({"lora_alpha": 8, "r": 2}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {layer: 1}}, 0.5),
        ({"r": 2}, 1.0),
    ):
        about = {f"text_encoder.{name}": value for name, value in told.items()}
        header = {lora.METADATA: json.dumps(about)}
        found = change(model, write_clip(tmp_path / "a.safetensors", header))
        np.testing.assert_allclose(found[0], 2 * factor, rtol=1e-5)
    for damaged in ("[]", "{", '{"odd.lora_alpha": 1}', '{"text_encoder.use_dora": true}'):
        path = write_clip(tmp_path / "a.safetensors", {lora.METADATA: damaged})
        with pytest.raises(WeightsError, match=r"damaged|DoRA"):
            merge_lora(model, path)


def test_names_of_2023_are_of_the_attentions_processors(tmp_path):
    model = random(unet)
    start = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    matrices = {"down": np.ones((1, 16), np.float32), "up": np.ones((16, 1), np.float32)}
    tensors = {
        f"{start}.{layer}_lora.{k}.weight": v
        for layer in ("to_q", "to_out")
        for k, v in matrices.items()
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    attention = lambda m: m.downs[1].attentions[0].blocks[0].self_attention
    before, after = (attention(m) for m in (model, merge_lora(model, tmp_path / "a.safetensors")))
    np.testing.assert_allclose(after.qkv.weight[0] - before.qkv.weight[0], 1, rtol=1e-5)
    np.testing.assert_allclose(after.proj.weight - before.proj.weight, 1, rtol=1e-5)
    assert np.array_equal(after.qkv.weight[1:], before.qkv.weight[1:])


def test_refused(tmp_path):
    model, path = random(clip), tmp_path / "a.safetensors"
    refused = lambda match, **options: pytest.raises(WeightsError, match=match)
    with refused("nothing for network; it has layers of text_encoder"):
        merge_lora(random(unet), write_clip(path))
    with refused(r"(?s)does not fit CLIPText:\n  no such layer: text_model.encoder.layers.7"):
        merge_lora(model, write_clip(path, layer="text_model.encoder.layers.7.mlp.fc1"))
    with refused(r"wrong shape: .*fc2 has \(32, 2\) times \(2, 8\), the model's is \(8, 32\)"):
        merge_lora(model, write_clip(path, layer="text_model.encoder.layers.0.mlp.fc2"))
    odd = np.ones((2, 2), np.float32)
    for name in (
        "x.dora_scale",
        "x.hada_w1_a",
        "x.lokr_w1",
        "x.diff",
        "x.lora_B.bias",
        "conv.weight",
    ):
        with refused(f"no LoRA's: {re.escape(name)}.*DoRA, LoHa, LoKr"):
            merge_lora(model, write_clip(path, more={name: odd}))
    with refused("lacks its up"):
        merge_lora(model, write_clip(path, more={"text_encoder.x.lora_A.weight": odd}))
    with refused("no rank, or an alpha"):
        merge_lora(model, write_clip(path, rank=0))
    with refused("scale must be finite"):
        merge_lora(model, path, float("nan"))
    half = jax.tree.map(lambda a: a.astype(jnp.float16), model)
    with refused("numbers that are not finite"):
        merge_lora(half, write_clip(path), 1e6)
    with pytest.raises(FileNotFoundError):
        merge_lora(model, tmp_path / "none.safetensors")
    with refused("no model of the library"):
        merge_lora(eqx.nn.Identity(), write_clip(path), part="text_encoder")
