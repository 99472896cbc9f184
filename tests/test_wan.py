"""WanTransformer: images and clips, times of frames, attention in blocks, divided frames, files."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, nn, pretrained, sharding
from eqxldm.models import WanTransformer, parameter_count

from helpers import filled, tree_error

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)
SMALL = dict(depth=2, width=16, num_heads=2, context_size=6, hidden=8)
TOKENS = jax.random.normal(KEY, (5, 6))
COND = nn.Conditioning(tokens=TOKENS)
MAKE = partial(WanTransformer, 2, key=KEY)


@pytest.fixture(scope="module")
def wan():
    return filled(partial(MAKE, **SMALL))


@pytest.fixture(scope="module")
def run():
    return eqx.filter_jit(lambda wan, x, t, cond: wan(x, t, cond))


def clip(frames=4):
    return jax.random.normal(jax.random.key(1), (2, frames, 4, 6))


def test_one_frame_is_a_clip_and_frames_are_told_apart(wan, run):
    x, t = clip(), jnp.array(0.3)
    out = run(wan, x, t, COND)
    assert out.shape == x.shape and jnp.std(out) > 1e-3
    assert run(wan, x[:, :1], t, COND).shape == (2, 1, 4, 6)
    # Positions are relative: the same frame in both places gives the same, another order does not.
    turned = run(wan, x[:, ::-1], t, COND)[:, ::-1]
    assert jnp.max(jnp.abs(turned - out)) > 1e-4
    still = run(wan, jnp.repeat(x[:, :1], 4, 1), t, COND)
    assert jnp.max(jnp.abs(still[:, 0] - still[:, 1])) > 1e-5


def test_a_time_for_each_frame(wan, run):
    x, t = clip(), jnp.array(0.3)
    each = run(wan, x, jnp.full(4, 0.3), COND)
    np.testing.assert_allclose(each, run(wan, x, t, COND), atol=1e-5)
    given = run(wan, x, jnp.array([0.0, 0.3, 0.3, 0.3]), COND)  # the first frame is not noise
    assert jnp.max(jnp.abs(given - each)) > 1e-4
    with pytest.raises(ValueError, match="one for each of 4 frames of patches; got shape"):
        wan(x, jnp.full(3, 0.3), COND)


def test_a_mask_leaves_the_padding_out(wan, run):
    x, t = clip(1), jnp.array(0.3)
    padded = jnp.concatenate([TOKENS, jnp.ones((3, 6))])
    masked = nn.Conditioning(tokens=padded, mask=jnp.arange(8) < 5)
    np.testing.assert_allclose(run(wan, x, t, masked), run(wan, x, t, COND), atol=1e-5)
    unmasked = run(wan, x, t, nn.Conditioning(tokens=padded))
    assert jnp.max(jnp.abs(unmasked - run(wan, x, t, COND))) > 1e-4


@pytest.mark.parametrize("where", [None, "keys", "both"])
def test_attention_in_blocks_is_attention(where):
    ks = jax.random.split(KEY, 4)
    q, k, v = (jax.random.normal(key, (n, 2, 4)) for key, n in zip(ks, (7, 5, 5), strict=False))
    mask = dict(keys=jnp.arange(5) < 4, both=jax.random.bernoulli(ks[3], 0.6, (2, 7, 5)))
    options = {} if where is None else dict(mask=mask[where], bias=jnp.ones((7, 5)))

    def value_and_gradients(attention):
        loss = lambda *qkv: jnp.sum(jnp.sin(attention(*qkv, **options)))
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    in_blocks = value_and_gradients(partial(nn.attend_in_blocks, block=2))
    assert tree_error(in_blocks, value_and_gradients(nn.attend)) < 1e-5


def test_frames_divided_over_devices_are_as_on_one(wan, run):
    """Two devices, over the axis that also has the heads, and over one that has the parameters."""
    x, t = clip(), jnp.array(0.3)

    def gradients(wan, x):
        loss = lambda wan: jnp.sum(jnp.sin(wan(x, t, COND)))
        return eqx.filter_value_and_grad(loss)(wan)

    expected = eqx.filter_jit(gradients)(wan, x)
    for axis in ("tensor", "fsdp"):
        options = SMALL | dict(sequence_axis=axis, attention=nn.attend)
        template = eqx.filter_eval_shape(partial(MAKE, **options))
        params = eqx.filter(wan, eqx.is_array)
        divided = eqx.combine(
            jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(params)), template
        )
        mesh = sharding.make_mesh({axis: 2})
        with jax.set_mesh(mesh):
            step: Any = eqx.filter_jit(gradients)
            found = step(divided, x)
            text = step.lower(divided, x).compile().compiled.as_text()
        assert tree_error(jax.tree.leaves(found), jax.tree.leaves(expected)) < 1e-5
        assert "f32[12,16]" in text  # 24 tokens in two parts
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="do not divide over the 2 devices"):
        nn.divide_tokens(jnp.ones((3, 2)), "fsdp")


def test_files_give_back_the_same_model(wan, tmp_path):
    pretrained.save(wan, tmp_path / "wan.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "wan.safetensors"), wan)
    pretrained.export(wan, tmp_path / "folder")
    loaded = pretrained.load(tmp_path / "folder")
    assert tree_error(jax.tree.leaves(loaded), jax.tree.leaves(wan)) == 0
    state = pretrained.to_state(wan, pretrained.wan.original_layout)
    assert state["blocks.1.modulation"].shape == (1, 6, 16)
    assert eqx.tree_equal(pretrained.load_state(wan, state), wan)


@pytest.mark.parametrize(
    "make, count",
    [
        (models.wan_t2v_1_3b, 1_418_996_800),
        (models.wan_t2v_14b, 14_288_491_584),
        (models.wan_ti2v_5b, 4_999_787_712),
    ],
)
def test_the_published_sizes_have_the_published_counts(make, count):
    shapes = eqx.filter_eval_shape(make, key=KEY)
    assert parameter_count(shapes) == count
    assert shapes.config.rope == nn.RoPE((44, 42, 42))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(width=18), "9 features, and three axes need an even number"),
        (dict(width=17), "does not divide into 2 heads"),
        (dict(depth=0), "at least 1, got depth=0"),
        (dict(patch_size=(2, 2)), "wrong argument for parameter 'patch_size'"),
    ],
)
def test_wrong_sizes_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(partial(MAKE, **SMALL | options))


@pytest.mark.parametrize(
    "x, cond, message",
    [
        (jnp.ones((3, 1, 4, 6)), COND, "need 2 channels, got 3"),
        (jnp.ones((2, 1, 4, 5)), COND, "does not divide by the patch size 1 x 2 x 2"),
        (jnp.ones((2, 1, 4, 6)), None, "cond must be nn.Conditioning"),
        (jnp.ones((2, 1, 4, 6)), nn.Conditioning(tokens=jnp.ones((3, 5))), r"of shape \(m, 6\)"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(wan, x, cond, message):
    with pytest.raises(ValueError, match=message):
        wan(x, jnp.array(0.3), cond)


def test_networks_with_features_of_clip_are_refused():
    config = dict(image_dim=1280, added_kv_proj_dim=5120)
    with pytest.raises(pretrained.WeightsError, match=r"image_dim = 1280 \(None\), added_kv"):
        pretrained.wan.from_diffusers(config, key=KEY)
