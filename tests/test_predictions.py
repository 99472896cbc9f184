import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm

from helpers import PATHS, PREDICTIONS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

numbers = st.floats(-3, 3, allow_subnormal=False)
interior = st.floats(0.02, 0.98)  # away from where a determinant is zero
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)


def determinant(prediction, at):
    a, b = prediction(at)
    return at.alpha * b - at.sigma * a


@each_path
@each_prediction
@given(t=interior, x0=numbers, eps=numbers)
def test_target_and_inverse_round_trip(path, prediction, x64, t, x0, eps):
    t, x0, eps = jnp.array(t), jnp.array(x0), jnp.array(eps)
    at = path.coefficients(t)
    x_t = eqxldm.q_sample(path, x0, t, eps)
    back = eqxldm.to_x0_eps(prediction, at, x_t, eqxldm.target(prediction, at, x0, eps))
    bound = 1e-14 / abs(float(determinant(prediction, at)))  # what rounding grows to
    np.testing.assert_allclose(back, (x0, eps), atol=max(bound, 1e-13))


@each_path
@each_prediction
@given(t=interior, x_t=numbers, out=numbers)
def test_any_output_splits_into_parts_that_make_x_t_again(path, prediction, x64, t, x_t, out):
    at = path.coefficients(jnp.array(t))
    x0, eps = eqxldm.to_x0_eps(prediction, at, jnp.array(x_t), jnp.array(out))
    bound = 1e-14 / abs(float(determinant(prediction, at)))
    assert float(at.alpha * x0 + at.sigma * eps) == pytest.approx(x_t, abs=max(bound, 1e-13))
    again = eqxldm.target(prediction, at, x0, eps)
    assert float(again) == pytest.approx(out, abs=10 * max(bound, 1e-13))


@each_path
@given(t=interior)
def test_determinants_are_the_documented_ones(path, x64, t):
    at = path.coefficients(jnp.array(t))
    found = {name: float(determinant(p, at)) for name, p in PREDICTIONS.items()}
    assert found["eps"] == pytest.approx(float(at.alpha))
    assert found["x0"] == pytest.approx(-float(at.sigma))
    assert found["v"] == pytest.approx(float(at.alpha**2 + at.sigma**2))
    assert found["velocity"] > 0
    if path is PATHS["linear"]:
        assert found["velocity"] == pytest.approx(1)


@each_path
@given(t=interior, x0=numbers, eps=numbers)
def test_targets_are_what_their_names_say(path, x64, t, x0, eps):
    at = path.coefficients(jnp.array(t))
    target = {
        n: eqxldm.target(p, at, jnp.array(x0), jnp.array(eps)) for n, p in PREDICTIONS.items()
    }
    assert float(target["x0"]) == x0 and float(target["eps"]) == eps
    assert float(target["v"]) == pytest.approx(float(at.alpha) * eps - float(at.sigma) * x0)
    h = 1e-4  # within one segment of the discrete path only if no timestep lies between
    if path is not PATHS["discrete"]:
        ahead, behind = (float(path.alpha(t + d) * x0 + path.sigma(t + d) * eps) for d in (h, -h))
        assert float(target["velocity"]) == pytest.approx((ahead - behind) / (2 * h), abs=1e-6)


def test_velocity_of_the_linear_flow_is_noise_minus_data():
    at = PATHS["linear"].coefficients(jnp.array(0.3))
    x0, eps = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_array_equal(eqxldm.target(eqxldm.predict_velocity, at, x0, eps), eps - x0)


@each_prediction
def test_dtype_of_the_network_is_kept(prediction):
    x = jnp.ones(3, jnp.bfloat16)
    at = PATHS["discrete"].coefficients(jnp.array(0.5))
    x0, eps = eqxldm.to_x0_eps(prediction, at, x, x)
    assert x0.dtype == eps.dtype == eqxldm.target(prediction, at, x, x).dtype == jnp.bfloat16


def test_singular_times_are_not_finite():
    at_noise = PATHS["linear"].coefficients(jnp.array(1.0))
    at_data = PATHS["linear"].coefficients(jnp.array(0.0))
    x = jnp.ones(2)
    x0, _ = eqxldm.to_x0_eps(eqxldm.predict_eps, at_noise, x, x)
    _, eps = eqxldm.to_x0_eps(eqxldm.predict_x0, at_data, x, x)
    assert not jnp.any(jnp.isfinite(x0)) and not jnp.any(jnp.isfinite(eps))
