"""Readers of tokenizers, pipelines, schedulers and small autoencoders, fed damaged bytes."""

import io
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from eqxldm import pipelines, pretrained
from eqxldm.data.sources.tar import ImageTars
from eqxldm.models import TinyAutoencoder
from eqxldm.pretrained import load_tiny_autoencoder, tiny_autoencoder
from eqxldm.pretrained.files import write_safetensors
from eqxldm.text import byte_pairs, load_tokenizer

from fuzzing import (
    Reader,
    check_pipe,
    check_reader,
    damaged_json,
    damaged_safetensors,
    edit,
    edited,
    one,
)
from helpers import filled
from test_fuzz import READERS as FILES, tars
from tiny_pipelines import STABLE, write_stable_diffusion, write_tokenizer

WORDS = ["a cat, ab", "<|endoftext|> ab!"]
FLOW = dict(
    _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True,
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip
PAIRS = b"#version: 0.2\nt h\nth e</w>\n"


# Texts


def clip_words(folder):
    """The 256 bytes and one merge, with an added token."""
    write_tokenizer(folder)
    words = json.loads((folder / "vocab.json").read_text())
    words["ab</w>"] = len(words)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(len(words)): {"content": "<cat>", "normalized": True, "lstrip": False}}
    config |= {"model_max_length": 77, "pad_token": "!", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def t5_words(folder):
    import tokenizers

    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("cat", -2.0)]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.save(str(folder / "tokenizer.json"))


def t5_pieces(folder):
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on the mat"] * 5), model_writer=written, vocab_size=14,
        minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(written.getvalue())


def read_tokenizer(path):
    load_tokenizer(path.parent)(WORDS)


def read_byte_pairs(path):
    byte_pairs(path.read_bytes().decode("utf-8", "replace"), 2)


# Pipelines


def stable_diffusion(folder):
    write_stable_diffusion(folder)


def scheduler(config):
    return one(json.dumps(config).encode())


def read_pipeline(path):
    """What is read before the weights: the index, the schedule, the text part."""
    folder = next(p for p in path.parents if (p / "vae").is_dir())
    pipelines.describe(folder)
    pipelines.load(folder, parts=["text_encoder"])


def read_schedule(path):
    schedule = pipelines.load_schedule(path)
    schedule.start_std(schedule.times(4, 16))


def load_folder(path):
    pretrained.load(path.parent)


# Tiny autoencoders


def tiny(folder):
    make = lambda: TinyAutoencoder(
        3, 2, width=2, encoder_blocks=(1, 3, 3, 3), decoder_blocks=(3, 3, 3, 1),
        key=jax.random.key(0),
    )  # fmt: skip
    model = filled(make)
    pretrained.export(model, folder)
    state = pretrained.to_state(model, tiny_autoencoder.original_layout)
    for half in ("encoder", "decoder"):
        start = f"{half}."
        tensors = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
        write_safetensors(folder / f"{half}.safetensors", tensors, {})


def read_halves(path):
    load_tiny_autoencoder(path.with_name("encoder.safetensors"), path)


# The index of tars that is kept: arrays in an .npz


def index(folder):
    tars(folder)
    with tempfile.TemporaryDirectory() as kept:
        ImageTars(folder, index_dir=kept)
        shutil.move(*Path(kept).iterdir(), folder / "index.npz")


def read_index(path):
    with tempfile.TemporaryDirectory() as kept:
        ImageTars(path.parent, index_dir=kept)
        (place,) = Path(kept).iterdir()
        place.write_bytes(path.read_bytes())
        source = ImageTars(path.parent, index_dir=kept)
    for i in range(len(source)):
        source[i]


NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 7, 2**31 - 1, 2**62, 2**63 - 1)


@st.composite
def damaged_arrays(draw, content):
    """An .npz with other numbers in it, or damaged as a file."""
    if draw(st.booleans()):
        return edited(content, draw(st.lists(edit, min_size=1, max_size=3)))
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    name = draw(st.sampled_from(["labels", "ends", "tar", "offset", "size"]))
    array, number = arrays[name], draw(st.sampled_from(NUMBERS))
    bounds = np.iinfo(array.dtype)
    array[draw(st.integers(0, len(array) - 1))] = min(max(number, bounds.min), bounds.max)
    written = io.BytesIO()
    np.savez(written, **arrays)
    return written.getvalue()


READERS = {
    "vocab.json": Reader(clip_words, "vocab.json", read_tokenizer, damaged_json),
    "merges.txt": Reader(clip_words, "merges.txt", read_tokenizer),
    "tokenizer_config.json": Reader(
        clip_words, "tokenizer_config.json", read_tokenizer, damaged_json
    ),
    "tokenizer.json": Reader(t5_words, "tokenizer.json", read_tokenizer, damaged_json),
    "spiece.model": Reader(t5_pieces, "spiece.model", read_tokenizer),
    "byte pairs": Reader(one(PAIRS), "file", read_byte_pairs),
    "model_index.json": Reader(stable_diffusion, "model_index.json", read_pipeline, damaged_json),
    "text_encoder": Reader(
        stable_diffusion, "text_encoder/config.json", read_pipeline, damaged_json
    ),
    "unet": Reader(stable_diffusion, "unet/config.json", load_folder, damaged_json),
    "scheduler": Reader(scheduler(STABLE), "file", read_schedule, damaged_json),
    "flow scheduler": Reader(scheduler(FLOW), "file", read_schedule, damaged_json),
    "tiny autoencoder": Reader(tiny, "config.json", load_folder, damaged_json),
    "taesd": Reader(tiny, "decoder.safetensors", read_halves, damaged_safetensors),
    "index of tars": Reader(index, "index.npz", read_index, damaged_arrays),
}


@pytest.mark.filterwarnings("default::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_models_ends_with_a_value_or_one_message(name, tmp_path):
    check_reader(READERS[name], tmp_path)


PIPES = {name: FILES[name] for name in (
    "idx.gz", "tar", "tars", "parquet", "arrayrecord", "captions", "metadata", "latents", "header",
    "safetensors", "weights", "config.json", "index", "about.json", "run: config.json",
)} | {name: READERS[name] for name in (
    "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "model_index.json", "scheduler",
)}  # fmt: skip


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name, tmp_path):
    check_pipe(PIPES[name], tmp_path)
