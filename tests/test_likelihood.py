"""The variational bound and its parts, held against quadrature, entropies and published values."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import log_ndtr, ndtr

import eqxldm

from helpers import PATHS, PREDICTIONS, gaussian_denoiser, reference, relative_error

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
LEARNED = eqxldm.LearnedRange
LEARNED_EPS = LEARNED(eqxldm.predict_eps)
VALUES = 2 * np.arange(256) / 255 - 1
BIT = np.log(2)
exact = eqxldm.discretized_gaussian_log_likelihood
approximate = eqxldm.approximate_gaussian_log_likelihood


def gauss_hermite(n):
    """Nodes and weights of the mean over `N(0, 1)`; exact for polynomials of degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / np.sum(weights)


numbers = st.floats(-3, 3, allow_subnormal=False)


@given(mean1=numbers, logvar1=numbers, mean2=numbers, logvar2=numbers)
def test_kl_of_two_normals_is_the_integral(x64, mean1, logvar1, mean2, logvar2):
    # The difference of two log-densities is quadratic: two nodes are exact.
    z, weights = gauss_hermite(2)
    x = mean1 + np.exp(logvar1 / 2) * z
    log_ratio = (logvar2 - logvar1 - z**2 + (x - mean2) ** 2 * np.exp(-logvar2)) / 2
    arguments = (jnp.array([v]) for v in (mean1, logvar1, mean2, logvar2))
    kl = float(eqxldm.normal_kl(*arguments)[0])
    assert kl == pytest.approx(np.sum(weights * log_ratio), rel=1e-12, abs=1e-13)
    assert kl >= 0
    if abs(mean1 - mean2) > 1e-6 or abs(logvar1 - logvar2) > 1e-6:
        assert kl > 0


@given(mean=numbers, logvar=numbers)
def test_kl_of_a_normal_to_itself_is_exactly_zero(mean, logvar):
    mean, logvar = jnp.array([mean], jnp.float32), jnp.array([logvar], jnp.float32)
    assert float(eqxldm.normal_kl(mean, logvar, mean, logvar)[0]) == 0


def test_kl_of_two_normals_is_never_negative_in_float32():
    # exp(d) - 1 - d of small d of both signs is where a careless formula falls below 0.
    d = np.concatenate([np.linspace(-1e-3, 1e-3, 20001), np.geomspace(1e-30, 1, 2001)])
    d = jnp.asarray(d, jnp.float32)
    zero = jnp.zeros_like(d)
    assert jnp.all(jax.jit(eqxldm.normal_kl)(zero, d, zero, zero) >= 0)


def test_kl_to_the_standard_normal_is_the_sum_of_its_elements():
    mean, logvar = jnp.array([0.5, -1.0]), jnp.array([0.3, -2.0])
    each = eqxldm.normal_kl(mean, logvar, jnp.zeros(2), jnp.zeros(2))
    whole = eqxldm.kl_to_standard_normal(mean, logvar)
    assert float(jnp.sum(each)) == pytest.approx(float(whole), rel=1e-6)


COMPILED = {}


def compiled(key, function):
    """`function`, compiled once for all examples of a property."""
    return COMPILED.setdefault(key, jax.jit(function))


def likelihoods(function, mean, log_std, values=VALUES):
    x = jnp.asarray(values)
    full = lambda v: jnp.full(x.shape, v, x.dtype)
    return compiled(function, function)(x, full(mean), full(log_std))


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(np.log(1e-4), 5))
def test_the_256_probabilities_sum_to_one(x64, mean, log_std):
    assert float(jnp.sum(jnp.exp(likelihoods(exact, mean, log_std)))) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("mean", [-50.0, -1.0, 0.0, 1 / 255, 0.3, 3.0])
def test_the_256_probabilities_sum_to_one_for_tiny_stds_and_far_means(x64, mean, std):
    log_p = likelihoods(exact, mean, np.log(std))
    assert jnp.all(jnp.isfinite(log_p)) and jnp.all(log_p <= 0)
    assert float(jnp.sum(jnp.exp(log_p))) == pytest.approx(1, abs=1e-10)


@given(mean=st.floats(-1, 1), log_std=st.floats(-3, 1))
def test_each_probability_is_that_of_its_bin(x64, mean, log_std):
    # By the tail that is nearer, of upper and lower edges that are infinite at the ends.
    lower = np.append(-np.inf, (VALUES[1:] - 1 / 255 - mean) / np.exp(log_std))
    upper = np.append((VALUES[:-1] + 1 / 255 - mean) / np.exp(log_std), np.inf)
    of_left, of_right = ndtr(upper) - ndtr(lower), ndtr(-lower) - ndtr(-upper)
    expected = np.where(lower + upper < 0, of_left, of_right)
    expected[[0, -1]] = ndtr(upper[0]), ndtr(-lower[-1])
    actual = np.exp(likelihoods(exact, mean, log_std))
    # Below -20 JAX's log_ndtr leaves out what follows the term in u^-6: 105 / 20^8 = 4e-9.
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-300)


@given(mean=st.floats(-2, 2), log_std=st.floats(np.log(1e-3), 2))
@pytest.mark.parametrize("function", [exact, approximate])
def test_likelihood_is_symmetric(function, x64, mean, log_std):
    there = likelihoods(function, mean, log_std)
    back = likelihoods(function, -mean, log_std, -VALUES)
    # A probability's cut-off at 1e-12 makes the approximate one jumpy there by its rounding.
    rel, floor = (1e-9, 0) if function is exact else (0, 1e-3)
    np.testing.assert_allclose(back, there, rtol=rel, atol=floor + 1e-12)


@pytest.mark.parametrize("std", [1e-4, 5e-3, 0.05, 1.0, 100.0])
def test_likelihood_and_its_gradient_are_finite_in_float32(std):
    def log_p(x, mean, log_std):
        return exact(x[None], mean[None], log_std[None])[0]

    each = jax.vmap(jax.value_and_grad(log_p, (1, 2)), (0, None, None))
    each = jax.jit(jax.vmap(each, (None, 0, None)))
    means = np.array([-50.0, -1.0, -0.3, 0.0, 1 / 255, 0.7, 1.0, 3.0])
    results = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            arguments = (jnp.asarray(a, dtype) for a in (VALUES, means, np.log(std)))
            values, gradients = each(*arguments)
            assert values.dtype == dtype
            assert all(jnp.all(jnp.isfinite(a)) for a in (values, *gradients))
            results.append([np.asarray(values), *map(np.asarray, gradients)])
    # u = distance / std is good to 6e-8 times the size of what is subtracted, the squares of u
    # to that; a logarithm of a bin's share of the line is good to 2e-7 / (bin / std).
    ours, theirs = results[0][0], results[1][0]
    distance = 1 + np.abs(VALUES - means[:, None]) / std
    rounding = 4e-7 * distance * (1 + np.abs(means[:, None])) / std
    bound = rounding + 2e-6 * (1 + std * 255 / 2) + 1e-6 * np.abs(theirs)
    assert np.all(np.abs(ours - theirs) < bound)


def test_approximate_likelihood_is_close_to_the_exact_one(x64):
    # A bin's probability is a difference of two values of the distribution function.
    u = np.linspace(-6, 6, 20001)
    cdf = (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))) / 2
    bound = 2 * np.max(np.abs(cdf - ndtr(u)))
    assert bound < 1e-3
    differ = 0.0
    for std in (1e-3, 0.01, 0.1, 1.0):
        for mean in (-1.0, 0.0, 0.1, 0.9):
            p = [np.exp(likelihoods(f, mean, np.log(std))) for f in (exact, approximate)]
            differ = max(differ, np.max(np.abs(p[0] - p[1])))
    assert 1e-6 < differ <= bound


@pytest.mark.parametrize("path", [eqxldm.LinearFlow(), eqxldm.CosineVP(), eqxldm.CosineVP(0.5)])
def test_no_bits_at_an_end_that_holds_no_data(path):
    assert float(eqxldm.prior_bits(path, jnp.array([3.0, -1.0, 0.2]))) == 0


def test_prior_bits_of_a_table_and_of_exploding_variance(x64):
    x0 = np.linspace(-1, 1, 7)
    discrete, exploding = PATHS["discrete"], PATHS["exploding"]
    alpha_bar = float(np.prod(1 - eqxldm.linear_betas(1000)))
    expected = np.mean(alpha_bar * x0**2 + (1 - alpha_bar) - 1 - np.log1p(-alpha_bar)) / 2
    # The variance is 1 - 4e-5 with the last digit of 1: 1e-16 of terms of 1, of a KL of 1e-5.
    assert float(eqxldm.prior_bits(discrete, jnp.asarray(x0))) == pytest.approx(
        float(expected) / BIT, rel=1e-9
    )
    std = exploding.sigma(1.0)
    expected = float(np.mean(x0**2)) / (2 * std**2) / BIT
    bits = eqxldm.prior_bits(exploding, jnp.asarray(x0), prior_std=float(std))
    assert float(bits) == pytest.approx(expected, rel=1e-12)
    # Half-way, and with another prior.
    a, s = exploding.alpha(0.5), exploding.sigma(0.5)
    expected = float(np.mean((a * x0) ** 2 + s**2)) / 8 - 0.5 + np.log(2 / s)
    bits = eqxldm.prior_bits(exploding, jnp.asarray(x0), prior_std=2.0, t=0.5)
    assert float(bits) == pytest.approx(expected / BIT, rel=1e-12)


MEAN, STD = 0.3, 0.25
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
RANGE = 0.3  # what the network with a learned variance says


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


def optimal(path, prediction):
    """The optimal network, with the variance's part where the prediction asks for one."""
    inner = prediction.prediction if isinstance(prediction, LEARNED) else prediction
    denoiser = gaussian_denoiser(path, inner, MEAN, STD)
    if inner is prediction:
        return denoiser
    of_range = lambda x_t: jnp.full_like(x_t, RANGE)
    return lambda x_t, t, cond, key=None: jnp.concatenate([denoiser(x_t, t), of_range(x_t)])


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


REFERENCE = reference("vb_linear_1000")


def stand_in(x_t, t, cond=None, *, key=None):
    """The network with a learned variance of the reference values, of the integer timestep."""
    timestep = jnp.round(1000 * t - 1).astype(x_t.dtype)
    eps = 0.6 * x_t + 0.2 * jnp.sin(2 * x_t + timestep / 150)
    return jnp.concatenate([eps, jnp.tanh(0.5 * x_t + timestep / 1000 - 0.5)])


def hybrid(denoiser, x0, t, eps, **settings):
    with mock.patch("jax.random.normal", lambda key, shape, dtype: eps):
        return eqxldm.hybrid_loss(
            denoiser,
            eqxldm.Diffusion(PATHS["discrete"], LEARNED_EPS),
            x0,
            t,
            None,
            key=jax.random.key(0),
            **settings,
        )


def reference_inputs(dtype):
    t = (REFERENCE["t"] + 1) / 1000
    return tuple(jnp.asarray(a, dtype) for a in (REFERENCE["x0"], t, REFERENCE["eps"]))


def hybrids(dtype, **settings):
    each = jax.jit(jax.vmap(lambda x0, t, eps: hybrid(stand_in, x0, t, eps, **settings)))
    return np.asarray(each(*reference_inputs(dtype)))


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-10), ("float32", 1e-5)])
def test_hybrid_loss_equals_reference(dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        loss = hybrids(dtype, log_likelihood=approximate)
        mse = hybrids(dtype, log_likelihood=approximate, vlb_weight=0.0)
    np.testing.assert_allclose(loss, REFERENCE["train_loss"], rtol=bound)
    np.testing.assert_allclose(mse, REFERENCE["train_mse"], rtol=bound)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-10), ("float32", 1e-5)])
def test_step_bits_equal_reference(dtype, bound):
    path, prediction = PATHS["discrete"], LEARNED_EPS
    times = eqxldm.timestep_times(1000, np.arange(1000))
    with jax.enable_x64(dtype == "float64"):
        table = eqxldm.step_table(path, times, eqxldm.learned_range)
        x0, eps = (jnp.asarray(REFERENCE[name], dtype) for name in ("x0", "eps"))
        for i, timestep in enumerate(REFERENCE["t"]):
            row = jax.tree.map(lambda a, t=timestep: a[999 - t], table)
            assert float(row.t) == pytest.approx((timestep + 1) / 1000, rel=1e-6)
            x_t = eqxldm.q_sample(path, x0[i], row.t, eps[i])
            assert relative_error(x_t, REFERENCE["x_t"][i]) < bound
            out, where = eqxldm.split_output(prediction, x_t, stand_in(x_t, row.t))
            parts = eqxldm.to_x0_eps(prediction, path.coefficients(row.t), x_t, out)
            estimate = eqxldm.Estimate(*parts, where)
            bits = eqxldm.step_bits(row, x0[i], estimate, approximate)
            assert bits.dtype == dtype
            assert relative_error(bits, REFERENCE["vb_bpd"][i]) < bound
            exactly = eqxldm.step_bits(row, x0[i], estimate)
            assert relative_error(exactly, bits) < (2e-4 if timestep == 0 else bound)
            assert (exactly != bits) == (timestep == 0)


def test_hybrid_loss_adds_the_weighted_bits_to_the_mean_square():
    plain, one, half = (hybrids("float32", vlb_weight=w) for w in (0.0, 1.0, 0.5))
    np.testing.assert_allclose(half, (plain + one) / 2, rtol=1e-6)
    assert np.all(one > plain)


@pytest.mark.parametrize("i", [0, 1, 4])
def test_bits_of_the_hybrid_loss_teach_the_variance_and_not_the_mean(i):
    def loss(change, vlb_weight):
        def denoiser(x_t, t, cond, *, key=None):
            eps, where = jnp.split(stand_in(x_t, t), 2)
            return jnp.concatenate([eps + change[0], where + change[1]])

        return hybrid(denoiser, *(a[i] for a in reference_inputs("float32")), vlb_weight=vlb_weight)

    change = jnp.zeros((2, *REFERENCE["x0"][i].shape), jnp.float32)
    plain, mixed = (jax.jit(jax.grad(lambda c, w=w: loss(c, w)))(change) for w in (0.0, 1.0))
    assert jnp.array_equal(mixed[0], plain[0]) and jnp.all(plain[0] != 0)
    assert jnp.all(plain[1] == 0) and jnp.all(mixed[1] != 0)
    assert jnp.all(jnp.isfinite(mixed))


def test_hybrid_loss_is_the_bound_on_average_over_the_timesteps(x64, key):
    # The bits of all timesteps with one noise are the steps of the bound with that noise.
    timesteps = 12
    alpha_bar = eqxldm.alpha_bar_from_betas(eqxldm.linear_betas(timesteps, 0.01, 0.5))
    path, prediction = eqxldm.DiscreteVP(alpha_bar), LEARNED_EPS
    x0, noise = jnp.asarray(VALUES[[10, 128, 250]]), jnp.array([0.3, -1.0, 0.8])
    times = eqxldm.timestep_times(timesteps, np.arange(timesteps))
    with mock.patch("jax.random.normal", lambda key, shape, dtype: noise):
        bound = eqxldm.variational_bound(
            optimal(path, prediction),
            eqxldm.Diffusion(path, prediction),
            times,
            x0,
            key=key,
            variance=eqxldm.learned_range,
        )

        def loss(t, vlb_weight):
            return eqxldm.hybrid_loss(
                optimal(path, prediction),
                eqxldm.Diffusion(path, prediction),
                x0,
                t,
                None,
                key=key,
                vlb_weight=vlb_weight,
            )

        bits = jax.jit(jax.vmap(lambda t: loss(t, 1.0) - loss(t, 0.0)))(jnp.asarray(times[:-1]))
    # The losses are of a size of 1 and may be float32: 1e-7, some times.
    np.testing.assert_allclose(bits, bound.steps, atol=1e-6, rtol=1e-6)


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


def test_the_hybrid_loss_refuses_what_makes_no_sense(key):
    def loss(t=0.5, path=PATHS["discrete"], prediction=LEARNED_EPS, size=4):
        denoiser = lambda x_t, t, cond, key=None: jnp.zeros(size)
        t = jnp.array(t)
        return eqxldm.hybrid_loss(
            denoiser, eqxldm.Diffusion(path, prediction), jnp.ones(2), t, None, key=key
        )

    assert jnp.isfinite(loss())
    for wrong in ({"prediction": eqxldm.predict_eps}, {"path": PATHS["cosine"]}):
        with pytest.raises(ValueError, match="the hybrid loss needs a table of timesteps"):
            loss(**wrong)
    with pytest.raises(ValueError, match="LearnedRange needs twice the channels"):
        loss(size=2)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*got 1.5"):
        loss(t=1.5)
