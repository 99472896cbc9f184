"""Flux: sizes, conditions, positions, packing, and the two layouts of its files."""

from collections import Counter
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, nn, pretrained
from eqxldm.models import Flux
from eqxldm.nn import Conditioning

from helpers import filled, numbered

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SIZES = dict(depth=1, single_depth=2, width=16, num_heads=2, context_size=6, pooled_size=5)
T = jnp.array(0.3)
LAYOUTS = [pretrained.flux.original_layout, pretrained.flux.diffusers_layout]


def make(**changes):
    options = {**SIZES, "guidance": True, "rope": nn.RoPE((4, 2, 2))}
    return partial(Flux, 2, **{**options, **changes}, key=jax.random.key(0))


NET = filled(make())


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


X, TOKENS, POOLED, SCALE = (
    normal(2, 4, 8),
    normal(5, 6, seed=1),
    normal(5, seed=2),
    jnp.array([3.5]),
)
COND = Conditioning(POOLED, TOKENS, numbers=SCALE)


@eqx.filter_jit
def run(net, x, t, cond):
    return net(x, t, cond)


@pytest.fixture(scope="module")
def out():
    return run(NET, X, T, COND)


def test_published_sizes_have_the_published_counts():
    """Counted by diffusers of its own modules."""
    for name, count in dict(flux1_dev=11_901_408_320, flux1_schnell=11_891_178_560).items():
        net = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
        assert models.parameter_count(net) == count, name
        assert net.config.rope == nn.RoPE((16, 56, 56))


def test_it_knows_how_it_was_made_and_starts_at_zero():
    net = make(depth=1, single_depth=1)()
    assert (
        not net.final_linear.weight.any()
        and not net.blocks.stacked.text.modulation.linear.weight.any()
    )
    assert net.config.build(key=jax.random.key(0)).config == net.config
    assert net.time_embedding.config == nn.Sinusoid(offset=0.0)  # 1000 t, not 1000 t - 1


def test_time_and_guidance_scale_both_tell(out):
    for t, scale in ((0.31, 3.5), (0.3, 3.0)):
        other = run(NET, X, jnp.array(t), Conditioning(POOLED, TOKENS, numbers=jnp.array([scale])))
        assert jnp.max(jnp.abs(other - out)) > 1e-3


def test_text_has_no_order_and_what_is_masked_is_as_if_it_were_not_there(out):
    mixed = Conditioning(POOLED, TOKENS[jnp.array([3, 0, 4, 1, 2])], numbers=SCALE)
    np.testing.assert_allclose(run(NET, X, T, mixed), out, atol=3e-5)
    longer = jnp.concatenate([TOKENS, 9 * normal(2, 6, seed=3)])
    masked = lambda n: run(NET, X, T, Conditioning(POOLED, longer, jnp.arange(7) < n, SCALE))
    np.testing.assert_allclose(masked(5), out, atol=3e-5)
    assert jnp.max(jnp.abs(masked(7) - out)) > 0.01


def test_scores_depend_on_how_far_apart_two_patches_lie_and_text_lies_at_zero():
    rotation = NET.config.rope(models.flux.flux_positions(1, (2, 3)))
    q, k = normal(1, 2, 8, seed=4), normal(1, 2, 8, seed=5)
    at = lambda x, i: rotation(jnp.tile(x, (7, 1, 1)))[i]
    score = lambda i, j: jnp.sum(at(q, i) * at(k, j), axis=-1)
    # Tokens: 0 is text, 1 + 3 row + column the image.
    np.testing.assert_allclose(score(1, 5), score(2, 6), rtol=1e-4)
    np.testing.assert_allclose(score(4, 2), score(5, 3), rtol=1e-4)
    assert jnp.max(jnp.abs(score(1, 5) - score(1, 6))) > 1e-3
    np.testing.assert_array_equal(at(q, 0), q[0])  # text is not turned
    np.testing.assert_array_equal(at(q, 1), q[0])


def test_tokens_are_packed_with_the_channel_slowest_and_unpacked_so():
    tokens = nn.patchify(X, 2)
    np.testing.assert_array_equal(tokens[1].reshape(2, 2, 2), X[:, :2, 2:4])
    np.testing.assert_array_equal(nn.unpatchify(tokens, (4, 8), 2, channels_first=True), X)
    assert not np.array_equal(nn.unpatchify(tokens, (4, 8), 2), X)


@pytest.mark.parametrize(
    "cond, message",
    [
        (TOKENS, r"Flux: cond must be nn\.Conditioning with tokens of shape \(m, 6\) and a vector"),
        (Conditioning(tokens=TOKENS, numbers=SCALE), "a vector of shape None"),
        (Conditioning(POOLED, TOKENS), "told the guidance scale: .* numbers of shape None"),
        (Conditioning(POOLED, TOKENS, numbers=jnp.ones(6)), r"numbers of shape \(6,\)"),
    ],
)
def test_another_condition_is_refused(cond, message):
    with pytest.raises(ValueError, match=message):
        NET(X, T, cond)


def test_a_network_without_guidance_refuses_a_scale():
    net = jax.tree.map(lambda leaf: None, eqx.filter_eval_shape(make(guidance=False)))
    with pytest.raises(ValueError, match="takes no guidance scale"):
        net._check_guidance(SCALE)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rope=nn.RoPE((4, 4))), "rope needs three sizes"),
        (dict(rope=nn.RoPE((4, 4, 4))), "at most the head size 8"),
        (dict(single_depth=0), "every size must be at least 1, got .*single_depth=0"),
        (dict(num_heads=3), "width 16 does not divide into 3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)()


# Files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_uses_each_number_once(layout):
    model, count = numbered(NET)
    state = pretrained.to_state(model, layout)
    once = np.concatenate([value.ravel() for value in state.values()])
    assert Counter(once.tolist()) == Counter(range(count))
    assert eqx.tree_equal(pretrained.load_state(model, state), jax.tree.map(jnp.asarray, model))


def test_one_matrix_of_the_original_is_several_here():
    model, _ = numbered(NET)
    original, theirs = (pretrained.to_state(model, layout) for layout in LAYOUTS)
    there = "single_transformer_blocks.1"
    for kind in ("weight", "bias"):
        rows = [theirs[f"{there}.attn.to_{letter}.{kind}"] for letter in "qkv"]
        rows.append(theirs[f"{there}.proj_mlp.{kind}"])
        joined = original[f"single_blocks.1.linear1.{kind}"]
        np.testing.assert_array_equal(joined, np.concatenate(rows))
    columns = original["single_blocks.1.linear2.weight"]  # attention first, then the MLP
    np.testing.assert_array_equal(
        columns[:, :16], model.single_blocks.stacked.attention.proj.weight[1]
    )
    np.testing.assert_array_equal(columns[:, 16:], model.single_blocks.stacked.fc2.weight[1])
    shift, scale = np.split(original["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(theirs["norm_out.linear.weight"], np.concatenate([scale, shift]))


def test_a_part_of_a_joined_matrix_that_is_missing_or_of_another_shape_is_named():
    state = pretrained.to_state(NET, pretrained.flux.original_layout)
    state["single_blocks.0.linear2.weight"] = state["single_blocks.0.linear2.weight"][:, :70]
    del state["single_blocks.1.linear1.bias"]
    with pytest.raises(pretrained.WeightsError) as error:
        pretrained.load_state(NET, state)
    assert "linear2.weight is (16, 70), the model needs (16, 80)" in str(error.value)
    assert "missing: single_blocks.1.linear1.bias (112,)" in str(error.value)


def test_folders_and_files_keep_the_model_and_the_dtype(tmp_path):
    pretrained.export(NET, tmp_path / "folder")
    half = pretrained.load(tmp_path / "folder", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert eqx.tree_equal(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), NET))
    pretrained.save(half, tmp_path / "half.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "half.safetensors", dtype=None), half)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("patch_size", 2, r"patch_size = 2 \(1\)"),
        ("in_channels", 6, r"in_channels = 6 \(a multiple of 4"),
        ("axes_dims_rope", [16, 56], r"axes_dims_rope = \[16, 56\] \(three numbers with the sum"),
    ],
)
def test_an_option_that_it_has_not_is_named(option, value, message):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.flux.from_diffusers({option: value}, key=jax.random.key(0))


def test_what_diffusers_cannot_hold_is_named():
    net = eqx.filter_eval_shape(make(rope=nn.RoPE((2, 2, 2)), patch_size=1))
    with pytest.raises(pretrained.WeightsError, match="its patch_size is 1, not 2; its rope is"):
        pretrained.flux.diffusers_config(net)
