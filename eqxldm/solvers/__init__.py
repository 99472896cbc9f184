"""Solvers of the reverse process: each a plan, an `init` and a `step`.

A solver goes along a time grid. Its `plan` says at which times the network is called and holds
all coefficients that depend on time alone, computed once for the whole grid: in float64 when the
grid is NumPy. Its `step` is what happens to `x` after one call: algebra on arrays, no network, no
loop. `sampling.sample` scans `step` over the plan.

| solver | solves | order | network calls in N steps | noise |
|---|---|---|---|---|
| `DDPM` | ancestral sampling | 1 | N | yes |
| `DDIM` | ODE, in `(x / alpha, sigma / alpha)` | 1 | N | for `eta > 0` |
| `Euler` | ODE, in `(x, t)` | 1 | N | no |
| `Heun` | ODE, in `(x, t)` | 2 | 2 N - 1 | no |
| `EulerMaruyama` | SDE | 1 (weak) | N | yes |
| `DPMSolverPP2M` | ODE or SDE, in logSNR | 2 | N | for `eta > 0` |
| `DPMSolverPP3M` | ODE, in logSNR | 3, 2 with a long first step | N | no |
| `UniPC` | ODE, in logSNR, each step corrected by the next call | p + 1 | N | no |

The ODE solvers also run from data to noise (`sampling.encode`).
"""

from .base import (
    AbstractSolver as AbstractSolver,
    Interval as Interval,
    Plan as Plan,
    intervals as intervals,
    one_call_a_step as one_call_a_step,
)
from .ddim import DDIM as DDIM
from .ddpm import (
    DDPM as DDPM,
    Variance as Variance,
    fixed_large as fixed_large,
    fixed_small as fixed_small,
    learned_range as learned_range,
    log_variance as log_variance,
)
from .dpm_solver import DPMSolverPP2M as DPMSolverPP2M, DPMSolverPP3M as DPMSolverPP3M
from .euler import Euler as Euler, Heun as Heun
from .euler_maruyama import EulerMaruyama as EulerMaruyama, forward_diffusion as forward_diffusion
from .unipc import UniPC as UniPC
