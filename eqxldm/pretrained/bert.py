"""BERT's encoder: the names of transformers, and the configurations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..models import BERT
from .activations import ACTIVATIONS, NAMES, foreign_activation, wrong_activation
from .layout import Layout, Part, Tensor
from .parts import Leaves, linear, norm, stacked, stacked_qkv
from .refusals import refuse_network, refuse_options

# What transformers assumes where a configuration is silent.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2,
    layer_norm_eps=1e-12,
)  # fmt: skip
# Of later BERTs, and what every encoder has.
FIXED: dict[str, Any] = dict(
    position_embedding_type="absolute", is_decoder=False, add_cross_attention=False
)
MODEL = "BertModel"
POOLER = "add_pooling_layer"  # an argument of transformers' class, which its config.json lacks
PREFIX = "bert."  # of the names in files of a BERT with a head for some task


def with_pooler(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration and whether there is a pooler, which only the tensors say.

    >>> with_pooler({}, {})
    {'add_pooling_layer': False}
    """
    return config | {POOLER: any("pooler." in name for name in tensors)}


def from_transformers(config: dict[str, Any], *, key) -> BERT:
    """The module of a transformers `config.json`, with random weights.

    Dropout is left out: it is off when an encoder is used.

    **Raises** `WeightsError` for an activation, positions or a kind of model that it cannot have.

    >>> import jax
    >>> sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> bert = from_transformers(sizes | {"num_hidden_layers": 1}, key=jax.random.key(0))
    >>> bert.config.hidden, bert.config.pooler
    (32, True)
    """
    given: dict[str, Any] = DEFAULTS | FIXED | {POOLER: True} | config
    refuse_options("BERT", given, FIXED, wrong_activation(given))
    return BERT(
        given["hidden_size"],
        given["num_hidden_layers"],
        given["num_attention_heads"],
        hidden=given["intermediate_size"],
        activation=ACTIVATIONS[given["hidden_act"]],
        pooler=given[POOLER],
        vocabulary=given["vocab_size"],
        length=given["max_position_embeddings"],
        kinds=given["type_vocab_size"],
        norm_eps=given["layer_norm_eps"],
        key=key,
    )


def transformers_config(bert: BERT) -> dict[str, Any]:
    """The `config.json` with which transformers makes the same network.

    **Raises** `WeightsError` if transformers has no such network.

    >>> import jax
    >>> bert = BERT(16, 1, 2, vocabulary=99, key=jax.random.key(0))
    >>> transformers_config(bert)["architectures"]
    ['BertModel']
    """
    ours = bert.config
    refuse_network("BERT", "transformers", foreign_activation(ours.activation))
    return DEFAULTS | dict(
        architectures=[MODEL],
        model_type="bert",
        vocab_size=ours.vocabulary,
        hidden_size=ours.width,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        intermediate_size=ours.hidden,
        hidden_act=NAMES[ours.activation],
        max_position_embeddings=ours.length,
        type_vocab_size=ours.kinds,
        layer_norm_eps=ours.norm_eps,
    )


def transformers_layout(bert: BERT) -> Layout:
    """The names of transformers' files, and the same with `bert.` before them.

    >>> import jax
    >>> bert = BERT(16, 1, 2, vocabulary=99, key=jax.random.key(0))
    >>> layout = transformers_layout(bert)
    >>> layout.leaves[".blocks.stacked.fc1.weight"][0].name
    'encoder.layer.0.intermediate.dense.weight'
    >>> layout.aliases["bert.embeddings.word_embeddings.weight"]
    'embeddings.word_embeddings.weight'
    """
    depth, there = bert.config.depth, "encoder.layer.{}"
    leaves: Leaves = {
        f".{ours}": (Part(f"embeddings.{theirs}_embeddings.weight"),)
        for ours, theirs in (
            ("table", "word"),
            ("positions", "position"),
            ("kind_table", "token_type"),
        )
    }
    leaves |= norm("norm", "embeddings.LayerNorm")
    query, key, value = (f"{there}.attention.self.{k}" for k in ("query", "key", "value"))
    leaves |= stacked_qkv("blocks.stacked.attention.qkv", (query, key, value), range(depth))
    leaves |= stacked(linear("attention.proj", f"{there}.attention.output.dense"), depth)
    leaves |= stacked(norm("norm1", f"{there}.attention.output.LayerNorm"), depth)
    leaves |= stacked(linear("fc1", f"{there}.intermediate.dense"), depth)
    leaves |= stacked(linear("fc2", f"{there}.output.dense"), depth)
    leaves |= stacked(norm("norm2", f"{there}.output.LayerNorm"), depth)
    if bert.pooled is not None:
        leaves |= linear("pooled", "pooler.dense")
    names = [part.name for parts in leaves.values() for part in parts]
    # Files of before 2023 hold the numbers of the positions.
    numbers, length = "embeddings.position_ids", bert.config.length
    fixed = {name: lambda: np.arange(length)[None] for name in (numbers, PREFIX + numbers)}
    return Layout(leaves, fixed, {PREFIX + name: name for name in names})
