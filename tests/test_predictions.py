import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import ALPHA_BAR, PATHS, PREDICTIONS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TINY = np.finfo(np.float64).eps
ZERO_TERMINAL = eqxldm.DiscreteVP(eqxldm.rescale_zero_terminal_snr(ALPHA_BAR))
ALL_PATHS = PATHS | {"zero_terminal": ZERO_TERMINAL, "shifted_cosine": eqxldm.CosineVP(0.3)}
VANISHING = ("cosine", "linear", "zero_terminal", "shifted_cosine")  # alpha(1) = 0
# XLA flushes what underflows to 0: relative bounds hold well above it.
numbers = st.floats(-3, 3).map(lambda x: x if abs(x) > 1e-30 else 0.0)
interior = st.floats(0.02, 0.98)  # away from where a determinant is zero
each_path = pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS)
each_path_name = pytest.mark.parametrize("name", ALL_PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_backend = pytest.mark.parametrize("backend", [float, jnp.array], ids=["numpy", "jax"])
OPEN = np.array([1e-6, 1e-5, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 1e-5, 1 - 1e-6], np.float32)


def system(prediction, at):
    """The 2 x 2 system `[x_t, out] = A [x0, eps]`, in NumPy."""
    return np.array([[at.alpha, at.sigma], prediction(at)], float)


def compiled(path, function):
    """`function(at, x0, eps)` of the coefficients at a traced time."""
    jitted = jax.jit(lambda t, x0, eps: function(path.coefficients(t), x0, eps))
    return lambda *numbers: jax.tree.map(np.asarray, jitted(*map(jnp.array, numbers)))


@each_path_name
def test_every_prediction_to_every_other_and_back_is_the_identity(name, x64):
    path = ALL_PATHS[name]

    def function(at, x0, eps):
        x_t = at.alpha * x0 + at.sigma * eps
        outs = {n: eqxldm.target(p, at, x0, eps) for n, p in PREDICTIONS.items()}
        found = {}
        for source, p in PREDICTIONS.items():
            for to, q in PREDICTIONS.items():
                there = eqxldm.convert(p, q, at, x_t, outs[source])
                found[source, to] = there, eqxldm.convert(q, p, at, x_t, there)
        parts = {n: eqxldm.to_x0_eps(p, at, x_t, outs[n]) for n, p in PREDICTIONS.items()}
        return at, outs, found, parts

    run = compiled(path, function)

    @given(interior, numbers, numbers)
    def check(t, x0, eps):
        at, outs, found, parts = run(t, x0, eps)
        systems = {n: system(p, at) for n, p in PREDICTIONS.items()}
        sizes = {n: np.abs(a) @ np.abs([x0, eps]) for n, a in systems.items()}
        # What rounding of x_t and out, by a few eps of their terms, grows to in x0 and eps.
        bounds = {n: 16 * TINY * np.abs(np.linalg.inv(systems[n])) @ sizes[n] for n in systems}
        for n, (x0_back, eps_back) in parts.items():
            assert np.all(np.abs([x0_back - x0, eps_back - eps]) <= bounds[n])
            # and they make x_t again, whatever was lost on the way
            again = at.alpha * x0_back + at.sigma * eps_back
            x_t = at.alpha * x0 + at.sigma * eps
            assert abs(again - x_t) <= np.abs(systems[n][0]) @ bounds[n]
        for (source, to), (there, back) in found.items():
            bound = np.abs(systems[to][1]) @ bounds[source]
            assert abs(there - outs[to]) <= bound
            out_to_parts = np.abs(np.linalg.inv(systems[to])) @ [16 * TINY * sizes[to][0], bound]
            out_to_parts = out_to_parts + bounds[to]
            assert abs(back - outs[source]) <= np.abs(systems[source][1]) @ out_to_parts

    check()


@each_path_name
def test_any_output_splits_into_parts_that_make_x_t_again(name, x64):
    path = ALL_PATHS[name]

    def function(at, x_t, out):
        parts = {n: eqxldm.to_x0_eps(p, at, x_t, out) for n, p in PREDICTIONS.items()}
        again = {n: eqxldm.target(p, at, *parts[n]) for n, p in PREDICTIONS.items()}
        return at, parts, again

    run = compiled(path, function)

    @given(interior, numbers, numbers)
    def check(t, x_t, out):
        at, parts, again = run(t, x_t, out)
        for n, p in PREDICTIONS.items():
            a = np.abs(system(p, at))
            bound = 16 * TINY * a @ np.abs(np.linalg.inv(system(p, at))) @ np.abs([x_t, out])
            x0, eps = parts[n]
            assert abs(at.alpha * x0 + at.sigma * eps - x_t) <= bound[0]
            assert abs(again[n] - out) <= bound[1]

    check()


@each_path
@given(t=interior)
def test_inverse_is_the_inverse_of_the_system(path, t):
    at = path.coefficients(t)
    for prediction in PREDICTIONS.values():
        i = eqxldm.inverse(prediction, at)
        found = np.array([[i.x0_from_x, i.x0_from_out], [i.eps_from_x, i.eps_from_out]])
        a = system(prediction, at)
        # No entry of the inverse is a difference: its determinant has two terms of one sign.
        expected = np.array([[a[1, 1], -a[0, 1]], [-a[1, 0], a[0, 0]]])
        expected /= a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]
        np.testing.assert_allclose(found, expected, rtol=16 * TINY)


@each_path
@given(t=interior)
def test_determinants_are_the_documented_ones(path, t):
    at = path.coefficients(t)
    found = {name: float(np.linalg.det(system(p, at))) for name, p in PREDICTIONS.items()}
    assert found["eps"] == pytest.approx(float(at.alpha))
    assert found["x0"] == pytest.approx(-float(at.sigma))
    assert found["v"] == pytest.approx(float(at.alpha**2 + at.sigma**2))
    assert found["score"] == pytest.approx(-float(at.alpha / at.sigma))
    assert found["velocity"] > 0
    if path is PATHS["linear"]:
        assert found["velocity"] == pytest.approx(1)


@each_path
@given(t=interior, x0=numbers, eps=numbers)
def test_targets_are_what_their_names_say(path, x64, t, x0, eps):
    at = path.coefficients(t)
    x0, eps = jnp.array(x0), jnp.array(eps)
    target = {n: float(eqxldm.target(p, at, x0, eps)) for n, p in PREDICTIONS.items()}
    x0, eps = float(x0), float(eps)
    assert target["x0"] == x0 and target["eps"] == eps
    assert target["v"] == pytest.approx(float(at.alpha) * eps - float(at.sigma) * x0)
    assert target["score"] * -float(at.sigma) == pytest.approx(eps, rel=4 * TINY)
    # A difference quotient is a mean of the velocity over its interval, and rounds to eps / h.
    h = 1e-6
    near = [path.coefficients(t + d) for d in (-h, h)]
    behind, ahead = (float(c.alpha * x0 + c.sigma * eps) for c in near)
    change = sum(abs(float(c.dalpha * x0 + c.dsigma * eps) - target["velocity"]) for c in near)
    bound = change + 16 * TINY * (abs(x0) + float(at.sigma + 1) * abs(eps)) / h
    assert target["velocity"] == pytest.approx((ahead - behind) / (2 * h), abs=bound)


@given(t=interior, x0=numbers, eps=numbers)
def test_score_is_the_slope_of_the_log_density(x64, t, x0, eps):
    path = PATHS["linear"]
    at = path.coefficients(t)
    x_t = jnp.array(float(at.alpha) * x0 + float(at.sigma) * eps)
    log_density = lambda x: -((x - float(at.alpha) * x0) ** 2) / (2 * float(at.sigma) ** 2)
    score = eqxldm.target(eqxldm.predict_score, at, jnp.array(x0), jnp.array(eps))
    # x_t - alpha x0 loses eps of x_t, over sigma^2 of 4e-4 or more.
    assert float(jax.grad(log_density)(x_t)) == pytest.approx(float(score), abs=1e-11, rel=1e-11)


def test_velocity_of_the_linear_flow_is_noise_minus_data():
    at = PATHS["linear"].coefficients(jnp.array(0.3))
    x0, eps = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_array_equal(eqxldm.target(eqxldm.predict_velocity, at, x0, eps), eps - x0)


X, OUT = jnp.array([0.5, -1.25]), jnp.array([2.0, 0.75])


def parts_at(path, prediction, t, backend):
    return eqxldm.to_x0_eps(prediction, ALL_PATHS[path].coefficients(backend(t)), X, OUT)


@each_backend
@pytest.mark.parametrize("path", VANISHING)
def test_without_data_an_eps_network_still_says_eps(path, backend):
    x0, eps = parts_at(path, eqxldm.predict_eps, 1.0, backend)
    np.testing.assert_array_equal(eps, OUT)
    assert not np.any(np.isfinite(x0))


@each_backend
@pytest.mark.parametrize("path", VANISHING)
def test_without_data_a_score_network_still_says_eps(path, backend):
    x0, eps = parts_at(path, eqxldm.predict_score, 1.0, backend)
    np.testing.assert_array_equal(eps, -OUT)  # sigma is 1
    assert not np.any(np.isfinite(x0))


@each_backend
@each_path_name
def test_without_noise_an_x0_network_still_says_x0(name, backend):
    x0, eps = parts_at(name, eqxldm.predict_x0, 0.0, backend)
    np.testing.assert_array_equal(x0, OUT)
    assert not np.any(np.isfinite(eps))


@each_backend
@each_path_name
def test_without_noise_a_score_network_says_x_t_and_no_noise(name, backend):
    x0, eps = parts_at(name, eqxldm.predict_score, 0.0, backend)
    np.testing.assert_array_equal(x0, X)
    np.testing.assert_array_equal(eps, 0 * X)


@each_backend
@each_path_name
def test_without_noise_an_eps_network_says_x_t(name, backend):
    x0, eps = parts_at(name, eqxldm.predict_eps, 0.0, backend)
    np.testing.assert_array_equal(x0, X)
    np.testing.assert_array_equal(eps, OUT)


@each_backend
@each_path_name
def test_v_is_regular_at_both_ends(name, backend):
    x0, eps = parts_at(name, eqxldm.predict_v, 0.0, backend)
    np.testing.assert_array_equal(x0, X)
    np.testing.assert_array_equal(eps, OUT)
    if name in VANISHING:
        x0, eps = parts_at(name, eqxldm.predict_v, 1.0, backend)
        np.testing.assert_array_equal(x0, -OUT)
        np.testing.assert_array_equal(eps, X)


@each_backend
@pytest.mark.parametrize("name", ["discrete", *VANISHING])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_is_regular_at_both_ends(name, backend, t):
    at = ALL_PATHS[name].coefficients(backend(t))
    x0, eps = eqxldm.to_x0_eps(eqxldm.predict_velocity, at, X, OUT)
    expected = np.linalg.solve(system(eqxldm.predict_velocity, at), np.stack([X, OUT]))
    np.testing.assert_allclose([x0, eps], expected, rtol=1e-5, atol=1e-6)  # float32


# A table may begin or end with a turn much smaller than its neighbour: of these, at the least
# 6.5e-4 in a third of the time.
@pytest.mark.parametrize("betas", [[1e-3, 0.1, 0.2], [0.1, 0.3, 1e-3], [0.5, 0.5]])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_is_regular_at_the_ends_of_any_table(betas, t):
    at = eqxldm.DiscreteVP(eqxldm.alpha_bar_from_betas(np.array(betas))).coefficients(t)
    a = system(eqxldm.predict_velocity, at)
    assert np.linalg.det(a) > 1e-4
    found = jax.tree.leaves(eqxldm.inverse(eqxldm.predict_velocity, at))
    np.testing.assert_allclose(np.array(found), np.linalg.inv(a).ravel(), rtol=1e-12, atol=1e-12)


def test_velocity_of_the_exploding_path_says_x_t_and_no_noise_at_data():
    # There sigma' is infinite: whatever the network says, eps = (out - 0) / sigma' is 0.
    x0, eps = parts_at("exploding", eqxldm.predict_velocity, 0.0, float)
    np.testing.assert_array_equal(x0, X)
    np.testing.assert_array_equal(eps, 0 * X)


@each_backend
def test_ends_convert_where_the_limit_is_finite(backend):
    def at(name, t):
        return ALL_PATHS[name].coefficients(backend(t))

    eps, x0, v, score = (PREDICTIONS[n] for n in ("eps", "x0", "v", "score"))
    for name in VANISHING:
        noise = at(name, 1.0)
        np.testing.assert_array_equal(eqxldm.convert(eps, score, noise, X, OUT), -OUT)
        np.testing.assert_array_equal(eqxldm.convert(score, eps, noise, X, OUT), -OUT)
        np.testing.assert_array_equal(eqxldm.convert(v, x0, noise, X, OUT), -OUT)
        np.testing.assert_array_equal(eqxldm.convert(v, eps, noise, X, OUT), X)
        np.testing.assert_array_equal(eqxldm.convert(x0, v, noise, X, OUT), -OUT)
        np.testing.assert_array_equal(eqxldm.convert(x0, eps, noise, X, OUT), X)
        assert not np.any(np.isfinite(eqxldm.convert(eps, v, noise, X, OUT)))
    for name in ALL_PATHS:
        data = at(name, 0.0)
        np.testing.assert_array_equal(eqxldm.convert(eps, x0, data, X, OUT), X)
        np.testing.assert_array_equal(eqxldm.convert(eps, v, data, X, OUT), OUT)
        np.testing.assert_array_equal(eqxldm.convert(v, eps, data, X, OUT), OUT)
        np.testing.assert_array_equal(eqxldm.convert(v, x0, data, X, OUT), X)
        np.testing.assert_array_equal(eqxldm.convert(score, x0, data, X, OUT), X)
        np.testing.assert_array_equal(eqxldm.convert(score, eps, data, X, OUT), 0 * X)
        assert not np.any(np.isfinite(eqxldm.convert(eps, score, data, X, OUT)))
        assert not np.any(np.isfinite(eqxldm.convert(x0, eps, data, X, OUT)))


@each_path_name
def test_gradients_in_time_are_finite_and_right_on_the_whole_open_interval(name, x64):
    path = ALL_PATHS[name]

    def coefficients(t):
        inverses = [eqxldm.inverse(p, path.coefficients(t)) for p in PREDICTIONS.values()]
        return jnp.stack(jax.tree.leaves(inverses))

    @jax.jit
    @jax.vmap
    def value_and_slope(t):
        return jax.jvp(coefficients, (t,), (jnp.ones_like(t),))

    _, narrow = value_and_slope(jnp.asarray(OPEN))
    assert narrow.dtype == jnp.float32 and np.all(np.isfinite(narrow))
    t, h = jnp.linspace(0.05, 0.95, 7) + 0.0003, 1e-6  # between timesteps, where slopes may turn
    (ahead, _), (behind, _), (_, slope) = (value_and_slope(t + d) for d in (h, -h, 0 * h))
    # Of a central difference the errors are about h^2 and eps / h of what it differentiates.
    scale = np.max(np.abs(slope), axis=0) + 1
    assert np.all(np.abs(slope - (ahead - behind) / (2 * h)) <= 1e-6 * scale)


@each_path_name
def test_gradients_of_x0_and_eps_are_finite_on_the_whole_open_interval(name):
    path = ALL_PATHS[name]

    def everything(t):
        at = path.coefficients(t)
        parts = [eqxldm.to_x0_eps(p, at, X[0], OUT[0]) for p in PREDICTIONS.values()]
        return sum(jax.tree.leaves(parts))

    assert np.all(np.isfinite(jax.jit(jax.vmap(jax.grad(everything)))(jnp.asarray(OPEN))))


@each_prediction
@given(t=interior, x=numbers, y=numbers)
def test_bfloat16_data_does_not_round_the_coefficients(prediction, t, x, y):
    x, y = jnp.array([x], jnp.bfloat16), jnp.array([y], jnp.bfloat16)
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    at = PATHS["discrete"].coefficients(jnp.array(t, jnp.float32))
    for function in (
        lambda x, y: (eqxldm.target(prediction, at, x, y),),
        lambda x, y: eqxldm.to_x0_eps(prediction, at, x, y),
        lambda x, y: (eqxldm.convert(prediction, eqxldm.predict_v, at, x, y),),
    ):
        for found, wide in zip(function(x, y), function(wide_x, wide_y), strict=True):
            assert found.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
            np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@each_prediction
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_of_the_network_is_kept(prediction, dtype, x64):
    x = jnp.ones(3, dtype)
    for t in (0.5, jnp.array(0.5, jnp.float32), jnp.array(0.5)):
        at = PATHS["discrete"].coefficients(t)
        for value in (
            *eqxldm.to_x0_eps(prediction, at, x, x),
            eqxldm.target(prediction, at, x, x),
            eqxldm.convert(prediction, eqxldm.predict_x0, at, x, x),
        ):
            assert value.dtype == dtype


def test_a_prediction_is_converted_to_itself_unchanged_even_where_it_is_singular():
    for prediction in PREDICTIONS.values():
        for t in (0.0, 1.0):
            at = PATHS["linear"].coefficients(t)
            np.testing.assert_array_equal(eqxldm.convert(prediction, prediction, at, X, OUT), OUT)


@each_prediction
def test_learned_range_means_the_same_mean(prediction):
    at = PATHS["discrete"].coefficients(0.3)
    ranged = eqxldm.LearnedRange(prediction)
    assert ranged(at) == prediction(at)
    expected = jax.tree.leaves(eqxldm.inverse(prediction, at))
    assert jax.tree.leaves(eqxldm.inverse(ranged, at)) == expected
    converted = eqxldm.convert(ranged, prediction, at, X, OUT)
    np.testing.assert_allclose(converted, OUT, rtol=1e-6)


def test_output_with_a_learned_range_splits_along_the_channels():
    x_t = jnp.zeros((3, 4, 2))
    out = jnp.arange(48.0).reshape(6, 4, 2)
    ranged = eqxldm.LearnedRange(eqxldm.predict_eps)
    mean, variance = eqxldm.split_output(ranged, x_t, out)
    np.testing.assert_array_equal(jnp.concatenate([mean, variance]), out)
    assert mean.shape == variance.shape == x_t.shape
    whole, nothing = eqxldm.split_output(eqxldm.predict_eps, x_t, out[:3])
    assert nothing is None
    np.testing.assert_array_equal(whole, out[:3])


@pytest.mark.parametrize(
    "prediction, x_shape, out_shape, message",
    [
        (eqxldm.predict_eps, (3, 4), (6, 4), r"\(6, 4\).*\(3, 4\).* wrap .* LearnedRange"),
        (eqxldm.predict_v, (3,), (4,), r"output has the shape \(4,\), x_t \(3,\): .* the same"),
        (eqxldm.predict_v, (3, 1), (3,), r"output has the shape \(3,\), x_t \(3, 1\)"),
        (eqxldm.LearnedRange(eqxldm.predict_eps), (3, 4), (3, 4), r"twice the channels of x_t"),
        (eqxldm.LearnedRange(eqxldm.predict_eps), (3, 4), (3, 8), r"whose shape is \(3, 4\)"),
        (eqxldm.LearnedRange(eqxldm.predict_eps), (), (2,), r"LearnedRange needs twice"),
    ],
)
def test_output_of_a_wrong_shape_is_refused(prediction, x_shape, out_shape, message):
    with pytest.raises(ValueError, match=message):
        eqxldm.split_output(prediction, jnp.zeros(x_shape), jnp.zeros(out_shape))


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda at: eqxldm.target(eqxldm.predict_v, at, jnp.ones(3), jnp.ones(4)), "eps"),
        (lambda at: eqxldm.to_x0_eps(eqxldm.predict_v, at, jnp.ones(3), jnp.ones(4)), "out"),
        (lambda at: eqxldm.inverse(eqxldm.predict_v, 0.5), "at"),
        (lambda at: eqxldm.inverse(0.5, at), "prediction"),
    ],
)
def test_a_wrong_argument_is_named(call, name):
    with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
        call(PATHS["linear"].coefficients(0.5))


@pytest.mark.parametrize("t", [-0.1, 1.1, np.nan])
def test_time_outside_of_the_interval_reaches_no_prediction(t):
    for given_time in (float(t), jnp.array(t)):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            eqxldm.inverse(eqxldm.predict_v, PATHS["linear"].coefficients(given_time))
