"""Solvers that draw noise: their moments, the mixtures they reproduce, what they are without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import (
    LATEST,
    MEAN,
    PATHS,
    SDE_SOLVERS,
    SOLVERS,
    STD,
    VP_PATHS,
    X_T,
    gaussian_denoiser,
    reference,
    sample,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


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


@pytest.mark.parametrize("solver", [eqxldm.DDIM, eqxldm.DPMSolverPP2M])
@pytest.mark.parametrize("eta", [-0.1, 1.5, np.nan])
def test_a_wrong_eta_is_refused(solver, eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        solver(eta)
