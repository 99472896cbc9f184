"""The variational bound, held against integrals and the entropy of Gaussian data."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import log_ndtr, ndtr

import eqxldm

from helpers import PATHS, PREDICTIONS, gaussian_denoiser
from normals import LEARNED, MEAN, RANGE, STD, gauss_hermite, optimal

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
LEARNED_EPS = LEARNED(eqxldm.predict_eps)
VALUES = 2 * np.arange(256) / 255 - 1
BIT = np.log(2)

COMPILED = {}


def compiled(key, function):
    """`function`, compiled once for all examples of a property."""
    return COMPILED.setdefault(key, jax.jit(function))


EARLY, LATE = 0.05, 0.95


def errors_of_the_optimal_denoiser(path, prediction, t):
    """`E (out - target)^2` at each `t` for `N(MEAN, STD^2)`: the error is linear in `x0` and `eps`.

    So its square is a polynomial of degree 2 in each, for which two nodes each are exact.
    """
    z, weights = gauss_hermite(2)
    denoiser = gaussian_denoiser(path, prediction, MEAN, STD)
    x0, eps = jnp.asarray(MEAN + STD * np.repeat(z, 2)), jnp.asarray(np.tile(z, 2))
    weights = np.repeat(weights, 2) * np.tile(weights, 2)

    @jax.jit
    @jax.vmap
    def error(t):
        at = path.coefficients(t)
        out = denoiser(eqxldm.q_sample(path, x0, t, eps), t, None)
        wrong = out - eqxldm.target(prediction, at, x0, eps)
        return jnp.sum(weights * wrong**2), eqxldm.elbo_weight(prediction)(at)

    return [np.asarray(a) for a in error(jnp.asarray(t))]


@each_path
def test_integral_of_the_elbo_weighted_loss_is_the_sum_of_all_steps(path, x64):
    # Gauss's rule of three nodes between any two of the table's times.
    knots = np.linspace(EARLY, LATE, 901)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    t = (knots[:-1, None] + (nodes + 1) / 2 * np.diff(knots)[:, None]).reshape(-1)
    weights = np.tile(weights / 2, 900) * np.repeat(np.diff(knots), 3)
    # In closed form: E (x0 - x0_hat)^2 = s^2 / (1 + s^2 SNR), integrated over SNR / 2.
    most, least = np.exp(path.logsnr(EARLY)), np.exp(path.logsnr(LATE))
    expected = np.log((1 + STD**2 * most) / (1 + STD**2 * least)) / 2
    for prediction in PREDICTIONS.values():
        error, weight = errors_of_the_optimal_denoiser(path, prediction, t)
        assert np.sum(weights * weight * error) == pytest.approx(expected, rel=1e-7)

    # The bound's terms, by the error of x0 in the same quadrature.
    z, node_weights = gauss_hermite(2)
    denoiser = gaussian_denoiser(path, eqxldm.predict_x0, MEAN, STD)
    x0, eps = jnp.asarray(MEAN + STD * np.repeat(z, 2)), jnp.asarray(np.tile(z, 2))
    node_weights = np.repeat(node_weights, 2) * np.tile(node_weights, 2)

    @jax.jit
    @jax.vmap
    def nats(row):
        x_t = eqxldm.q_sample(path, x0, row.t, eps)
        estimate = eqxldm.Estimate(denoiser(x_t, row.t, None), eps)
        bits = jax.vmap(lambda x, e: eqxldm.step_bits(row, x[None], e))(
            x0, jax.tree.map(lambda a: a[:, None], estimate)
        )
        return jnp.sum(node_weights * bits) * BIT

    def total(steps):
        grid = eqxldm.uniform_times(steps, LATE, EARLY)
        return float(jnp.sum(nats(eqxldm.step_table(path, grid))))

    # Each step takes the error of its noisier end: a sum of first order, from above. Twice the
    # steps halve the error, and what two sums extrapolate to is of second order.
    coarse, fine = total(900), total(1800)
    assert coarse > fine > expected
    assert (coarse - expected) / (fine - expected) == pytest.approx(2, rel=0.01)
    assert 2 * fine - coarse == pytest.approx(expected, rel=5 * (fine / expected - 1) ** 2)


VARIANCES = {
    "fixed_small": eqxldm.fixed_small,
    "fixed_large": eqxldm.fixed_large,
    "learned_range": eqxldm.learned_range,
}
each_variance = pytest.mark.parametrize("variance", VARIANCES)


@each_path
@each_variance
@given(
    pixels=st.lists(st.integers(0, 255), min_size=4, max_size=4),
    slope=st.floats(-2, 2),
    offset=st.floats(-3, 3),
    where=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_no_term_of_the_bound_is_negative(path, variance, pixels, slope, offset, where, seed):
    learned = variance == "learned_range"

    def run(x0, slope, offset, where, key):
        def denoiser(x_t, t, cond, *, key=None):
            out = slope * x_t + offset
            return jnp.concatenate([out, jnp.full_like(x_t, where)]) if learned else out

        return eqxldm.variational_bound(
            denoiser,
            eqxldm.Diffusion(path, LEARNED(eqxldm.predict_v) if learned else eqxldm.predict_v),
            eqxldm.uniform_times(5),
            x0,
            key=key,
            variance=VARIANCES[variance],
            prior_std=float(path.sigma(1.0)),
        )

    x0 = jnp.asarray(VALUES[np.array(pixels)], jnp.float32)
    bound = compiled((id(path), variance), run)(
        x0, *(jnp.float32(v) for v in (slope, offset, where)), jax.random.key(seed)
    )
    assert bound.prior >= 0 and bound.steps.shape == (5,)
    assert jnp.all(bound.steps >= 0) and jnp.all(jnp.isfinite(bound.steps))
    assert bound.total == bound.prior + jnp.sum(bound.steps)
    assert bound.total.dtype == jnp.float32


def test_total_sums_over_the_steps_of_each_of_many():
    bound = eqxldm.Bound(jnp.array([1.0, 2.0]), jnp.array([[1.0, 3.0], [0.5, 0.0]]))
    assert bound.total.tolist() == [5.0, 2.5]


def discretised_gaussian(mean, std):
    """The probabilities of the 256 values if `N(mean, std^2)` is rounded to them."""
    edges = np.concatenate([[-np.inf], (VALUES[1:] + VALUES[:-1]) / 2, [np.inf]])
    return np.diff(ndtr((edges - mean) / std))


P = discretised_gaussian(MEAN, STD)
ENTROPY = -np.sum(P[P > 0] * np.log2(P[P > 0]))


def expected_terms(path, times, variance):
    """The prior and every step's term in bits, averaged over the data and `eps` by quadrature.

    Over the 256 values the sum is complete. In `eps` the KL is quadratic and the decoder's
    likelihood nearly: 40 nodes leave nothing (the test below takes 60 and finds the same). All in
    NumPy, from the densities, with the network that is right for the Gaussian before rounding.
    """
    z, weights = gauss_hermite(40)
    joint = P[:, None] * weights
    x0 = VALUES[:, None]
    end = path.coefficients(times[0])
    prior = (end.alpha * x0[:, 0]) ** 2 + end.sigma**2 - 1 - 2 * np.log(end.sigma)
    terms = [np.sum(P * prior) / 2]
    small_before = None
    for t, s in itertools.pairwise(times):
        at, to = path.coefficients(t), path.coefficients(s)
        x_t = at.alpha * x0 + at.sigma * z
        spread = at.alpha**2 * STD**2 + at.sigma**2
        x0_hat = MEAN + at.alpha * STD**2 / spread * (x_t - at.alpha * MEAN)
        large = at.sigma**2 - (at.alpha / to.alpha) ** 2 * to.sigma**2
        # The product of q(x_s | x0) and q(x_t | x_s): precisions add.
        small = 1 / (1 / to.sigma**2 + (at.alpha / to.alpha) ** 2 / large) if s > 0 else 0.0
        low = np.log(small if s > 0 else small_before)
        high = np.log(large)
        share = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": (RANGE + 1) / 2}[variance]
        logvar = (1 - share) * low + share * high
        if s > 0:
            fusion_barrier = small * to.alpha / to.sigma**2 * (x0 - x0_hat)
            term = (logvar - np.log(small) + (small + fusion_barrier**2) / np.exp(logvar) - 1) / 2
        else:
            std = np.exp(logvar / 2)
            upper, lower = (x0 + 1 / 255 - x0_hat) / std, (x0 - 1 / 255 - x0_hat) / std
            upper = np.where(x0 > 0.999, np.inf, upper)
            lower = np.where(x0 < -0.999, -np.inf, lower)
            swap = x0 > x0_hat
            upper, lower = np.where(swap, -lower, upper), np.where(swap, -upper, lower)
            term = -(log_ndtr(upper) + np.log1p(-np.exp(log_ndtr(lower) - log_ndtr(upper))))
        terms.append(np.sum(joint * term))
        small_before = small
    return np.array(terms) / BIT


DDPM_TIMES = eqxldm.timestep_times(1000, eqxldm.respace(1000, [8]))
CASES = {
    "discrete_eps_small": ("discrete", eqxldm.predict_eps, DDPM_TIMES, "fixed_small"),
    "discrete_eps_large": ("discrete", eqxldm.predict_eps, DDPM_TIMES, "fixed_large"),
    "discrete_eps_learned": ("discrete", LEARNED_EPS, DDPM_TIMES, "learned_range"),
    "cosine_v_large": ("cosine", eqxldm.predict_v, eqxldm.uniform_times(12), "fixed_large"),
    "linear_velocity_small": (
        "linear",
        eqxldm.predict_velocity,
        eqxldm.shifted_times(9, 0.5),
        "fixed_small",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_of_gaussian_data_is_the_integral_and_a_bound(case, x64, key):
    path, prediction, times, variance = CASES[case]
    path = PATHS[path]

    def one(key):
        data, noise = jax.random.split(key)
        x0 = jax.random.choice(data, jnp.asarray(VALUES), (1,), p=jnp.asarray(P))
        return eqxldm.variational_bound(
            optimal(path, prediction),
            eqxldm.Diffusion(path, prediction),
            times,
            x0,
            key=noise,
            variance=VARIANCES[variance],
        )

    n = 4000
    bound = jax.jit(jax.vmap(one))(jax.random.split(key, n))
    expected = expected_terms(path, times, variance)
    terms = np.concatenate([bound.prior[:, None], bound.steps], axis=1)
    # Five standard errors, for each term and for the total; rounding where a term is exact.
    error = lambda x: 5 * np.std(x, axis=0) / np.sqrt(n) + 1e-10
    assert np.all(np.abs(np.mean(terms, axis=0) - expected) < error(terms))
    total = np.asarray(bound.total)
    assert abs(np.mean(total) - np.sum(expected)) < error(total)
    # It bounds the best code length, both ways of computing it.
    assert np.sum(expected) > ENTROPY
    assert np.mean(total) > ENTROPY - error(total)


@each_variance
def test_more_steps_bring_the_bound_nearer_to_the_entropy(variance, x64):
    path = PATHS["discrete"]
    counts = [10, 50, 250, 1000]
    totals = [
        np.sum(expected_terms(path, eqxldm.timestep_times(1000, kept), variance))
        for kept in (eqxldm.respace(1000, [n]) for n in counts)
    ]
    assert np.all(np.diff(totals) < 0) and totals[-1] > ENTROPY


def test_the_bound_broadcasts_over_the_shape_and_takes_its_mean(x64, key):
    # With the noise of every element the same, every element has the same bits.
    path, prediction, times, _ = CASES["discrete_eps_small"]

    def bits(shape):
        with mock.patch("jax.random.normal", lambda key, shape, dtype: jnp.full(shape, 0.4, dtype)):
            return eqxldm.variational_bound(
                optimal(PATHS[path], prediction), eqxldm.Diffusion(PATHS[path], prediction), times,
                jnp.full(shape, VALUES[180]), key=key,
            ).total  # fmt: skip

    assert float(bits((2, 3, 3))) == pytest.approx(float(bits((1,))), rel=1e-12)


def test_bfloat16_data_have_a_float32_bound(key):
    x0 = jnp.asarray(VALUES[[0, 100, 255]], jnp.bfloat16)
    denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    bound = eqxldm.variational_bound(
        denoiser,
        eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v),
        eqxldm.uniform_times(3),
        x0,
        key=key,
    )
    assert bound.steps.dtype == jnp.float32 and jnp.all(jnp.isfinite(bound.steps))
    loss = eqxldm.hybrid_loss(
        lambda x_t, t, cond, key=None: jnp.concatenate([x_t, x_t]),
        eqxldm.Diffusion(PATHS["discrete"], LEARNED_EPS),
        x0,
        jnp.array(0.5),
        None,
        key=key,
    )
    assert loss.dtype == jnp.float32 and jnp.isfinite(loss)


ZERO = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)


def bound_of(path=PATHS["cosine"], prediction=eqxldm.predict_v, times=None, denoiser=ZERO, **more):
    times = eqxldm.uniform_times(3) if times is None else times
    return eqxldm.variational_bound(
        denoiser,
        eqxldm.Diffusion(path, prediction),
        times,
        jnp.ones(2),
        key=jax.random.key(0),
        **more,
    )


def test_the_bound_refuses_what_makes_no_sense():
    bound_of()
    with pytest.raises(ValueError, match=r"DDPM\(learned_range\) needs a network"):
        bound_of(variance=eqxldm.learned_range)
    with pytest.raises(ValueError, match="LearnedRange needs twice the channels"):
        bound_of(prediction=LEARNED(eqxldm.predict_v), variance=eqxldm.learned_range)
    with pytest.raises(ValueError, match="wrap the prediction in LearnedRange"):
        bound_of(denoiser=lambda x_t, t, cond, key=None: jnp.zeros(4))
    with pytest.raises(ValueError, match="times must descend"):
        bound_of(times=np.array([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="times must descend strictly"):
        bound_of(times=np.array([1.0, 0.5, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"times must lie in \[0, 1\], got times\[0\] = 1.2"):
        bound_of(times=np.array([1.2, 0.5, 0.0]))
    with pytest.raises(ValueError, match="times must be one row of at least two entries"):
        bound_of(times=np.array([1.0]))
    with pytest.raises(ValueError, match="times must lie in"):
        bound_of(times=np.array([1.0, np.nan, 0.0]))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_bound_refuses_a_prediction_that_is_singular_on_the_grid(path):
    with pytest.raises(ValueError, match=r"predict_eps .* says nothing about x0 at t = 1"):
        bound_of(PATHS[path], eqxldm.predict_eps)
    assert jnp.all(jnp.isfinite(bound_of(PATHS[path], eqxldm.predict_x0).steps))


@pytest.mark.parametrize("prior_std", [0.0, -1.0, np.nan, np.inf])
def test_a_prior_of_no_width_is_refused_by_name(prior_std):
    with pytest.raises(ValueError, match="prior_std must be positive"):
        eqxldm.prior_bits(PATHS["cosine"], jnp.ones(2), prior_std=prior_std)
