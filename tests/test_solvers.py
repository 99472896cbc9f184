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
    SDE_SOLVERS,
    SOLVERS,
    STD,
    VP_PATHS,
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


@pytest.mark.parametrize("path", VP_PATHS.values(), ids=VP_PATHS)
def test_ddpm_with_large_variance_keeps_standard_normal_data(path):
    # x0 ~ N(0, 1) makes x_t ~ N(0, 1) at every t, and fixed_large the exact reverse process.
    n, steps = 20_000, 10
    x_T = jax.random.normal(jax.random.key(1), (n,))
    denoiser = gaussian_denoiser(path, eqxldm.predict_v, 0.0, 1.0)
    states, _ = eqxldm.sample_trajectory(
        denoiser,
        eqxldm.Diffusion(path, eqxldm.predict_v),
        eqxldm.DDPM(eqxldm.fixed_large),
        eqxldm.uniform_times(steps),
        x_T,
        key=jax.random.key(2),
    )
    # The last step returns E[x0 | x_t] = alpha x_t.
    scale = np.append(np.ones(steps), path.alpha(1 / steps))
    # Five standard errors of a mean and of a variance of Gaussians.
    assert np.all(np.abs(np.mean(states, axis=1)) < 5 / np.sqrt(n))
    np.testing.assert_allclose(np.var(states, axis=1) / scale**2, 1, atol=5 * np.sqrt(2 / n))


def affine(solver, path, times):
    """`(gain, offset, noise)` of each step of a one-call solver on the data N(MEAN, STD^2).

    The exact estimates are affine in x_t, so every step is; read off by running it.
    """
    at = path.coefficients(times[:-1])
    spread = at.alpha**2 * STD**2 + at.sigma**2
    rows = []
    plan = solver.plan(path, times)
    for i in range(len(times) - 1):

        def step(x, i=i):
            centred = (x - at.alpha[i] * MEAN) / spread[i]
            estimate = eqxldm.Estimate(MEAN + at.alpha[i] * STD**2 * centred, at.sigma[i] * centred)
            table = jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], plan.table)
            key = jax.random.key(0)
            return solver.step(table, x, estimate, jnp.zeros_like(x), key=key)[0]

        two = jnp.array([0.0, 1.0])
        ahead = np.asarray(step(two))
        drawn = np.asarray(jax.random.normal(jax.random.key(0), (2,), two.dtype))
        same = np.asarray(step(jnp.zeros(2)))
        std = (same[1] - same[0]) / (drawn[1] - drawn[0])
        offset = same[0] - std * drawn[0]
        rows.append((ahead[1] - std * drawn[1] - offset, offset, std))
    return rows


@each_path
@pytest.mark.parametrize("name", ["ddpm_small", "ddpm_large", "ddim_eta1", "euler_maruyama"])
def test_moments_of_stochastic_solvers_follow_their_affine_steps(name, path, x64):
    n, times = 20_000, LATEST * eqxldm.uniform_times(6)
    at = path.coefficients(LATEST)
    mean, var = at.alpha * MEAN, at.alpha**2 * STD**2 + at.sigma**2
    x_T = mean + np.sqrt(var) * jax.random.normal(jax.random.key(1), (n,))
    for gain, offset, std in affine(SOLVERS[name], path, times):
        mean, var = gain * mean + offset, gain**2 * var + std**2
    x0 = np.asarray(sample(SOLVERS[name], path, times, x_T))
    if name != "euler_maruyama":
        assert mean == pytest.approx(MEAN)  # ancestral steps keep the mean exactly
    assert abs(x0.mean() - mean) < 5 * np.sqrt(var / n)
    assert abs(x0.var() / var - 1) < 5 * np.sqrt(2 / n)


DATA = eqxldm.GaussianMixture([0.3, 0.5, 0.2], [-2.0, 0.0, 1.5], [0.15, 0.2, 0.1])
BORDERS = np.array([-1.0, 0.8])  # where the density is below 1e-4


# Each solver on two paths, each path by half the solvers.
SOME_OF_BOTH = [
    pytest.param(solver, path, id=f"{solver_name}-{path_name}")
    for i, (solver_name, solver) in enumerate(SDE_SOLVERS.items())
    for j, (path_name, path) in enumerate(PATHS.items())
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize("solver, path", SOME_OF_BOTH)
def test_stochastic_solvers_reproduce_the_weights_of_a_mixture(solver, path):
    """The shares of the modes, within what is due to chance and to the step.

    Chance: five standard deviations of a binomial. The step: half as many steps differ by about
    as much as all of them miss, for a solver of first order; here by less than chance.
    """
    n, start, stop = 20_000, 0.999, 8.0
    rng = np.random.default_rng(0)
    at = path.coefficients(start)
    x_T = jnp.asarray(at.alpha * DATA.draw(n, seed=1) + at.sigma * rng.standard_normal(n))
    denoiser = DATA.denoiser(path, eqxldm.predict_v)

    def shares(steps):
        logsnr = np.linspace(float(path.logsnr(start)), stop, steps)
        times = np.append(eqxldm.time_at_logsnr(path, logsnr), 0.0)
        arguments = (denoiser, eqxldm.Diffusion(path, eqxldm.predict_v), solver, times)
        x0 = jax.jit(lambda x, key: eqxldm.sample(*arguments, x, key=key))(x_T, jax.random.key(2))
        return np.bincount(np.searchsorted(BORDERS, np.asarray(x0)), minlength=3) / n

    coarse, fine = shares(120), shares(240)
    chance = 5 * np.sqrt(DATA.weights * (1 - DATA.weights) / n)
    bias = np.abs(coarse - fine)
    assert np.all(bias < chance)
    assert np.all(np.abs(fine - DATA.weights) < chance + bias)


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
def test_stochastic_ddim_is_ddpm(path, x64):
    times = LATEST * eqxldm.uniform_times(7)
    interval = eqxldm.intervals(path, times)
    noise = eqxldm.DDIM(1.0).plan(path, times).table[2]
    variance = eqxldm.posterior_coefficients(interval.at_s, interval.at_t)[2]
    np.testing.assert_allclose(noise**2, variance, rtol=1e-12)
    ddim, ddpm = (sample(s, path, times, X_T) for s in (eqxldm.DDIM(1.0), eqxldm.DDPM()))
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-10)


@each_path
@given(eta=st.floats(0, 1))
def test_eta_scales_the_noise_between_none_and_ddpm(path, eta):
    times = LATEST * eqxldm.uniform_times(7)
    sigma_s = path.coefficients(times[1:]).sigma
    _, b, c = eqxldm.DDIM(eta).plan(path, times).table
    np.testing.assert_allclose(c, eta * eqxldm.DDIM(1.0).plan(path, times).table[2], rtol=1e-12)
    np.testing.assert_allclose(b**2 + c**2, sigma_s**2, rtol=1e-12, atol=1e-300)


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


@each_path
def test_the_sde_variant_of_dpmpp_draws_from_the_posterior(path):
    """x_s = ct x_t + c0 D + sqrt(var) noise, with the (c0, ct, var) of q(x_s | x_t, x0)."""
    times = LATEST * eqxldm.uniform_times(6)
    i = eqxldm.intervals(path, times)
    c0, ct, variance = eqxldm.posterior_coefficients(i.at_s, i.at_t)
    of_x0, of_x, _, noise = eqxldm.DPMSolverPP2M(1.0).plan(path, times).table
    np.testing.assert_allclose(of_x0, c0, rtol=1e-10)
    np.testing.assert_allclose(of_x, ct, rtol=1e-10)
    np.testing.assert_allclose(noise**2, variance, rtol=1e-10)


@each_path
@given(t=st.floats(0.05, 0.95))
def test_forward_diffusion_is_the_rate_of_fresh_noise(path, t):
    """g^2 = -sigma^2 d logSNR / dt, and noise of variance g^2 dt comes in from t - dt to t."""
    at, dt = path.coefficients(t), 1e-6
    g2 = float(eqxldm.forward_diffusion(at))
    slope = (path.logsnr(t + dt) - path.logsnr(t - dt)) / (2 * dt)
    # Central differences: rounding of logSNR over dt, and a third derivative below 1e5 times dt^2.
    assert g2 == pytest.approx(-(float(at.sigma) ** 2) * float(slope), rel=1e-6)
    before, after = path.coefficients(t - dt), path.coefficients(t + dt)
    variance = eqxldm.transition_coefficients(before, after)[1]
    # One-sided, by dt; the difference of variances is known to 1e-16 / dt.
    assert g2 == pytest.approx(float(variance) / (2 * dt), rel=1e-3)


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


@each_path
def test_learned_variance_spans_from_small_to_large(path, x64):
    times = LATEST * eqxldm.uniform_times(6)
    prediction = eqxldm.LearnedRange(eqxldm.predict_v)
    plain = gaussian_denoiser(path, eqxldm.predict_v, MEAN, STD)

    def run(solver, u, prediction=prediction):
        denoiser = lambda x_t, t, cond, key=None: jnp.concatenate(
            [plain(x_t, t), jnp.full_like(x_t, u)]
        )
        return eqxldm.sample(
            denoiser,
            eqxldm.Diffusion(path, prediction),
            solver,
            times,
            jnp.asarray(X_T),
            key=jax.random.key(3),
        )

    learned = eqxldm.DDPM(eqxldm.learned_range)
    for u, fixed in ((-1.0, eqxldm.fixed_small), (1.0, eqxldm.fixed_large)):
        expected = run(eqxldm.DDPM(fixed), 0.0)
        np.testing.assert_allclose(run(learned, u), expected, rtol=1e-10)
    low, high = eqxldm.learned_range(eqxldm.intervals(path, times))
    middle = run(eqxldm.DDPM(lambda i: ((low + high) / 2, None)), 0.0)
    np.testing.assert_allclose(run(learned, 0.0), middle, rtol=1e-10)
    assert np.all(low[:-1] < high[:-1])


def test_the_clipped_small_variance_equals_the_published_one():
    expected = reference("schedule_linear_1000")["posterior_log_variance_clipped"]
    times = eqxldm.timestep_times(1000, np.arange(1000))
    log_variance, _ = eqxldm.fixed_small(eqxldm.intervals(PATHS["discrete"], times))
    # sigma_{t|s}^2 is a difference, in which at least 1e-3 of its terms is left.
    np.testing.assert_allclose(log_variance[::-1], expected, rtol=1e-10)


def test_stochastic_steps_draw_different_noise_and_obey_the_key():
    path, times = PATHS["discrete"], eqxldm.uniform_times(4)
    zero = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)

    def noises(seed):
        diffusion = eqxldm.Diffusion(path, eqxldm.predict_x0)
        arguments = (zero, diffusion, eqxldm.DDPM(), times, jnp.zeros(500))
        states, _ = eqxldm.sample_trajectory(*arguments, key=jax.random.key(seed))
        at, nxt = path.coefficients(times[:-1]), path.coefficients(times[1:])
        _, ct, variance = eqxldm.posterior_coefficients(nxt, at)
        return [(states[i + 1] - float(ct[i]) * states[i]) / np.sqrt(variance[i]) for i in range(3)]

    drawn = np.stack(noises(0) + noises(1))
    correlations = np.corrcoef(drawn) - np.eye(6)
    assert np.max(np.abs(correlations)) < 5 / np.sqrt(500)  # five standard errors


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


@pytest.mark.parametrize("solver", [eqxldm.DDIM, eqxldm.DPMSolverPP2M])
@pytest.mark.parametrize("eta", [-0.1, 1.5, np.nan])
def test_a_wrong_eta_is_refused(solver, eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        solver(eta)


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
