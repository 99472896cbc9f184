"""BERT's tokenizer: word pieces (Wu et al. 2016, section 4.1), cut from the left as long as can be.

A text in lower case is split at blanks and punctuation; of each word the longest beginning that is
in the vocabulary is a token, then of the rest the longest `##` piece, and so on.
"""

from functools import partial
from pathlib import Path

from .clip import encode_with, open_core
from .errors import TokenizerError
from .tokenizer import Tokenizer

BEGIN, END, PADDING = "[CLS]", "[SEP]", "[PAD]"
LONGEST = 512


def bert_tokenizer(path: str | Path, *, longest: int = LONGEST) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, whose own cutting and padding do not count.

    **Arguments**: `longest` is the number of positions of the encoder, or the longest text that it
    was trained on.

    **Raises** `FileNotFoundError`; `TokenizerError` if the file is damaged, holds no word pieces,
    or lacks the tokens of begin, end and padding.

    >>> bert_tokenizer("tokenizer.json")
    Traceback (most recent call last):
    ...
    FileNotFoundError: BERT's tokenizer: there is no file tokenizer.json.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"BERT's tokenizer: there is no file {path}.")
    core = open_core(path, "WordPiece", "BERT has")
    ids = [core.token_to_id(token) for token in (BEGIN, END, PADDING)]
    for token, found in zip((BEGIN, END, PADDING), ids, strict=True):
        if found is None:
            raise TokenizerError(f"{path} has no token {token}, which BERT's vocabularies have.")
    return Tokenizer(
        partial(encode_with, core),
        begin=ids[0],
        end=ids[1],
        padding=ids[2],
        vocabulary=core.get_vocab_size(),
        longest=longest,
        fixed=True,
    )
