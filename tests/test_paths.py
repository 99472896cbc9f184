import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import ALPHA_BAR, PATHS, VP_PATHS, reference

pytestmark = pytest.mark.usefixtures("strict_dtypes")

times = st.floats(0, 1, allow_subnormal=False)
interior = st.floats(0.01, 0.99)


@st.composite
def ordered_times(draw):
    """`0 < s < t < 1`, apart by enough for float64 differences to mean something."""
    s = draw(st.floats(0.01, 0.97))
    return s, draw(st.floats(s + 0.01, 0.99))


@pytest.mark.parametrize("path", VP_PATHS.values(), ids=VP_PATHS)
@given(t=times)
def test_variance_is_preserved(path, t):
    assert path.alpha(t) ** 2 + path.sigma(t) ** 2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_zero_is_data(path):
    assert path.alpha(0.0) == 1 and path.sigma(0.0) == 0
    assert path.logsnr(0.0) == np.inf


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_time_one_is_noise(name):
    assert PATHS[name].alpha(1.0) == 0 and PATHS[name].sigma(1.0) == 1
    assert PATHS[name].logsnr(1.0) == -np.inf


def test_discrete_path_meets_its_table():
    path = PATHS["discrete"]
    at = path.coefficients(np.arange(1, 1001) / 1000)
    # t T is rounded, and alpha' / T is at most 0.01 a timestep.
    np.testing.assert_allclose(at.alpha**2, ALPHA_BAR, rtol=1e-12)
    np.testing.assert_allclose(at.sigma**2, 1 - ALPHA_BAR, rtol=1e-12)
    assert path.timesteps == 1000


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(pair=ordered_times())
def test_logsnr_decreases(path, pair):
    s, t = pair
    assert path.logsnr(t) < path.logsnr(s)
    expected = 2 * np.log(path.alpha(t) / path.sigma(t))
    assert path.logsnr(t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(t=interior)
def test_derivatives_equal_automatic_ones(path, x64, t):
    at = path.coefficients(t)
    for function, derivative in ((path.alpha, at.dalpha), (path.sigma, at.dsigma)):
        _, expected = jax.jvp(function, (jnp.array(t),), (jnp.array(1.0),))
        assert derivative == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(t=times)
def test_numpy_and_jax_agree(path, x64, t):
    in_numpy, in_jax = path.coefficients(t), path.coefficients(jnp.array(t))
    # The derivatives of the discrete path jump at its timesteps: t T may round either way.
    knot = abs(t * 1000 - round(t * 1000)) < 1e-9
    for name in ("alpha", "sigma") if knot else ("alpha", "sigma", "dalpha", "dsigma"):
        assert getattr(in_jax, name).dtype == jnp.float64
        value = float(getattr(in_jax, name))
        assert value == pytest.approx(float(getattr(in_numpy, name)), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(t=times)
def test_float32_is_close_and_stays_float32(path, t):
    t32 = np.float32(t)
    exact, at = path.coefficients(float(t32)), path.coefficients(jnp.array(t32))
    assert at.alpha.dtype == at.sigma.dtype == at.dalpha.dtype == jnp.float32
    # Rounding t T by half a unit moves alpha by alpha' t eps / 2; a few more roundings follow.
    slope = max(abs(float(exact.dalpha)), abs(float(exact.dsigma)))
    bound = float(np.finfo(np.float32).eps) * (4 + slope)
    assert float(at.alpha) == pytest.approx(float(exact.alpha), abs=bound)
    assert float(at.sigma) == pytest.approx(float(exact.sigma), abs=bound)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_many_times_at_once_equal_one_by_one(path):
    t = np.linspace(0, 1, 7)
    many = path.coefficients(t)
    for i in range(7):
        one = path.coefficients(float(t[i]))
        assert float(one.alpha) == many.alpha[i] and float(one.dsigma) == many.dsigma[i]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(pair=ordered_times(), x0=st.floats(-3, 3, allow_subnormal=False))
def test_two_jumps_have_the_moments_of_one(path, pair, x0):
    s, t = pair
    at_s, at_t = path.coefficients(s), path.coefficients(t)
    r = at_t.alpha / at_s.alpha
    fresh = eqxldm.fixed_large(eqxldm.Interval(t, s, at_t, at_s))
    assert fresh > 0
    assert r * (at_s.alpha * x0) == pytest.approx(at_t.alpha * x0, abs=1e-12)
    assert r**2 * at_s.sigma**2 + fresh == pytest.approx(at_t.sigma**2, rel=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(pair=ordered_times())
def test_posterior_is_the_product_of_two_gaussians(path, pair):
    s, t = pair
    at_s, at_t = path.coefficients(s), path.coefficients(t)
    c0, ct, variance = eqxldm.posterior_coefficients(at_s, at_t)
    # N(x_s; alpha_s x0, sigma_s^2) N(x_t; r x_s, fresh): precisions add.
    r = at_t.alpha / at_s.alpha
    fresh = at_t.sigma**2 - r**2 * at_s.sigma**2
    precision = 1 / at_s.sigma**2 + r**2 / fresh
    # fresh is a difference that may be as small as 1e-4 of its terms.
    assert variance == pytest.approx(1 / precision, rel=1e-10)
    assert c0 == pytest.approx(at_s.alpha / at_s.sigma**2 / precision, rel=1e-10)
    assert ct == pytest.approx(r / fresh / precision, rel=1e-10)


def test_posterior_equals_reference():
    expected = reference("schedule_linear_1000")
    at = PATHS["discrete"].coefficients
    t = np.arange(1, 1001) / 1000
    c0, ct, variance = eqxldm.posterior_coefficients(at(t - 1 / 1000), at(t))
    # sigma_{t|s}^2 / sigma_t^2 is at least 1e-3 of the difference that it comes from, and
    # sigma itself rests on t T, rounded to 1000 eps of a timestep.
    np.testing.assert_allclose(c0, expected["posterior_mean_coef1"], rtol=1e-9)
    np.testing.assert_allclose(ct, expected["posterior_mean_coef2"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance, expected["posterior_variance"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_posterior_of_the_last_step_is_x0(path):
    at = path.coefficients
    assert [float(c) for c in eqxldm.posterior_coefficients(at(0.0), at(0.3))] == [1, 0, 0]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_q_sample_is_the_mix_and_maps_over_a_batch(path, key):
    x0, eps = jax.random.normal(key, (2, 5, 3, 2))
    t = jnp.linspace(0, 1, 5)
    x_t = jax.vmap(lambda x0, t, eps: eqxldm.q_sample(path, x0, t, eps))(x0, t, eps)
    at = path.coefficients(np.asarray(t, np.float64))
    expected = at.alpha[:, None, None] * np.asarray(x0) + at.sigma[:, None, None] * np.asarray(eps)
    np.testing.assert_allclose(x_t, expected, atol=1e-5)
    jitted = jax.jit(lambda x0, t, eps: eqxldm.q_sample(path, x0, t, eps))
    np.testing.assert_allclose(jitted(x0[2], t[2], eps[2]), x_t[2], atol=1e-6)


def test_q_sample_keeps_the_dtype_of_the_data():
    x0 = jnp.ones(3, jnp.bfloat16)
    x_t = eqxldm.q_sample(PATHS["discrete"], x0, jnp.array(0.5), x0)
    assert x_t.dtype == jnp.bfloat16


def test_q_sample_names_the_wrong_argument():
    with pytest.raises(TypeCheckError, match="parameter 'eps'"):
        eqxldm.q_sample(PATHS["linear"], jnp.ones(3), jnp.array(0.5), jnp.ones(4))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        eqxldm.q_sample(PATHS["linear"], jnp.ones(3), jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize("table", [[0.5, 0.5], [0.5, 0.6], [1.0, 0.5], [0.5, 0.0], [np.nan], []])
def test_a_table_that_cannot_be_is_refused(table):
    with pytest.raises(ValueError, match="strictly decrease"):
        eqxldm.DiscreteVP(np.array(table, float))
