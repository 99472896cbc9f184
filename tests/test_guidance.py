import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm

from helpers import PATHS, perturbed, small_dit

pytestmark = pytest.mark.usefixtures("strict_dtypes")

T = jnp.array(0.4)
X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
COND, NULL = jnp.array(2.0), jnp.array(-1.0)


def denoiser(x_t, t, cond, *, key=None):
    return jnp.tanh(cond * x_t) + t


def branches():
    return denoiser(X, T, NULL), denoiser(X, T, COND)


@pytest.mark.parametrize("scale, branch", [(0.0, 0), (1.0, 1)])
def test_scale_one_is_conditional_and_zero_unconditional(scale, branch):
    guided = eqxldm.guide(denoiser, NULL, scale)
    np.testing.assert_allclose(guided(X, T, COND), branches()[branch], atol=1e-6)


@pytest.mark.parametrize("scale", [-0.5, 1.5, 4.0, jnp.array(2.5)])
def test_guidance_is_linear_in_the_scale(scale):
    unconditional, conditional = branches()
    guided = eqxldm.guide(denoiser, NULL, scale)(X, T, COND)
    expected = unconditional + float(scale) * (conditional - unconditional)
    np.testing.assert_allclose(guided, expected, rtol=1e-6)


def test_scale_may_be_a_function_of_time():
    guided = eqxldm.guide(denoiser, NULL, lambda t: 1 + 5 * t)
    for t in (jnp.array(0.1), jnp.array(0.9)):
        expected = eqxldm.guide(denoiser, NULL, float(1 + 5 * t))(X, t, COND)
        np.testing.assert_allclose(guided(X, t, COND), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "t, inside", [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)]
)
def test_interval_is_closed_and_conditional_outside(t, inside):
    t = jnp.array(t)
    guided = jax.jit(eqxldm.guide(denoiser, NULL, 3.0, interval=(0.25, 0.75)))
    plain = eqxldm.guide(denoiser, NULL, 3.0 if inside else 1.0)
    np.testing.assert_allclose(guided(X, t, COND), plain(X, t, COND), atol=1e-6)


def calls_of(t, **interval):
    shapes = []

    def counted(x_t, t, cond, *, key=None):
        jax.debug.callback(lambda c: shapes.append(np.shape(c)), cond)
        return cond * x_t

    guided = jax.jit(eqxldm.guide(counted, NULL, 3.0, **interval))
    jax.block_until_ready(guided(X, jnp.array(t), COND))
    jax.effects_barrier()
    return len(shapes)


def test_outside_the_interval_the_network_is_called_once():
    assert calls_of(0.5, interval=(0.25, 0.75)) == 2
    assert calls_of(0.9, interval=(0.25, 0.75)) == 1


def test_conditions_may_be_trees():
    def tree_denoiser(x_t, t, cond, *, key=None):
        return cond["a"] * x_t + cond["b"].sum()

    cond, null = {"a": jnp.array(2.0), "b": jnp.ones(3)}, {"a": jnp.array(1.0), "b": jnp.zeros(3)}
    guided = eqxldm.guide(tree_denoiser, null, 2.0)(X, T, cond)
    np.testing.assert_allclose(guided, X + 2 * (X + 3), rtol=1e-6)


@pytest.mark.parametrize("a, b", [("eps", "v"), ("x0", "velocity")])
def test_guidance_commutes_with_the_change_of_prediction(a, b, x64):
    predictions = {
        name: getattr(eqxldm, f"predict_{name}") for name in ("eps", "x0", "v", "velocity")
    }
    at = PATHS["cosine"].coefficients(jnp.array(0.4))
    x = jnp.asarray(X, jnp.float64)

    def as_b(x_t, t, cond, *, key=None):
        x0, eps = eqxldm.to_x0_eps(predictions[a], at, x_t, denoiser(x_t, t, cond))
        return eqxldm.target(predictions[b], at, x0, eps)

    time, cond, null = (jnp.asarray(v, jnp.float64) for v in (0.4, 2.0, -1.0))
    from_a = eqxldm.to_x0_eps(
        predictions[a], at, x, eqxldm.guide(denoiser, null, 3.0)(x, time, cond)
    )
    from_b = eqxldm.to_x0_eps(predictions[b], at, x, eqxldm.guide(as_b, null, 3.0)(x, time, cond))
    np.testing.assert_allclose(from_a, from_b, rtol=1e-10)


def test_guidance_of_a_dit_uses_its_null_row(key):
    dit = perturbed(small_dit())
    x, label = jax.random.normal(key, dit.shape), jnp.array(3)
    guided = jax.jit(eqxldm.guide(dit, dit.null, 2.0))(x, T, label)
    conditional, unconditional = dit(x, T, label), dit(x, T, dit.null)
    assert jnp.max(jnp.abs(conditional - unconditional)) > 1e-3
    np.testing.assert_allclose(guided, 2 * conditional - unconditional, atol=1e-4)


def test_bfloat16_stays_bfloat16():
    guided = eqxldm.guide(denoiser_of_bfloat16, NULL, lambda t: 2 * t, interval=(0.1, 0.9))
    assert guided(X.astype(jnp.bfloat16), T, COND).dtype == jnp.bfloat16


def denoiser_of_bfloat16(x_t, t, cond, *, key=None):
    return x_t * cond.astype(x_t.dtype)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_a_wrong_interval_is_refused(interval):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        eqxldm.guide(denoiser, NULL, 1.0, interval=interval)
