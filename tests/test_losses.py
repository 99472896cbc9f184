import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import PATHS, PREDICTIONS, gaussian_denoiser

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)


@each_path
@each_prediction
def test_loss_of_a_denoiser_that_knows_x0_is_zero(path, prediction, x64, key):
    x0 = jnp.linspace(-1, 1, 6)
    denoiser = gaussian_denoiser(path, prediction, x0, 0.0)
    for t in (0.1, 0.5, 0.9):
        loss = eqxldm.denoising_loss(
            denoiser, path, prediction, eqxldm.constant_weight, x0, jnp.array(t), None, key=key
        )
        assert loss.dtype == jnp.float32
        assert float(loss) < 1e-20


@each_path
@each_prediction
def test_optimal_denoiser_of_gaussian_data_minimises_the_loss(path, prediction, key):
    n, mean, std, t = 4000, 0.7, 0.5, jnp.array(0.4)
    optimal = gaussian_denoiser(path, prediction, mean, std)

    def loss(change, key):
        x_key, key = jax.random.split(key)
        x0 = mean + std * jax.random.normal(x_key, (4,))

        def denoiser(x_t, t, cond, *, key=None):
            return optimal(x_t, t) + change[0] * x_t + change[1]

        weight = eqxldm.constant_weight
        return eqxldm.denoising_loss(denoiser, path, prediction, weight, x0, t, None, key=key)

    per_example = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    gradients = per_example(jnp.zeros(2), jax.random.split(key, n))
    # Five standard errors of the mean gradient.
    bound = 5 * jnp.std(gradients, axis=0) / np.sqrt(n)
    assert jnp.all(jnp.abs(jnp.mean(gradients, axis=0)) < bound)
    away = jnp.mean(per_example(jnp.array([0.1, 0.0]), jax.random.split(key, n)), axis=0)
    assert away[0] > bound[0]


def test_loss_is_the_weighted_mean_square_of_its_own_noise(key):
    weight = lambda at: at.sigma**2 / at.alpha
    seen = {}

    def denoiser(x_t, t, cond, *, key=None):
        seen.update(x_t=x_t, t=t, cond=cond, key=key)
        return jnp.zeros_like(x_t)

    x0, t = jnp.array([[1.0, -2.0], [0.5, 0.0]]), jnp.array(0.25)
    loss = eqxldm.denoising_loss(
        denoiser, PATHS["linear"], eqxldm.predict_eps, weight, x0, t, "label", key=key
    )
    eps = (seen["x_t"] - 0.75 * x0) / 0.25
    assert float(loss) == pytest.approx(0.25**2 / 0.75 * float(jnp.mean(eps**2)), rel=1e-5)
    assert seen["cond"] == "label" and seen["t"] is t
    assert seen["key"] is not None and not jnp.array_equal(
        jax.random.key_data(seen["key"]), jax.random.key_data(key)
    )


def test_loss_of_bfloat16_is_float32(key):
    denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    x0 = jnp.ones(4, jnp.bfloat16)
    loss = eqxldm.denoising_loss(
        denoiser, PATHS["discrete"], eqxldm.predict_x0, eqxldm.constant_weight, x0,
        jnp.array(0.5), None, key=key,
    )  # fmt: skip
    assert loss.dtype == jnp.float32 and float(loss) == 1.0


def largest_gap(samples, cdf):
    """Kolmogorov and Smirnov's statistic."""
    samples = np.sort(np.asarray(samples, np.float64))
    n, expected = len(samples), cdf(samples)
    return max(np.max(np.arange(1, n + 1) / n - expected), np.max(expected - np.arange(n) / n))


def logit_normal_cdf(mean, std):
    from scipy.stats import norm

    return lambda t: norm.cdf((np.log(t / (1 - t)) - mean) / std)


@pytest.mark.parametrize(
    "sampler, cdf",
    [
        (eqxldm.uniform_time, lambda t: t),
        (eqxldm.stratified_time, lambda t: t),
        (eqxldm.logit_normal_time(), logit_normal_cdf(0.0, 1.0)),
        (eqxldm.logit_normal_time(0.5, 0.8), logit_normal_cdf(0.5, 0.8)),
    ],
)
@pytest.mark.parametrize("position", [0, 2])
def test_each_time_of_a_batch_has_the_documented_density(sampler, cdf, position, key):
    n = 20_000
    keys = jax.random.split(key, n)
    t = jax.jit(jax.vmap(lambda k: sampler(k, 4)[position]))(keys)
    # P(gap > g) <= 2 exp(-2 n g^2) (Dvoretzky, Kiefer & Wolfowitz), here 1e-6.
    assert largest_gap(t, cdf) < np.sqrt(np.log(2e6) / (2 * n))
    assert np.all((t >= 0) & (t < 1))


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


numbers = st.floats(-3, 3, allow_subnormal=False)


@given(mean=numbers, logvar=numbers)
def test_kl_equals_the_integral(x64, mean, logvar):
    std = np.exp(logvar / 2)
    z = np.linspace(-12, 12, 4001)
    x = mean + std * z
    log_ratio = -0.5 * z**2 - np.log(std) + 0.5 * x**2
    expected = np.sum(np.exp(-0.5 * z**2) * log_ratio) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    kl = eqxldm.kl_to_standard_normal(jnp.array([mean]), jnp.array([logvar]))
    assert float(kl) == pytest.approx(expected, abs=1e-10)
    assert float(kl) >= 0


def test_kl_sums_over_elements_and_is_exact_near_zero():
    mean, logvar = jnp.zeros((2, 3)), jnp.full((2, 3), 1e-4)
    # exp(l) - 1 - l = l^2 / 2 + l^3 / 6: below float32's rounding of exp(l) - 1.
    expected = 0.5 * 6 * (1e-8 / 2 + 1e-12 / 6)
    assert float(eqxldm.kl_to_standard_normal(mean, logvar)) == pytest.approx(expected, rel=1e-2)


def test_hinge_losses_and_their_margins():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
    loss, gradients = jax.value_and_grad(eqxldm.hinge_discriminator_loss, (0, 1))(real, fake)
    assert float(loss) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    np.testing.assert_allclose(gradients[0], [0, -1 / 6, -1 / 6], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [0, 1 / 6, 1 / 6], rtol=1e-6)
    assert float(eqxldm.hinge_generator_loss(fake)) == pytest.approx(2 / 3)


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="stddev must be positive, got 0"):
        eqxldm.logit_normal_time(0.0, 0.0)
    with pytest.raises(ValueError, match="timesteps must be at least 1, got 0"):
        eqxldm.discrete_time(0)
