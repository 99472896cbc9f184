"""What can be served of text: a finished run of `experiments.words`, or a folder of LLaDA."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eqxldm import discrete as dd
from eqxldm.serving.text import TextGenerator
from eqxldm.sharding import make_mesh

from ..train.streams import stream_number
from ..train.terminal import UserError
from ..words.commands import VOCABULARY, load_network
from ..words.config import SAMPLERS
from ..words.measuring import make_sampler
from ..words.training import STAGES

LONGEST = 1024  # tokens of the window, unless another length is asked for
MOST_CALLS = 1000
USUAL = "random"  # the sampler, as in `generate`


def is_text(folder: Path) -> bool:
    """Whether a folder is one of words: a run's, or of a published model of tokens."""
    ours = (folder / VOCABULARY).exists() or (folder / "checkpoints" / STAGES[0]).exists()
    published = (folder / "tokenizer.json").exists() and (folder / "config.json").exists()
    return ours or (published and not (folder / "model_index.json").exists())


def refuse_text(folder: Path) -> None:
    """`UserError` for a folder of words, where images are measured."""
    if is_text(folder):
        raise UserError(f"--run {folder}: is a run of words, and images are measured here.")


def from_words(folder: Path, length: int | None, dtype: str) -> TextGenerator:
    """The network that `experiments.words generate` writes with.

    **Raises** `UserError` for what cannot be served, and a length beyond the network's context.
    """
    network, vocabulary = load_network(folder, make_mesh(), jnp.dtype(dtype))
    most = network.config.max_length
    if length is not None and length > most:
        raise UserError(f"--length {length}: the network's context has {most} tokens.")
    window: int = min(most, LONGEST) if length is None else length
    number = stream_number("samples")

    def encode(text: str) -> Any:
        try:
            return vocabulary.encode(text)
        except UserError as error:
            raise ValueError(str(error)) from None

    return TextGenerator(
        folder.resolve().name, network, dd.Masking(vocabulary.mask_id), network.config.vocabulary,
        window, encode, vocabulary.decode, (USUAL, *(n for n in SAMPLERS if n != USUAL)),
        make_sampler,
        # The texts of a seed are those of `make generate-text ARGS="--seed"`.
        stream=lambda key: jax.random.fold_in(key, number),
        most_calls=max(MOST_CALLS, window),
    )  # fmt: skip
