"""A loss and a solver of one's own, beside the library's: half a minute on two cores.

    python examples/own_loss.py                 # writes own_loss.png

The loss noises every example twice, by eps and by -eps: the same minimum as the denoising loss,
with less chance in it. The solver is Adams-Bashforth of second order on the probability-flow ODE:
one network call a step, and the velocity of the step before is what it carries. Both go through
the same train step and the same sampling loop as the library's own.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot as plt

import eqxldm as ex
from eqxldm.training import adamw, constant, init_state, make_loss, make_train_step

matplotlib.use("Agg")
FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
DATA = ex.GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.15, 0.25])  # whose diffusion is known exactly


class Antithetic(ex.AbstractObjective):
    """`mean of |out - target|^2` over a pair of noises, eps and -eps, at the same time."""

    diffusion: ex.Diffusion

    def times(self, key, n):
        return ex.stratified_time(key, n)

    def loss(self, denoiser, x0, times, cond, *, key, context=None):
        eps = jax.random.normal(key, x0.shape, x0.dtype)

        def one(eps):
            out = denoiser(self.diffusion.noise(x0, times, eps), times, cond)
            return jnp.mean((out - self.diffusion.target(x0, times, eps)) ** 2)

        pair = jnp.stack([one(eps), one(-eps)])
        return jnp.mean(pair), {"between_the_two": jnp.abs(pair[0] - pair[1])}


class AdamsBashforth(ex.AbstractSolver):
    """`x_s = x_t + h ((1 + r) d_t - r d_before)`, `d = alpha' x0 + sigma' eps`, `h = s - t`.

    `r = h / (2 h_before)`, and 0 at the first step, which is Euler's. Second order.
    """

    @property
    def draws_noise(self):
        return False

    def plan(self, path, times):
        i = ex.intervals(path, times)
        h = i.s - i.t
        r = np.append(0.0, h[1:] / (2 * h[:-1]))  # the tables are NumPy: float64
        return ex.one_call_a_step(times, (i.at_t.dalpha, i.at_t.dsigma, h, r))

    def init(self, x):
        return jnp.zeros_like(x)  # there is no velocity before the first

    def step(self, table, x, estimate, carry, *, key):
        dalpha, dsigma, h, r = table
        velocity = dalpha * estimate.x0 + dsigma * estimate.eps
        return x + h * ((1 + r) * velocity - r * carry), velocity


class Network(eqx.Module):
    """The velocity of a number, from its waves and those of the time."""

    mlp: eqx.nn.MLP

    def __init__(self, *, key):
        self.mlp = eqx.nn.MLP(2, 1, width_size=64, depth=3, activation=jax.nn.silu, key=key)

    def __call__(self, x_t, t, cond=None, *, key=None):
        return self.mlp(jnp.append(x_t, t))


def train(objective, steps, seed=0):
    key = jax.random.key(seed)
    optimizer = adamw(2e-3)
    state, static = init_state(Network(key=key), optimizer, num_emas=1)
    step = make_train_step(make_loss(objective), static, optimizer, ema_decays=(constant(0.99),))
    step, data = jax.jit(step, donate_argnums=0), DATA.draw(50_000, seed=seed)
    rng = np.random.default_rng(seed)
    history = []
    for _ in range(steps):
        x0 = data[rng.integers(0, len(data), 512), None].astype(np.float32)
        state, metrics = step(state, {"x0": x0}, key)
        history.append(metrics["loss"])
    last = np.asarray(jax.device_get(history[-500:]))
    print(f"{type(objective).__name__}: loss {last.mean():.3f}, from step to step {last.std():.3f}")
    return eqx.combine(state.ema[0], static)


def errors(solver, counts):
    """The mean distance from the exact flow, for each number of steps, with the exact network."""
    denoiser = DATA.denoiser(FLOW.path, FLOW.prediction)
    start, end, x = 0.9, 0.1, np.linspace(-2, 2, 41)
    exact = DATA.transport(FLOW.path, start, end, x)
    run = lambda n: ex.sample(
        denoiser, FLOW, solver, ex.uniform_times(n, start, end), jnp.asarray(x, jnp.float32)
    )
    return [float(np.mean(np.abs(run(n) - exact))) for n in counts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--out", default="own_loss.png", help="the picture")
    options = parser.parse_args()
    train(ex.Denoising(FLOW, time_sampler=ex.stratified_time), options.steps)
    network = train(Antithetic(FLOW), options.steps)
    counts = [5, 10, 20, 40, 80]
    table = {s.__class__.__name__: errors(s, counts) for s in (ex.Euler(), AdamsBashforth())}
    for name, row in table.items():
        order = np.log2(row[-2] / row[-1])
        print(f"{name}: errors {[f'{e:.4f}' for e in row]}, order {order:.1f}")

    keys = jax.random.split(jax.random.key(1), 4000)
    draw = lambda key: ex.sample(
        network, FLOW, AdamsBashforth(), ex.uniform_times(20), FLOW.sample_prior((1,), key=key)
    )
    samples = np.asarray(jax.jit(jax.vmap(draw))(keys))[:, 0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    bins = np.linspace(-2, 2, 81)
    left.hist(DATA.draw(100_000, seed=3), bins, density=True, alpha=0.5, label="data")
    left.hist(samples, bins, density=True, histtype="step", color="black", label="samples")
    left.set(title="antithetic loss, Adams-Bashforth, 20 calls", yticks=[], xlabel="x")
    left.legend()
    for name, row in table.items():
        right.loglog(counts, row, "o-", label=name)
    right.set(title="error against the exact flow", xlabel="network calls")
    right.set_xticks(counts, counts)
    right.minorticks_off()
    right.legend()
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
