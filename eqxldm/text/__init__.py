"""Texts to the ids of published text encoders: CLIP's byte pairs, T5's sentence pieces and
BERT's word pieces.

Needs the extra `text`: `pip install 'eqxldm[text]'`.
"""

from .bert import bert_tokenizer as bert_tokenizer
from .byte_pairs import (
    MERGES as MERGES,
    byte_pairs as byte_pairs,
    vocabulary_size as vocabulary_size,
)
from .clip import clip_tokenizer as clip_tokenizer
from .errors import TokenizerError as TokenizerError
from .folder import load_tokenizer as load_tokenizer
from .t5 import t5_tokenizer as t5_tokenizer
from .tokenizer import Tokenizer as Tokenizer, Tokens as Tokens
