"""A published sentence encoder in the place of one that is trained along: captions, encoded once.

The run folder keeps the encoder (`text-encoder`), as it does the autoencoder, and what it says of
all captions (`captions.safetensors`), which the training reads. Nothing of the encoder is trained
or computed in a step.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import pretrained
from eqxldm.data import DataError, ImageRecord
from eqxldm.digests import digest
from eqxldm.durable import read_file
from eqxldm.models import SentenceEncoder
from eqxldm.pretrained.files import check_seal, open_safetensors, write_safetensors
from eqxldm.pretrained.records import to_json
from eqxldm.text import Tokenizer, TokenizerError, load_tokenizer

from .terminal import StageBar, UserError, say

ENCODER, CAPTIONS = "text-encoder", "captions.safetensors"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
AT_ONCE = 16
# Half precision: of states of about 1 it keeps three digits, and the files are half as large.
STORED = np.float16

Caption = dict[str, np.ndarray]


@dataclass(frozen=True)
class FrozenEncoder:
    """A sentence encoder and its tokenizer; `encode` makes captions of texts."""

    network: SentenceEncoder
    tokenizer: Tokenizer
    identity: str

    @property
    def size(self) -> int:
        """Numbers in a token's state, and in the vector."""
        return self.network.bert.config.width

    def encode(self, texts: Sequence[str], max_length: int) -> Iterable[Caption]:
        """What the encoder says of each text: `tokens`, `mask` and `vector`.

        It depends on the text alone, to the bit: texts are encoded one by one, in a program that
        always has as many of them.
        """
        for i in range(0, len(texts), AT_ONCE):
            part = list(texts[i : i + AT_ONCE])
            rows = self.tokenizer(part + [""] * (AT_ONCE - len(part)), max_length)
            out = jax.device_get(_encode(self.network, rows.ids, rows.mask))
            for j in range(len(part)):
                states = np.where(rows.mask[j][:, None], out.tokens[j], 0)
                yield {
                    "tokens": states.astype(STORED),
                    "mask": rows.mask[j],
                    "vector": out.vector[j].astype(STORED),
                }


@eqx.filter_jit
def _encode(network: Any, ids: Any, mask: Any) -> Any:
    return jax.lax.map(lambda row: network(*row), (jnp.asarray(ids), jnp.asarray(mask)))


@functools.cache
def load_encoder(folder: Path, option: str = "--text-encoder") -> FrozenEncoder:
    """The encoder of a folder; **raises** `UserError` for what is none, in one message."""
    try:
        network = pretrained.load_sentence_encoder(folder)
        tokenizer = load_tokenizer(folder)
    except (pretrained.WeightsError, TokenizerError, OSError) as error:
        raise UserError(
            f"{option} {folder}: {error} Needed is a folder of a sentence encoder, such as "
            "all-MiniLM-L6-v2: config.json, model.safetensors and tokenizer.json."
        ) from None
    vocabulary = network.bert.config.vocabulary
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"{option} {folder}: its tokenizer has {tokenizer.vocabulary} tokens, its network "
            f"{vocabulary}; one of the files is another model's."
        )
    about = json.dumps(to_json(network.config)).encode() + read_file(folder / TOKENIZER)
    parts = eqx.filter(network, eqx.is_array), np.frombuffer(about, np.uint8)
    return FrozenEncoder(network, tokenizer, digest(parts))


def find_encoder(run: Path, given: Path | None, max_length: int, *, anew: bool = False) -> Path:
    """The run's own encoder, or the one that was given, which must be the same where both are.

    `anew`: what is in the run folder does not count.
    """
    own = run / ENCODER
    if anew or not (own / CONFIG).exists():
        if given is None:
            raise UserError(
                "--text.tokens frozen: needs --text-encoder FOLDER (make: TEXT_ENCODER=folder), a "
                "published sentence encoder."
            )
        longest = load_encoder(given).tokenizer.longest
        if not 3 <= max_length <= longest:
            raise UserError(
                f"--text.max-length {max_length}: the encoder of {given} reads 3 to {longest} "
                "tokens, with those of begin and end."
            )
        return given
    if given is not None and load_encoder(given).identity != load_encoder(own, "run").identity:
        raise UserError(
            f"--text-encoder {given}: is another one than the run's, {own}. Leave it out, use "
            "another --run-dir, or --overwrite to start anew."
        )
    return own


def keep_encoder(folder: Path, own: Path) -> Path:
    """Writes the encoder into the run folder, as a whole or not at all; returns where it is."""
    if (own / CONFIG).exists():
        return own
    half = own.with_name(f"{own.name}.part")
    pretrained.export_sentence_encoder(load_encoder(folder).network, half)
    (half / TOKENIZER).write_bytes(read_file(folder / TOKENIZER))
    os.replace(half, own)
    return own


@dataclass(frozen=True)
class FrozenText:
    """A condition: what the encoder of a folder says of the caption, as `table` has it.

    Texts that are not in the table are encoded when they come. Worker processes get it pickled, and
    open the table themselves.
    """

    folder: Path
    max_length: int
    table: Path

    def __call__(self, record: ImageRecord) -> Caption:
        if record.caption is None:
            raise DataError(f"{record.id}: has no caption, which --condition text needs.")
        return self.tokens(record.caption)

    def tokens(self, text: str) -> Caption:
        """Of a text; that of `""` is of begin and end alone."""
        return self.all((text,))[0]

    def all(self, texts: Sequence[str]) -> list[Caption]:
        """Of many texts."""
        table = open_captions(self.table)
        known = {} if table is None or table.max_length != self.max_length else table.rows
        missing = sorted({text for text in texts if text not in known})
        encoded: dict[str, Caption] = {}
        if missing:
            with jax.ensure_compile_time_eval():  # the empty caption is a constant of programs
                new = list(load_encoder(self.folder).encode(missing, self.max_length))
            encoded = dict(zip(missing, new, strict=True))
        at = lambda text: table.caption(known[text]) if text in known and table else encoded[text]
        return [at(text) for text in texts]

    def cut(self, text: str) -> str:
        """The end of a text that finds no room."""
        return load_encoder(self.folder).tokenizer([text], self.max_length).cut[0]


@dataclass(frozen=True)
class CaptionTable:
    """The content of a file of captions: their rows, and the arrays that these are rows of."""

    rows: dict[str, int]
    arrays: dict[str, np.ndarray]
    encoder: str
    max_length: int

    def caption(self, row: int) -> Caption:
        return {name: array[row] for name, array in self.arrays.items()}


def open_captions(path: Path) -> CaptionTable | None:
    """The captions of a file, read once; None where there is none.

    **Raises** `UserError` if the file is not what was written.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _read_captions(path, stamp)


@functools.lru_cache(maxsize=2)
def _read_captions(path: Path, stamp: int) -> CaptionTable:
    try:
        tensors, header = open_safetensors(path)
        check_seal(path, header)
        texts = json.loads(tensors["texts"].read().tobytes())
        arrays = {name: tensors[name].read() for name in ("tokens", "mask", "vector")}
        rows = {text: row for row, text in enumerate(texts)}
        return CaptionTable(rows, arrays, header["encoder"], int(header["max_length"]))
    except (pretrained.WeightsError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: not what was written ({error}). Delete it; `train` "
            "writes it again."
        ) from None


def write_captions(reader: FrozenText, texts: Iterable[str]) -> None:
    """The reader's file of these captions and of the empty one, unless it is there already.

    **Raises** `UserError` if the file that is there was made by another encoder.
    """
    encoder, found = load_encoder(reader.folder), open_captions(reader.table)
    wanted = sorted({"", *texts})
    if found is not None:
        if (found.encoder, found.max_length) != (encoder.identity, reader.max_length):
            raise UserError(
                f"{reader.table}: was made by another encoder than {reader.folder}, which is "
                "damaged or another one. Restore it, or --overwrite to start anew."
            )
        if all(text in found.rows for text in wanted):
            return
    with StageBar("captions", len(wanted), "caption") as bar:
        rows = []
        for row in encoder.encode(wanted, reader.max_length):
            rows.append(row)
            bar.update(len(rows))
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    arrays["texts"] = np.frombuffer(json.dumps(wanted).encode(), np.uint8)
    about = {"encoder": encoder.identity, "max_length": str(reader.max_length)}
    write_safetensors(reader.table, arrays, about, sealed=True)
    say(f"captions: {len(wanted)} encoded once, in {reader.table}")
