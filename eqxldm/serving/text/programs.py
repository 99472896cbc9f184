"""The compiled programs of a text engine: the network's answers, and what is drawn from them.

Each slot has a window of as many tokens as the model's context; a shorter text ends in it, and its
tokens do not see what comes after. Tokens are few and lie on the host; what the network says of
each slot stays on the device until its text has changed. Plans, samplers, temperatures, top-p,
guidance and seeds are numbers in small arrays, so requests that differ in all of them share a call
and a step. What has to be compiled depends on the number of network rows alone.
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
    """

    def __init__(
        self, generator: TextGenerator, *, slots: int = 8, sizes: tuple[int, ...] | None = None
    ):
        self.generator, self.slots = generator, slots
        self.sizes = powers_of_two(2 * slots) if sizes is None else tuple(sorted(sizes))
        if self.sizes[-1] < 2:
            raise ValueError(f"TextPrograms: sizes {self.sizes} do not hold a text with guidance.")
        self.numbers = {name: i for i, name in enumerate(generator.sampler_names)}
        self._samplers = [generator.sampler(name) for name in generator.sampler_names]
        self._arrays, self._network_of = separate(generator.network)
        self._ask = jax.jit(self._asked, donate_argnums=1)
        self._step = jax.jit(self._stepped)
        shape = slots, generator.length, generator.vocabulary
        self._log_p = jax.jit(lambda: jnp.zeros(shape, jnp.float32))()

    def ask(self, x, prompt, lengths, scale, rows, pairs) -> None:
        """One network call, whose answers are kept.

        `x`, `(slots, n)`: the tokens, of which `lengths` are a slot's text; `prompt` is true where
        something was known. `rows`, `(size, 2)`: the slot of each, and whether it sees no prompt.
        `pairs`, `(slots, 2)`: which rows hold a slot's answers with and without one, -1 where it
        has none; they are mixed by `scale`, as in `discrete.guide_prompt`.
        """
        self._log_p = self._ask(self._arrays, self._log_p, x, prompt, lengths, scale, rows, pairs)

    def step(self, x, plan, counts, words, drawing) -> tuple[np.ndarray, np.ndarray]:
        """The tokens after a step of each slot, and which slots' answers are numbers.

        `plan`: a `TokenPlan` with an entry for each slot. `counts`, `(slots, 3)`: the sampler's
        number (-1: the slot rests), the step's, and which text of its seed it is. `words`, `(slots,
        2)`: the seed's; `drawing`, `(slots, 2)`: temperature and top-p.
        """
        return jax.device_get(self._step(self._log_p, x, plan, counts, words, drawing))

    def warm_up(self, progress: Any = None) -> None:
        """Runs every program until none is compiled any more."""
        compile_all(partial(self._run_all, progress or (lambda name: None)))

    def _run_all(self, tell):
        s, n = self.slots, self.generator.length
        x, none = np.zeros((s, n), np.int32), np.full((s, 2), -1, np.int32)
        for size in self.sizes:
            tell(f"{size} rows")
            rows = np.zeros((size, 2), np.int32)
            lengths, scale = np.full(s, n, np.int32), np.ones(s, np.float32)
            self.ask(x, np.zeros((s, n), bool), lengths, scale, rows, none)
        tell("step")
        counts, words = np.full((s, 3), -1, np.int32), np.zeros((s, 2), np.uint32)
        self.step(x, blank_plan(s), counts, words, np.ones((s, 2), np.float32))

    # The functions that are compiled.

    def _asked(self, arrays, log_p, x, prompt, lengths, scale, rows, pairs):
        network, mask_id = self._network_of(arrays), self.generator.mask_id
        place = jnp.arange(x.shape[1])

        def call(row):
            slot, hides = row
            ids = jnp.where((hides == 1) & prompt[slot], mask_id, x[slot])
            return network(ids, None, None, key=None, mask=place < lengths[slot])

        outs = jax.vmap(call)(rows)

        def mix(pair, scale):
            out, without = outs[pair[0]], outs[pair[1]]
            mixed = without + scale.astype(out.dtype) * (out - without)
            return log_probabilities(mixed, mask_id)

        return jnp.where((pairs[:, 0] >= 0)[:, None, None], jax.vmap(mix)(pairs, scale), log_p)

    def _stepped(self, log_p, x, plan, counts, words, drawing):
        chosen, path = counts[:, 0], self.generator.path

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


def blank_plan(slots: int) -> TokenPlan:
    """A plan's entries for slots that rest, to be filled in.

    >>> blank_plan(2).left.tolist()
    [1, 1]
    """
    whole = lambda value: np.full(slots, value, np.int32)
    return TokenPlan(np.ones(slots, np.float32), np.zeros(slots, np.float32), whole(1), whole(0),
                     whole(0))  # fmt: skip
