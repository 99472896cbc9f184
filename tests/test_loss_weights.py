"""Loss weights: the published ones, their conversions and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import ALPHA_BAR, PATHS, PREDICTIONS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)

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


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_wrong_arguments_of_weights_are_named(bad):
    eps = eqxldm.predict_eps
    with pytest.raises(ValueError, match=f"min_snr_weight: gamma must be positive.*{bad}"):
        eqxldm.min_snr_weight(eps, bad)
    with pytest.raises(ValueError, match=f"p2_weight: gamma must be positive.*{bad}"):
        eqxldm.p2_weight(eps, bad, 1.0)
    with pytest.raises(ValueError, match=f"p2_weight: k must be positive.*{bad}"):
        eqxldm.p2_weight(eps, 1.0, bad)
