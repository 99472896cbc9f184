import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import eqxldm

from helpers import (
    PATHS,
    PREDICTIONS,
    SOLVERS,
    VP_PATHS,
    WithNoise,
    gaussian_denoiser,
    reference,
    relative_error,
    transported,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
# Of every path but the discrete one, t = 1 holds no data: some predictions are singular there.
LATEST = 0.98
MEAN, STD = 0.7, 0.5
X_T = np.array([-1.5, -0.2, 0.4, 2.0])


def stand_in(x_t, t, cond=None, *, key=None):
    """The network of the reference trajectories, of the integer timestep."""
    timestep = (1000 * t - 1).astype(x_t.dtype)
    return 0.6 * x_t + 0.2 * jnp.sin(2 * x_t + timestep / 150)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "name, solver",
    [
        ("ddpm_linear_1000_respaced25", eqxldm.DDPM()),
        ("ddim_linear_1000_ddim20_eta0", eqxldm.DDIM()),
    ],
)
def test_trajectories_equal_reference(name, solver, dtype, bound):
    expected = reference(name)
    times = eqxldm.timestep_times(1000, np.sort(expected["timesteps"]))
    with jax.enable_x64(dtype == "float64"):
        noise = jnp.asarray(expected["noise"], dtype)
        states, estimates = eqxldm.sample_trajectory(
            stand_in, PATHS["discrete"], eqxldm.predict_eps, WithNoise(solver, noise[1:]),
            times, noise[0], key=jax.random.key(0),
        )  # fmt: skip
    steps = len(times) - 1
    assert states.dtype == dtype and len(states) == steps + 1 and len(estimates) == steps
    assert relative_error(states[-1], expected["final"]) < bound
    every = states[:: steps // 10]
    assert relative_error(every, expected["every10"][: len(every)]) < bound


def sample(solver, path, times, x_T, *, prediction=eqxldm.predict_v, mean=MEAN, std=STD, seed=0):
    denoiser = gaussian_denoiser(path, prediction, mean, std)
    run = jax.jit(
        lambda x_T, key: eqxldm.sample(denoiser, path, prediction, solver, times, x_T, key=key)
    )
    return run(jnp.asarray(x_T), jax.random.key(seed))


@pytest.mark.parametrize("solver", [eqxldm.DDIM(), eqxldm.Euler()], ids=["ddim", "euler"])
@each_path
def test_ode_solvers_reach_the_exact_map_at_first_order(solver, path, x64):
    exact = transported(path, MEAN, STD, LATEST, 0.0, X_T)
    errors = []
    for steps in (64, 128, 256):
        times = LATEST * eqxldm.uniform_times(steps)
        errors.append(np.max(np.abs(sample(solver, path, times, X_T) - exact)))
    orders = np.log2(errors[:-1] / np.array(errors[1:]))
    # error = c h + d h^2 has the order 1 + (d / c) h / (2 ln 2): its distance from 1 halves too.
    assert abs(orders[1] - 1) < 0.1
    assert abs(orders[1] - 1) < 0.6 * abs(orders[0] - 1) + 0.02


@each_path
@each_prediction
def test_every_prediction_takes_the_same_way(path, prediction, x64):
    times = LATEST * eqxldm.uniform_times(8)
    for solver in (eqxldm.DDIM(), eqxldm.Euler(), eqxldm.DDPM()):
        way = sample(solver, path, times, X_T, prediction=prediction)
        np.testing.assert_allclose(way, sample(solver, path, times, X_T), rtol=1e-9)


@each_solver
@each_path
def test_data_at_one_point_is_landed_on(solver, path, x64):
    times = LATEST * eqxldm.uniform_times(5)
    if solver is SOLVERS["euler"] and path is not PATHS["linear"]:
        # Exact only where paths are straight; elsewhere the nearer the finer the grid.
        grids = [LATEST * eqxldm.uniform_times(n) for n in (32, 128, 512)]
        ends = [sample(solver, path, grid, X_T, std=0.0) for grid in grids]
        distances = [float(jnp.max(jnp.abs(end - MEAN))) for end in ends]
        assert distances[2] < distances[1] < distances[0]
    else:
        np.testing.assert_allclose(sample(solver, path, times, X_T, std=0.0), MEAN, rtol=1e-12)


def test_one_step_of_ddim_and_ddpm_returns_the_estimate():
    times = np.array([0.9, 0.0])
    for solver in (eqxldm.DDIM(), eqxldm.DDIM(1.0), eqxldm.DDPM(), eqxldm.DDPM(eqxldm.fixed_large)):
        states, estimates = eqxldm.sample_trajectory(
            gaussian_denoiser(PATHS["cosine"], eqxldm.predict_x0, MEAN, STD), PATHS["cosine"],
            eqxldm.predict_x0, solver, times, jnp.asarray(X_T, jnp.float32), key=jax.random.key(0),
        )  # fmt: skip
        np.testing.assert_array_equal(states[-1], estimates[-1])


@pytest.mark.parametrize("path", VP_PATHS.values(), ids=VP_PATHS)
def test_ddpm_with_large_variance_keeps_standard_normal_data(path):
    # x0 ~ N(0, 1) makes x_t ~ N(0, 1) at every t, and fixed_large the exact reverse process.
    n, steps = 20_000, 10
    x_T = jax.random.normal(jax.random.key(1), (n,))
    denoiser = gaussian_denoiser(path, eqxldm.predict_v, 0.0, 1.0)
    states, _ = eqxldm.sample_trajectory(
        denoiser, path, eqxldm.predict_v, eqxldm.DDPM(eqxldm.fixed_large),
        eqxldm.uniform_times(steps), x_T, key=jax.random.key(2),
    )  # fmt: skip
    # The last step returns E[x0 | x_t] = alpha x_t.
    scale = np.append(np.ones(steps), path.alpha(1 / steps))
    # Five standard errors of a mean and of a variance of Gaussians.
    assert np.all(np.abs(np.mean(states, axis=1)) < 5 / np.sqrt(n))
    np.testing.assert_allclose(np.var(states, axis=1) / scale**2, 1, atol=5 * np.sqrt(2 / n))


@each_path
@pytest.mark.parametrize("variance", [eqxldm.fixed_small, eqxldm.fixed_large])
def test_ddpm_moments_follow_the_affine_recursion(path, variance):
    n = 20_000
    times = LATEST * eqxldm.uniform_times(6)
    at, nxt = path.coefficients(times[:-1]), path.coefficients(times[1:])
    mean = at.alpha[0] * MEAN
    var = at.alpha[0] ** 2 * STD**2 + at.sigma[0] ** 2
    x_T = mean + np.sqrt(var) * jax.random.normal(jax.random.key(1), (n,))
    c0, ct, _ = eqxldm.posterior_coefficients(nxt, at)
    extra = variance(eqxldm.Interval(times[:-1], times[1:], at, nxt))
    gain = at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2)  # d E[x0 | x_t] / d x_t
    for i in range(len(gain)):
        mean = c0[i] * (MEAN + gain[i] * (mean - at.alpha[i] * MEAN)) + ct[i] * mean
        var = (c0[i] * gain[i] + ct[i]) ** 2 * var + extra[i]
    x0 = np.asarray(sample(eqxldm.DDPM(variance), path, times, x_T))
    assert mean == pytest.approx(MEAN)  # any variance keeps the mean
    assert abs(x0.mean() - mean) < 5 * np.sqrt(var / n)
    assert abs(x0.var() / var - 1) < 5 * np.sqrt(2 / n)


@each_path
def test_stochastic_ddim_is_ddpm(path, x64):
    times = LATEST * eqxldm.uniform_times(7)
    at = path.coefficients
    interval = eqxldm.Interval(times[:-1], times[1:], at(times[:-1]), at(times[1:]))
    noise_of_ddim = eqxldm.DDIM(1.0).tables(path, interval)[2]
    np.testing.assert_allclose(noise_of_ddim**2, eqxldm.fixed_small(interval), rtol=1e-12)
    ddim, ddpm = (sample(s, path, times, X_T) for s in (eqxldm.DDIM(1.0), eqxldm.DDPM()))
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-10)


def test_eta_scales_the_noise_between_none_and_ddpm(x64):
    path, times = PATHS["cosine"], LATEST * eqxldm.uniform_times(7)
    at = path.coefficients
    interval = eqxldm.Interval(times[:-1], times[1:], at(times[:-1]), at(times[1:]))
    for eta in (0.0, 0.3, 1.0):
        _, b, c = eqxldm.DDIM(eta).tables(path, interval)
        np.testing.assert_allclose(c, eta * eqxldm.DDIM(1.0).tables(path, interval)[2], rtol=1e-12)
        np.testing.assert_allclose(b**2 + c**2, interval.at_s.sigma**2, rtol=1e-12)


@each_prediction
def test_ddim_is_euler_on_the_linear_flow(prediction, x64):
    times = LATEST * eqxldm.shifted_times(6, 3.0)
    ddim, euler = (
        sample(s, PATHS["linear"], times, X_T, prediction=prediction)
        for s in (eqxldm.DDIM(), eqxldm.Euler())
    )
    np.testing.assert_allclose(ddim, euler, rtol=1e-11)


@each_solver
def test_a_step_is_one_network_call(solver):
    calls = []

    def denoiser(x_t, t, cond, *, key=None):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.zeros_like(x_t)

    times = eqxldm.uniform_times(6)
    x = eqxldm.sample(
        denoiser, PATHS["discrete"], eqxldm.predict_eps, solver, times, jnp.ones(3),
        key=jax.random.key(0),
    )  # fmt: skip
    jax.block_until_ready(x)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls, reverse=True), times[:-1], rtol=1e-6)


@each_solver
def test_sampling_compiles_once_and_repeats_exactly(solver):
    traces = []

    def denoiser(x_t, t, cond, *, key=None):
        traces.append(x_t.shape)
        return cond * x_t

    @jax.jit
    def run(x_T, cond, key):
        return eqxldm.sample(
            denoiser, PATHS["discrete"], eqxldm.predict_v, solver, eqxldm.uniform_times(4), x_T,
            cond, key=key,
        )  # fmt: skip

    x_T = jnp.arange(3.0)
    first = run(x_T, jnp.array(0.5), jax.random.key(0))
    np.testing.assert_array_equal(first, run(x_T, jnp.array(0.5), jax.random.key(0)))
    other = run(x_T + 1, jnp.array(0.1), jax.random.key(1))
    assert len(traces) == 1 and not np.allclose(first, other)


@each_solver
def test_sample_is_the_end_of_the_trajectory_and_maps_over_a_batch(solver):
    denoiser = lambda x_t, t, cond, key=None: cond * x_t
    arguments = (denoiser, PATHS["discrete"], eqxldm.predict_v, solver, eqxldm.uniform_times(4))
    x_T = jax.random.normal(jax.random.key(0), (3, 2, 2))
    cond, keys = jnp.array([0.1, 0.2, 0.3]), jax.random.split(jax.random.key(1), 3)
    batch = jax.vmap(lambda x, c, k: eqxldm.sample(*arguments, x, c, key=k))(x_T, cond, keys)
    for i in range(3):
        states, estimates = eqxldm.sample_trajectory(*arguments, x_T[i], cond[i], key=keys[i])
        assert states.shape == (5, 2, 2) and estimates.shape == (4, 2, 2)
        np.testing.assert_array_equal(states[0], x_T[i])
        np.testing.assert_allclose(states[-1], batch[i], rtol=1e-5, atol=1e-6)


def test_stochastic_steps_draw_different_noise_and_obey_the_key():
    denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    path, times = PATHS["discrete"], eqxldm.uniform_times(4)

    def noises(seed):
        solver, key = eqxldm.DDPM(), jax.random.key(seed)
        arguments = (denoiser, path, eqxldm.predict_x0, solver, times, jnp.zeros(500))
        states, _ = eqxldm.sample_trajectory(*arguments, key=key)
        at, nxt = path.coefficients(times[:-1]), path.coefficients(times[1:])
        _, ct, variance = eqxldm.posterior_coefficients(nxt, at)
        return [(states[i + 1] - float(ct[i]) * states[i]) / np.sqrt(variance[i]) for i in range(3)]

    drawn = np.stack(noises(0) + noises(1))
    correlations = np.corrcoef(drawn) - np.eye(6)
    assert np.max(np.abs(correlations)) < 5 / np.sqrt(500)  # five standard errors


def test_grid_of_jax_times_is_close_to_the_numpy_grid():
    denoiser = gaussian_denoiser(PATHS["cosine"], eqxldm.predict_v, MEAN, STD)
    times = LATEST * eqxldm.uniform_times(6)
    for solver in SOLVERS.values():
        of_numpy, of_jax = (
            eqxldm.sample(
                denoiser, PATHS["cosine"], eqxldm.predict_v, solver, grid,
                jnp.asarray(X_T, jnp.float32), key=jax.random.key(0),
            )
            for grid in (times, jnp.asarray(times, jnp.float32))
        )  # fmt: skip
        np.testing.assert_allclose(of_numpy, of_jax, atol=1e-5)


def test_bfloat16_noise_gives_bfloat16():
    denoiser = lambda x_t, t, cond, key=None: x_t
    for solver in SOLVERS.values():
        x = eqxldm.sample(
            denoiser, PATHS["discrete"], eqxldm.predict_v, solver, eqxldm.uniform_times(2),
            jnp.ones(3, jnp.bfloat16), key=jax.random.key(0),
        )  # fmt: skip
        assert x.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(x))


@pytest.mark.parametrize(
    "times", [[1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.1, 0.0], [1.0, -0.1], [1.0, np.nan]]
)
def test_a_wrong_grid_is_refused(times):
    with pytest.raises(ValueError, match="times must descend within"):
        sample(eqxldm.DDIM(), PATHS["linear"], np.array(times), jnp.ones(2))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_a_wrong_eta_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        eqxldm.DDIM(eta)


def test_a_denoiser_of_the_wrong_shape_is_named():
    denoiser = lambda x_t, t, cond, key=None: jnp.zeros(5)
    with pytest.raises(TypeCheckError, match="parameter 'out'"):
        eqxldm.sample(
            denoiser, PATHS["linear"], eqxldm.predict_v, eqxldm.DDIM(), eqxldm.uniform_times(2),
            jnp.ones(3), key=jax.random.key(0),
        )  # fmt: skip
