"""CLIP's and T5's text encoders: hidden states, masks, the pooled token, files, refusals.

The comparison with transformers is tests/parity/test_text.py, the published sizes are in
tests/test_pretrained_published.py.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, nn, pretrained
from eqxldm.pretrained.files import write_safetensors

from helpers import filled

IDS = jnp.array([7, 1, 4, 9, 9, 0])  # begin, two words, the end, the end as padding, another


def clip(**changes):
    options = dict(projection=6, vocabulary=10, length=6, end_id=9) | changes
    return filled(lambda: models.CLIPText(8, 2, 2, **options, key=jax.random.key(0)))


CLIP = clip()
call = eqx.filter_jit(lambda model, ids, mask=None: model(ids, mask))


def test_the_hidden_states_are_counted_as_in_a_list():
    out = call(CLIP, IDS)
    assert out.hidden.shape == (3, 6, 8)
    np.testing.assert_allclose(out.hidden[0], CLIP.table[IDS] + CLIP.positions, atol=1e-6)
    np.testing.assert_allclose(CLIP.norm(out.hidden[-1]), out.last, atol=1e-5)
    for layer in (-3, -2, 0, 2):
        chosen = eqx.filter_eval_shape(lambda model, n=layer: model(IDS, layer=n), CLIP)
        assert chosen.hidden.shape == (6, 8)
    np.testing.assert_allclose(CLIP(IDS, layer=-2).hidden, out.hidden[1], atol=1e-5)


def test_the_last_norm_is_in_none_of_the_hidden_states():
    louder = eqx.tree_at(lambda model: model.norm.scale, CLIP, 7 * CLIP.norm.scale)
    a, b = call(CLIP, IDS), call(louder, IDS)
    np.testing.assert_array_equal(a.hidden, b.hidden)
    assert float(jnp.abs(a.last - b.last).max()) > 0.1


def test_a_token_sees_those_before_it_and_padding_is_seen():
    """Nothing after a token changes it; what is masked changes no other."""
    a, b = call(CLIP, IDS), call(CLIP, IDS.at[3].set(5))
    np.testing.assert_array_equal(a.last[:3], b.last[:3])
    assert (jnp.abs(a.last[3:] - b.last[3:]).max(1) > 1e-4).all()
    mask = jnp.array([True, True, True, False, True, True])
    a, b = call(CLIP, IDS, mask), call(CLIP, IDS.at[3].set(5), mask)
    others = np.array([0, 1, 2, 4, 5])
    np.testing.assert_array_equal(a.last[others], b.last[others])


def test_the_pooled_token_by_both_rules():
    """Of the end token's id, the first; else of the largest id, the first. They differ once a
    token was added behind the end token."""
    larger = clip(vocabulary=12)
    by_largest = clip(vocabulary=12, end_id=None)
    for ids, first, largest in (
        ([7, 1, 9, 9, 0, 0], 2, 2),
        ([7, 11, 9, 9, 0, 0], 2, 1),
        ([7, 1, 3, 4, 5, 6], 0, 0),  # without an end token the first rule gives the first token
    ):
        for model, at in ((larger, first), (by_largest, largest)):
            out = call(model, jnp.array(ids))
            np.testing.assert_array_equal(out.pooled, out.last[at])
            np.testing.assert_allclose(out.embeds, model.project.weight @ out.pooled, atol=1e-5)
    assert clip(projection=None)(IDS).embeds is None


def test_a_batch_in_bfloat16_is_near_float32():
    ids = jnp.stack([IDS, IDS[::-1]])
    run = eqx.filter_jit(lambda model: jax.vmap(model)(ids).last)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), CLIP)
    out = run(half)
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 6, 8)
    scale = float(jnp.abs(run(CLIP)).max())
    np.testing.assert_allclose(out.astype(jnp.float32) / scale, run(CLIP) / scale, atol=0.05)


def test_ids_and_layers_that_there_are_not():
    with pytest.raises(ValueError, match=r"at most 6 ids, got 7\. Cut the text"):
        CLIP(jnp.zeros(7, int))
    for layer in (3, -4):
        with pytest.raises(ValueError, match=rf"must lie in -3 \.\. 2.* got {layer}"):
            CLIP(IDS, layer=layer)
    with pytest.raises(ValueError, match="every size must be at least 1"):
        models.CLIPText(8, 0, 2, key=jax.random.key(0))
    for wrong in (10, -1):
        assert jnp.isnan(call(CLIP, IDS.at[0].set(wrong)).last[0]).all()


@pytest.mark.parametrize("activation", [nn.quick_gelu, nn.gelu, nn.gelu_tanh])
def test_clip_comes_back_identical_from_each_format(tmp_path, activation):
    model = clip(activation=activation, end_id=None if activation is nn.gelu else 9, hidden=12)
    pretrained.save(model, tmp_path / "clip.safetensors")
    pretrained.export(model, tmp_path / "folder")
    for path in (tmp_path / "clip.safetensors", tmp_path / "folder"):
        again = pretrained.load(path)
        assert eqx.tree_equal(again, model), path
    state = pretrained.to_state(model, pretrained.clip_text.open_clip_layout)
    assert eqx.tree_equal(pretrained.load_state(model, state), model)


def test_old_files_hold_the_numbers_of_positions(tmp_path):
    pretrained.export(CLIP, tmp_path)
    tensors = pretrained.to_state(CLIP, pretrained.clip_text.transformers_layout)
    for prefix in ("text_model.", ""):
        spelled = {n.replace("text_model.", prefix): value for n, value in tensors.items()}
        spelled[f"{prefix}embeddings.position_ids"] = np.arange(6)[None]
        write_safetensors(tmp_path / "model.safetensors", spelled, {})
        assert eqx.tree_equal(pretrained.load(tmp_path), CLIP)
        spelled[f"{prefix}embeddings.position_ids"] = np.arange(6)[None] + 1
        write_safetensors(tmp_path / "model.safetensors", spelled, {})
        with pytest.raises(pretrained.WeightsError, match=r"not the constant .*position_ids"):
            pretrained.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, r"hidden_act = 'relu' \(quick_gelu, gelu"),
        ({"eos_token_id": [9, 10]}, r"eos_token_id = \[9, 10\] \(one number\)"),
        ({"architectures": ["CLIPModel"]}, "unknown architecture 'CLIPModel'"),
        ({"architectures": []}, "unknown architecture None"),
        ({"num_attention_heads": 3}, "no model can be made of its configuration"),
        ({"architectures": ["CLIPTextModel"]}, r"unexpected: text_projection.weight"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 is too much"),
    ],
)
def test_configurations_that_clip_cannot_have(tmp_path, change, message):
    pretrained.export(CLIP, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    pretrained.export(CLIP, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(pretrained.WeightsError, match=r"pytorch_model\.bin can hold code and is"):
        pretrained.load(tmp_path)


def test_what_transformers_cannot_hold_is_not_exported(tmp_path):
    for changes, what in (({"activation": jax.nn.relu}, "activation"), ({"end_id": 2}, "end_id")):
        with pytest.raises(pretrained.WeightsError, match=f"cannot hold this network: its {what}"):
            pretrained.export(clip(**changes), tmp_path)


TEXT = jnp.array([5, 7, 2, 1, 0, 0])
SEEN = jnp.array([True, True, True, True, False, False])


def t5(**changes):
    options = dict(head_size=3, vocabulary=10, buckets=8, max_distance=16) | changes
    return filled(lambda: models.T5Encoder(8, 2, 2, 12, **options, key=jax.random.key(0)))


KINDS = {"T5": t5(), "umT5": t5(shared_bias=False)}
each_t5 = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)


@each_t5
def test_a_masked_token_changes_no_other_and_one_that_is_not_does(model):
    a, b = call(model, TEXT, SEEN), call(model, TEXT.at[4].set(6), SEEN)
    np.testing.assert_array_equal(a[SEEN], b[SEEN])
    a, b = call(model, TEXT), call(model, TEXT.at[4].set(6))
    assert (jnp.abs(a - b).max(1) > 1e-4).all()


@each_t5
def test_t5_knows_distances_and_no_positions(model):
    """Behind masked tokens a text is the same text; in another order it is another one."""
    moved = call(model, jnp.roll(TEXT, 2), jnp.roll(SEEN, 2))
    np.testing.assert_allclose(moved[2:], call(model, TEXT, SEEN)[:4], atol=1e-5)
    turned = call(model, TEXT.at[:4].set(TEXT[3::-1]), SEEN)
    assert float(jnp.abs(turned[3::-1] - call(model, TEXT, SEEN)[:4]).max()) > 1e-3


def test_the_scores_of_t5_are_not_divided():
    attention = jax.tree.map(lambda a: a[0], KINDS["T5"].blocks.stacked).attention
    x = jax.random.normal(jax.random.key(1), (5, 8))
    bias = jax.random.normal(jax.random.key(2), (2, 5, 5))
    q, k, v = attention.heads(x)
    weights = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", q, k) + bias)
    expected = jnp.einsum("hnm,mhd->nhd", weights, v).reshape(5, 6) @ attention.proj.weight.T
    np.testing.assert_allclose(attention(x, None, bias), expected, atol=1e-5)


def test_the_buckets_of_t5():
    """Of 32 and 128: exact to 7, then coarser, the last from 91 on."""
    found = models.relative_buckets(200, 32, 128)
    assert found[0, :8].tolist() == [0, *range(17, 24)]
    ends = [int(np.flatnonzero(found[:, 0] == bucket)[0]) for bucket in range(16)]
    assert ends == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(found[0, 1:], found[1:, 0] + 16)
    assert found.max() == 31 and found[50, 60] == found[0, 10] and found.dtype == np.int32


def test_umt5_has_a_table_for_every_block():
    model = KINDS["umT5"]
    assert model.bias_table is None and model.blocks.stacked.bias_table.shape == (2, 8, 2)
    other = eqx.tree_at(lambda m: m.blocks.stacked.bias_table, model, replace_fn=lambda a: a[::-1])
    assert float(jnp.abs(call(model, TEXT) - call(other, TEXT)).max()) > 1e-3


@each_t5
def test_t5_in_bfloat16_is_near_float32_and_refuses_float16(model):
    """Activations of a thousand times the usual size are no more inexact than others."""
    loud = eqx.tree_at(lambda m: m.blocks.stacked.fc2.weight, model, replace_fn=lambda a: 1e5 * a)
    narrow = lambda m, dtype: jax.tree.map(lambda a: a.astype(dtype), m)
    out, exact = call(narrow(loud, jnp.bfloat16), TEXT, SEEN), call(loud, TEXT, SEEN)
    assert out.dtype == jnp.bfloat16 and bool(jnp.isfinite(out).all())
    assert float(jnp.abs(out - exact).max() / jnp.abs(exact).max()) < 0.05
    with pytest.raises(ValueError, match=r"float16 is too small .* dtype=jnp\.bfloat16"):
        narrow(model, jnp.float16)(TEXT)


@each_t5
def test_t5_comes_back_identical_from_each_format(tmp_path, model):
    pretrained.save(model, tmp_path / "t5.safetensors")
    pretrained.export(model, tmp_path / "folder")
    for path in (tmp_path / "t5.safetensors", tmp_path / "folder"):
        assert eqx.tree_equal(pretrained.load(path), model), path
    assert eqx.tree_equal(pretrained.load_into(model, tmp_path / "folder"), model)


def test_the_embeddings_of_t5_by_either_name_or_both(tmp_path):
    model, other = KINDS["T5"], "encoder.embed_tokens.weight"
    pretrained.export(model, tmp_path)
    tensors = pretrained.to_state(model, pretrained.t5.transformers_layout)
    for kept in (("shared.weight",), (other,), ("shared.weight", other)):
        written = {n: v for n, v in tensors.items() if n != "shared.weight"}
        written |= {name: tensors["shared.weight"] for name in kept}
        write_safetensors(tmp_path / "model.safetensors", written, {})
        assert eqx.tree_equal(pretrained.load(tmp_path), model), kept
    written[other] = written[other] + 1
    write_safetensors(tmp_path / "model.safetensors", written, {})
    with pytest.raises(
        pretrained.WeightsError, match=f"differs from shared.weight, must be equal: {other}"
    ):
        pretrained.load(tmp_path)
    written = {n: v for n, v in tensors.items() if n != "shared.weight"}
    write_safetensors(tmp_path / "model.safetensors", written, {})
    with pytest.raises(pretrained.WeightsError, match=r"missing: shared\.weight \(10, 8\)"):
        pretrained.load(tmp_path)


def test_sizes_and_configurations_that_t5_cannot_have(tmp_path):
    for changes, message in (
        ({"buckets": 6}, "buckets must be a multiple of 4"),
        ({"buckets": 64}, "a quarter of it between 1 and max_distance; got 64 and 16"),
        ({"head_size": 0}, "every size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            t5(**changes)
    pretrained.export(KINDS["T5"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'; only 'gated-gelu'"),
        ({"architectures": ["UMT5EncoderModel"]}, r"missing: .*block\.1.*relative_attention_bias"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "unknown architecture 'T5For"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(pretrained.WeightsError, match=message):
            pretrained.load(tmp_path)
