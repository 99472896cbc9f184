"""Solvers, held against the exact solutions of Gaussian data and mixtures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import (
    LATEST,
    MEAN,
    ODE_SOLVERS,
    PATHS,
    PREDICTIONS,
    SOLVERS,
    STD,
    X_T,
    WithNoise,
    gaussian_denoiser,
    reference,
    relative_error,
    sample,
    transported,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_ode_solver = pytest.mark.parametrize("solver", ODE_SOLVERS.values(), ids=ODE_SOLVERS)


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
    steps = len(times) - 1
    with jax.enable_x64(dtype == "float64"):
        noise = jnp.asarray(expected["noise"], dtype)
        states, estimates = eqxldm.sample_trajectory(
            stand_in,
            eqxldm.Diffusion(PATHS["discrete"], eqxldm.predict_eps),
            WithNoise(solver, noise[1:]),
            times,
            noise[0],
            key=jax.random.key(0),
            every=steps // 10,
        )
    assert states.dtype == dtype and len(states) == len(estimates) + 1
    assert relative_error(states[-1], expected["final"]) < bound
    kept = expected["every10"]
    kept = kept[: steps // (steps // 10) + 1]
    assert relative_error(states[: len(kept)], kept) < bound


ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp": 2, "unipc": 3}


@pytest.mark.parametrize("name", ORDERS)
@each_path
def test_orders_of_convergence(name, path, x64):
    """The exact transport map of Gaussian data is approached like h^order.

    error = c h^p + d h^(p + 1) has the measured order p + (d / c) h / (2 ln 2): its distance from
    p halves with h.
    """
    start, end, order = 0.8, 0.2, ORDERS[name]
    exact = transported(path, MEAN, STD, start, end, X_T)
    errors = []
    for steps in (128, 256, 512):
        times = eqxldm.uniform_times(steps, start, end)
        errors.append(np.max(np.abs(sample(SOLVERS[name], path, times, X_T) - exact)))
    orders = np.log2(errors[:-1] / np.array(errors[1:]))
    assert abs(orders[1] - order) < 0.1
    assert abs(orders[1] - order) < 0.6 * abs(orders[0] - order) + 0.02


@each_path
@each_ode_solver
def test_ode_solvers_carry_noise_to_the_data(solver, path, x64):
    """From t close to 1 to t = 0: the map, and so the mean and the variance, of N(m, s^2).

    The error of n steps is estimated from that of n / 2 (a ratio of 2 at first order), not
    guessed; the grid is uniform in logSNR, on which no path is stiff.
    """
    exact = transported(path, MEAN, STD, LATEST, 0.0, X_T)
    last = eqxldm.time_at_logsnr(path, np.array(12.0))  # the noise left there is 0.0025

    def run(steps):
        logsnr = np.linspace(float(path.logsnr(LATEST)), 12.0, steps)
        grid = eqxldm.time_at_logsnr(path, logsnr)
        times = np.concatenate([[LATEST], grid[1:-1], [float(last), 0.0]])
        return sample(solver, path, times, X_T)

    coarse, fine = run(150), run(300)
    difference = np.max(np.abs(coarse - fine))
    # The step to t = 0 returns E[x0 | x_t]: off by at most sigma^2 / s^2 of the spread there.
    at = path.coefficients(float(last))
    leftover = float(at.sigma / at.alpha) ** 2 / STD**2 * np.max(np.abs(exact - MEAN))
    assert difference < 0.05
    assert np.max(np.abs(fine - exact)) < 1.2 * difference + leftover
    # The map is affine: its mean and standard deviation over noise are those of the data.
    slope, at_mean = np.polyfit(X_T, np.asarray(fine), 1)
    expected_slope, expected_at = np.polyfit(X_T, exact, 1)
    assert slope == pytest.approx(expected_slope, abs=difference + leftover)
    assert at_mean == pytest.approx(expected_at, abs=2 * difference + leftover)


@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_takes_the_same_way(name, x64):
    """By half the solvers on each path, so that each solver is on two."""
    times, path = LATEST * eqxldm.uniform_times(8), PATHS[name]
    for solver in list(SOLVERS.values())[list(PATHS).index(name) % 2 :: 2]:
        way, *others = (
            sample(solver, path, times, X_T, prediction=prediction)
            for prediction in PREDICTIONS.values()
        )
        for other in others:
            np.testing.assert_allclose(other, way, rtol=1e-9)


LAND_ON_POINTS = (
    "ddim", "ddim_eta1", "ddpm_small", "ddpm_large", "dpmpp", "dpmpp_sde", "dpmpp3m", "unipc",
)  # fmt: skip


@pytest.mark.parametrize("name", LAND_ON_POINTS)
@each_path
def test_data_at_one_point_is_landed_on(name, path, x64):
    times = LATEST * eqxldm.uniform_times(5)
    landed = sample(SOLVERS[name], path, times, X_T, std=0.0)
    np.testing.assert_allclose(landed, MEAN, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - set(LAND_ON_POINTS)))
@each_path
def test_solvers_in_time_land_on_a_point_as_the_grid_is_refined(name, path, x64):
    """Euler, Heun and Euler-Maruyama know a straight path only: exact on `LinearFlow`'s ODE.

    Elsewhere the last step leaves an error that vanishes with it.
    """
    solver = SOLVERS[name]
    if path is PATHS["linear"] and name in ODE_SOLVERS:
        times = LATEST * eqxldm.uniform_times(5)
        landed = sample(solver, path, times, X_T, std=0.0)
        np.testing.assert_allclose(landed, MEAN, rtol=1e-12)
        return
    distances = []
    for steps in (50, 200, 800):
        logsnr = np.linspace(-3.0, 3.0 + 2 * np.log(steps), steps)
        times = np.append(eqxldm.time_at_logsnr(path, logsnr), 0.0)
        landed = sample(solver, path, times, X_T, std=0.0)
        distances.append(float(jnp.sqrt(jnp.mean((landed - MEAN) ** 2))))
    # The last standard deviation falls by 4 with each grid; less than half is no chance.
    assert distances[1] < distances[0] / 2 and distances[2] < distances[1] / 2


def test_one_step_to_data_returns_the_estimate():
    times = np.array([0.9, 0.0])
    for solver in (SOLVERS[name] for name in LAND_ON_POINTS):
        states, estimates = eqxldm.sample_trajectory(
            gaussian_denoiser(PATHS["cosine"], eqxldm.predict_x0, MEAN, STD),
            eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_x0),
            solver,
            times,
            jnp.asarray(X_T, jnp.float32),
            key=jax.random.key(0),
        )
        np.testing.assert_array_equal(states[-1], estimates[-1])


DATA = eqxldm.GaussianMixture([0.3, 0.5, 0.2], [-2.0, 0.0, 1.5], [0.15, 0.2, 0.1])


@each_path
def test_the_mixtures_map_is_the_quantile_map_and_solvers_reach_it(path, x64):
    start, end = 0.9, 0.1
    exact = DATA.transport(path, start, end, X_T)
    back = DATA.transport(path, end, start, exact)
    np.testing.assert_allclose(back, X_T, rtol=1e-9)
    errors = []
    for steps in (100, 200):
        times = eqxldm.uniform_times(steps, start, end)
        x = eqxldm.sample(
            DATA.denoiser(path, eqxldm.predict_v),
            eqxldm.Diffusion(path, eqxldm.predict_v),
            eqxldm.Heun(),
            times,
            jnp.asarray(X_T),
            key=jax.random.key(0),
        )
        errors.append(np.max(np.abs(x - exact)))
    assert errors[1] < 0.3 * errors[0] < 0.01


SMOOTH = eqxldm.GaussianMixture([0.3, 0.5, 0.2], [-2.0, 0.0, 1.5], [0.5, 0.6, 0.4])
MULTISTEP = {
    "dpmpp3m": (eqxldm.DPMSolverPP3M(), 3),
    "dpmpp3m_published": (eqxldm.DPMSolverPP3M(half_bend=True), 2),
    "unipc1": (eqxldm.UniPC(1, lower_order_final=False), 2),
    "unipc2": (eqxldm.UniPC(2, lower_order_final=False), 3),
    "unipc3": (eqxldm.UniPC(3, lower_order_final=False), 4),
    "unipc2_lower": (eqxldm.UniPC(2), 2),
}


@pytest.mark.parametrize("solver, order", MULTISTEP.values(), ids=MULTISTEP)
def test_multistep_orders_on_a_mixture_with_a_short_start(solver, order, x64):
    """The first steps, of lower order, are of length h^2: then the others' order shows."""
    path, (start, end) = PATHS["linear"], (0.9, 0.1)
    exact, errors = SMOOTH.transport(path, start, end, X_T), []
    low, high = (float(path.logsnr(t)) for t in (start, end))
    for steps in (40, 80, 160):
        logsnr = low + (high - low) * np.linspace(0, 1, steps + 1) ** 2
        times = eqxldm.time_at_logsnr(path, logsnr)
        denoiser = SMOOTH.denoiser(path, eqxldm.predict_v)
        diffusion = eqxldm.Diffusion(path, eqxldm.predict_v)
        x = eqxldm.sample(denoiser, diffusion, solver, times, jnp.asarray(X_T))
        errors.append(np.max(np.abs(x - exact)))
    orders = np.log2(errors[:-1] / np.array(errors[1:]))
    assert abs(orders[1] - order) < 0.25, orders


def test_short_runs_end_with_lower_orders(x64):
    """With `lower_order_final` the last step is DDIM's and the one before it of second order."""
    path, times = PATHS["cosine"], eqxldm.uniform_times(6, 0.9, 0.1)
    of_x0, of_x, a, b = eqxldm.DPMSolverPP3M().plan(path, times).table
    second = eqxldm.DPMSolverPP2M().plan(path, times).table
    np.testing.assert_allclose(of_x0, second[0], rtol=1e-9)
    np.testing.assert_allclose(of_x, second[1], rtol=1e-12)
    assert a[-1] == 0 and np.all(b[[0, 1, 4, 5]] == 0) and np.all(b[2:4] != 0)
    np.testing.assert_allclose(a[[1, 4]], second[2][[1, 4]], rtol=1e-12)
    _, predicted = eqxldm.UniPC(3).plan(path, times).table
    assert predicted[2][-1] == 0 and np.all(predicted[3][[0, 1, 4, 5]] == 0)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        eqxldm.UniPC(4)


@given(z=st.floats(-40, 5))
def test_phi_functions_are_the_integrals_they_stand_for(z):
    """`phi_k(z) = int_0^1 exp((1 - u) z) u^(k - 1) / (k - 1)! du`, by Gauss's rule."""
    from eqxldm.solvers.exponential import phi_functions

    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2
    for k, phi in enumerate(phi_functions(np.array(z)), start=1):
        integrand = np.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1)
        assert float(phi) == pytest.approx(float(np.sum(weights * integrand) / 2), rel=1e-11)


@each_path
def test_ddim_is_euler_in_scaled_variables(path, x64):
    """d(x / alpha) / d(sigma / alpha) = eps, so Euler there is x / alpha + d(sigma / alpha) eps."""
    times = LATEST * eqxldm.uniform_times(7)
    states, _ = eqxldm.sample_trajectory(
        gaussian_denoiser(path, eqxldm.predict_eps, MEAN, STD),
        eqxldm.Diffusion(path, eqxldm.predict_eps),
        eqxldm.DDIM(),
        times,
        jnp.asarray(X_T),
        key=jax.random.key(0),
    )
    denoiser = gaussian_denoiser(path, eqxldm.predict_eps, MEAN, STD)
    x = jnp.asarray(X_T)
    at = path.coefficients(times)
    for i in range(7):
        eps = denoiser(x, jnp.asarray(times[i]), None)
        ratio = at.sigma / at.alpha
        x = at.alpha[i + 1] * (x / at.alpha[i] + (ratio[i + 1] - ratio[i]) * eps)
        np.testing.assert_allclose(states[i + 1], x, rtol=1e-11)


@each_prediction
def test_ddim_is_euler_on_the_linear_flow(prediction, x64):
    times = LATEST * eqxldm.shifted_times(6, 3.0)
    ddim, euler = (
        sample(s, PATHS["linear"], times, X_T, prediction=prediction)
        for s in (eqxldm.DDIM(), eqxldm.Euler())
    )
    np.testing.assert_allclose(ddim, euler, rtol=1e-11)


@each_path
def test_dpmpp_with_one_estimate_is_ddim(path, x64):
    """Its first step, and the whole of it where estimates do not change, is DDIM's."""
    times = LATEST * eqxldm.uniform_times(6)
    constant = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 0.3)
    for eta in (0.0, 1.0):
        ddim, dpmpp = (
            eqxldm.sample(
                constant,
                eqxldm.Diffusion(path, eqxldm.predict_x0),
                solver,
                times,
                jnp.asarray(X_T),
                key=jax.random.key(0),
            )
            for solver in (eqxldm.DDIM(eta), eqxldm.DPMSolverPP2M(eta))
        )
        np.testing.assert_allclose(dpmpp, ddim, rtol=1e-11)


@pytest.mark.parametrize("name", ["discrete", "linear", "exploding"])
def test_ddim_takes_the_same_way_on_every_path(name, x64):
    """On grids of equal logSNR the states of two paths are multiples of each other."""
    first, second = PATHS["cosine"], PATHS[name]
    times = eqxldm.uniform_times(6, 0.8, 0.1)
    others = eqxldm.time_at_logsnr(second, np.asarray(first.logsnr(times)))
    scale = np.asarray(second.alpha(others)) / np.asarray(first.alpha(times))
    x = sample(eqxldm.DDIM(), first, times, X_T)
    np.testing.assert_allclose(
        sample(eqxldm.DDIM(), second, others, scale[0] * X_T), scale[-1] * np.asarray(x), rtol=1e-10
    )


@each_path
def test_dpmpp_weighs_its_last_estimates_by_the_steps_in_logsnr(path):
    times = LATEST * eqxldm.shifted_times(6, 2.0)
    half = path.logsnr(times[:-1]) / 2
    h = np.append(np.diff(half), np.inf)
    *_, weight, _ = eqxldm.DPMSolverPP2M().plan(path, times).table
    np.testing.assert_allclose(weight[1:-1], h[1:-1] / (2 * h[:-2]), rtol=1e-12)
    assert weight[0] == 0 and weight[-1] == 0  # nothing before, and an infinite step


@each_path
def test_encoding_and_decoding_return_the_start_to_the_order(path, x64):
    """DDIM inversion is first order: the way there and back misses by half with half the step."""
    prediction, x0 = eqxldm.predict_v, transported(PATHS["cosine"], MEAN, STD, 0.8, 0.1, X_T)
    denoiser = gaussian_denoiser(path, prediction, MEAN, STD)
    misses, encodings = [], []
    for steps in (64, 128, 256):
        times = eqxldm.uniform_times(steps, 0.8, 0.1)
        x = jax.jit(
            lambda x, times=times: eqxldm.ddim_invert(
                denoiser, eqxldm.Diffusion(path, prediction), times, x
            )
        )(jnp.asarray(x0))
        back = sample(eqxldm.DDIM(), path, times, x)
        misses.append(float(jnp.max(jnp.abs(back - x0))))
        encodings.append(np.max(np.abs(x - transported(path, MEAN, STD, 0.1, 0.8, x0))))
    for errors in (misses, encodings):
        orders = np.log2(errors[:-1] / np.array(errors[1:]))
        assert abs(orders[1] - 1) < 0.15


def encode(solver, path, times, x0, *, prediction=eqxldm.predict_v):
    denoiser = gaussian_denoiser(path, prediction, MEAN, STD)
    run = jax.jit(
        lambda x: eqxldm.encode(denoiser, eqxldm.Diffusion(path, prediction), solver, times, x)
    )
    return run(jnp.asarray(x0))


@each_ode_solver
def test_every_ode_solver_encodes(solver, x64):
    path, x0 = PATHS["cosine"], np.array([0.2, 1.3])
    x = encode(solver, path, eqxldm.uniform_times(400, 0.9, 0.05), x0)
    np.testing.assert_allclose(x, transported(path, MEAN, STD, 0.05, 0.9, x0), rtol=0.02)


def test_encoding_may_begin_at_clean_data(x64):
    path = PATHS["linear"]
    for name in ("ddim", "euler", "heun"):
        x = encode(SOLVERS[name], path, eqxldm.uniform_times(800), np.array([0.2, 1.3]))
        exact = transported(path, MEAN, STD, 0.0, 1.0, np.array([0.2, 1.3]))
        np.testing.assert_allclose(x, exact, rtol=0.02)


def test_zero_terminal_snr_is_a_path_to_sample_from(x64):
    alpha_bar = eqxldm.rescale_zero_terminal_snr(
        eqxldm.alpha_bar_from_betas(eqxldm.linear_betas(1000))
    )
    path = eqxldm.DiscreteVP(alpha_bar)
    exact, errors = transported(path, MEAN, STD, 1.0, 0.0, X_T), []
    for steps in (50, 100, 200):
        times = eqxldm.timestep_times(1000, eqxldm.trailing_timesteps(1000, steps))
        errors.append(np.max(np.abs(sample(eqxldm.DDIM(), path, times, X_T) - exact)))
    # First order. The last step, from timestep 1000 / N - 1 to data, shrinks with the others.
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]
    with pytest.raises(ValueError, match="predict_eps on DiscreteVP says nothing about x0"):
        sample(eqxldm.DDIM(), path, times, X_T, prediction=eqxldm.predict_eps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.5, 0.6], [0.0, 1.0], [1.0, 1.0]), "weights must be positive, sum to 1"),
        (([1.0], [0.0, 1.0], [1.0]), "must have one length"),
        (([1.0], [0.0], [-1.0]), "stds must not be negative"),
    ],
)
def test_a_wrong_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        eqxldm.GaussianMixture(*arguments)
