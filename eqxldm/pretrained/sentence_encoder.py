"""Folders of sentence-transformers: a BERT, how its tokens are pooled, and the longest text."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..durable import read_file
from ..models import BERT, SentenceEncoder, first_token, mean_token
from .files import read_json
from .io import export, load
from .layout import ShardingRule, WeightsError

MODULES, LONGEST, POOLING = "modules.json", "sentence_bert_config.json", "1_Pooling"
KINDS = ("Transformer", "Pooling", "Normalize")
# The flags of a pooling's config.json; those of other ways must be off.
POOLS = {"pooling_mode_mean_tokens": mean_token, "pooling_mode_cls_token": first_token}
MODES = {"mean": mean_token, "cls": first_token}


def load_sentence_encoder(
    folder: str | Path, *, dtype: Any = jnp.float32, sharding: ShardingRule | None = None
) -> SentenceEncoder:
    """The encoder of a folder of sentence-transformers, such as `all-MiniLM-L6-v2`.

    `modules.json` says of what it is made: a BERT, in this folder or one of its own; a pooling, by
    the mean or the first token; and, in some, a division by the norm. `sentence_bert_config.json`
    has the longest text. A plain folder of transformers, without `modules.json`, is pooled by the
    mean and not divided, as sentence-transformers does. `text.load_tokenizer` reads its tokenizer.

    Arguments and errors as in `load`; **raises** `WeightsError` for other modules or poolings, and
    `FileNotFoundError` for no folder.

    >>> load_sentence_encoder("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: load_sentence_encoder: there is no folder nowhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_sentence_encoder: there is no folder {folder}.")
    parts = _modules(folder)
    inside = folder / parts["Transformer"]
    bert = load(inside, dtype=dtype, sharding=sharding)
    if not isinstance(bert, BERT):
        raise WeightsError(f"{inside}: is a {type(bert).__name__}; a sentence encoder is a BERT.")
    pool = mean_token
    if "Pooling" in parts:
        pool = _pool(folder / parts["Pooling"] / "config.json")
    longest = bert.config.length
    if (inside / LONGEST).exists():
        longest = read_json(inside / LONGEST).get("max_seq_length") or longest
    if not isinstance(longest, int) or not 2 < longest <= bert.config.length:
        raise WeightsError(
            f"{inside / LONGEST}: max_seq_length = {longest!r} must lie in 3 .. "
            f"{bert.config.length}, the positions of the network."
        )
    return SentenceEncoder(bert, pool=pool, unit="Normalize" in parts, longest=longest)


def export_sentence_encoder(encoder: SentenceEncoder, folder: str | Path) -> None:
    """Writes a folder for sentence-transformers, all of it but the tokenizer's `tokenizer.json`.

    **Raises** `WeightsError` if transformers has no such network.

    >>> import equinox as eqx, jax, tempfile
    >>> from eqxldm.models import BERTConfig
    >>> encoder = SentenceEncoder(BERTConfig(16, 1, 2, vocabulary=99), key=jax.random.key(0))
    >>> folder = Path(tempfile.mkdtemp())
    >>> export_sentence_encoder(encoder, folder)
    >>> bool(eqx.tree_equal(load_sentence_encoder(folder), encoder))
    True
    """
    folder, ours = Path(folder), encoder.config
    if ours.pool not in POOLS.values():
        raise WeightsError(
            "SentenceEncoder: sentence-transformers has no such pooling; known are "
            f"{', '.join(pool.__name__ for pool in POOLS.values())}."
        )
    export(encoder.bert, folder)
    kinds = KINDS if ours.unit else KINDS[:2]
    places = ("", POOLING, "2_Normalize")
    modules = [
        dict(idx=i, name=str(i), path=places[i], type=f"sentence_transformers.models.{kind}")
        for i, kind in enumerate(kinds)
    ]
    pooling = dict(word_embedding_dimension=encoder.bert.config.width)
    pooling |= {name: ours.pool is pool for name, pool in POOLS.items()}
    (folder / POOLING).mkdir(exist_ok=True)
    for path, content in (
        (MODULES, modules),
        (f"{POOLING}/config.json", pooling),
        (LONGEST, dict(max_seq_length=ours.longest, do_lower_case=False)),
    ):
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")


def _modules(folder: Path) -> dict[str, str]:
    """The folder of each module, by its kind."""
    path = folder / MODULES
    if not path.exists():
        return {"Transformer": ""}
    try:
        listed = json.loads(read_file(path))
        kinds = [str(module["type"]).rpartition(".")[2] for module in listed]
        found = {kind: str(module["path"]) for kind, module in zip(kinds, listed, strict=True)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: it must list modules by type and path.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if tuple(kinds) not in (KINDS, KINDS[:2], KINDS[:1]):
        raise WeightsError(
            f"{path} lists {', '.join(kinds) or 'nothing'}; known are {', '.join(KINDS)}, in this "
            "order."
        )
    if outside := [p for p in found.values() if Path(p).is_absolute() or ".." in Path(p).parts]:
        raise WeightsError(f"{path}: {outside[0]} lies outside of the folder.")
    return found


def _pool(path: Path) -> Any:
    """The pooling of a config.json, by its flags, or in newer ones by name."""
    config = read_json(path)
    mode = config.get("pooling_mode")
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    found = [POOLS.get(name) for name in on] if mode is None else [MODES.get(str(mode))]
    if len(found) != 1 or found[0] is None:
        given = ", ".join(on) if mode is None else repr(mode)
        raise WeightsError(
            f"{path}: the pooling {given or 'of none'} is not known; known are the mean of the "
            "tokens and the first one."
        )
    return found[0]
