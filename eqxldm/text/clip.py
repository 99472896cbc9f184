r"""CLIP's tokenizer: byte pairs in lower case (Sennrich et al. 2016; Radford et al. 2021, 2.4).

A text in normal form C, its blanks made single, in lower case, is split by `SPLIT`; each piece, as
bytes, is a word, whose last symbol carries `</w>`, and whose symbols are merged in the order of the
published list.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .errors import TokenizerError, library
from .tokenizer import Tokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LONGEST = 77
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def clip_tokenizer(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    padding: str = END,
    longest: int = LONGEST,
    added: Sequence[Mapping[str, Any]] = (),
) -> Tokenizer:
    """The tokenizer of a vocabulary and its merges.

    **Arguments**:

    - `padding`: a token of the vocabulary: that of the end for CLIP ViT-L/14, "!" for the larger
      ones of OpenCLIP.
    - `longest`: the number of positions of the encoder.
    - `added`: tokens that are found in a text before it is split, as those of textual inversion:
      the arguments of `tokenizers.AddedToken`. Those of begin, end and padding always are: where
      "!" is the padding, a "!" of a text is that token, as it is in transformers.

    **Raises** `TokenizerError` if a token is missing, or a merge gives none of the vocabulary.

    >>> vocabulary = {"a</w>": 0, "b</w>": 1, "a": 2, "ab</w>": 3, BEGIN: 4, END: 5}
    >>> tokenizer = clip_tokenizer(vocabulary, [("a", "b</w>")], longest=6)
    >>> tokenizer(["AB  a"]).ids.tolist()
    [[4, 3, 0, 5, 5, 5]]
    """
    lib = library("tokenizers")
    if missing := [token for token in (BEGIN, END) if token not in vocabulary]:
        raise TokenizerError(
            f"CLIP's tokenizer: the vocabulary of {len(vocabulary)} tokens lacks "
            f"{' and '.join(missing)}; it is another model's, or damaged."
        )
    try:
        model = lib.models.BPE(
            vocab=dict(vocabulary),
            merges=list(merges),
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the library raises its errors as plain exceptions
        raise TokenizerError(
            f"CLIP's tokenizer: vocabulary and merges do not belong together: {error}"
        ) from error
    core = lib.Tokenizer(model)
    normalizers, splits = lib.normalizers, lib.pre_tokenizers
    core.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(lib.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    core.pre_tokenizer = splits.Sequence(
        [
            splits.Split(lib.Regex(SPLIT), behavior="removed", invert=True),
            splits.ByteLevel(add_prefix_space=False),
        ]
    )
    tokens = {str(token["content"]): dict(token) for token in added}
    if padding not in tokens.keys() | vocabulary.keys():
        raise TokenizerError(f"CLIP's tokenizer: its vocabulary has no padding token {padding!r}.")
    # As they are written, not in capitals; published folders say otherwise of the first alone.
    plain = {token: dict(content=token, normalized=False) for token in (BEGIN, END, padding)}
    tokens |= {token: plain[token] for token in plain if token != BEGIN or BEGIN not in tokens}
    for token in tokens.values():
        core.add_tokens([lib.AddedToken(**token)])
    return Tokenizer(
        partial(encode_with, core),
        begin=core.token_to_id(BEGIN),
        end=core.token_to_id(END),
        padding=core.token_to_id(padding),
        vocabulary=core.get_vocab_size(),
        longest=longest,
        fixed=True,
    )


def open_core(path: Path, kind: str, whose: str) -> Any:
    """The `tokenizers.Tokenizer` of a file, whose own cutting and padding do not count.

    **Raises** `TokenizerError` if it is damaged, or of another `kind` of model than `whose` is.
    """
    lib = library("tokenizers")
    try:
        core = lib.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises its errors as plain exceptions
        raise TokenizerError(f"{path} is damaged or no tokenizer: {error}") from error
    if type(core.model).__name__ != kind:
        found = type(core.model).__name__
        raise TokenizerError(f"{path} is of the kind {found}; {whose} {kind}.")
    core.no_truncation()
    core.no_padding()
    return core


def encode_with(core: Any, text: str) -> tuple[list[int], list[int]]:
    """The ids of a text by a `tokenizers.Tokenizer`, and the character where each begins.

    >>> tokenizer = clip_tokenizer({"a</w>": 0, BEGIN: 1, END: 2}, [])
    >>> encode_with(tokenizer.encode.args[0], "a  A")
    ([0, 0], [0, 3])
    """
    found = core.encode(text, add_special_tokens=False)
    return found.ids, [start for start, _ in found.offsets]
