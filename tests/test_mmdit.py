"""MMDiT: sizes, conditions, positions, skipped blocks, and the two layouts of its files."""

from collections import Counter
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, nn, pretrained
from eqxldm.models import MMDiT
from eqxldm.nn import Conditioning

from helpers import filled, numbered

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SIZES = dict(depth=3, width=16, num_heads=2, context_size=6, pooled_size=5, out_channels=3)
T = jnp.array(0.3)
LAYOUTS = [pretrained.mmdit.original_layout, pretrained.mmdit.diffusers_layout]


def make(**changes):
    options = {**SIZES, "dual_depth": 1, "qk_norm": nn.RMSNorm, "max_grid": 6, "base_grid": 4}
    return partial(MMDiT, 2, **{**options, **changes}, key=jax.random.key(0))


NET = filled(make())


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


X, TOKENS, POOLED = normal(2, 4, 8), normal(5, 6, seed=1), normal(5, seed=2)
COND = Conditioning(vector=POOLED, tokens=TOKENS)


@eqx.filter_jit
def run(net, x, t, cond, skip=()):
    return net(x, t, cond, skip=skip)


@pytest.fixture(scope="module")
def out():
    return run(NET, X, T, COND)


def test_published_sizes_have_the_published_counts():
    """Counted by diffusers of its own modules, tables of positions left out."""
    published = dict(
        mmdit_sd3_medium=2_028_328_000,
        mmdit_sd35_medium=2_243_171_520,
        mmdit_sd35_large=8_056_627_520,
    )
    for name, count in published.items():
        net = eqx.filter_eval_shape(getattr(models, name), key=jax.random.key(0))
        assert models.parameter_count(net) == count, name
        assert net.config.width == 64 * net.config.num_heads


def test_it_starts_at_zero_and_knows_how_it_was_made():
    net = make(depth=1, dual_depth=0)()
    assert net.dual_blocks is None and net.blocks is None
    assert not net.final_linear.weight.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(net.last_block.stacked.image.modulation))
    assert net.config.build(key=jax.random.key(0)).config == net.config
    assert net.time_embedding.config == nn.Sinusoid(offset=0.0)  # 1000 t, not 1000 t - 1


def test_text_has_no_order_and_what_is_masked_is_as_if_it_were_not_there(out):
    mixed = Conditioning(vector=POOLED, tokens=TOKENS[jnp.array([3, 0, 4, 1, 2])])
    np.testing.assert_allclose(run(NET, X, T, mixed), out, atol=3e-5)
    longer = jnp.concatenate([TOKENS, 9 * normal(2, 6, seed=3)])
    masked = lambda n: run(NET, X, T, Conditioning(POOLED, longer, jnp.arange(7) < n))
    np.testing.assert_allclose(masked(5), out, atol=3e-5)
    assert jnp.max(jnp.abs(masked(7) - out)) > 0.01


def test_it_computes_in_the_dtype_of_its_input(out):
    found = run(NET, X.astype(jnp.bfloat16), T, COND)
    assert found.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    assert jnp.max(jnp.abs(found.astype(jnp.float32) - out)) < 0.1 * jnp.max(jnp.abs(out))


def test_positions_are_cut_from_the_centre_of_the_square():
    config = NET.config
    whole = models.mmdit.cut_positions(config, (6, 6)).reshape(6, 6, 16)
    for grid in ((6, 6), (2, 4), (3, 1), (1, 5)):
        top, left = ((6 - side) // 2 for side in grid)
        cut = whole[top : top + grid[0], left : left + grid[1]].reshape(-1, 16)
        np.testing.assert_array_equal(models.mmdit.cut_positions(config, grid), cut)
    # 4 / 6 from one to the next: the column's sines first, then its cosines, then the row's.
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(whole[0, 5, :4], np.sin(5 * 4 / 6 * frequencies), atol=1e-6)
    np.testing.assert_allclose(whole[5, 0, 12:], np.cos(5 * 4 / 6 * frequencies), atol=1e-6)
    with pytest.raises(ValueError, match=r"has 7 x 2 patches, and positions are there for 6"):
        NET(normal(2, 14, 4), T, COND)


def test_a_skipped_block_is_as_if_it_were_not_there(out):
    without = run(NET, X, T, COND, (1,))
    two = filled(make(depth=2))
    parts = lambda net: (net.patch_embedding, net.time_embedding, net.pooled_embedding)
    parts_and_blocks = lambda net: (
        *parts(net), net.context_embedding, net.dual_blocks, net.last_block, net.final_modulation,
        net.final_linear,
    )  # fmt: skip
    two = eqx.tree_at(parts_and_blocks, two, parts_and_blocks(NET))
    np.testing.assert_allclose(run(two, X, T, COND), without, atol=1e-5)
    assert jnp.max(jnp.abs(without - out)) > 0.01
    with pytest.raises(ValueError, match=r"skip must name blocks 0 \.\. 2, got \[-1, 3\]"):
        NET(X, T, COND, skip=(3, -1))


@pytest.mark.parametrize(
    "cond, message",
    [
        (TOKENS, r"cond must be nn\.Conditioning with tokens of shape \(m, 6\) and a vector"),
        (None, "got NoneType"),
        (Conditioning(vector=POOLED), r"got tokens of shape None and a vector of shape \(5,\)"),
        (Conditioning(tokens=TOKENS), r"got tokens of shape \(5, 6\) and a vector of shape None"),
        (Conditioning(POOLED, TOKENS[:, :4]), r"got tokens of shape \(5, 4\)"),
        (Conditioning(POOLED[:3], TOKENS), r"a vector of shape \(3,\)"),
        (Conditioning(POOLED[None], TOKENS[None]), r"got tokens of shape \(1, 5, 6\)"),
    ],
)
def test_another_condition_is_refused(cond, message):
    with pytest.raises(ValueError, match=message):
        NET(X, T, cond)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=3), "width 16 does not divide into 3 heads"),
        (dict(depth=0), "every size must be at least 1, got .*depth=0"),
        (dict(dual_depth=4), r"dual_depth must lie in 0 \.\. 3"),
        (dict(max_grid=0), "max_grid=0"),
        (dict(width=2, num_heads=1), "size must be even and at least 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)()


def test_a_text_encoder_of_ones_own_trains_along():
    text = models.ByteTextConfig(16, 1, 2, 8)
    net = filled(make(depth=1, dual_depth=0, context_size=16, pooled_size=16, embed_cond=text))
    text = jnp.asarray(np.frombuffer(b"a fox\0\0\0", np.uint8), jnp.int32)
    loss = lambda net: jnp.sum(net(X, T, text) ** 2)
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(net)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient.embed_cond))
    assert isinstance(net.config.embed_cond, models.ByteTextConfig)


# Files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_uses_each_number_once(layout):
    model, count = numbered(NET)
    state = pretrained.to_state(model, layout)
    table = layout(model).fixed.keys()
    once = np.concatenate([value.ravel() for name, value in state.items() if name not in table])
    assert Counter(once.tolist()) == Counter(range(count))
    again = pretrained.load_state(model, state)
    assert eqx.tree_equal(again, jax.tree.map(jnp.asarray, model))
    assert [state[name].shape for name in table] == [(1, 36, 16)]


def test_diffusers_has_the_scale_first_where_the_original_has_the_shift():
    model, _ = numbered(NET)
    original, theirs = (pretrained.to_state(model, layout) for layout in LAYOUTS)
    text = "joint_blocks.{}.context_block.adaLN_modulation.1", "transformer_blocks.{}.norm1_context"
    pairs = {"final_layer.adaLN_modulation.1": "norm_out", text[0].format(2): text[1].format(2)}
    for ours, name in pairs.items():
        for kind in ("weight", "bias"):
            shift, scale = np.split(original[f"{ours}.{kind}"], 2)
            np.testing.assert_array_equal(
                theirs[f"{name}.linear.{kind}"], np.concatenate([scale, shift])
            )
    np.testing.assert_array_equal(
        theirs[f"{text[1].format(1)}.linear.weight"], original[f"{text[0].format(1)}.weight"]
    )


def test_folders_and_files_keep_the_model_and_the_dtype(tmp_path):
    pretrained.export(NET, tmp_path / "folder")
    assert eqx.tree_equal(pretrained.load(tmp_path / "folder"), NET)
    half = pretrained.load(tmp_path / "folder", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    pretrained.save(half, tmp_path / "half.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "half.safetensors", dtype=None), half)


def test_the_distance_of_positions_is_read_from_the_table(tmp_path):
    """A folder's configuration does not say it."""
    pretrained.export(NET, tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"sample_size": 8', '"sample_size": 2')
    (tmp_path / "config.json").write_text(config)
    assert pretrained.load(tmp_path).config == NET.config


def test_one_network_of_a_file_of_several_is_read(tmp_path):
    state = pretrained.to_state(NET, pretrained.mmdit.original_layout)
    tensors = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    tensors["first_stage_model.encoder.conv_in.bias"] = np.ones(3, np.float32)
    path = tmp_path / "sd3.safetensors"
    pretrained.files.write_safetensors(path, tensors, {})
    found = pretrained.load_into(
        eqx.filter_eval_shape(make()), path, prefix="model.diffusion_model."
    )
    assert eqx.tree_equal(found, NET)
    with pytest.raises(pretrained.WeightsError, match="unexpected: first_stage_model"):
        pretrained.load_into(eqx.filter_eval_shape(make()), path)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("dual_attention_layers", [1, 2], r"dual_attention_layers = \[1, 2\] \(the first blocks"),
        ("qk_norm", "layer_norm", r"qk_norm = 'layer_norm' \(None or 'rms_norm'\)"),
        ("caption_projection_dim", 7, r"caption_projection_dim = 7 \(1152\)"),
    ],
)
def test_an_option_that_it_has_not_is_named(option, value, message):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.mmdit.from_diffusers({option: value}, key=jax.random.key(0))


def test_what_diffusers_cannot_hold_is_named():
    net = eqx.filter_eval_shape(make(pooled_size=None, mlp_ratio=2.0))
    with pytest.raises(pretrained.WeightsError, match=r"no pooled vector; its mlp_ratio is 2\.0"):
        pretrained.mmdit.diffusers_config(net)
