"""`make bench-mixture`: every solver against the exact solution, a mixture of Gaussians.

The data are `0.3 N(-2, 0.15^2) + 0.5 N(0, 0.2^2) + 0.2 N(1.5, 0.1^2)` and the network is the exact
denoiser, so all that is left is the solver's error. 100,000 starting points are the quantiles of
the exact marginal at t = 0.999. Printed is the mean distance of the sorted results from where the
exact flow carries these points, the Wasserstein-1 distance; solvers without noise keep the order,
so for them it is the mean error of a sample. As many exact random samples have the distance in
the last row, below which a solver with noise cannot go.
"""

import jax
import jax.numpy as jnp
import numpy as np

import eqxldm as ex

DATA = ex.GaussianMixture([0.3, 0.5, 0.2], [-2.0, 0.0, 1.5], [0.15, 0.2, 0.1])
STEPS, COUNT, START = (5, 10, 20, 50), 100_000, 0.999
PATHS = {
    "DDPM's linear table": ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000))),
    "CosineVP": ex.CosineVP(),
    "LinearFlow": ex.LinearFlow(),
}
SOLVERS = {
    "DDIM()": ex.DDIM(),
    "Euler()": ex.Euler(),
    "Heun()": ex.Heun(),
    "DPMSolverPP2M()": ex.DPMSolverPP2M(),
    "DPMSolverPP3M()": ex.DPMSolverPP3M(),
    "UniPC()": ex.UniPC(),
    "UniPC(3)": ex.UniPC(3),
    "DDPM()": ex.DDPM(),
    "DDPM(fixed_large)": ex.DDPM(ex.fixed_large),
    "DDIM(0.5)": ex.DDIM(0.5),
    "EulerMaruyama()": ex.EulerMaruyama(),
    "DPMSolverPP2M(1.0)": ex.DPMSolverPP2M(1.0),
}


def ends(path: ex.AbstractPath) -> tuple[np.ndarray, np.ndarray]:
    """The starting points and where the exact flow carries them."""
    quantiles = (np.arange(COUNT) + 0.5) / COUNT
    low, high = np.full(COUNT, -20.0), np.full(COUNT, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        left = DATA.cdf(middle, 1.0, 0.0) < quantiles
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    exact = (low + high) / 2
    return DATA.transport(path, 0.0, START, exact), exact


def distance(path, solver, steps, x_T, exact) -> float:
    denoiser, times = DATA.denoiser(path, ex.predict_v), ex.uniform_times(steps, START)

    @jax.jit
    def run(x_T, key):
        return ex.sample(denoiser, ex.Diffusion(path, ex.predict_v), solver, times, x_T, key=key)

    x = np.asarray(run(jnp.asarray(x_T, jnp.float32), jax.random.key(0)), np.float64)
    return float(np.mean(np.abs(np.sort(x) - exact)))


def main() -> None:
    for name, path in PATHS.items():
        x_T, exact = ends(path)
        print(f"\n| {name} | " + " | ".join(f"{n} steps" for n in STEPS) + " | calls at 20 |")
        print("|---" * (len(STEPS) + 2) + "|")
        for solver_name, solver in SOLVERS.items():
            errors = [distance(path, solver, n, x_T, exact) for n in STEPS]
            calls = ex.nfe(path, solver, ex.uniform_times(20, START))
            cells = " | ".join(f"{e:.4f}" for e in errors)
            print(f"| `{solver_name}` | {cells} | {calls} |", flush=True)
    chance = np.mean(np.abs(np.sort(DATA.draw(COUNT, seed=0)) - exact))
    print(f"\nas many exact samples: {chance:.4f}")


if __name__ == "__main__":
    main()
