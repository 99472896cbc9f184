"""The compiled programs of a text engine: the network's answers, and what is drawn from them.

Each slot has a window of as many tokens as the model's context; a shorter text ends in it, and its
tokens do not see what comes after. Tokens are few and lie on the host; what the network says of
each slot stays on the device until its text has changed. Plans, samplers, temperatures, top-p,
guidance and seeds are numbers in small arrays, so requests that differ in all of them share a call
and a step. What has to be compiled depends on the number of network rows, and of texts, alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...discrete import TokenPlan, draw_tokens_at, log_probabilities, step_keys
from ..programs import compile_all, powers_of_two, separate
from .generator import TextGenerator


class TextPrograms:
    """A text generator's programs, compiled by `warm_up`; all arrays that they get are NumPy.

    - `slots`: texts that can be on their way at once.
    - `sizes`: the numbers of network rows that are compiled; a call is padded to the next one.
      With one size only, every text is computed in calls of one shape, whoever else is there.

    `steps` are the numbers of texts that a step is compiled for.
    """

    def __init__(
        self, generator: TextGenerator, *, slots: int = 8, sizes: tuple[int, ...] | None = None
    ):
        self.generator, self.slots = generator, slots
        self.sizes = powers_of_two(2 * slots) if sizes is None else tuple(sorted(sizes))
        self.steps = powers_of_two(slots) if sizes is None else (slots,)
        if self.sizes[-1] < 2:
            raise ValueError(f"TextPrograms: sizes {self.sizes} do not hold a text with guidance.")
        self.numbers = {name: i for i, name in enumerate(generator.sampler_names)}
        self._samplers = [generator.sampler(name) for name in generator.sampler_names]
        self._arrays, self._network_of = separate(generator.network)
        self._ask = jax.jit(self._asked, donate_argnums=1)
        self._step = jax.jit(self._stepped)
        shape = slots, generator.length, generator.vocabulary
        self._log_p = jax.jit(lambda: jnp.zeros(shape, jnp.float32))()

    def ask(self, x, prompt, lengths, rows, targets, scale) -> None:
        """One network call, whose answers are kept.

        `x`, `(slots, n)`: the tokens, of which `lengths` are a slot's text; `prompt` is true where
        something was known. `rows`, `(size, 2)`: the slot of each, and whether it sees no prompt.
        `targets`, `(size, 2)`: whose answer a row is, no slot's if it is `slots`; and the row of
        the same text without its prompt. They are mixed by `scale`, `(size,)`, as in
        `discrete.guide_prompt`.
        """
        self._log_p = self._ask(self._arrays, self._log_p, x, prompt, lengths, rows, targets, scale)

    def step(self, slots, x, plan, counts, words, drawing) -> tuple[np.ndarray, np.ndarray]:
        """The tokens after a step of the texts in some slots, and whose answers are numbers.

        `slots`, `(size,)`, and for each its `x`, `(size, n)`, and its entry of a `plan`. `counts`,
        `(size, 3)`: the sampler's number (-1: nothing is done), the step's, and which text of its
        seed it is. `words`, `(size, 2)`: the seed's; `drawing`, `(size, 2)`: temperature and top-p.
        """
        return jax.device_get(self._step(self._log_p, slots, x, plan, counts, words, drawing))

    def warm_up(self, progress: Any = None) -> None:
        """Runs every program until none is compiled any more."""
        compile_all(partial(self._run_all, progress or (lambda name: None)))

    def _run_all(self, tell):
        s, n = self.slots, self.generator.length
        x, whole = np.zeros((s, n), np.int32), np.full(s, n, np.int32)
        for size in self.sizes:
            tell(f"{size} rows")
            rows, targets = np.zeros((size, 2), np.int32), np.full((size, 2), [s, 0], np.int32)
            self.ask(x, x > 0, whole, rows, targets, np.ones(size, np.float32))
        for size in self.steps:
            tell(f"{size} texts")
            counts, words = np.full((size, 3), -1, np.int32), np.zeros((size, 2), np.uint32)
            given = blank_plan(size), counts, words, np.ones((size, 2), np.float32)
            self.step(np.zeros(size, np.int32), x[:size], *given)

    # The functions that are compiled.

    def _asked(self, arrays, log_p, x, prompt, lengths, rows, targets, scale):
        network, mask_id = self._network_of(arrays), self.generator.mask_id
        place = jnp.arange(x.shape[1])

        def call(row):
            slot, hides = row
            ids = jnp.where((hides == 1) & prompt[slot], mask_id, x[slot])
            return network(ids, None, None, key=None, mask=place < lengths[slot])

        outs = jax.vmap(call)(rows)

        def mix(out, other, scale):
            without = outs[other]
            mixed = without + scale.astype(out.dtype) * (out - without)
            return log_probabilities(mixed, mask_id)

        answers = jax.vmap(mix)(outs, targets[:, 1], scale)
        return log_p.at[targets[:, 0]].set(answers, mode="drop")

    def _stepped(self, log_p, slots, x, plan, counts, words, drawing):
        chosen, path, log_p = counts[:, 0], self.generator.path, log_p[slots]

        def keys_of(words, counts):
            key = jax.random.wrap_key_data(words, impl="threefry2x32")
            key = jax.random.fold_in(self.generator.stream(key), counts[2])
            return tuple(jax.random.split(step_keys(key, counts[1])[1]))

        draw_keys, order_keys = jax.vmap(keys_of)(words, counts)
        draw = lambda log_p, own, key: draw_tokens_at(log_p, own[0], own[1], key=key)
        draw_all = lambda log_p, own, key: draw_tokens_at(log_p, own[0], None, key=key)
        given = log_p, drawing, draw_keys
        cuts = jnp.any((drawing[:, 1] < 1) & (chosen >= 0))  # only then tokens are sorted
        tokens = jax.lax.cond(cuts, jax.vmap(draw), jax.vmap(draw_all), *given)

        def put(sampler, number, x, plan, chosen, log_p, tokens, key):
            new, _ = sampler.put(plan, path, x, log_p, tokens, None, key=key)
            return jnp.where(chosen == number, new, x)

        for number, sampler in enumerate(self._samplers):
            take = jax.vmap(partial(put, sampler, number))
            given = x, plan, chosen, log_p, tokens, order_keys
            x = jax.lax.cond(jnp.any(chosen == number), take, lambda x, *_: x, *given)
        return x, ~jnp.any(jnp.isnan(log_p), axis=(1, 2))


def blank_plan(size: int) -> TokenPlan:
    """Entries of plans for which there is nothing to do, to be filled in.

    >>> blank_plan(2).left.tolist()
    [1, 1]
    """
    whole = lambda value: np.full(size, value, np.int32)
    return TokenPlan(np.ones(size, np.float32), np.zeros(size, np.float32), whole(1), whole(0),
                     whole(0))  # fmt: skip
