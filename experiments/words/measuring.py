"""What a run's networks are worth: bits a character, and the quality of texts by sampler."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import discrete as dd
from eqxldm.models import TokenTransformer

from ..train.streams import stream_key
from .config import Config, Measure
from .corpus import Corpus, entropies
from .training import objective_of


def make_sampler(name: str, *, block_size: int = 16, start: int = 0, **options: Any) -> Any:
    """A sampler by its name on the command line."""
    if name == "blocks":
        inside = dd.Ordered(dd.at_random, **options)
        return dd.InBlocks(inside, block_size=block_size, start=start)
    scores = dict(confidence=dd.likeliest, drawn=dd.drawn, random=dd.at_random, margin=dd.margin)
    if name in scores:
        return dd.Ordered(scores[name], **options)
    kinds = {
        "ancestral": dd.Ancestral,
        "entropy-bounded": dd.EntropyBounded,
        "threshold": dd.Threshold,
    }
    return kinds[name](**options)


def bits(objective: Any, network: Any, windows: np.ndarray, draws: int, key: Any) -> list[float]:
    """The mean of an objective over windows, in bits a token, and its standard error.

    Of each window `draws` masks, whose counts or times are stratified.
    """

    @eqx.filter_jit
    def losses(network, x0, key):
        time_key, key = jax.random.split(key)
        times = objective.times(time_key, draws)
        one = lambda t, k: objective.loss(network, x0, t, None, key=k)[0]
        return jnp.mean(jax.vmap(one)(times, jax.random.split(key, draws)))

    keys = jax.random.split(key, len(windows))
    found = np.array([losses(network, x, k) for x, k in zip(windows, keys, strict=True)])
    found = found / math.log(2)
    return [float(found.mean()), float(found.std() / math.sqrt(len(found)))]


def likelihoods(
    config: Config, measure: Measure, corpus: Corpus, networks: dict[str, TokenTransformer]
) -> dict[str, Any]:
    """Bits a character of the held-out text: the masked network's bound, the twin, and counts."""
    mask_id, per = corpus.vocabulary.mask_id, corpus.characters_per_token
    windows = corpus.windows(config.length, measure.windows)
    found: dict[str, Any] = {}
    for i, (stage, network) in enumerate(networks.items()):
        draws = measure.draws if stage == "masked" else 1
        objective = objective_of(config, mask_id, stage)
        key = jax.random.fold_in(stream_key(config.seed, "evaluation"), i)
        mean, error = bits(objective, network, windows, draws, key)
        found[stage] = {"bits_per_character": mean / per, "standard_error": error / per}
    for name, value in entropies(corpus.train, corpus.test, mask_id).items():
        found[name] = {"bits_per_character": value / per}
    return found


def quality(twin: TokenTransformer, texts: np.ndarray, mask_id: int) -> dict[str, float]:
    """Of texts `(b, n)`: the twin's perplexity of them, and the entropy of a text's own tokens.

    The one means nothing without the other: a text that repeats itself has a low perplexity.
    """
    losses = np.asarray(_losses(twin, jnp.asarray(texts), mask_id))
    shares = [np.unique(text, return_counts=True)[1] / len(text) for text in texts]
    entropy = float(np.mean([-(p * np.log2(p)).sum() for p in shares]))
    return {"perplexity": float(np.exp(losses.mean())), "entropy": entropy}


@eqx.filter_jit
def _losses(twin: TokenTransformer, texts: Any, mask_id: int) -> Any:
    objective = dd.NextToken(mask_id)
    one = lambda x: objective.loss(twin, x, jnp.ones(()), None, key=None)[0]
    return jax.vmap(one)(texts)


def table(
    config: Config, measure: Measure, corpus: Corpus, networks: dict[str, TokenTransformer]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The quality of every sampler's texts by its network calls, and one text appearing.

    A sampler is compiled once, whatever the number of calls. The first rows are of the text
    itself and of the twin's own writing.
    """
    mask_id, n = corpus.vocabulary.mask_id, config.length
    path, twin = dd.Masking(mask_id), networks["twin"]
    key = stream_key(config.seed, "samples")
    windows = corpus.windows(n, measure.samples)
    rows = [{"texts": "held out", "calls": 0, **quality(twin, windows, mask_id)}]
    write = eqx.filter_jit(
        lambda twin, key: dd.sample_next_tokens(twin, mask_id, n, measure.samples, key=key)
    )
    texts = np.asarray(write(twin, key))
    rows.append({"texts": "twin", "calls": n, **quality(twin, texts, mask_id)})
    x = jnp.full((measure.samples, n), mask_id, jnp.int32)
    counts = sorted({min(c, n) for c in measure.calls})
    history = np.zeros((0, n), np.int32)
    for name in measure.samplers:
        sampler = make_sampler(name, block_size=config.block_size)

        @eqx.filter_jit
        def draw(network, plan, key, sampler=sampler):
            return dd.sample_tokens(network, path, sampler, plan, x, key=key, trajectory=True)

        for calls in counts:
            if name == "blocks" and calls < -(-n // config.block_size):
                continue  # a block needs a call at least
            plan = dd.padded_plan(sampler.plan(path, calls, n), counts[-1])
            found = draw(networks["masked"], plan, jax.random.fold_in(key, calls))
            texts = np.asarray(found.tokens)
            scores = quality(twin, texts, mask_id)
            rows.append({"texts": name, "calls": calls, "made": int(found.calls), **scores})
            if not len(history) or name == "random":
                history = np.asarray(found.trajectory)[:, 0]
    return rows, history


def table_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| texts | steps | calls | perplexity | entropy |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['texts']} | {row['calls'] or ''} | {row.get('made', '')} | "
        f"{row['perplexity']:.2f} | {row['entropy']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
