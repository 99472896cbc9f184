"""The numbers of a run's network calls, packed into one row of float32 for each call.

What `sampling.sample` scans over are the rows of a PyTree: times, the path's coefficients, the
solver's table. Runs of different solvers and grids share programs here, so each row becomes one
vector with the same layout for all: the numbers that all have, then a part for each solver, which
is 0 for the others.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..diffusion import Diffusion
from ..predictions import inverse
from ..sampling import check_combination
from ..solvers import AbstractSolver
from ..times import check_times
from .generator import MAP, Generator

KEPT = 256  # plans


class Plan(NamedTuple):
    """The network calls of a run: their times, and a packed row of numbers for each.

    >>> Plan(np.zeros(2, np.float32), np.zeros((2, 10), np.float32), 1.0).calls
    2
    """

    times: np.ndarray
    rows: np.ndarray
    start_std: float

    @property
    def calls(self) -> int:
        return len(self.rows)


class Packing:
    """How the rows of some solvers lie in one vector of `width` numbers.

    >>> from eqxldm import DDIM, Heun, LinearFlow, predict_velocity, uniform_times
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> packing = Packing(flow, {"ddim": DDIM(), "heun": Heun()})
    >>> packed = packing.pack("heun", packing.rows("heun", uniform_times(3)))
    >>> packed.shape == (5, packing.width)
    True
    """

    def __init__(self, diffusion: Diffusion, solvers: Mapping[str, AbstractSolver]):
        self._diffusion, self._solvers = diffusion, dict(solvers)
        grid = np.array([0.9, 0.5, 0.1])
        templates = {name: self.rows(name, grid) for name in self._solvers}
        self._templates = {name: jax.tree.map(lambda a: a[0], t) for name, t in templates.items()}
        nothing = (np.float32(0), np.float32(0)), None  # of a flow map alone: t and s
        first = next(iter(self._templates.values()), nothing)
        self._common = first[0]
        self._sizes = {n: len(jax.tree.leaves(t[1])) for n, t in self._templates.items()}
        self.width = len(jax.tree.leaves(self._common)) + sum(self._sizes.values())

    def rows(self, name: str, times: Any) -> Any:
        """The rows of a run, as NumPy; `ValueError` where solver and grid do not go together."""
        diffusion, solver = self._diffusion, self._solvers[name]
        check_combination(diffusion, solver, times)
        with jax.ensure_compile_time_eval():  # a path of one's own may be written with jnp
            plan = solver.plan(diffusion.path, check_times(times, rises=solver.goes_back_up))
            at = diffusion.path.coefficients(plan.t)
            rows = (plan.t, plan.t - plan.s, at, inverse(diffusion.prediction, at)), plan.table
        return jax.tree.map(_single, rows)

    def pack(self, name: str, rows: Any) -> np.ndarray:
        """`(calls, width)` float32."""
        common, table = rows
        leaves = jax.tree.leaves(common)
        for other, size in self._sizes.items():
            zeros = [np.zeros_like(leaves[0])] * size
            leaves += jax.tree.leaves(table) if other == name else zeros
        return np.stack([np.asarray(leaf, np.float32) for leaf in leaves], axis=1)

    def unpack(self, vector: Any) -> tuple[Any, dict[str, Any]]:
        """`(t, h, at, solution)` and the table of each solver, of one packed row."""
        used = 0

        def take(template):
            nonlocal used
            leaves, structure = jax.tree.flatten(template)
            found = [vector[used + i].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
            used += len(leaves)
            return jax.tree.unflatten(structure, found)

        common = take(self._common)
        return common, {name: take(t[1]) for name, t in self._templates.items()}


class Plans:
    """The plans of a generator's requests, each made once; the latest are kept.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> from eqxldm.serving.generator import Defaults
    >>> import jax.numpy as jnp
    >>> generator = Generator(
    ...     "sevens", lambda x, t, cond, key=None: jnp.full_like(x, 7.0),
    ...     Diffusion(LinearFlow(), predict_x0), (1, 2, 2), lambda z: z, (2, 2),
    ...     {"ddim": DDIM()}, uniform_times, Defaults("ddim"))
    >>> Plans(generator)("ddim", 4).times
    array([1.  , 0.75, 0.5 , 0.25], dtype=float32)
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self.packing = Packing(generator.diffusion, generator.solvers)
        self._kept: OrderedDict[tuple[str, int], Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, solver: str, steps: int) -> Plan:
        """The plan of a solver and a number of steps; `ValueError` where there is none."""
        with self._lock:
            if (plan := self._kept.get((solver, steps))) is not None:
                self._kept.move_to_end((solver, steps))
                return plan
        plan = self._make(solver, steps)  # milliseconds
        with self._lock:
            self._kept[solver, steps] = plan
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return plan

    def has(self, solver: str, steps: int) -> bool:
        """Whether that plan is made already."""
        return (solver, steps) in self._kept

    def _make(self, solver, steps):
        generator = self._generator
        if solver == MAP:
            grid = np.linspace(1.0, 0.0, steps + 1)
            rows = np.zeros((steps, self.packing.width), np.float32)
            rows[:, 0], rows[:, 1] = grid[:-1], grid[1:]
        else:
            grid = generator.times(steps)
            rows = self.packing.pack(solver, self.packing.rows(solver, grid))
        if generator.start_std is None:
            std = generator.diffusion.prior_std
        else:
            std = generator.start_std(grid)
        return Plan(rows[:, 0].copy(), rows, float(std))


def _single(leaf):
    """A column as the loop sees it: floats in float32."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.float32) if np.issubdtype(leaf.dtype, np.floating) else leaf
