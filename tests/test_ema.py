"""Averages of parameters, against directly tracked ones and against integrals of the profiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxldm import nn, training
from eqxldm.training.ema import WIDEST

WIDTHS = (0.05, 0.1)
EPS32 = 2.0**-24


def profile(tau, updates, sigma_rel):
    """The power function on a grid of tau, by its definition; its exponent by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        width2 = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
        low, high = (low, middle) if width2 < sigma_rel**2 else (middle, high)
    inside = np.where(tau <= updates, tau / updates, 0.0)
    return (low + 1) / updates * inside**low


def midpoints(end, count=200_000):
    step = end / count
    return (np.arange(count) + 0.5) * step, step


def track(thetas, sigma_rel):
    """The average after every update, as training tracks it: float32, inside jit."""
    decay = training.power_function(sigma_rel)

    def update(carry, theta):
        ema, step = carry
        ema = training.update_ema(ema, theta, decay(step))
        return (ema, step + 1), ema

    start = jnp.full_like(thetas[0], 1e3), jnp.array(0, jnp.int32)  # to be forgotten
    return np.asarray(jax.jit(lambda t: jax.lax.scan(update, start, t)[1])(thetas), np.float64)


def random_walk(updates=768, size=32):
    steps = jax.random.normal(jax.random.key(0), (updates, size))
    return jnp.cumsum(steps, 0) / np.sqrt(updates)


def training_run(updates=768):
    """The parameters of a small network after each update of Adam on noisy targets."""
    model = nn.Linear(3, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (16, 3))
    optimizer = optax.adam(0.03)

    def loss(model, key):
        target = jnp.sin(x[:, :2]) + jax.random.normal(key, (16, 2))
        return jnp.mean((jax.vmap(model)(x) - target) ** 2)

    def step(carry, key):
        model, state = carry
        updates, state = optimizer.update(jax.grad(loss)(model, key), state)
        model = optax.apply_updates(model, updates)
        return (model, state), jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(model)])

    keys = jax.random.split(jax.random.key(2), updates)
    return jax.jit(lambda k: jax.lax.scan(step, (model, optimizer.init(model)), k)[1])(keys)


def evenly(count, updates):
    """Snapshots of both widths, `count` times, the last at the end."""
    return [(updates * (i + 1) // count, s) for i in range(count) for s in WIDTHS]


def test_update_is_the_equation_in_float32():
    ema = {"w": jnp.array([1.0, -2.0])}
    new = training.update_ema(ema, {"w": jnp.array([3.0, 2.0], jnp.bfloat16)}, 0.75)
    assert new["w"].dtype == jnp.float32
    np.testing.assert_array_equal(new["w"], [1.5, -1.0])


def test_a_bfloat16_model_moves_a_slow_average():
    ema = training.update_ema(jnp.array(1.0), jnp.array(2.0, jnp.bfloat16), 0.9999)
    assert float(ema) == pytest.approx(1.0001, abs=1e-7)


@pytest.mark.parametrize("step", [0, 3, 89, 90, 10**6])
def test_exponential_warms_up(step):
    decay = jax.jit(training.exponential(0.9))(jnp.array(step))
    assert float(decay) == pytest.approx(min(0.9, (1 + step) / (10 + step)), rel=1e-6)


def test_constant_starts_from_the_weights_and_keeps_its_digits():
    move = jax.jit(lambda step: training.update_ema(0.0, jnp.array(1.0), decay(step)))
    decay = training.constant(0.9999)
    for step in (0, 10**6):
        # 1 - float32(0.9999) would be 1.7e-4 off
        assert float(move(jnp.array(step))) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("kind", [training.constant, training.exponential])
def test_decays_outside_their_range_are_refused(kind, decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got"):
        kind(decay)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.28])
@pytest.mark.parametrize("t", [1, 2, 3, 1000, 400_000, 10_000_000, 2_000_000_000])
def test_power_function_keeps_its_digits(sigma_rel, t):
    rate = jax.jit(lambda step: 1 - training.power_function(sigma_rel)(step))(jnp.array(t - 1))
    exact = -np.expm1((training.gamma_of(sigma_rel) + 1) * np.log1p(-1 / t)) if t > 1 else 1.0
    assert rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.01, 0.05, 0.1, 0.25, 0.2886])
def test_gamma_and_sigma_invert_each_other(sigma_rel):
    gamma = training.gamma_of(sigma_rel)
    assert gamma > 0
    assert training.sigma_of(gamma) == pytest.approx(sigma_rel, rel=1e-10)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_sigma_is_the_width_of_the_profile(sigma_rel):
    tau, step = midpoints(1.0)
    gamma = training.gamma_of(sigma_rel)
    p = (gamma + 1) * tau**gamma * step
    mean = np.sum(p * tau)
    assert np.sum(p) == pytest.approx(1, rel=1e-6)
    assert np.sqrt(np.sum(p * (tau - mean) ** 2)) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, WIDEST, 0.5, float("nan")])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel must lie between 0 and 0\.2887"):
        training.power_function(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_tracked_average_weighs_updates_by_the_profile(sigma_rel):
    updates = 60
    weights = track(jnp.eye(updates), sigma_rel)[-1]
    tau, step = midpoints(updates, updates * 4000)
    integrals = (profile(tau, updates, sigma_rel) * step).reshape(updates, -1).sum(1)
    # The start, 1000, is replaced but for its rounding, and that decays as well.
    np.testing.assert_allclose(weights, integrals, atol=2e-7)


@pytest.mark.parametrize("target", [(1000, 0.07), (875, 0.15), (1000, 0.03)])
def test_posthoc_error_is_the_distance_of_the_profiles(target):
    snapshots = evenly(8, 1000)
    weights = training.posthoc_weights(snapshots, *target)
    tau, _ = midpoints(1000.0)
    wanted = profile(tau, *target)
    combined = sum(w * profile(tau, *s) for w, s in zip(weights, snapshots, strict=True))
    error = np.sqrt(np.sum((wanted - combined) ** 2) / np.sum(wanted**2))
    assert training.posthoc_error(snapshots, weights, *target) == pytest.approx(error, rel=1e-3)
    # No other weights with this sum come nearer.
    for seed in range(5):
        shift = np.random.default_rng(seed).normal(size=len(weights))
        other = weights + 1e-2 * (shift - shift.mean())
        assert training.posthoc_error(snapshots, other, *target) > error


@pytest.mark.parametrize("count", [1, 4, 32, 128])
def test_weights_sum_to_one(count):
    weights = training.posthoc_weights(evenly(count, 1000), 1000, 0.07)
    assert weights.dtype == np.float64
    assert np.sum(weights) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("index", [0, 9, 63])
def test_a_stored_average_is_given_back(index):
    snapshots = evenly(32, 1000)
    weights = training.posthoc_weights(snapshots, *snapshots[index])
    np.testing.assert_allclose(weights, np.eye(64)[index], atol=1e-7)


@pytest.mark.parametrize("trajectory", [random_walk, training_run])
@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_posthoc_average_is_the_tracked_one(trajectory, sigma_rel):
    thetas = trajectory()
    updates = len(thetas)
    stored = {s: track(thetas, s) for s in WIDTHS}
    tracked = track(thetas, sigma_rel)[-1]
    thetas = np.asarray(thetas, np.float64)
    tau, step = midpoints(float(updates))
    norm = np.sqrt(np.sum(profile(tau, updates, sigma_rel) ** 2) * step)
    spread = np.sqrt(np.sum((thetas - tracked) ** 2))
    errors, bounds = [], []
    for count in (1, 2, 4, 8, 16, 32):
        snapshots = evenly(count, updates)
        weights = training.posthoc_weights(snapshots, updates, sigma_rel)
        trees = [{"theta": stored[s][n - 1]} for n, s in snapshots]
        average = training.posthoc_ema(trees, weights)["theta"]
        errors.append(np.linalg.norm(average - tracked))
        # posthoc_error's bound, and float32: an update rounds three times, and what it leaves in
        # the average at the end is at most its share (t / updates)^(gamma + 1), whose sum over t is
        # updates / (gamma + 2), with gamma > 3 here.
        relative = training.posthoc_error(snapshots, weights, updates, sigma_rel)
        rounding = 3 * EPS32 * np.abs(thetas).max() * np.sqrt(thetas.shape[1]) * updates / 5
        bounds.append(relative * norm * spread)
        assert errors[-1] <= bounds[-1] + (1 + np.abs(weights).sum()) * rounding
    assert sorted(bounds, reverse=True) == bounds and bounds[-1] < bounds[0] / 50
    assert errors[4] < errors[0] / 10 and errors[5] < errors[0] / 100


def test_an_earlier_end_is_reconstructed():
    thetas = random_walk()
    stored = {s: track(thetas, s) for s in WIDTHS}
    snapshots = evenly(16, len(thetas))
    target = 480, 0.12  # a width that is not stored
    weights = training.posthoc_weights(snapshots, *target)
    average = training.posthoc_ema((stored[s][n - 1] for n, s in snapshots), weights)
    tracked = track(thetas, 0.12)[479]
    assert np.linalg.norm(average - tracked) < 0.02 * np.linalg.norm(tracked)


def test_posthoc_ema_sums_in_float64():
    trees = [jnp.array([1.0 + 2**-20]), jnp.array([1.0])]
    average = training.posthoc_ema(trees, np.array([2.0**20, 1 - 2.0**20]))
    assert average.dtype == np.float32
    np.testing.assert_array_equal(average, [2.0])


@pytest.mark.parametrize(
    ("snapshots", "target", "message"),
    [
        ([], (10, 0.1), "no snapshots"),
        ([(0, 0.1)], (10, 0.1), "exists after 1 update"),
        ([(10, 0.1)], (0, 0.1), "exists after 1 update"),
        ([(10, 0.1), (20, 0.1)], (21, 0.1), "the last snapshot is of update 20"),
        ([(10, 0.1)], (10, 0.3), "sigma_rel must lie between"),
        ([(10, 0.9)], (10, 0.1), "sigma_rel must lie between"),
        (evenly(2, 1000), (1000, 0.01), "describe sigma_rel 0.01 at update 1000 only to 61%"),
        (evenly(2, 1000), (10, 0.1), "describe sigma_rel 0.1 at update 10 only to"),
        # Between snapshots the target ends where no stored profile does.
        (evenly(16, 1000), (530, 0.1), "at an update that has a snapshot"),
    ],
)
def test_impossible_targets_are_refused(snapshots, target, message):
    with pytest.raises(ValueError, match=message):
        training.posthoc_weights(snapshots, *target)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([], "0 trees for 2 weights"),
        ([np.ones(2)], "1 trees for 2 weights"),
        ([np.ones(2)] * 3, "3 trees for 2 weights"),
        ([np.ones(2), {"w": np.ones(2)}], "tree 1 has other parameters"),
        ([np.ones(2), np.ones(1)], "tree 1 has other parameters"),  # would broadcast
    ],
)
def test_other_trees_than_weights_are_refused(trees, message):
    with pytest.raises(ValueError, match=message):
        training.posthoc_ema(trees, np.array([0.5, 0.5]))
