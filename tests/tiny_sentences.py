"""A tiny sentence encoder, and its folder as sentence-transformers writes them."""

import json
from pathlib import Path

import jax
import tokenizers
from tokenizers import models as kinds, normalizers, pre_tokenizers

from eqxldm import models, pretrained

from helpers import filled

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = ["noto", "twemoji", "fluent", "thing", "##s", "a", "fox", "red", *"0123456789", "!"]


def sentence_encoder(**changes):
    vocabulary = len(SPECIAL) + len(PIECES)
    bert = models.BERTConfig(8, 2, 2, hidden=12, vocabulary=vocabulary, length=16)
    options = dict(longest=12) | changes
    return filled(lambda: models.SentenceEncoder(bert, **options, key=jax.random.key(0)))


def write_tokenizer(folder: Path, pieces=tuple(SPECIAL + PIECES)) -> None:
    """With what published ones hold besides: texts cut and padded to another length."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(kinds.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    core.enable_truncation(4)
    core.enable_padding(length=4)
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_folder(folder: Path) -> Path:
    pretrained.export_sentence_encoder(sentence_encoder(), folder)
    write_tokenizer(folder)
    return folder
