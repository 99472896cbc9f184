"""Two moons by flow matching, and every solver beside the others: a minute on two cores.

    python examples/two_moons.py                # writes two_moons.png
    python examples/two_moons.py --steps 8000   # trains longer

Two numbers are enough to see all of it: a network learns the velocity from noise to data, then
each solver carries the same noise to the data with the same number of network calls.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib import pyplot as plt

import eqxldm as ex
from eqxldm.training import adamw, constant, init_state, make_loss, make_train_step

matplotlib.use("Agg")
FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)


def two_moons(n, *, seed):
    """`n` points of two half circles that reach into each other, (n, 2), with a little noise."""
    rng = np.random.default_rng(seed)
    angle, upper = rng.uniform(0, np.pi, n), rng.integers(0, 2, n)
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    points = np.stack([x, y], 1) + 0.06 * rng.standard_normal((n, 2))
    return (1.4 * points).astype(np.float32)  # of about unit variance, as the noise is


class Velocity(eqx.Module):
    """`(x_t, t, cond) -> velocity`, a multilayer perceptron that sees waves of the time."""

    mlp: eqx.nn.MLP

    def __init__(self, *, key):
        self.mlp = eqx.nn.MLP(2 + 8, 2, width_size=128, depth=3, activation=jax.nn.silu, key=key)

    def __call__(self, x_t, t, cond=None, *, key=None):
        waves = jnp.pi * t * 2.0 ** jnp.arange(4)
        return self.mlp(jnp.concatenate([x_t, jnp.cos(waves), jnp.sin(waves)]))


def train(data, steps, batch_size=512, seed=0):
    """The averaged network after `steps` steps."""
    key = jax.random.key(seed)
    rate = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = adamw(rate, clip_norm=1.0)
    state, static = init_state(Velocity(key=key), optimizer, num_emas=1)
    loss = make_loss(ex.Denoising(FLOW, time_sampler=ex.stratified_time))
    step = make_train_step(loss, static, optimizer, ema_decays=(constant(0.995),))
    step = jax.jit(step, donate_argnums=0)
    rng = np.random.default_rng(seed)
    for i in range(1, steps + 1):
        batch = {"x0": data[rng.integers(0, len(data), batch_size)]}
        state, metrics = step(state, batch, key)
        if i % 500 == 0 or i == steps:  # reading a loss waits for the device: not at every step
            print(f"step {i} of {steps}: loss {float(metrics['loss']):.3f}")
    return eqx.combine(state.ema[0], static)


def solvers(calls):
    """`{name: (solver, times)}`, all with about this many network calls."""
    times = ex.uniform_times(calls)
    even = ex.logsnr_times(FLOW.path, calls, -9.0, 7.0)  # in logSNR, what DPM-Solver steps in
    return {
        "Euler": (ex.Euler(), times),
        "DDIM": (ex.DDIM(), times),
        "Heun": (ex.Heun(), ex.uniform_times(calls // 2)),
        "DPM-Solver++(2M)": (ex.DPMSolverPP2M(), even),
        "DDIM, eta 1": (ex.DDIM(1.0), times),
        "DDPM": (ex.DDPM(), times),
        "Euler-Maruyama": (ex.EulerMaruyama(lambda at: at.sigma), times),
        "SDE-DPM-Solver++": (ex.DPMSolverPP2M(1.0), even),
    }


def draw(network, solver, times, n, seed=1):
    """`n` samples, (n, 2), from the same noise for every solver."""

    @jax.jit
    @jax.vmap
    def one(key):
        prior_key, solver_key = jax.random.split(key)
        x_T = FLOW.sample_prior((2,), key=prior_key)
        return ex.sample(network, FLOW, solver, times, x_T, key=solver_key)

    return np.asarray(one(jax.random.split(jax.random.key(seed), n)))


def plot(data, samples, path):
    figure, axes = plt.subplots(3, 3, figsize=(9, 6.6), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes.flat, {"the data": data, **samples}.items(), strict=True):
        axis.scatter(*points.T, s=3, alpha=0.4, color="tab:gray" if points is data else "tab:blue")
        axis.set_title(name, fontsize=11)
        axis.set(xlim=(-2.8, 2.8), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--calls", type=int, default=16, help="network calls of each solver")
    parser.add_argument("--samples", type=int, default=2000, help="points drawn by each solver")
    parser.add_argument("--out", default="two_moons.png", help="the picture")
    options = parser.parse_args()
    data = two_moons(20_000, seed=0)
    network = train(data, options.steps)
    samples = {}
    for name, (solver, times) in solvers(options.calls).items():
        samples[f"{name}, {ex.nfe(FLOW.path, solver, times)} calls"] = points = draw(
            network, solver, times, options.samples
        )
        # The mean distance to the nearest point of the data: 0.03 for fresh data.
        nearest = np.min(np.linalg.norm(points[:500, None] - data[None, :4000], axis=-1), 1)
        print(f"{name:18} mean distance to the data {nearest.mean():.3f}")
    plot(data[: options.samples], samples, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
