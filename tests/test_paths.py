import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import ALPHA_BAR, PATHS, VP_PATHS, reference

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TINY = np.finfo(np.float64).eps
ALL_PATHS = PATHS | {
    "zero_terminal": eqxldm.DiscreteVP(eqxldm.rescale_zero_terminal_snr(ALPHA_BAR)),
    "respaced": eqxldm.DiscreteVP(ALPHA_BAR[eqxldm.respace(1000, [10])]),
    "shifted_cosine": eqxldm.CosineVP(0.3),
}
each_path = pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS)
each_vp_path = pytest.mark.parametrize(
    "name", [*VP_PATHS, *sorted(ALL_PATHS.keys() - PATHS.keys())]
)

times = st.floats(0, 1, allow_subnormal=False)
interior = st.floats(0.01, 0.99)
numbers = st.floats(-3, 3).map(lambda x: x if abs(x) > 1e-30 else 0.0)  # nothing underflows
# From the first times that float32 tells from 0 and 1 in a sum.
OPEN = np.array([1e-6, 1e-5, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 1e-5, 1 - 1e-6], np.float32)


@st.composite
def ordered_times(draw):
    """`0 < s < t < 1`, apart by enough for float64 differences to mean something."""
    s = draw(st.floats(0.01, 0.97))
    return s, draw(st.floats(s + 0.01, 0.99))


@st.composite
def tables(draw, largest=0.5):
    """A table of a few timesteps, which may end without any data."""
    betas = draw(st.lists(st.floats(1e-3, largest), min_size=1, max_size=8))
    return eqxldm.alpha_bar_from_betas(np.array([*betas, 1.0] if draw(st.booleans()) else betas))


def as_floats(at):
    return [float(value) for value in (at.alpha, at.sigma, at.dalpha, at.dsigma)]


@each_vp_path
@given(t=times)
def test_variance_is_preserved(name, t):
    path = ALL_PATHS[name]
    assert path.alpha(t) ** 2 + path.sigma(t) ** 2 == pytest.approx(1, abs=8 * TINY)


@each_path
def test_time_zero_is_data(path):
    assert path.alpha(0.0) == 1 and path.sigma(0.0) == 0
    assert path.logsnr(0.0) == np.inf
    at = path.coefficients(jnp.array(0.0))
    assert at.alpha == 1 and at.sigma == 0 and at.logsnr == np.inf


@pytest.mark.parametrize("name", ["cosine", "linear", "shifted_cosine", "zero_terminal"])
def test_time_one_is_noise(name):
    path = ALL_PATHS[name]
    for at in (path.coefficients(1.0), path.coefficients(jnp.array(1.0))):
        assert at.alpha == 0 and at.sigma == 1
        assert at.logsnr == -np.inf


@given(t=times, sigma_min=st.floats(1e-3, 0.1), sigma_max=st.floats(1, 100))
def test_exploding_variance_is_the_published_one(t, sigma_min, sigma_max):
    path = eqxldm.VarianceExploding(sigma_min, sigma_max)
    assert path.alpha(t) == 1
    # The difference has an error of eps times the growth, which expm1 does not.
    grown = sigma_min**2 * (sigma_max / sigma_min) ** (2 * t)
    assert path.sigma(t) ** 2 == pytest.approx(grown - sigma_min**2, abs=64 * TINY * grown)
    assert path.sigma(1.0) == pytest.approx(math.sqrt(sigma_max**2 - sigma_min**2), rel=1e-13)


def test_exploding_variance_is_exact_near_data():
    path, t = eqxldm.VarianceExploding(0.02, 5.0), 1e-20
    # sigma^2 = sigma_min^2 2 log(sigma_max / sigma_min) t to first order; the next is 1e-19 of it.
    expected = 0.02 * math.sqrt(2 * math.log(250) * t)
    assert path.sigma(t) == pytest.approx(expected, rel=8 * TINY)


@given(t=interior, shift=st.floats(0.1, 10))
def test_shifted_cosine_has_a_shifted_logsnr(t, shift):
    plain, shifted = eqxldm.CosineVP().logsnr(t), eqxldm.CosineVP(shift).logsnr(t)
    # alpha and sigma are exact to a few eps of their own; and so, absolutely, their logarithms.
    bound = TINY * (32 + 4 * abs(plain) + 8 * abs(math.log(shift)))
    assert shifted == pytest.approx(plain - 2 * math.log(shift), abs=bound)
    assert plain == pytest.approx(-2 * math.log(math.tan(math.pi / 2 * t)), abs=2 * bound)


def test_discrete_path_meets_its_table():
    path = PATHS["discrete"]
    at = path.coefficients(np.arange(1, 1001) / 1000)
    # t T is rounded, and alpha' / T is at most 0.01 a timestep.
    np.testing.assert_allclose(at.alpha**2, ALPHA_BAR, rtol=1e-12)
    np.testing.assert_allclose(at.sigma**2, 1 - ALPHA_BAR, rtol=1e-12)
    assert path.timesteps == 1000


@given(tables())
def test_any_table_is_met(table):
    timesteps = len(table)
    at = eqxldm.DiscreteVP(table).coefficients(np.arange(1, timesteps + 1) / timesteps)
    # An angle of at most 90 degrees over at most 9 timesteps, of which t T rounds to 9 eps.
    np.testing.assert_allclose(at.alpha, np.sqrt(table), atol=64 * TINY)
    np.testing.assert_allclose(at.sigma, np.sqrt(1 - table), atol=64 * TINY)
    assert (at.alpha[-1] == 0) == (table[-1] == 0)


@given(tables(), st.integers(1, 7))
def test_discrete_path_turns_smoothly_through_its_timesteps(table, i):
    timesteps = len(table)
    path, t, h = eqxldm.DiscreteVP(table), min(i, timesteps) / timesteps, 1e-9
    before, after = path.coefficients(t - h), path.coefficients(min(t + h, 1.0))
    # The cubic's coefficients are bounded by its turn, at most 90 degrees: the square's by 9 of
    # them, the cube's by 4. So the second derivative of the angle is at most 42 T^2 turns, and
    # that of alpha and sigma has the square of the slope, at most 3 T turns, besides.
    turn = math.pi / 2
    steepest = timesteps**2 * (42 * turn + (3 * turn) ** 2)
    assert abs(after.dalpha - before.dalpha) <= 2 * h * steepest
    assert abs(after.dsigma - before.dsigma) <= 2 * h * steepest


@given(tables(), st.lists(times, min_size=2, max_size=20, unique=True))
def test_logsnr_decreases_on_any_table(table, t):
    t = np.unique(np.round(t, 3))
    logsnr = eqxldm.DiscreteVP(table).logsnr(t)
    assert np.all(logsnr[1:] < logsnr[:-1])


# The turns of a table may grow or fall abruptly, as they do at the ends of these; the least is
# 6.5e-4 in a third of the time.
@pytest.mark.parametrize("betas", [[1e-3, 0.1, 0.2], [0.1, 0.3, 1e-3], [1e-3], [0.5, 0.5]])
def test_velocity_of_any_table_is_regular_at_both_ends(betas):
    path = eqxldm.DiscreteVP(eqxldm.alpha_bar_from_betas(np.array(betas)))
    for t in (0.0, 1.0):
        at = path.coefficients(t)
        angle = at.alpha * at.dsigma - at.sigma * at.dalpha  # d angle / dt
        assert angle > 1e-4
        np.testing.assert_allclose([at.dalpha, at.dsigma], [-at.sigma * angle, at.alpha * angle])


@each_path
@given(pair=ordered_times())
def test_logsnr_decreases(path, pair):
    s, t = pair
    assert path.logsnr(t) < path.logsnr(s)
    expected = 2 * np.log(path.alpha(t) / path.sigma(t))
    assert path.logsnr(t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ALL_PATHS)
def test_derivatives_equal_automatic_ones(name, x64):
    path = ALL_PATHS[name]
    derivatives = jax.jit(
        jax.vmap(
            lambda t: tuple(
                jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (path.alpha, path.sigma)
            )
        )
    )

    @given(st.lists(interior, min_size=8, max_size=8))
    def check(t):
        at, (dalpha, dsigma) = path.coefficients(np.array(t)), derivatives(jnp.array(t))
        # t T rounds to T eps of a timestep, in which a slope may change by all of itself.
        np.testing.assert_allclose(at.dalpha, dalpha, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(at.dsigma, dsigma, rtol=1e-11, atol=1e-13)

    check()


@pytest.mark.parametrize("name", ALL_PATHS)
def test_numpy_and_jax_agree(name, x64):
    path = ALL_PATHS[name]
    jitted = jax.jit(lambda t: path.coefficients(t))

    @given(times)
    def check(t):
        in_numpy, in_jax = path.coefficients(t), jitted(jnp.array(t))
        assert all(value.dtype == jnp.float64 for value in jax.tree.leaves(in_jax))
        assert as_floats(in_jax) == pytest.approx(as_floats(in_numpy), rel=1e-11, abs=1e-14)

    check()


@pytest.mark.parametrize("name", ALL_PATHS)
def test_float32_is_close_and_stays_float32(name):
    path = ALL_PATHS[name]
    jitted = jax.jit(lambda t: path.coefficients(t))

    @given(times)
    def check(t):
        t32 = np.float32(t)
        exact, at = path.coefficients(float(t32)), jitted(jnp.array(t32))
        assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(at))
        # Rounding t T by half a unit moves alpha by alpha' t eps / 2; a few more roundings follow.
        slope = max(abs(float(exact.dalpha)), abs(float(exact.dsigma))) * float(t32)
        slope = slope if np.isfinite(slope) else 0.0
        bound = float(np.finfo(np.float32).eps) * 4 * (1 + slope) * max(1, float(exact.sigma))
        assert float(at.alpha) == pytest.approx(float(exact.alpha), abs=bound)
        assert float(at.sigma) == pytest.approx(float(exact.sigma), abs=bound)

    check()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 inf, in the exploding path
@each_path
def test_many_times_at_once_equal_one_by_one(path):
    t = np.linspace(0, 1, 7)
    many = path.coefficients(t)
    for i in range(7):
        one = path.coefficients(float(t[i]))
        assert float(one.alpha) == many.alpha[i] and float(one.dsigma) == many.dsigma[i]


@each_path
@given(t=st.lists(st.floats(0.01, 1), min_size=2, max_size=30, unique=True).map(sorted), x0=numbers)
def test_one_jump_equals_many_single_steps(path, t, x0):
    at = [path.coefficients(s) for s in (0.0, *t)]
    mean, variance = x0, 0.0
    for at_s, at_t in itertools.pairwise(at):
        r, fresh = eqxldm.transition_coefficients(at_s, at_t)
        assert fresh >= 0
        mean, variance = r * mean, r**2 * variance + fresh
    # A few roundings a step, of at most sigma_t^2: sigma / alpha grows.
    bound = 8 * len(t) * TINY
    assert mean == pytest.approx(float(at[-1].alpha) * x0, rel=bound, abs=1e-300)
    assert variance == pytest.approx(float(at[-1].sigma) ** 2, rel=bound)


@each_path
def test_samples_of_one_jump_and_of_single_steps_have_the_same_moments(path, key):
    t = np.array([0.0, 0.05, 0.3, 0.31, 0.6])
    x0, count = 0.7, 40_000
    at = path.coefficients(t)
    at_s, at_t = path.coefficients(t[:-1]), path.coefficients(t[1:])
    r, fresh = (jnp.asarray(c, jnp.float32) for c in eqxldm.transition_coefficients(at_s, at_t))

    def chain(key):
        def step(x, row):
            r, fresh, key = row
            return r * x + jnp.sqrt(fresh) * jax.random.normal(key, (count,)), None

        keys = jax.random.split(key, len(t) - 1)
        return jax.lax.scan(step, jnp.full(count, x0), (r, fresh, keys))[0]

    def jump(key):
        eps = jax.random.normal(key, (count,))
        return eqxldm.q_sample(path, jnp.full(count, x0), jnp.array(t[-1], jnp.float32), eps)

    keys = jax.random.split(key)
    for x in (jax.jit(chain)(keys[0]), jax.jit(jump)(keys[1])):
        x = np.asarray(x, np.float64)
        # Five standard errors, of the mean and of the variance of a Gaussian: one in a million.
        sigma = at.sigma[-1]
        assert np.mean(x) == pytest.approx(at.alpha[-1] * x0, abs=5 * sigma / math.sqrt(count))
        assert np.var(x) == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / count))


@each_path
@given(pair=ordered_times(), x0=numbers, deviation=numbers)
def test_posterior_is_the_normalised_product_of_two_gaussians(path, pair, x0, deviation):
    s, t = pair
    at_s, at_t = path.coefficients(s), path.coefficients(t)
    x_t = at_t.alpha * x0 + at_t.sigma * deviation
    r = at_t.alpha / at_s.alpha
    fresh = at_t.sigma**2 - r**2 * at_s.sigma**2
    # q(x_s | x0) q(x_t | x_s) on a grid of 10 standard deviations of the first. The trapezoid
    # rule is exact to rounding once its step is below half the product's standard deviation.
    x_s = at_s.alpha * x0 + at_s.sigma * np.linspace(-10, 10, 20_001)
    log = -((x_s - at_s.alpha * x0) ** 2) / (2 * at_s.sigma**2) - (x_t - r * x_s) ** 2 / (2 * fresh)
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = weight @ x_s
    variance = weight @ (x_s - mean) ** 2
    assert variance > (x_s[1] - x_s[0]) ** 2 * 4
    c0, ct, found = eqxldm.posterior_coefficients(at_s, at_t)
    # fresh is a difference that may be as small as 1e-3 of its terms.
    assert found == pytest.approx(variance, rel=1e-10)
    assert c0 * x0 + ct * x_t == pytest.approx(mean, abs=1e-10 * at_s.sigma * (1 + abs(deviation)))
    # Below the variance of both, as functions of x_s, and below the transition's own.
    assert found < at_s.sigma**2 and found < fresh / r**2 and found < fresh


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


@each_path
def test_posterior_of_the_last_step_is_x0(path):
    at = path.coefficients
    assert [float(c) for c in eqxldm.posterior_coefficients(at(0.0), at(0.3))] == [1, 0, 0]


@each_path
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.0, 1.0), (0.2, 0.3), (0.4, 1.0)])
def test_q_posterior_computes_in_float64_and_keeps_the_dtype(path, dtype, s, t, x64):
    x0, x_t = jnp.array([0.3, -1.0], dtype), jnp.array([0.7, 2.0], dtype)
    mean, variance = eqxldm.q_posterior(path, x0, x_t, s, t)
    c0, ct, expected = eqxldm.posterior_coefficients(path.coefficients(s), path.coefficients(t))
    assert mean.dtype == dtype and type(variance) is float and variance == expected
    exact = [c0 * float(a) + ct * float(b) for a, b in zip(x0, x_t, strict=True)]
    # Rounded once to the dtype, after a few roundings of float32 at least.
    bound = float(jnp.finfo(dtype).eps) + 4 * float(np.finfo(np.float32).eps) * (dtype != "float64")
    np.testing.assert_allclose(mean.astype(float), exact, rtol=bound, atol=bound / 8)
    if s == 0:
        assert variance == 0 and np.array_equal(mean, x0)
    else:
        assert variance > 0


@each_path
def test_q_sample_is_the_mix_and_maps_over_a_batch(path, key):
    x0, eps = jax.random.normal(key, (2, 5, 3, 2))
    t = jnp.linspace(0, 1, 5)
    x_t = jax.vmap(lambda x0, t, eps: eqxldm.q_sample(path, x0, t, eps))(x0, t, eps)
    at = path.coefficients(np.asarray(t, np.float64))
    expected = at.alpha[:, None, None] * np.asarray(x0) + at.sigma[:, None, None] * np.asarray(eps)
    # sigma of the exploding path is up to 5, of an exponential of up to 11.
    np.testing.assert_allclose(x_t, expected, atol=1e-6 * np.max(np.abs(expected)) * 3)
    jitted = jax.jit(lambda x0, t, eps: eqxldm.q_sample(path, x0, t, eps))
    np.testing.assert_allclose(jitted(x0[2], t[2], eps[2]), x_t[2], atol=1e-6)


@pytest.mark.parametrize("name", ALL_PATHS)
def test_gradients_in_time_are_right_on_the_whole_open_interval(name):
    path = ALL_PATHS[name]

    def sampled(t, x0, eps):
        return eqxldm.q_sample(path, x0, t, eps)

    gradient = jax.jit(jax.vmap(jax.grad(sampled), in_axes=(0, None, None)))
    one, zero = jnp.array(1.0), jnp.array(0.0)
    # t T rounds to an eps of itself or two: the derivative lies between those of such times.
    eps = np.finfo(np.float32).eps
    t = OPEN.astype(float)
    near = [path.coefficients(np.minimum(t * (1 + k * eps), 1)) for k in np.linspace(-2, 2, 9)]
    for weights, derivative in (((one, zero), "dalpha"), ((zero, one), "dsigma")):
        found = np.asarray(gradient(jnp.asarray(OPEN), *weights))
        assert np.all(np.isfinite(found))
        exact = np.stack([getattr(at, derivative) for at in near])
        slack = 1e-5 * np.max(np.abs(exact), axis=0) + 1e-6
        assert np.all((found >= exact.min(0) - slack) & (found <= exact.max(0) + slack))
    of_logsnr = jax.jit(jax.vmap(jax.grad(path.logsnr)))(jnp.asarray(OPEN))
    assert np.all(np.isfinite(of_logsnr)) and np.all(of_logsnr < 0)


@given(t=interior, x0=numbers, eps=numbers)
def test_bfloat16_data_does_not_round_the_coefficients(t, x0, eps):
    x0, eps, t = jnp.array([x0], jnp.bfloat16), jnp.array([eps], jnp.bfloat16), jnp.array(t)
    path = PATHS["discrete"]
    x_t = eqxldm.q_sample(path, x0, t, eps)
    wide = eqxldm.q_sample(path, x0.astype(jnp.float32), t, eps.astype(jnp.float32))
    assert x_t.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_array_equal(x_t, wide.astype(jnp.bfloat16))


def test_q_sample_names_the_wrong_argument():
    with pytest.raises(TypeCheckError, match="parameter 'eps'"):
        eqxldm.q_sample(PATHS["linear"], jnp.ones(3), jnp.array(0.5), jnp.ones(4))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        eqxldm.q_sample(PATHS["linear"], jnp.ones(3), jnp.ones(3), jnp.ones(3))


INSIDE = "alpha_bar must lie strictly between 0 and 1"


@pytest.mark.parametrize(
    "table, message",
    [
        ([0.5, 0.5], "alpha_bar must strictly decrease, got 0.5 and then 0.5 at timestep 1"),
        ([0.9, 0.5, 0.6], "alpha_bar must strictly decrease, got 0.5 and then 0.6 at timestep 2"),
        ([1.0, 0.5], f"{INSIDE}.* got 1.0 at timestep 0"),
        ([0.5, -0.1], f"{INSIDE}.* got -0.1 at timestep 1"),
        ([0.5, 0.0, 0.0], f"{INSIDE}.* got 0.0 at timestep 1"),
        ([0.5, np.nan], f"{INSIDE}.* got nan at timestep 1"),
        ([], "alpha_bar is empty"),
    ],
)
def test_a_table_that_cannot_be_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        eqxldm.DiscreteVP(np.array(table, float))


@each_path
@pytest.mark.parametrize("t", [-0.1, 1.1, np.nan, np.inf, 1 + 1e-6])
def test_a_time_outside_of_the_interval_is_refused(path, t):
    x = jnp.ones(2)
    message = r"t must lie in \[0, 1\] \(0 is data, 1 is noise\), got "
    for given_time in (float(t), np.array([0.5, t]), jnp.array(t), jnp.array([0.5, t])):
        for function in (path.coefficients, path.alpha, path.sigma, path.logsnr):
            with pytest.raises(ValueError, match=message):
                function(given_time)
    with pytest.raises(ValueError, match=message):
        eqxldm.q_sample(path, x, jnp.array(t), x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eqxldm.CosineVP(0.0), "CosineVP: shift must be positive, got 0.0"),
        (lambda: eqxldm.CosineVP(math.inf), "CosineVP: shift must be positive, got inf"),
        (lambda: eqxldm.VarianceExploding(0.0, 1.0), "0 < sigma_min < sigma_max, got 0.0 and 1.0"),
        (lambda: eqxldm.VarianceExploding(2.0, 1.0), "sigma_min < sigma_max, got 2.0 and 1.0"),
        (lambda: eqxldm.VarianceExploding(1.0, math.inf), "sigma_max, got 1.0 and inf"),
        (lambda: eqxldm.VarianceExploding(math.nan, 1.0), "sigma_min < sigma_max, got nan"),
    ],
)
def test_wrong_parameters_of_a_path_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("s, t", [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, np.nan)])
def test_q_posterior_refuses_times_out_of_order(s, t):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=f"q_posterior: .* got s = {s} and t = {t}"):
        eqxldm.q_posterior(PATHS["linear"], x, x, s, t)
