"""The engine of texts: shared network calls, and each text what it would be alone."""

import time
from dataclasses import replace
from itertools import pairwise
from queue import Queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import (
    MASK,
    TEXT_SAMPLERS,
    compilations,
    expected_texts,
    letters,
    make_text_generator,
    writing,
    written,
)

from eqxldm import discrete as dd
from eqxldm.serving.events import Failure, QueueFull
from eqxldm.serving.requests import Limits, RequestError
from eqxldm.serving.text import Progress, TextRequest, Written

# Requests that differ in everything, and what their windows begin with.
MIXED = [
    (TextRequest(("ab",), "random", 2**40, n=2), ["ab", *"_" * 14]),
    (TextRequest(("",), "ancestral", 1, calls=40), ["_"] * 16),
    (TextRequest(("c",), "threshold", 2, calls=9, max_tokens=9, temperature=0.3), ["c", *"_" * 9]),
    (TextRequest(("fa",), "blocks", 3, calls=5, block_size=6, max_tokens=9), ["fa", *"_" * 9]),
    (TextRequest(("a_b__c",), "random", 4, infill=True, top_p=0.6), ["a", "_", "b", "_", "_", "c"]),
    (TextRequest(("de",), "random", 5, guidance=2.5, calls=4), ["de", *"_" * 14]),
    (
        TextRequest(("d",), "blocks", 6, max_tokens=7, suffix="f", temperature=0.0, calls=7),
        ["d", *"_" * 7, "f"],
    ),
]


@pytest.fixture(scope="module")
def generator():
    return make_text_generator()


@pytest.fixture(scope="module")
def engine(generator):
    with writing(generator, slots=3, queue=16, sizes=(1, 2, 4)) as engine:
        yield engine


def test_each_text_of_a_mixture_is_what_sample_tokens_writes(generator, engine):
    assert {wanted.sampler for wanted, _ in MIXED} == set(TEXT_SAMPLERS)
    with compilations() as compiled:
        found = written(engine, *(wanted for wanted, _ in MIXED))
        assert not compiled
    for (wanted, start), texts in zip(MIXED, found, strict=True):
        ours, calls = expected_texts(generator, wanted, start)
        assert [text for text, _ in texts] == ours, wanted
        if wanted.n == 1:  # of several texts a call is left out for all of them or for none
            assert texts[0][1] == calls, wanted
        assert all("_" not in text for text, _ in texts)
    assert {calls for _, calls in found[1]} < set(range(17))  # 40 steps, and 16 tokens to find
    # The prompts of a list, and the texts of a prompt, are those of requests alone.
    both = TextRequest(("ab", "d"), "random", 2**40, n=1)
    ((first, second),) = written(engine, both)
    assert first == found[0][0] and second[0].startswith("d")


def test_numbers_of_a_compiled_program_draw_as_constants_do():
    log_p = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), (500, 6)))
    key, at = jax.random.key(1), jax.jit(dd.draw_tokens_at)
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.5), (0.0, 1.0), (0.0, 0.3), (2.0, 1.0)):
        want = dd.draw_tokens(log_p, temperature=temperature, top_p=top_p, key=key)
        found = at(log_p, jnp.float32(temperature), jnp.float32(top_p), key=key)
        assert (found == want).all()
        if top_p == 1:
            assert (at(log_p, jnp.float32(temperature), None, key=key) == want).all()


def test_a_nucleus_is_the_same_set_in_programs_of_any_size():
    """XLA rounds otherwise in a program for one; it takes optimisations to see that."""
    logits = 2 * jax.random.normal(jax.random.key(5), (4, 128, 28))
    kept = jax.jit(jax.vmap(lambda x: dd.nucleus(jax.nn.log_softmax(x / 0.7), 0.9)))
    p = np.exp(np.asarray(logits, np.float64) / 0.7)
    p = -np.sort(-p / p.sum(-1, keepdims=True))
    sizes = np.sum(np.cumsum(p, -1) - p < 0.9, -1)
    for found in (kept(logits), jnp.concatenate([kept(logits[i : i + 1]) for i in range(4)])):
        assert (np.isfinite(found).sum(-1) == sizes).all()


def test_a_text_does_not_depend_on_how_many_there_are(generator):
    x = jnp.full((3, 8), MASK)
    write = lambda b: (
        dd.sample_tokens(
            generator.network, generator.path, dd.Ancestral(), 4, x[:b], key=jax.random.key(0)
        ).tokens
    )
    assert (write(3)[:1] == write(1)).all()


def test_a_live_text_fills_up_step_by_step(engine):
    queue = Queue()
    engine.submit(TextRequest(("ab",), "random", 7, calls=7, live=True), queue.put)
    events = [queue.get(timeout=30)]
    while not isinstance(events[-1], Written):
        events.append(queue.get(timeout=30))
    shown = [letters(event.tokens) for event in events]
    assert [text.count("_") for text in shown] == [12, 10, 8, 6, 4, 2, 0]
    for before, after in pairwise(shown):
        assert all(b in ("_", a) for b, a in zip(before, after, strict=True))
    steps = [(e.step, e.of, e.calls) for e in events if isinstance(e, Progress)]
    assert steps == [(i, 7, i) for i in range(1, 7)]


REFUSED = [
    (TextRequest(("abcdefabcdefabcdef",), "random", 0), "18 tokens, longer than the context of 16"),
    (TextRequest(("abcdefabcdefabcd",), "random", 0), "leaves nothing to write: shorten it"),
    (TextRequest(("abc",), "random", 0, infill=True), "nothing to write: mark blanks with _"),
    (TextRequest(("abc",), "random", 0, max_tokens=14), "the prompt takes 3 of them"),
    (TextRequest(("a", "x"), "random", 0), "'x' is not among the letters"),
    (TextRequest(("a",), "blocks", 0, calls=2, block_size=4), "need one call each at least"),
]


@pytest.mark.parametrize(("wanted", "message"), REFUSED)
def test_what_cannot_be_written_is_refused(engine, wanted, message):
    with pytest.raises(RequestError, match=message) as found:
        engine.submit(wanted, print)
    assert found.value.status == 400 and engine.waiting == 0


def test_full_late_cancelled_and_not_a_number(generator):
    nan = generator.network.tables * jnp.nan
    with writing(generator, slots=1, queue=2, sizes=(2,)) as engine:
        queue, most = Queue(), dict(calls=60, sampler="ancestral")
        held = TextRequest(("",), seed=0, n=3, **most)
        engine.generator = generator  # the network is in the programs
        jobs = [engine.submit(held, queue.put)]
        with pytest.raises(QueueFull):
            engine.submit(TextRequest(("",), seed=0, n=3, **most), queue.put)
        jobs[0].cancel()
        deadline = time.monotonic() + 20
        while (engine.active or engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.active == engine.waiting == 0
        engine.limits = Limits(seconds=0.0)
        late = Queue()
        engine.submit(held, late.put)
        failure = late.get(timeout=30)
        assert isinstance(failure, Failure) and failure.status == 504
        assert "fewer calls" in failure.message
        engine.limits = Limits()
        engine.programs._arrays = jax.tree.map(lambda a: a * 0 + nan, engine.programs._arrays)
        bad = Queue()
        engine.submit(TextRequest(("",), "random", 0), bad.put)
        assert "not a number" in bad.get(timeout=30).message
    with pytest.raises(RequestError, match="is stopping"):
        engine.submit(held, print)


def test_a_sampler_that_carries_something_is_refused():
    class Counting(dd.Ancestral):
        def init(self, x):
            return np.zeros(())

    with pytest.raises(ValueError, match="carries a state"):
        replace(make_text_generator(), sampler=lambda name, **_: Counting())
