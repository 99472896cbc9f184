"""BERT and the sentence encoders made of it: hidden states, masks, pooling, folders, tokenizers.

The comparison with transformers is tests/parity/test_bert.py.
"""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sentences import PIECES, SPECIAL, sentence_encoder, write_folder, write_tokenizer

from eqxldm import models, nn, pretrained, text
from eqxldm.pretrained.files import write_safetensors

from helpers import filled

IDS = jnp.array([2, 5, 7, 3, 0, 0])
SEEN = jnp.array([True, True, True, True, False, False])


def bert(**changes):
    options = dict(hidden=12, vocabulary=10, length=6) | changes
    return filled(lambda: models.BERT(8, 2, 2, **options, key=jax.random.key(0)))


BERT = bert()
call = eqx.filter_jit(lambda model, ids, mask=None, kinds=None: model(ids, mask, kinds))
encode = eqx.filter_jit(lambda model, ids, mask: model(ids, mask))


def test_the_norms_stand_behind_the_sums():
    out = call(BERT, IDS, SEEN)

    @eqx.filter_jit
    def by_hand(model):
        states = [model.norm(model.table[IDS] + model.positions + model.kind_table[0])]
        for i in range(2):
            block = jax.tree.map(lambda a, i=i: a[i], model.blocks.stacked)
            x = block.norm1(states[-1] + block.attention(states[-1], SEEN))
            states.append(block.norm2(x + block.fc2(nn.gelu(block.fc1(x)))))
        return jnp.stack(states)

    np.testing.assert_allclose(out.hidden, by_hand(BERT), atol=2e-5)
    np.testing.assert_array_equal(out.last, out.hidden[-1])
    np.testing.assert_allclose(out.pooled, jnp.tanh(BERT.pooled(out.last[0])), atol=1e-5)
    assert bert(pooler=False)(IDS).pooled is None


def test_a_token_sees_those_behind_it_and_no_padding():
    a, b = call(BERT, IDS, SEEN), call(BERT, IDS.at[4].set(9), SEEN)
    np.testing.assert_array_equal(a.last[:4], b.last[:4])
    b = call(BERT, IDS.at[3].set(9), SEEN)
    assert (jnp.abs(a.last[:4] - b.last[:4]).max(1) > 1e-4).all()


def test_tokens_of_a_second_text_are_of_another_kind():
    kinds = jnp.array([0, 0, 1, 1, 1, 1])
    a, b = call(BERT, IDS, SEEN), call(BERT, IDS, SEEN, kinds)
    assert float(jnp.abs(a.last - b.last).max()) > 1e-3
    np.testing.assert_allclose(call(BERT, IDS, SEEN, 0 * kinds).last, a.last, atol=1e-6)


def test_ids_and_sizes_that_there_are_not():
    with pytest.raises(ValueError, match=r"at most 6 ids, got 7\. Cut the text"):
        BERT(jnp.zeros(7, int))
    with pytest.raises(ValueError, match="every size must be at least 1"):
        models.BERT(8, 2, 2, kinds=0, key=jax.random.key(0))
    for wrong in (10, -1):
        assert jnp.isnan(call(BERT, IDS.at[0].set(wrong)).last[0]).all()


@pytest.mark.parametrize("change", [{}, {"pooler": False, "activation": nn.gelu_tanh}])
def test_bert_comes_back_identical_from_each_format(tmp_path, change):
    model = bert(**change)
    pretrained.save(model, tmp_path / "bert.safetensors")
    pretrained.export(model, tmp_path / "folder")
    for path in (tmp_path / "bert.safetensors", tmp_path / "folder"):
        assert eqx.tree_equal(pretrained.load(path), model), path
    tensors = pretrained.to_state(model, pretrained.bert.transformers_layout)
    longer = {f"bert.{name}": value for name, value in tensors.items()}
    longer["bert.embeddings.position_ids"] = np.arange(6)[None]
    write_safetensors(tmp_path / "folder" / "model.safetensors", longer, {})
    assert eqx.tree_equal(pretrained.load(tmp_path / "folder"), model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, r"hidden_act = 'relu' \(gelu|hidden_act = 'relu'"),
        ({"position_embedding_type": "relative_key"}, r"'relative_key' \('absolute'\)"),
        ({"is_decoder": True}, r"is_decoder = True \(False\)"),
        ({"architectures": ["BertForMaskedLM"]}, "unknown architecture 'BertForMaskedLM'"),
        ({"num_attention_heads": 3}, "no model can be made of its configuration"),
        ({"num_hidden_layers": 3}, r"missing: .*encoder\.layer\.2"),
    ],
)
def test_configurations_that_bert_cannot_have(tmp_path, change, message):
    pretrained.export(BERT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(tmp_path)


def test_a_sentence_is_the_mean_of_its_tokens_of_length_one():
    encoder = sentence_encoder()
    out = encode(encoder, IDS, SEEN)
    mean = np.asarray(out.tokens)[:4].mean(0)
    np.testing.assert_allclose(out.vector, mean / np.linalg.norm(mean), atol=1e-5)
    more = encode(encoder, jnp.concatenate([IDS[:4], jnp.array([9, 9])]), SEEN)
    np.testing.assert_array_equal(more.vector, out.vector)
    first = encode(sentence_encoder(pool=models.first_token, unit=False), IDS, SEEN)
    np.testing.assert_allclose(first.vector, out.tokens[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"longest must lie in 3 \.\. 16"):
        sentence_encoder(longest=17)


@pytest.mark.parametrize("change", [{}, {"pool": models.first_token}, {"unit": False}])
def test_a_sentence_encoder_comes_back_from_its_folder_and_file(tmp_path, change):
    encoder = sentence_encoder(**change)
    pretrained.save(encoder, tmp_path / "encoder.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "encoder.safetensors"), encoder)
    pretrained.export_sentence_encoder(encoder, tmp_path)
    assert eqx.tree_equal(pretrained.load_sentence_encoder(tmp_path), encoder)
    (tmp_path / "modules.json").unlink()
    plain = pretrained.load_sentence_encoder(tmp_path)
    assert plain.config.pool is models.mean_token and not plain.config.unit
    assert eqx.tree_equal(plain.bert, encoder.bert)


def test_modules_and_poolings_that_are_not_known(tmp_path):
    folder = write_folder(tmp_path)
    pooling = folder / "1_Pooling" / "config.json"
    written = pooling.read_text()
    for content, message in (
        ('{"pooling_mode": "lasttoken"}', "'lasttoken' is not known"),
        ('{"pooling_mode_max_tokens": true}', "pooling_mode_max_tokens is not known"),
        ("{}", "of none is not known"),
    ):
        pooling.write_text(content)
        with pytest.raises(pretrained.WeightsError, match=message):
            pretrained.load_sentence_encoder(folder)
    pooling.write_text('{"pooling_mode": "cls"}')
    assert pretrained.load_sentence_encoder(folder).config.pool is models.first_token
    pooling.write_text(written)
    modules = json.loads((folder / "modules.json").read_text())
    for change, message in (
        ([*modules, dict(type="x.Dense", path="3_Dense")], "lists Transformer, .* Dense"),
        ([modules[1]], "lists Pooling"),
        ([modules[0] | {"path": "../else"}], "lies outside"),
        ({"a": 1}, "is damaged"),
    ):
        (folder / "modules.json").write_text(json.dumps(change))
        with pytest.raises(pretrained.WeightsError, match=message):
            pretrained.load_sentence_encoder(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 99}')
    with pytest.raises(pretrained.WeightsError, match=r"max_seq_length = 99 must lie in 3 \.\. 16"):
        pretrained.load_sentence_encoder(folder)


def test_word_pieces_with_begin_and_end_cut_where_the_folder_says(tmp_path):
    folder = write_folder(tmp_path)
    tokenizer = text.load_tokenizer(folder)
    at = {piece: i for i, piece in enumerate([*SPECIAL, *PIECES])}
    tokens = tokenizer(["A FOX!", "things zebra", ""], 7)
    rows = [["a", "fox", "!"], ["thing", "##s", "[UNK]"], []]
    for ids, mask, row in zip(tokens.ids, tokens.mask, rows, strict=True):
        expected = [at[piece] for piece in ("[CLS]", *row, "[SEP]")]
        assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()
        assert mask.sum() == len(expected)
    assert tokenizer.longest == 12  # of sentence_bert_config.json; the network has 16 positions
    long = tokenizer(["a fox " * 6])
    assert long.cut == ("a fox ",) and long.ids[0, -1] == at["[SEP]"]
    (folder / "sentence_bert_config.json").unlink()
    assert text.load_tokenizer(folder).longest == 16
    (folder / "tokenizer_config.json").unlink()  # known by its own file, too
    assert text.load_tokenizer(folder).longest == 512


def test_tokenizers_that_are_none_of_bert(tmp_path):
    write_tokenizer(tmp_path, tuple(["[UNK]", "[CLS]", "[PAD]", *PIECES]))
    with pytest.raises(text.TokenizerError, match=r"has no token \[SEP\]"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(text.TokenizerError, match="is damaged or no tokenizer"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(text.TokenizerError, match=r"BERT tokenizer, and has no tokenizer\.json"):
        text.load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_network_takes_what_a_frozen_encoder_says():
    """Its masked tokens change nothing, and its states are normalised."""
    embed = models.EncodedCaption(5, 8, key=jax.random.key(0))
    tokens = jax.random.normal(jax.random.key(1), (3, 5)).astype(jnp.float16)
    caption = {"tokens": tokens, "mask": jnp.array([True, True, False]), "vector": tokens[0]}
    dit = models.DiT(
        (2, 4, 4), patch_size=2, depth=1, width=8, num_heads=2, embed_cond=embed,
        block=models.CrossAttentionDiTBlock, key=jax.random.key(2),
    )  # fmt: skip
    dit = filled(lambda: dit)
    draw = eqx.filter_jit(lambda caption: dit(jnp.ones((2, 4, 4)), jnp.array(0.5), caption))
    out = draw(caption)
    np.testing.assert_array_equal(out, draw(caption | {"tokens": tokens.at[2].set(9)}))
    assert float(jnp.abs(out - draw(caption | {"tokens": tokens[::-1]})).max()) > 1e-4
    np.testing.assert_allclose(out, draw(caption | {"tokens": 3 * tokens}), atol=2e-3)
