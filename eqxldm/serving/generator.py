"""What stands behind a server: a network, how it is sampled, and what a request may say to it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..diffusion import Diffusion
from ..flow_maps import FlowMap
from ..solvers import AbstractSolver

MAP = "map"  # the solver of a flow map: each step is one call of it


@dataclass(frozen=True)
class Defaults:
    """What a request means that says nothing of it.

    Guidance is there for `interval[0] <= t <= interval[1]`, as in `guidance.guide`.
    """

    solver: str
    steps: int = 20
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Generator:
    """A model to serve, as the functions that the engine calls.

    A finished run, a diffusers folder or a file with exported functions can stand behind it.
    `network`, `decoder` and `flow_map` are PyTrees: their arrays become arguments of the compiled
    programs.

    **Arguments**:

    - `name`: what clients know it by.
    - `network`: `(x_t, t, cond, *, key=None) -> out`, one example.
    - `diffusion`: the path, and what `out` means.
    - `shape`: of `x_t`, one example.
    - `decoder`: `z -> picture`, `(c, h, w)` in [-1, 1], one example.
    - `size`: height and width of a picture, after its border of `pad` pixels was cut off.
    - `solvers`: those that a request may name. Their programs are one: see `Programs`.
    - `times`: the grid of a number of steps.
    - `defaults`: of a request.
    - `condition`: `(prompt, label) -> cond` of one example, on the host; both may be None.
      **Raises** `ValueError`, which the client reads, for what the model does not know.
    - `null`: the condition for "none" that guidance leads away from, or None: no guidance.
    - `labels`: names of the classes, for a model of classes; else empty.
    - `takes_text`: whether `prompt` is read.
    - `flow_map`: a map of the same network (`flow_maps`), or None; its solver is named "map".
    - `stream`: the key that pictures are drawn from, of a seed's key.
    - `start_std`: the standard deviation of the noise that a run over a grid starts from.
    - `most_steps`: of a request.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> import jax.numpy as jnp
    >>> generator = Generator(
    ...     "sevens", lambda x, t, cond, key=None: jnp.full_like(x, 7.0),
    ...     Diffusion(LinearFlow(), predict_x0), (1, 2, 2), lambda z: z, (2, 2),
    ...     {"ddim": DDIM()}, uniform_times, Defaults("ddim"))
    >>> generator.channels, generator.guided
    (1, False)
    """

    name: str
    network: Any
    diffusion: Diffusion
    shape: tuple[int, ...]
    decoder: Any
    size: tuple[int, int]
    solvers: Mapping[str, AbstractSolver]
    times: Callable[[int], Any]
    defaults: Defaults
    condition: Callable[[str | None, int | None], Any] = lambda prompt, label: None
    null: Any = None
    labels: Sequence[str] = ()
    takes_text: bool = False
    flow_map: FlowMap | None = None
    pad: int = 0
    channels: int = 1
    stream: Callable[[Any], Any] = lambda key: key
    start_std: Callable[[Any], float] | None = None
    most_steps: int = 250

    def __post_init__(self):
        if self.defaults.solver not in self.solver_names:
            raise ValueError(
                f"Generator: the default solver {self.defaults.solver} is not one of "
                f"{', '.join(self.solver_names)}."
            )

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is possible."""
        return self.null is not None

    @property
    def solver_names(self) -> tuple[str, ...]:
        """What a request may name."""
        return (*self.solvers, *((MAP,) if self.flow_map is not None else ()))

    def replace(self, **changes: Any) -> "Generator":
        """The same with other fields."""
        return dataclasses.replace(self, **changes)
