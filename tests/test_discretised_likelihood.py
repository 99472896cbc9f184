"""Divergences of normals, and the likelihood of data in bins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import ndtr

import eqxldm

from helpers import PATHS
from normals import gauss_hermite

pytestmark = pytest.mark.usefixtures("strict_dtypes")
VALUES = 2 * np.arange(256) / 255 - 1
BIT = np.log(2)
exact = eqxldm.discretized_gaussian_log_likelihood
approximate = eqxldm.approximate_gaussian_log_likelihood

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
