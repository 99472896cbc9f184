"""The compiled programs of an engine: slots that are filled, advanced and decoded.

All images that are being drawn lie in one `State` with a fixed number of slots, which stays on the
device. A call advances any of them by one network call: the slots' times, coefficients, guidance
scales and solvers are numbers in small arrays, so requests with different steps, solvers, guidance,
prompts and seeds share it, and may join at any step. What has to be compiled depends on the number
of network rows alone; an image with guidance needs two, and one without it one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..data.pixels import to_uint8
from ..diffusion import Diffusion
from ..guidance import guide
from ..paths import LinearFlow
from ..sampling import sampling_steps
from .generator import Generator
from .plans import Plans

# A loop's step looks at its row alone, so any grid and any path make the same one.
ANY_GRID, ANY_PATH = np.array([0.9, 0.5, 0.1]), LinearFlow()
FRAMES = 8  # of the forward process
COMPILED = "/jax/core/compile/backend_compile_duration"  # what jax.monitoring calls it
ROUNDS = 4  # of warming up, at most


class State(NamedTuple):
    """The slots: the state and the last estimate of each, what its solver carries, its condition
    and the key of its noise. Each array has a leading axis of the slots."""

    x: Any
    x0: Any
    carries: Any
    cond: Any
    keys: Any


class Programs:
    """A generator's programs, compiled by `warm_up`; all arrays that they are given are NumPy.

    - `slots`: images that can be on their way at once.
    - `sizes`: the numbers of network rows that are compiled; a call is padded to the next one.
      With one size only, every image is computed in calls of one shape, whoever else is there.
    - `decodes`: likewise of the images that are decoded at once.

    A solver's step is computed for every slot where any of them takes that solver, and not at all
    otherwise: which ones are is a number, too.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        slots: int = 16,
        sizes: tuple[int, ...] | None = None,
        decodes: tuple[int, ...] | None = None,
    ):
        each = 2 if generator.guided and generator.solvers else 1  # a flow map is not guided
        self.generator, self.slots = generator, slots
        self.sizes = powers_of_two(max(slots, each)) if sizes is None else tuple(sorted(sizes))
        self.images = self.sizes[-1] // each
        self.decodes = powers_of_two(slots) if decodes is None else tuple(sorted(decodes))
        if self.sizes[-1] < each:
            raise ValueError(f"Programs: sizes {self.sizes} do not hold an image with guidance.")
        self.plans = Plans(generator)
        self.solvers = {name: i for i, name in enumerate(generator.solvers)}
        self._network, self._network_of = separate((generator.network, generator.null))
        self._map, self._map_of = separate(generator.flow_map)
        self._decoder, self._decoder_of = separate(generator.decoder)
        self._begin = jax.jit(self._begin_state)
        donating = partial(jax.jit, donate_argnums=1)
        self._admit = jax.jit(self._admitted, donate_argnums=0)
        self._advance = donating(self._advanced)
        self._follow = donating(self._followed)
        self._decode = jax.jit(self._decoded)
        self._noise = jax.jit(self._noised)
        self.state: State = self.begin()

    # What the engine calls.

    def begin(self) -> State:
        """A state with empty slots."""
        self.state = self._begin(self._blank_cond())
        return self.state

    def admit(self, mask, words, index, std, cond) -> None:
        """Starts images in the slots of `mask`: noise of the seed's `words` and of the image's
        `index` in its request, times `std`, and its condition."""
        self.state = self._admit(self.state, mask, words, index, std, cond)

    def advance(self, numbers, counts, rows) -> Any:
        """One network call; returns which slots are finite still.

        `numbers`, `(slots, 1 + width)`: the guidance scale and the plan's row. `counts`, `(slots,
        4)`: the call's number, the solver's (-1: the slot rests), and which of the `rows` hold the
        output under the slot's condition and under none. `rows`, `(size, 2)`: the slot of each,
        and whether its condition is none.
        """
        self.state, finite = self._advance(self._network, self.state, numbers, counts, rows)
        return finite

    def follow(self, numbers, counts, rows) -> Any:
        """As `advance`, by the flow map."""
        self.state, finite = self._follow(self._map, self.state, numbers, counts, rows)
        return finite

    def decode(self, rows) -> Any:
        """Pictures, uint8 `(rows, h, w, c)`: of each row's slot its state, or its estimate (1)."""
        return self._decode(self._decoder, self.state, rows)

    def noise(self, slot, words, index, alpha, sigma) -> Any:
        """`FRAMES` pictures of the forward process from what is in a slot, to the noise that it
        came from: `alpha x0 + sigma eps`."""
        return self._noise(self._decoder, self.state, slot, words, index, alpha, sigma)

    def warm_up(self, progress: Any = None) -> None:
        """Runs every program until none is compiled any more; the slots stay empty."""
        compile_all(partial(self._run_all, progress))

    def _run_all(self, progress):
        s, tell = self.slots, progress or (lambda name: None)
        off, words = np.zeros(s, bool), np.zeros((s, 2), np.uint32)
        numbers = np.zeros((s, 1 + self.plans.packing.width), np.float32)
        counts = np.zeros((s, 4), np.int32)
        counts[:, 1] = -1
        cond = self._blank_cond()
        tell("start")
        self.admit(off, words, np.zeros(s, np.int32), np.ones(s, np.float32), cond)
        for size in self.sizes:
            rows = np.zeros((size, 2), np.int32)
            tell(f"{size} rows")
            if self.generator.solvers:
                self.advance(numbers, counts, rows).block_until_ready()
            if self.generator.flow_map is not None:
                self.follow(numbers, counts, rows).block_until_ready()
        for size in self.decodes:
            tell(f"{size} pictures")
            np.asarray(self.decode(np.zeros((size, 2), np.int32)))
        frames = np.zeros(FRAMES, np.float32)
        np.asarray(self.noise(np.int32(0), words[0], np.int32(0), frames, frames))

    def _blank_cond(self):
        """Conditions of empty slots, in the shapes of a request's."""
        blank = self.generator.null
        if blank is None:
            blank = self.generator.condition(None, 0 if self.generator.labels else None)
        return jax.tree.map(lambda a: np.stack([np.asarray(a)] * self.slots), blank)

    # The functions that are compiled.

    def _init(self, x):
        return {name: solver.init(x) for name, solver in self.generator.solvers.items()}

    def _begin_state(self, cond):
        x = jnp.zeros((self.slots, *self.generator.shape), jnp.float32)
        keys = jnp.zeros((self.slots, 2), jnp.uint32)
        return State(x, jnp.zeros_like(x), jax.vmap(self._init)(x), cond, keys)

    def _start(self, words, index):
        """The noise of image `index` of a seed, and the key of what its solver draws."""
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(self.generator.stream(key), index)
        noise_key, solver_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, self.generator.shape, jnp.float32)
        return noise, jax.random.key_data(solver_key)

    def _admitted(self, state, mask, words, index, std, cond):
        noise, keys = jax.vmap(self._start)(words, index)
        x = jax.vmap(jnp.multiply)(std, noise)
        new = State(x, x, jax.vmap(self._init)(x), cond, keys)
        return jax.tree.map(partial(_where, mask), new, state)

    def _advanced(self, arrays, state, numbers, counts, rows):
        network, null = self._network_of(arrays)
        times = numbers[:, 1]

        def call(row):
            slot, is_null = row
            cond = jax.tree.map(lambda a: a[slot], state.cond)
            if null is not None:
                cond = jax.tree.map(
                    lambda n, c: jnp.where(is_null, jnp.asarray(n, c.dtype), c), null, cond
                )
            return network(state.x[slot], times[slot], cond, key=None)

        outs = jax.vmap(call)(rows)

        anywhere = Diffusion(ANY_PATH, self.generator.diffusion.prediction)

        def step(name, x, x0, carry, key, numbers, counts):
            i, chosen, own, without = counts
            common, tables = self.plans.packing.unpack(numbers[1:])
            # The outputs are there already: `guide` mixes them, and the solver's step follows.
            given = lambda x_t, t, out, *, key=None: out
            out = guide(given, outs[without], numbers[0])(x, common[0], outs[own])
            answer = lambda x_t, t, cond, *, key=None: out
            solver = self.generator.solvers[name]
            key = jax.random.wrap_key_data(key, impl="threefry2x32") if solver.draws_noise else None
            loop = sampling_steps(answer, anywhere, solver, ANY_GRID, x, key=key)
            row = (None, i, *common, tables[name])
            (new, new_carry), estimate = loop.step((x, carry), row)
            pick = partial(_where, chosen == self.solvers[name])
            return jax.tree.map(pick, (new, estimate, new_carry), (x, x0, carry))

        x, x0, carries = state.x, state.x0, dict(state.carries)
        for name, number in self.solvers.items():
            take = jax.vmap(partial(step, name))
            x, x0, carries[name] = jax.lax.cond(
                jnp.any(counts[:, 1] == number),
                take,
                lambda x, x0, carry, *_: (x, x0, carry),
                *(x, x0, carries[name], state.keys, numbers, counts),
            )
        return State(x, x0, carries, state.cond, state.keys), _finite(x)

    def _followed(self, arrays, state, numbers, counts, rows):
        flow_map = self._map_of(arrays)
        slots = rows[:, 0]

        def call(slot):
            cond = jax.tree.map(lambda a: a[slot], state.cond)
            key = jax.random.wrap_key_data(state.keys[slot], impl="threefry2x32")
            key = jax.random.fold_in(key, counts[slot, 0])
            return flow_map(state.x[slot], numbers[slot, 1], numbers[slot, 2], cond, key=key)

        outs = jax.vmap(call)(slots)
        moves = counts[:, 1] >= 0
        x = jax.vmap(_where)(moves, outs[counts[:, 2]].astype(state.x.dtype), state.x)
        x0 = jax.vmap(_where)(moves, x, state.x0)
        return State(x, x0, state.carries, state.cond, state.keys), _finite(x)

    def _decoded(self, arrays, state, rows):
        def one(row):
            slot, is_estimate = row
            return self._picture(arrays, jnp.where(is_estimate, state.x0[slot], state.x[slot]))

        return jax.vmap(one)(rows)

    def _noised(self, arrays, state, slot, words, index, alpha, sigma):
        eps, _ = self._start(words, index)
        x0 = state.x[slot]
        return jax.lax.map(lambda c: self._picture(arrays, c[0] * x0 + c[1] * eps), (alpha, sigma))

    def _picture(self, arrays, z):
        return to_uint8(self._decoder_of(arrays)(z)[None], pad=self.generator.pad)[0]


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most` itself.

    >>> powers_of_two(6)
    (1, 2, 4, 6)
    """
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def fitting(sizes: tuple[int, ...], count: int) -> int:
    """The smallest of the sizes that holds so many, or the largest.

    >>> fitting((1, 2, 4), 3)
    4
    """
    return next((size for size in sizes if size >= count), sizes[-1])


def compile_all(run: Callable[[], None]) -> None:
    """Runs every program, by `run`, until none is compiled any more.

    Once would not do where a result lies on the devices as the first argument did not.
    """
    compiled = [""]
    listen = lambda event, duration_secs, **_: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(ROUNDS):
            compiled.clear()
            run()
            if COMPILED not in compiled:
                break
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def separate(part: Any) -> tuple[tuple[Any, ...], Callable[[Any], Any]]:
    """The arrays of a model on the device, and what makes the model of them again.

    They are a plain tuple, which a call takes apart in C++: an Equinox module's own way is in
    Python, module by module, and at each call.
    """
    arrays, static = eqx.partition(part, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    whole = lambda leaves: eqx.combine(jax.tree.unflatten(structure, leaves), static)
    return tuple(map(placed, leaves)), whole


def placed(a: Any) -> Any:
    """On the device, once: a NumPy array would go there at each call. What lies on one device, on
    it plainly, as the slots do: a program is compiled for each way in which its arguments lie."""
    a = jnp.asarray(a)
    devices = a.sharding.device_set
    return jax.device_put(a, next(iter(devices))) if len(devices) == 1 else a


def _where(mask, new, old):
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


def _finite(x):
    return jnp.all(jnp.isfinite(x.reshape(len(x), -1)), axis=1)
