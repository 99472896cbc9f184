"""CLIP's vocabulary from the list of its byte pairs, all of them or the commonest."""

from .clip import BEGIN, END
from .errors import TokenizerError

# Of the list's 262,144 pairs CLIP has these; with 512 bytes and 2 tokens that makes 49,408.
MERGES = 48894


def vocabulary_size(merges: int = MERGES) -> int:
    """Of a vocabulary of so many byte pairs; its last token is the end.

    >>> vocabulary_size(), vocabulary_size(2)
    (49408, 516)
    """
    return 2 * 256 + merges + 2


def byte_pairs(content: str, merges: int = MERGES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    r"""`(vocabulary, merges)`, as `clip_tokenizer` takes them, of the published list.

    Its ids are the 256 bytes, the same at the end of a word, the first `merges` pairs joined, begin
    and end. As byte-pair encoding merges the commonest pairs first, a part of the list is a
    vocabulary too: rare words are of more tokens, and the ids of what remains stay the same, but
    for begin and end.

    **Raises** `TokenizerError` if the list is shorter or damaged, `ValueError` for `merges` below 0
    or above `MERGES`.

    Source: `SimpleTokenizer` of Radford et al. 2021's code.

    >>> vocabulary, merges = byte_pairs("#version: 0.2\nc a\nca t</w>\n", 2)
    >>> len(vocabulary), vocabulary["a"], vocabulary["a</w>"], vocabulary["cat</w>"], merges
    (516, 64, 320, 513, [('c', 'a'), ('ca', 't</w>')])
    """
    if not 0 <= merges <= MERGES:
        raise ValueError(f"byte_pairs: merges must lie in 0 .. {MERGES}, got {merges}.")
    pairs = [tuple(line.split()) for line in content.split("\n")[1 : 1 + merges]]
    if len(pairs) != merges or any(len(pair) != 2 for pair in pairs):
        raise TokenizerError(
            f"byte_pairs: needs a line of comment and {merges} of two symbols each, got "
            f"{sum(len(pair) == 2 for pair in pairs)} of these: the list is cut or damaged."
        )
    # A byte that is no printed character of Latin-1 is written as one from 256 upwards, so that a
    # vocabulary is text without blanks; the ids go by the printed ones first.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printed] + [chr(256 + i) for i in range(256 - len(printed))]
    found = [(a, b) for a, b in pairs]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in found)]
    return {token: i for i, token in enumerate([*tokens, BEGIN, END])}, found
