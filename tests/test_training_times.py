"""The times that training draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def largest_gap(samples, cdf):
    """Kolmogorov and Smirnov's statistic."""
    samples = np.sort(np.asarray(samples, np.float64))
    n, expected = len(samples), cdf(samples)
    return max(np.max(np.arange(1, n + 1) / n - expected), np.max(expected - np.arange(n) / n))


def logit_normal_cdf(mean, std):
    from scipy.stats import norm

    return lambda t: norm.cdf((np.log(t / (1 - t)) - mean) / std)


def shifted(sampler, shift):
    return lambda key, batch: eqxldm.shift_time(sampler(key, batch), shift)


def unshift(t, shift):
    """The inverse: the odds `t / (1 - t)` were multiplied by `shift`."""
    return t / (shift - (shift - 1) * t)


NORMAL = logit_normal_cdf(0.0, 1.0)


@pytest.mark.parametrize(
    "sampler, cdf",
    [
        (eqxldm.uniform_time, lambda t: t),
        (eqxldm.stratified_time, lambda t: t),
        (eqxldm.logit_normal_time(), logit_normal_cdf(0.0, 1.0)),
        (eqxldm.logit_normal_time(0.5, 0.8), logit_normal_cdf(0.5, 0.8)),
        (shifted(eqxldm.uniform_time, 3.0), lambda t: unshift(t, 3.0)),
        (shifted(eqxldm.logit_normal_time(), 0.5), lambda t: NORMAL(unshift(t, 0.5))),
        # A shift by s adds log(s) to the logit: the same as another mean.
        (shifted(eqxldm.logit_normal_time(0.2), 3.0), logit_normal_cdf(0.2 + np.log(3), 1.0)),
    ],
)
@pytest.mark.parametrize("position", [0, 2])
def test_each_time_of_a_batch_has_the_documented_density(sampler, cdf, position, key):
    n = 20_000
    keys = jax.random.split(key, n)
    t = jax.jit(jax.vmap(lambda k: sampler(k, 4)[position]))(keys)
    # P(gap > g) <= 2 exp(-2 n g^2) (Dvoretzky, Kiefer & Wolfowitz), here 1e-6.
    assert largest_gap(t, cdf) < np.sqrt(np.log(2e6) / (2 * n))
    assert np.all((t > 0) & (t <= 1))


def test_discrete_times_are_the_timesteps_and_equally_likely(key):
    n = 20_000
    t = eqxldm.discrete_time(5)(key, n)
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(values, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    # Five standard deviations of a binomial.
    assert np.all(np.abs(counts - n / 5) < 5 * np.sqrt(n * 0.2 * 0.8))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_stratified_times_hit_every_stratum(batch, key):
    for k in jax.random.split(key, 20):
        t = np.sort(eqxldm.stratified_time(k, batch))
        np.testing.assert_allclose(np.diff(t), 1 / batch, atol=1e-6)
        assert np.array_equal(np.floor(t * batch + 1e-5), np.arange(batch))


def test_stratified_times_lower_the_variance_of_a_batch(key):
    n, batch = 4000, 16
    means = jax.jit(jax.vmap(lambda k: jnp.mean(eqxldm.stratified_time(k, batch) ** 2)))
    variance = float(jnp.var(means(jax.random.split(key, n))))
    # With d = u mod 1/n the mean of t^2 is 1/3 - 1/2n + 1/6n^2 + d (1 - 1/n) + d^2, d ~ U(0, 1/n);
    # independent times give var(t^2) / n = (4 / 45) / n.
    b, c = 1 / batch, 1 - 1 / batch
    exact = c**2 * b**2 / 12 + 2 * c * b**3 / 12 + b**4 * (1 / 5 - 1 / 9)
    # A variance of n values has a relative error of at most sqrt(2 / n) for such flat densities.
    assert variance == pytest.approx(exact, rel=5 * np.sqrt(2 / n))
    assert exact < 0.1 * 4 / 45 / batch
