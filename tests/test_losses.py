import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import ALPHA_BAR, PATHS, PREDICTIONS, gaussian_denoiser

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)


@each_path
@each_prediction
def test_loss_of_a_denoiser_that_knows_x0_is_zero(path, prediction, x64, key):
    x0 = jnp.linspace(-1, 1, 6)

    def denoiser(x_t, t, cond, *, key=None):
        at = path.coefficients(t)
        return eqxldm.target(prediction, at, x0, (x_t - at.alpha * x0) / at.sigma)

    for t in (0.1, 0.5, 0.9):
        loss = eqxldm.denoising_loss(
            denoiser,
            eqxldm.Diffusion(path, prediction),
            eqxldm.constant_weight,
            x0,
            jnp.array(t),
            None,
            key=key,
        )
        assert loss.dtype == x0.dtype
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
        return eqxldm.denoising_loss(
            denoiser, eqxldm.Diffusion(path, prediction), weight, x0, t, None, key=key
        )

    per_example = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    gradients = per_example(jnp.zeros(2), jax.random.split(key, n))
    # Five standard errors of the mean gradient.
    bound = 5 * jnp.std(gradients, axis=0) / np.sqrt(n)
    assert jnp.all(jnp.abs(jnp.mean(gradients, axis=0)) < bound)
    # A tenth of the output's own size: the score's is 1 / sigma.
    at = path.coefficients(t)
    step = 0.1 / at.sigma if prediction is eqxldm.predict_score else 0.1
    away = jnp.mean(per_example(jnp.array([step, 0.0]), jax.random.split(key, n)), axis=0)
    assert away[0] > bound[0]


def test_loss_is_the_weighted_mean_square_of_its_own_noise(key):
    weight = lambda at: at.sigma**2 / at.alpha
    seen = {}

    def denoiser(x_t, t, cond, *, key=None):
        seen.update(x_t=x_t, t=t, cond=cond, key=key)
        return jnp.zeros_like(x_t)

    x0, t = jnp.array([[1.0, -2.0], [0.5, 0.0]]), jnp.array(0.25)
    loss = eqxldm.denoising_loss(
        denoiser,
        eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_eps),
        weight,
        x0,
        t,
        "label",
        key=key,
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
        denoiser,
        eqxldm.Diffusion(PATHS["discrete"], eqxldm.predict_x0),
        eqxldm.constant_weight,
        x0,
        jnp.array(0.5),
        None,
        key=key,
    )
    assert loss.dtype == jnp.float32 and float(loss) == 1.0


@each_path
def test_a_denoiser_of_another_shape_than_x_t_is_refused(path, key):
    def loss(shape):
        denoiser = lambda x_t, t, cond, key=None: jnp.zeros(shape)
        return eqxldm.denoising_loss(
            denoiser,
            eqxldm.Diffusion(path, eqxldm.predict_v),
            eqxldm.constant_weight,
            jnp.ones((2, 3)),
            jnp.array(0.5),
            None,
            key=key,
        )

    loss((2, 3))
    for shape in [(4, 3), (1, 3), (3,), ()]:
        with pytest.raises(ValueError, match=r"output has the shape .*x_t"):
            loss(shape)


GAMMA, POWER, K, BIAS = 4.0, 0.7, 1.5, 1.0
# Of each weight: how the library makes it, and the published weight of the x0 loss, by the
# signal-to-noise ratio and r = -1/2 d logSNR / dt.
WEIGHTS = {
    "snr": (eqxldm.snr_weight, lambda snr, r: snr),
    "truncated_snr": (eqxldm.truncated_snr_weight, lambda snr, r: np.maximum(snr, 1)),
    "min_snr": (
        lambda p: eqxldm.min_snr_weight(p, GAMMA),
        lambda snr, r: np.minimum(snr, GAMMA),
    ),
    "p2": (
        lambda p: eqxldm.p2_weight(p, POWER, K),
        lambda snr, r: snr * (K + snr) ** -POWER,
    ),
    "elbo": (eqxldm.elbo_weight, lambda snr, r: snr * r),
    "sigmoid": (
        lambda p: eqxldm.sigmoid_weight(p, BIAS),
        lambda snr, r: snr * r / (1 + snr * np.exp(-BIAS)),
    ),
}
# The square of an error of x0 over that of the output which it comes from: by hand, from
# x0 = (x_t - sigma eps) / alpha = (alpha x_t - sigma v) / (alpha^2 + sigma^2), and so on.
X0_ERRORS = {
    "eps": lambda alpha, sigma, r: (sigma / alpha) ** 2,
    "x0": lambda alpha, sigma, r: 1,
    "v": lambda alpha, sigma, r: (sigma / (alpha**2 + sigma**2)) ** 2,
    "velocity": lambda alpha, sigma, r: (alpha * r) ** -2,  # D = alpha sigma r
    "score": lambda alpha, sigma, r: (sigma**2 / alpha) ** 2,
}
each_weight = pytest.mark.parametrize("weight", WEIGHTS)
inner = st.floats(0.01, 0.99)
COMPILED = {}  # once for all examples of a property


def rate(path, t):
    """-1/2 d logSNR / dt by automatic differentiation, not by the path's own derivatives."""
    _, slope = jax.jvp(path.logsnr, (jnp.asarray(t),), (jnp.ones_like(t),))
    return -slope / 2


def table(path, weight_of):
    """`t -> [the weight of every prediction]`, compiled."""
    return jax.jit(
        lambda t: jnp.stack([weight_of(p)(path.coefficients(t)) for p in PREDICTIONS.values()])
    )


@each_path
@each_weight
@given(t=inner)
def test_weights_are_the_published_ones(path, weight, t, x64):
    make, of_x0 = WEIGHTS[weight]
    key = (id(path), weight)
    if key not in COMPILED:
        COMPILED[key] = table(path, make), jax.jit(lambda t: rate(path, t))
    weights, slope = COMPILED[key]
    t = jnp.array(t)
    r, at = float(slope(t)), path.coefficients(float(t))
    snr = (at.alpha / at.sigma) ** 2
    expected = [of_x0(snr, r) * error(at.alpha, at.sigma, r) for error in X0_ERRORS.values()]
    np.testing.assert_allclose(weights(t), expected, rtol=1e-10)


@pytest.mark.parametrize("path", [PATHS["discrete"], PATHS["cosine"]], ids=["discrete", "cosine"])
@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9])
def test_weights_on_a_variance_preserving_path_are_those_in_the_papers(path, t, x64):
    at = path.coefficients(jnp.array(t))
    snr, r = float((at.alpha / at.sigma) ** 2), float(rate(path, t))
    eps, x0, v = eqxldm.predict_eps, eqxldm.predict_x0, eqxldm.predict_v
    papers = [
        # Salimans & Ho 2022, section 4 and appendix: v's weight is SNR + 1 of x0's.
        (eqxldm.snr_weight(eps), 1),
        (eqxldm.snr_weight(v), snr / (snr + 1)),
        (eqxldm.truncated_snr_weight(x0), max(snr, 1)),
        (eqxldm.truncated_snr_weight(eps), max(1, 1 / snr)),
        (eqxldm.constant_weight, 1),
        # Hang et al. 2023, section 3.4; 5 is their gamma.
        (eqxldm.min_snr_weight(x0), min(snr, 5)),
        (eqxldm.min_snr_weight(eps), min(snr, 5) / snr),
        (eqxldm.min_snr_weight(v), min(snr, 5) / (snr + 1)),
        # Choi et al. 2022, eq. 8; k = gamma = 1 are theirs.
        (eqxldm.p2_weight(eps), 1 / (1 + snr)),
        # Kingma et al. 2021, eq. 17; Kingma & Gao 2023.
        (eqxldm.elbo_weight(eps), r),
        (eqxldm.elbo_weight(x0), r * snr),
        (eqxldm.sigmoid_weight(eps), r / (1 + snr * np.exp(-2))),
    ]
    for i, (weight, expected) in enumerate(papers):
        assert float(weight(at)) == pytest.approx(expected, rel=1e-10), i


def test_elbo_weight_is_the_slope_of_logsnr_in_time(x64):
    h = 1e-5
    for path in PATHS.values():
        # Off the table's times, at which only the first derivative is continuous.
        for t in (0.1234, 0.5678, 0.8765):
            slope = (path.logsnr(t + h) - path.logsnr(t - h)) / (2 * h)
            weight = eqxldm.elbo_weight(eqxldm.predict_eps)(path.coefficients(jnp.array(t)))
            # A central difference: h^2 / 6 of a third derivative below 1e4, and rounding.
            assert float(weight) == pytest.approx(-slope / 2, rel=1e-6)


vectors = st.lists(st.floats(-2, 2), min_size=3, max_size=3).map(np.array)


@each_path
@each_weight
@given(t=inner, x0=vectors, eps=vectors, wrong=st.floats(0.1, 2))
def test_weighted_errors_of_all_predictions_agree(path, weight, t, x0, eps, wrong, x64):
    key = (id(path), weight, "errors")

    def errors(t, x0, eps, wrong):
        at = path.coefficients(t)
        # Another x0 and the eps with which it makes the same x_t.
        x0_too = x0 + wrong * jnp.array([1.0, -0.5, 0.2])
        eps_too = (at.alpha * (x0 - x0_too) + at.sigma * eps) / at.sigma
        losses = []
        for prediction in PREDICTIONS.values():
            outs = (eqxldm.target(prediction, at, *p) for p in ((x0, eps), (x0_too, eps_too)))
            error = next(outs) - next(outs)
            losses.append(WEIGHTS[weight][0](prediction)(at) * jnp.mean(error**2))
        return jnp.stack(losses)

    if key not in COMPILED:
        COMPILED[key] = jax.jit(errors)
    losses = COMPILED[key](t, x0, eps, wrong)
    assert np.all(losses > 0)
    # Two outputs of size 2 differ by 4e-4 or more, which is where alpha / sigma is least: their
    # difference is good to 2 * 2e-16 / 4e-4 = 1e-12, and its square to twice that.
    np.testing.assert_allclose(losses, losses[0], rtol=1e-11)


@each_path
@given(t=inner)
def test_converting_a_weight_gives_the_other_predictions_and_back(path, t, x64):
    key = (id(path), "convert")
    kinds = list(PREDICTIONS.values())

    def there_and_back(t):
        at = path.coefficients(t)
        weight = lambda at: 1 + at.alpha + at.sigma
        there = [[eqxldm.convert_weight(weight, a, b) for b in kinds] for a in kinds]
        back = [
            [eqxldm.convert_weight(there[i][j], b, a)(at) for j, b in enumerate(kinds)]
            for i, a in enumerate(kinds)
        ]
        named = [
            [eqxldm.convert_weight(eqxldm.min_snr_weight(a), a, b)(at) for b in kinds]
            for a in kinds
        ]
        made = [eqxldm.min_snr_weight(b)(at) for b in kinds]
        return weight(at), jnp.array(back), jnp.array(named), jnp.array(made)

    if key not in COMPILED:
        COMPILED[key] = jax.jit(there_and_back)
    weight, back, named, made = COMPILED[key](t)
    np.testing.assert_allclose(back, np.full((5, 5), weight), rtol=1e-12)
    np.testing.assert_allclose(named, np.broadcast_to(made, (5, 5)), rtol=1e-12)


def test_snr_weight_is_the_constant_weight_of_eps_converted(x64):
    at = PATHS["linear"].coefficients(jnp.array(0.3))
    for p in PREDICTIONS.values():
        converted = eqxldm.convert_weight(eqxldm.constant_weight, eqxldm.predict_eps, p)
        assert float(converted(at)) == pytest.approx(float(eqxldm.snr_weight(p)(at)), rel=1e-12)


# Where a weight has a finite limit, on paths that have both singular ends: (t, weight,
# prediction, limit). gamma and k as the literature has them.
LIMITS = [
    *[(0.0, eqxldm.snr_weight, p, v) for p, v in {"eps": 1, "v": 1, "score": 0}.items()],
    *[(1.0, eqxldm.snr_weight, p, v) for p, v in {"eps": 1, "x0": 0, "v": 0, "score": 1}.items()],
    *[(0.0, eqxldm.truncated_snr_weight, p, v) for p, v in {"eps": 1, "v": 1}.items()],
    *[(1.0, eqxldm.truncated_snr_weight, p, v) for p, v in {"x0": 1, "v": 1}.items()],
    *[(0.0, eqxldm.min_snr_weight, p, v) for p, v in {"eps": 0, "x0": 5, "v": 0}.items()],
    *[(1.0, eqxldm.min_snr_weight, p, v) for p, v in {"eps": 1, "x0": 0, "v": 0}.items()],
    *[(0.0, eqxldm.p2_weight, p, v) for p, v in {"eps": 0, "x0": 1, "v": 0}.items()],
    *[(1.0, eqxldm.p2_weight, p, v) for p, v in {"eps": 1, "x0": 0, "v": 0}.items()],
    (0.0, eqxldm.elbo_weight, "score", 0),
    *[(1.0, eqxldm.elbo_weight, p, 0) for p in ("x0", "v", "velocity")],
    *[(0.0, eqxldm.sigmoid_weight, p, 0) for p in ("eps", "v", "velocity", "score")],
    *[(1.0, eqxldm.sigmoid_weight, p, 0) for p in ("x0", "v", "velocity")],
]
SINGULAR = {
    "linear": PATHS["linear"],
    "cosine": PATHS["cosine"],
    "zero_terminal_snr": eqxldm.DiscreteVP(eqxldm.rescale_zero_terminal_snr(ALPHA_BAR)),
}


@pytest.mark.parametrize("path", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize(
    "t, weight, prediction, limit",
    LIMITS,
    ids=[f"{weight.__name__}-{name}-{t:g}" for t, weight, name, _ in LIMITS],
)
def test_weights_take_their_limit_at_a_singular_end(path, t, weight, prediction, limit):
    at = path.coefficients(jnp.array(t))
    value = float(weight(PREDICTIONS[prediction])(at))
    # Taken beside the end, where alpha or sigma is 1e-6; of these the steepest is the sigmoid
    # weight of eps at t = 0: sigma d sigma / dt exp(bias) = 1e-6 * 12.6 * 7.4 on the table.
    assert value == pytest.approx(limit, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("weight", [eqxldm.sigmoid_weight, eqxldm.elbo_weight])
def test_a_loss_at_zero_terminal_snr_is_finite(weight, key):
    # DDPM's times hold t = 1, and v is the prediction for a schedule whose end is noise alone.
    denoiser = lambda x_t, t, cond, key=None: 0.5 * x_t
    path, prediction = SINGULAR["zero_terminal_snr"], eqxldm.predict_v
    loss = eqxldm.denoising_loss(
        denoiser,
        eqxldm.Diffusion(path, prediction),
        weight(prediction),
        jnp.ones(3),
        jnp.array(1.0),
        None,
        key=key,
    )
    assert jnp.isfinite(loss)


@each_path
@each_weight
def test_weights_and_their_gradients_are_finite_within_the_open_interval(path, weight):
    t = jnp.concatenate([jnp.array([1e-4, 1 - 1e-4]), jnp.linspace(0.001, 0.999, 23)])
    for prediction in PREDICTIONS.values():
        made = WEIGHTS[weight][0](prediction)
        value_and_grad = jax.value_and_grad(lambda t, made=made: made(path.coefficients(t)))
        values, gradients = jax.jit(jax.vmap(value_and_grad))(t)
        assert values.dtype == jnp.float32
        assert jnp.all(jnp.isfinite(values)) and jnp.all(jnp.isfinite(gradients))
        assert jnp.all(values > 0)


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


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_wrong_arguments_of_weights_are_named(bad):
    eps = eqxldm.predict_eps
    with pytest.raises(ValueError, match=f"min_snr_weight: gamma must be positive.*{bad}"):
        eqxldm.min_snr_weight(eps, bad)
    with pytest.raises(ValueError, match=f"p2_weight: gamma must be positive.*{bad}"):
        eqxldm.p2_weight(eps, bad, 1.0)
    with pytest.raises(ValueError, match=f"p2_weight: k must be positive.*{bad}"):
        eqxldm.p2_weight(eps, 1.0, bad)


def test_a_loss_refuses_wrong_shapes_and_times(key):
    def loss(x0, t):
        denoiser = lambda x_t, t, cond, key=None: x_t
        return eqxldm.denoising_loss(
            denoiser,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.constant_weight,
            x0,
            t,
            None,
            key=key,
        )

    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\] .* got 1.5"):
        loss(jnp.ones(2), jnp.array(1.5))
    with pytest.raises(TypeCheckError, match="'t'"):
        loss(jnp.ones(2), jnp.ones(2))
    with pytest.raises(TypeCheckError, match="'x0'"):
        loss(jnp.ones(2, int), jnp.array(0.5))


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="stddev must be positive, got 0"):
        eqxldm.logit_normal_time(0.0, 0.0)
    with pytest.raises(ValueError, match="timesteps must be at least 1, got 0"):
        eqxldm.discrete_time(0)
    with pytest.raises(ValueError, match="shift must be positive, got -1"):
        eqxldm.shift_time(jnp.array(0.5), -1.0)
