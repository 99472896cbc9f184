"""The tokenizer of a folder, as they lie beside published text encoders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..durable import read_file
from .bert import LONGEST as BERT_LONGEST, bert_tokenizer
from .clip import END, LONGEST, clip_tokenizer
from .errors import TokenizerError
from .t5 import LONGEST as T5_LONGEST, t5_tokenizer
from .tokenizer import Tokenizer

CLASSES = {
    "CLIPTokenizer": "clip",
    "CLIPTokenizerFast": "clip",
    "T5Tokenizer": "t5",
    "T5TokenizerFast": "t5",
    "BertTokenizer": "bert",
    "BertTokenizerFast": "bert",
}
CONFIG = "tokenizer_config.json"
SENTENCES = "sentence_bert_config.json"  # of sentence-transformers, which may cut texts earlier
MODELS = {"Unigram": "t5", "WordPiece": "bert"}  # of a tokenizer.json; all others are CLIP's
# `tokenizer_config.json` says int(1e30), rounded or not, of a tokenizer without an end. Rows are
# made as long as it says, so that nothing near that is taken for a length.
_NO_LIMIT = 10**6


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: CLIP's, T5's or BERT's, whichever it is.

    CLIP's from `vocab.json` with `merges.txt`, or from `tokenizer.json`; T5's from
    `tokenizer.json`, or from `spiece.model`; BERT's from `tokenizer.json`, its rows as long as
    `sentence_bert_config.json` says, if there is one. `tokenizer_config.json` may name the
    class, the padding token, the longest row and added tokens (older folders have
    `special_tokens_map.json` and `added_tokens.json`); without it a folder with merges is CLIP's,
    padded with its end token.

    **Raises** `FileNotFoundError` for no folder; `TokenizerError` if it holds no tokenizer, one of
    another class, or damaged files.

    >>> load_tokenizer("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: load_tokenizer: there is no folder nowhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_tokenizer: there is no folder {folder}.")
    config = _read(folder / CONFIG) if (folder / CONFIG).exists() else {}
    kind = _kind(folder, config)
    longest = config.get("model_max_length")
    if not isinstance(longest, int | float) or not 2 < longest < _NO_LIMIT:
        longest = {"clip": LONGEST, "t5": T5_LONGEST, "bert": BERT_LONGEST}[kind]
    if kind == "bert":
        cut = _read(folder / SENTENCES, {}).get("max_seq_length")
        if isinstance(cut, int) and 2 < cut < longest:
            longest = cut
        if not (folder / "tokenizer.json").exists():
            raise TokenizerError(
                f"{folder} is of a BERT tokenizer, and has no tokenizer.json. AutoTokenizer of "
                "transformers writes one of a vocab.txt."
            )
        return bert_tokenizer(folder / "tokenizer.json", longest=int(longest))
    if kind == "t5":
        forms = [folder / name for name in ("tokenizer.json", "spiece.model")]
        there = [path for path in forms if path.exists()]
        if not there:
            raise TokenizerError(
                f"{folder} is of a T5 tokenizer, and has neither tokenizer.json nor spiece.model."
            )
        return t5_tokenizer(there[0], longest=int(longest))
    vocabulary, merges = _clip_files(folder)
    special = _read(folder / "special_tokens_map.json", {}) | config
    padding = _content(special.get("pad_token", END))
    added = _added(folder, config, vocabulary)
    try:
        return clip_tokenizer(
            vocabulary, merges, padding=padding, longest=int(longest), added=added
        )
    except (TypeError, ValueError) as error:  # tokens that are no texts, options of other types
        raise TokenizerError(f"{folder}: {error}") from error


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    """`clip`, `t5` or `bert`, by the class that the folder names, or else by its files."""
    name = config.get("tokenizer_class")
    if isinstance(name, str) and name in CLASSES:
        return CLASSES[name]
    if name is not None and name not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        raise TokenizerError(
            f"{folder}: unknown tokenizer {name!r}; known are {', '.join(CLASSES)}."
        )
    if (folder / "spiece.model").exists():
        return "t5"
    if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
        return "clip"
    if (folder / "tokenizer.json").exists():
        model = _read(folder / "tokenizer.json").get("model")
        return MODELS.get(str(model.get("type")), "clip") if isinstance(model, dict) else "clip"
    inside = sorted(
        path.name for path in folder.glob("tokenizer*") if path.is_dir() and any(path.iterdir())
    )
    hint = f" Load one of its folders: {', '.join(inside)}." if inside else ""
    raise TokenizerError(
        f"{folder} holds no tokenizer: neither vocab.json with merges.txt, nor tokenizer.json, nor "
        f"spiece.model.{hint}"
    )


def _clip_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary: Any
    merges: Any
    plain = [folder / name for name in ("vocab.json", "merges.txt")]
    absent = [path.name for path in plain if not path.exists()]
    if not absent:
        vocabulary, merges = _read(plain[0]), _merges(plain[1])
    elif (folder / "tokenizer.json").exists():
        model = _read(folder / "tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type") != "BPE":
            raise TokenizerError(f"{folder / 'tokenizer.json'} holds no byte pairs, as CLIP's do.")
        vocabulary = model.get("vocab")
        merges = model.get("merges", [])
        if isinstance(merges, list):
            merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    else:
        raise TokenizerError(f"{folder} lacks {' and '.join(absent)} of a CLIP tokenizer.")
    numbered = isinstance(vocabulary, dict) and all(
        type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()
    )
    pair = lambda m: isinstance(m, list) and len(m) == 2 and all(isinstance(s, str) for s in m)
    if not numbered or not isinstance(merges, list) or not all(map(pair, merges)):
        raise TokenizerError(
            f"{folder}: its vocabulary must give each token its number, and its merges two tokens "
            "each; one of the files is damaged."
        )
    return vocabulary, [(a, b) for a, b in merges]


def _merges(path: Path) -> list[list[str]]:
    """One merge a line; the first line may say which version of the format it is."""
    try:
        lines = read_file(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}.") from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    return [line.split() for line in lines[lines[0].startswith("#version") :] if line.strip()]


def _added(
    folder: Path, config: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The tokens that are found in texts before they are split, in the order of their ids.

    They get the next free ids, so these must be the ones that they had.
    """
    known: dict[str, dict[str, Any]] = {}
    ids: dict[str, int] = {}
    if isinstance(config.get("bos_token"), dict):
        known[_content(config["bos_token"])] = config["bos_token"]
    entries = [
        (i, {"content": token, "normalized": True})
        for token, i in _read(folder / "added_tokens.json", {}).items()
    ]
    listed = _read(folder / "tokenizer.json", {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else []:
        entries.append((token.get("id") if isinstance(token, dict) else None, token))
    listed = config.get("added_tokens_decoder")
    entries += listed.items() if isinstance(listed, dict) else []
    for i, token in entries:
        content = _content(token)
        if not str(i).isdigit() or not content:
            raise TokenizerError(f"{folder}: an added token has the odd number {i!r}.")
        ids[content] = int(i)
        known[content] = token if isinstance(token, dict) else {"content": content}
    free = len(vocabulary)
    for token in sorted(ids, key=lambda token: ids[token]):
        expected = vocabulary.get(token, free)
        free += token not in vocabulary
        if ids[token] != expected:
            raise TokenizerError(
                f"{folder}: the added token {token!r} has the id {ids[token]}, the vocabulary of "
                f"{len(vocabulary)} has {expected} for it; one of the files is another model's."
            )
    options = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    order = sorted(known, key=lambda token: ids.get(token, -1))
    return [
        {key: known[token][key] for key in options if key in known[token]} | {"content": token}
        for token in order
    ]


def _content(token: Any) -> str:
    """A token as a text; configurations also write it as a record."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _read(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    if absent is not None and not path.exists():
        return absent
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is damaged, not JSON: {error}") from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} is damaged: it must hold a JSON object.")
    return content
