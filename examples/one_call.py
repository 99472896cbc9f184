"""From fifty network calls to one, on points in the plane: a minute on two cores.

    python examples/one_call.py                # writes one_call.png
    python examples/one_call.py --steps 8000   # trains longer

A network learns the velocity of a flow, whose ODE takes many steps. `EasyConsistency` goes on with
it until one call from the noise leads to the data, and `frechet_loss` until what one call makes has
the features of the data. The same two go on with any denoiser, of images too; the features are then
those of a network that sees them.
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
from eqxldm.objectives import feature_moments
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


def train(network, objective, data, steps, rate, batch_size=512, seed=0):
    """The averaged network after so many steps of the objective."""
    optimizer = adamw(optax.cosine_decay_schedule(rate, steps), clip_norm=1.0)
    network = jax.tree.map(lambda a: jnp.array(a) if eqx.is_array(a) else a, network)  # is donated
    state, static = init_state(network, optimizer, num_emas=1)
    step = make_train_step(make_loss(objective), static, optimizer, ema_decays=(constant(0.995),))
    step = jax.jit(step, donate_argnums=0)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    for _ in range(steps):
        state, _ = step(state, {"x0": data[rng.integers(0, len(data), batch_size)]}, key)
    return eqx.combine(state.ema[0], static)


def one_call(network, noise):
    """The estimate of the data at `t = 1`, where there is nothing but noise."""
    f = ex.consistency_function(network, FLOW)
    return jax.vmap(lambda x: f(x, jnp.array(1.0)))(noise)


def many_calls(network, noise, calls=50):
    times = ex.uniform_times(calls)
    return jax.vmap(lambda x: ex.sample(network, FLOW, ex.Euler(), times, x))(noise)


def waves(points):
    """What points are compared by: 64 waves in random directions, long and short ones."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, 64)) * np.repeat([1, 2, 4, 8], 16)
    return jnp.cos(points @ w.astype(np.float32) + rng.uniform(0, 6.28, 64).astype(np.float32))


def match_features(network, data, steps, rate, batch_size=512, seed=0):
    """The network whose single call is trained on the Frechet distance of `waves`."""
    real, optimizer = feature_moments(waves(jnp.asarray(data))), optax.adam(rate)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    draw = lambda key, n: jax.random.normal(key, (n, 2))
    key = jax.random.key(seed)
    running = feature_moments(waves(one_call(network, draw(key, 20_000))))

    def loss(params, running, noise):
        made = one_call(eqx.combine(params, static), noise)
        return ex.frechet_loss(waves(made), real, running, decay=0.99)

    def step(carry, key):
        params, opt_state, running = carry
        grads, (running, distance) = jax.grad(loss, has_aux=True)(
            params, running, draw(key, batch_size)
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state, running), distance

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (params, _, _), _ = run((params, optimizer.init(params), running), jax.random.split(key, steps))
    return eqx.combine(params, static)


def energy_distance(x, y):
    """`2 E|x - y| - E|x - x'| - E|y - y'|`: 0 for equal distributions."""
    mean = lambda a, b: np.mean(np.linalg.norm(a[:, None] - b[None], axis=-1))
    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each stage")
    parser.add_argument("--samples", type=int, default=2000, help="points drawn by each network")
    parser.add_argument("--out", default="one_call.png", help="the picture")
    options = parser.parse_args()
    data = two_moons(20_000, seed=0)
    steps, n = options.steps, options.samples
    noise = jax.random.normal(jax.random.key(1), (n, 2))
    flow = train(
        Velocity(key=jax.random.key(0)),
        ex.Denoising(FLOW, time_sampler=ex.stratified_time),
        data, steps, 3e-3,
    )  # fmt: skip
    tuning = ex.EasyConsistency(FLOW, stage_steps=max(steps // 8, 1))
    tuned = train(flow, tuning, data, steps, 1e-3)
    matched = match_features(tuned, data, steps // 2, 1e-4)
    found = {
        "the flow, 50 calls": many_calls(flow, noise),
        "the flow, 1 call": one_call(flow, noise),
        "easy consistency tuning, 1 call": one_call(tuned, noise),
        "and the Frechet loss, 1 call": one_call(matched, noise),
    }
    fresh = two_moons(n, seed=1)
    shown = {"the data": fresh} | {name: np.asarray(points) for name, points in found.items()}
    figure, axes = plt.subplots(1, 5, figsize=(15, 2.4), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes, shown.items(), strict=True):
        distance = energy_distance(points, data[:n])
        print(f"{name:32} energy distance {distance:.4f}")
        axis.scatter(*points.T, s=2, alpha=0.4, color="tab:gray" if points is fresh else "tab:blue")
        axis.set_title(name, fontsize=10)
        axis.set(xlim=(-2.8, 2.8), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
