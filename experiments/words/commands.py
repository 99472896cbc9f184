"""The commands: train both networks and measure them, write a text with a finished network."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import discrete as dd, pretrained
from eqxldm.data import read_text
from eqxldm.distributed import is_primary
from eqxldm.durable import replacing
from eqxldm.models import TokenTransformer
from eqxldm.sharding import check_batch, leaf_sharding

from ..train.checks import check_writable, mesh_of
from ..train.options import check
from ..train.run import METRICS, RunFolder, as_dict, read_json, write_json
from ..train.stages import Stages
from ..train.streams import stream_key
from ..train.terminal import Signals, UserError, say, user_errors
from .config import Config, Generate, Train
from .corpus import Corpus, Vocabulary, make_tokenizer, open_corpus
from .measuring import likelihoods, make_sampler, table, table_text
from .showing import write_page
from .training import STAGES, train_network

VOCABULARY, NETWORK = "vocabulary.json", "masked.safetensors"


def train(command: Train) -> None:
    signals, config = Signals(), command.config
    check(command)
    check_config(config)
    mesh = mesh_of(command.mesh)
    with user_errors(ValueError, what="--batch-size"):
        check_batch(config.batch_size, mesh)
    corpus = open_corpus(command.text, config.tokens, config.length)
    run = RunFolder(command.run_dir, primary=is_primary())
    with run.locked():
        # Another text is another run; the folder says which it is about.
        about = {**as_dict(config), "text": corpus.digest}
        run.open(about, overwrite=command.overwrite, defaults=as_dict(Config()))
        every, log = command.checkpoint_every, command.log
        stages = Stages(config.seed, run, mesh, signals, log, every, unit="windows")
        networks = {stage: train_network(config, stage, corpus, stages) for stage in STAGES}
        if is_primary():
            finish(command, corpus, run, networks, stages.timings)


def finish(
    command: Train, corpus: Corpus, run: RunFolder, networks: dict[str, Any], timings: Any
) -> None:
    """Saves the networks, measures them and shows what they write."""
    config, vocabulary = command.config, corpus.vocabulary
    write_json(run.file(VOCABULARY), vocabulary_json(vocabulary))
    for stage, network in networks.items():
        pretrained.save(network, run.file(f"{stage}.safetensors"))
    found = likelihoods(config, command.measure, corpus, networks)
    for name, value in found.items():
        error = value.get("standard_error")
        shown = "" if error is None else f" +- {error:.3f}"
        bound = " (bound)" if name == "masked" else ""
        say(f"{name}{bound}: {value['bits_per_character']:.3f}{shown} bits a character")
    rows, frames = table(config, command.measure, corpus, networks)
    with replacing(run.file("table.md")) as temporary:
        temporary.write_text(table_text(rows) + "\n")
    if len(frames):
        write_page(run.file("appearing.html"), vocabulary, frames, "A text appearing")
        say(f"a text by the masked network: {vocabulary.decode(frames[-1])}")
    write_json(run.file(METRICS), {"likelihood": found, "table": rows, "timings": timings})
    say(f"{table_text(rows)}\nThe table and a page with a text appearing are in {run.path}.")


def check_config(config: Config) -> None:
    """Refuses sizes that do not divide, before anything is written."""
    if config.width % (2 * config.num_heads):
        raise UserError(
            f"--width {config.width} does not divide into {config.num_heads} heads of an even size."
        )
    if config.objective == "block" and config.length % config.block_size:
        raise UserError(
            f"--block-size {config.block_size} does not divide --length {config.length}."
        )


def vocabulary_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """What `load_network` reads back."""
    tokenizer = vocabulary.tokenizer
    written = None if tokenizer is None else json.loads(tokenizer.to_str())
    return {"characters": vocabulary.characters, "tokenizer": written}


@user_errors(FileNotFoundError, pretrained.WeightsError)
def load_network(folder: Path, mesh: Any, dtype: Any = jnp.float32) -> tuple[Any, Vocabulary]:
    """The network of a run, or of a folder of LLaDA, and its vocabulary.

    **Raises** `UserError` for what is neither, or damaged.
    """
    options: dict[str, Any] = dict(dtype=dtype, sharding=leaf_sharding(mesh))
    if (folder / VOCABULARY).exists():
        kinds = {"characters": str | None, "tokenizer": dict | None}
        repair = "Train again with --overwrite."
        found = read_json(folder / VOCABULARY, kinds, repair=repair)
        tokenizer = found.get("tokenizer")
        if tokenizer is not None:
            tokenizer = make_tokenizer(json.dumps(tokenizer), folder / VOCABULARY, repair)
        vocabulary = Vocabulary(found.get("characters"), tokenizer)
        return _fitting(pretrained.load(folder / NETWORK, **options), vocabulary, folder)
    if not (folder / "config.json").exists() or (folder / "checkpoints").exists():
        raise UserError(f"--model {folder}: no finished run and no folder of LLaDA's.")
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"--model {folder}: has no tokenizer.json, which makes tokens of a text.")
    kinds, repair = {"mask_token_id": int | None}, "Fetch it again."
    mask = read_json(folder / "config.json", kinds, repair=repair).get("mask_token_id")
    mask = pretrained.llada.MASK if mask is None else mask
    path = folder / "tokenizer.json"
    tokenizer = make_tokenizer(read_text(path), path, repair)
    network = pretrained.load_llada(folder, **options)
    return _fitting(network, Vocabulary(None, tokenizer, mask), folder)


def _fitting(network: Any, vocabulary: Vocabulary, folder: Path) -> tuple[Any, Vocabulary]:
    """The two, if the network has a token for each of the vocabulary's, and one for [MASK]."""
    known = network.config.vocabulary if isinstance(network, TokenTransformer) else 0
    own = vocabulary.mask is None  # of a run, whose [MASK] is the last of its tokens
    if not 0 <= vocabulary.mask_id < known or (own and vocabulary.mask_id != known - 1):
        raise UserError(
            f"--model {folder}: its network knows {known} tokens, and [MASK] is token "
            f"{vocabulary.mask_id}: they do not belong together."
        )
    return network, vocabulary


def canvas(command: Generate, vocabulary: Vocabulary, most: int) -> np.ndarray:
    """The tokens to begin with: the prompt, and [MASK] where the network is to write."""
    mask_id = vocabulary.mask_id
    if command.infill:
        parts = [vocabulary.encode(part) for part in command.prompt.split("_")]
        between = np.array([mask_id], np.int32)
        joined = [p for part in parts for p in (part, between)][:-1]
        ids = np.concatenate(joined)
    else:
        ids = vocabulary.encode(command.prompt)
    length = command.length or (len(ids) if command.infill else most)
    if length > most:
        raise UserError(f"--length {length}: the network's context has {most} tokens.")
    if len(ids) > length:
        raise UserError(
            f"--prompt has {len(ids)} tokens, longer than the context of {length}. Shorten it."
        )
    whole = np.concatenate([ids, np.full(length - len(ids), mask_id, np.int32)])
    if not (whole == mask_id).any():
        raise UserError("--prompt leaves nothing to write. Shorten it, or mark blanks with _.")
    return whole


def generate(command: Generate) -> None:
    check(command)
    Signals()
    if command.out is not None:
        check_writable(command.out, "--out")
    mesh = mesh_of(command.mesh)
    dtype = jnp.bfloat16 if command.bfloat16 else jnp.float32
    network, vocabulary = load_network(command.model, mesh, dtype)
    start = canvas(command, vocabulary, network.config.max_length)
    if start.max() >= network.config.vocabulary:
        raise UserError(
            f"--prompt: has token {start.max()}, and the network knows {network.config.vocabulary}."
        )
    mask_id, length = vocabulary.mask_id, len(start)
    known = int(np.argmax(start == mask_id))
    sampler = make_sampler(
        command.sampler,
        block_size=command.block_size,
        start=known,
        temperature=command.temperature,
        top_p=command.top_p,
    )
    calls = command.calls or max(1, int((start == mask_id).sum()) // 2)
    x = jnp.broadcast_to(jnp.asarray(start), (command.n, length))

    @eqx.filter_jit
    def draw(network, x, prompt, key):
        denoiser = dd.guide_prompt(network, mask_id, command.guidance)
        path = dd.Masking(mask_id)
        options: dict[str, Any] = dict(key=key, trajectory=command.out is not None)
        return dd.sample_tokens(denoiser, path, sampler, calls, x, prompt, **options)

    with jax.set_mesh(mesh), user_errors(ValueError):  # fewer calls than blocks
        found = draw(network, x, x != mask_id, stream_key(command.seed, "samples"))
    for tokens in np.asarray(found.tokens):
        say(vocabulary.decode(tokens))
    say(f"({int(found.calls)} calls of the network)")
    if command.out is not None:
        frames = np.concatenate([start[None], np.asarray(found.trajectory)[:, 0]])
        write_page(Path(command.out), vocabulary, frames, "A text appearing")
        say(f"wrote {command.out}")
