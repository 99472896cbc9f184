"""BERT against transformers, both ways: hidden states, pooled, sentences, gradients, files."""

import copy
import json

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

from eqxldm import models, pretrained

from harness import (
    FORMS,
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    randomise,
)

SAFE_FORMS = [form for form in FORMS if form != "bin"]


def read(kind, folder, **options):
    """What transformers makes of a folder, in float32."""
    options |= dict(dtype=torch.float32, output_loading_info=True)
    module, about = kind.from_pretrained(folder, **options)
    assert not any(about.values()), about
    return module.eval()


def written_as(way, folder):
    """The file with the names of a model with a head, or of other years."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if way == "with position_ids":
        length = len(tensors["embeddings.position_embeddings.weight"])
        tensors["embeddings.position_ids"] = np.arange(length)[None]
    if way == "with prefix":
        tensors = {f"bert.{name}": value for name, value in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def theirs(module, ids, mask, kinds=None):
    """With the sentence as sentence-transformers has it: the mean over the mask, of length 1."""
    out = module(ids, attention_mask=mask, token_type_ids=kinds, output_hidden_states=True)
    counted = mask[..., None].to(out.last_hidden_state.dtype)
    mean = (out.last_hidden_state * counted).sum(1) / counted.sum(1).clamp(min=1e-9)
    found = {
        "last": out.last_hidden_state * counted,
        "hidden": torch.stack(out.hidden_states, 1) * counted[:, None],
        "sentence": torch.nn.functional.normalize(mean, p=2, dim=1),
    }
    return found | ({} if out.pooler_output is None else {"pooled": out.pooler_output})


def ours(bert, ids, mask, kinds=None):
    encoder = models.SentenceEncoder(bert, longest=bert.config.length)
    out = jax.vmap(bert)(ids, mask) if kinds is None else jax.vmap(bert)(ids, mask, kinds)
    vectors = jax.vmap(lambda tokens, mask: encoder.config.pool(tokens, mask))(out.last, mask)
    found = {
        "last": out.last * mask[..., None],
        "hidden": out.hidden * mask[:, None, :, None],
        "sentence": vectors / jax.numpy.linalg.norm(vectors, axis=1, keepdims=True),
    }
    return found | ({} if out.pooled is None else {"pooled": out.pooled})


@each_configuration
def test_bert(number, tmp_path, record_property):
    draw = Draw("bert", number)
    heads = draw.between(1, 3)
    config = BertConfig(
        vocab_size=draw.one(20, 100),
        hidden_size=heads * 4 * draw.between(4, 6),
        num_hidden_layers=draw.between(1, 3),
        num_attention_heads=heads,
        intermediate_size=draw.between(8, 60),
        hidden_act=draw.one("gelu", "gelu", "gelu_new"),
        max_position_embeddings=draw.between(6, 14),
        type_vocab_size=draw.between(1, 3),
        layer_norm_eps=draw.one(1e-12, 1e-5),
    )
    kind = BertModel
    module = randomise(BertModel(config, add_pooling_layer=draw.one(True, True, False)), draw)
    form = SAFE_FORMS[number % len(SAFE_FORMS)]
    dtype, options = FORMS[form]
    copy.deepcopy(module).to(dtype).save_pretrained(tmp_path / "theirs", **options)
    pooled = {"add_pooling_layer": module.pooler is not None}
    again = lambda kind, folder, **more: read(kind, folder, **pooled, **more)
    module = again(kind, tmp_path / "theirs", variant=options.get("variant"))
    check_dtypes(tmp_path / "theirs", form)
    if form in ("float32", "bf16"):
        ways = ["as it is", "with prefix", "with position_ids"]
        written_as(ways[number // len(SAFE_FORMS) % 3], tmp_path / "theirs")
    bert = pretrained.load(tmp_path / "theirs")
    assert (bert.pooled is not None) == pooled["add_pooling_layer"]
    n = draw.between(3, config.max_position_embeddings)
    values = dict(  # not of id 0: transformers gives the row of the padding no gradient
        ids=draw.rng.integers(1, config.vocab_size, (3, n)),
        mask=np.arange(n) < draw.rng.integers(2, n + 1, (3, 1)),
    )
    if draw.one(False, True):
        values["kinds"] = draw.rng.integers(0, config.type_vocab_size, (3, n))
    pair = Pair(theirs, ours, pretrained.bert.transformers_layout, values)
    errors = compare(module, bert, pair)
    errors["exported"] = compare_back(kind, module, bert, tmp_path / "ours", pair, read=again)
    record_property("BERT", errors)


def test_a_folder_of_sentences_is_read_by_transformers(tmp_path):
    config = models.BERTConfig(16, 1, 2, vocabulary=20, length=8)
    encoder = models.SentenceEncoder(config, longest=8, key=jax.random.key(0))
    pretrained.export_sentence_encoder(encoder, tmp_path)
    module = read(BertModel, tmp_path)
    ids, mask = np.array([[1, 5, 7, 2]]), np.ones((1, 4), bool)
    with torch.no_grad():
        expected = theirs(module, torch.from_numpy(ids), torch.from_numpy(mask))
    found = encoder(ids[0], mask[0])
    np.testing.assert_allclose(found.vector, expected["sentence"][0], atol=2e-6)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
