"""DINOv2 and CLIP's image encoder against transformers'."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from eqxldm import models, nn, pretrained
from eqxldm.pretrained import image_encoders

from harness import Draw, Pair, compare, compare_back, each_configuration, randomise, read, save


@each_configuration
def test_dinov2(number, tmp_path, record_property):
    draw = Draw("dinov2", number)
    heads, patch, grid = draw.between(1, 3), draw.between(2, 5), draw.between(2, 4)
    config = Dinov2Config(
        hidden_size=4 * heads * draw.between(1, 3),
        num_hidden_layers=draw.between(1, 3),
        num_attention_heads=heads,
        mlp_ratio=draw.between(1, 4),
        image_size=patch * grid,
        patch_size=patch,
        layer_norm_eps=draw.one(1e-6, 1e-5),
    )
    form = draw.one("float32", "sharded", "fp16", "bf16")
    module = save(randomise(Dinov2Model(config), draw), tmp_path / "theirs", form)
    model = pretrained.load(tmp_path / "theirs")
    # At the size of its positions, or of others, which are interpolated.
    sides = [patch * (grid if number % 2 else draw.between(1, 5)) for _ in "hw"]
    pair = Pair(
        lambda module, x: {"tokens": module(x).last_hidden_state},
        lambda model, x: {"tokens": jax.vmap(_tokens(model))(x)},
        image_encoders.dinov2_layout,
        dict(x=draw.normal(2, 3, *sides)),
        fixed=("mask_token",),
    )
    module.embeddings.mask_token.requires_grad_(False)
    found = jax.vmap(_tokens(model))(pair.inputs["x"])
    with torch.no_grad():
        expected = module(torch.from_numpy(pair.inputs["x"])).last_hidden_state.numpy()
    error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    record_property("dinov2", {"forward": error})
    assert error <= 2e-5
    state = pretrained.to_state(model, image_encoders.dinov2_original_layout)
    again = pretrained.load_state(model, state)
    assert all(
        bool(jnp.all(a == b)) for a, b in zip(*map(jax.tree.leaves, (again, model)), strict=True)
    )
    compare_back(Dinov2Model, module, model, tmp_path / "ours", pair, read=read)


def _tokens(model):
    def run(x):
        out = model(x)
        return jnp.concatenate([out.features[None], out.patches])

    return run


@each_configuration
def test_clip(number, tmp_path, record_property):
    draw = Draw("clip image", number)
    heads, patch = draw.between(1, 3), draw.between(2, 5)
    config = CLIPVisionConfig(
        hidden_size=4 * heads * draw.between(1, 3),
        intermediate_size=draw.between(4, 40),
        projection_dim=draw.between(2, 12),
        num_hidden_layers=draw.between(1, 3),
        num_attention_heads=heads,
        image_size=patch * draw.between(1, 4),
        patch_size=patch,
        hidden_act=draw.one("quick_gelu", "gelu"),
    )
    form = draw.one("float32", "sharded", "fp16", "bf16")
    kind = CLIPVisionModelWithProjection
    module = save(randomise(kind(config), draw), tmp_path / "theirs", form)
    model = pretrained.load(tmp_path / "theirs")
    pair = Pair(
        lambda module, x: {"features": module(x).image_embeds},
        lambda model, x: {"features": jax.vmap(lambda x: model(x).features)(x)},
        image_encoders.clip_layout,
        dict(x=draw.normal(2, 3, config.image_size, config.image_size)),
    )
    record_property("clip image", compare(module, model, pair))
    compare_back(kind, module, model, tmp_path / "ours", pair)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_clip(form, tmp_path):
    """As OpenAI's folders are: with the text encoder, and some pickled."""
    draw = Draw("whole clip", 0)
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        vision_config=sizes | dict(image_size=12, patch_size=4),
        text_config=sizes | dict(vocab_size=20, max_position_embeddings=5),
        projection_dim=6,
    )
    module = randomise(CLIPModel(config), draw)
    module.save_pretrained(tmp_path)
    if form == "pytorch_model.bin":
        torch.save(module.state_dict(), tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    x = draw.normal(2, 3, 12, 12)
    with torch.no_grad():
        pooled = module.vision_model(torch.from_numpy(x)).pooler_output
        expected = module.visual_projection(pooled).numpy()
    model = pretrained.load_clip_image(tmp_path)
    found = jax.vmap(lambda x: model(x).features)(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.max(np.abs(expected)))


def test_published_sizes():
    """The parameters of transformers' networks of the published configurations."""
    sizes = {
        "dinov2_s": (384, 12, 6),
        "dinov2_b": (768, 12, 12),
        "dinov2_l": (1024, 24, 16),
    }
    for name, (width, depth, heads) in sizes.items():
        with torch.device("meta"):
            module = Dinov2Model(
                Dinov2Config(
                    hidden_size=width,
                    num_hidden_layers=depth,
                    num_attention_heads=heads,
                    image_size=518,
                )
            )
        _same_shapes(getattr(models, name), image_encoders.dinov2_layout, module)
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        )
    _same_shapes(models.clip_image_l_14_336, image_encoders.clip_layout, module)


def _same_shapes(make, layout, module):
    shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
    ours = pretrained.layout.tensor_shapes(shapes, layout(shapes))
    # Some names are others in a file than in the module; those of files are compared above.
    assert sorted(ours.values()) == sorted(tuple(p.shape) for p in module.parameters())


def test_bicubic_of_positions():
    rng = np.random.default_rng(0)
    for size, out in [((3, 4), (5, 7)), ((37, 37), (16, 16)), ((2, 2), (9, 1))]:
        x = rng.standard_normal((2, *size)).astype(np.float32)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(x)[None], out, mode="bicubic", align_corners=False
        )[0]
        found = nn.resize(jnp.asarray(x), out, nn.sparse_bicubic_matrix)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
