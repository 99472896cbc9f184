"""The checks of values that only the running program can see."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm

from helpers import PATHS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TIME = r"t must lie in \[0, 1\]"
DOUBLE = lambda x_t, t, cond, key=None: x_t + x_t
OUT = "the denoiser's output holds NaN or infinity"

# `eqx.filter_jit` raises `EquinoxRuntimeError`, `jax.jit` JAX's own: both are RuntimeErrors.
each_way = pytest.mark.parametrize("jit", [eqx.filter_jit, jax.jit], ids=["equinox", "jax"])
each_bad_number = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


@each_way
@pytest.mark.parametrize("t", [-1e-6, 1.0001, np.nan, np.inf])
def test_a_time_outside_the_unit_interval_stops_the_program(jit, t):
    with pytest.raises(RuntimeError, match=TIME):
        jit(eqxldm.check_time)(jnp.array(t, jnp.float32))


def test_one_wrong_time_among_many_is_enough():
    with pytest.raises(RuntimeError, match=TIME):
        eqx.filter_jit(eqxldm.check_time)(jnp.array([0.0, 0.5, 1.5, 1.0]))


@each_way
def test_times_inside_pass_unchanged_with_their_ends(jit):
    t = jnp.array([0.0, 1e-30, 0.5, 1.0])
    checked = jit(eqxldm.check_time)(t)
    assert checked.dtype == t.dtype and jnp.array_equal(checked, t)


@each_way
@each_bad_number
def test_a_number_that_is_not_finite_is_named(jit, bad):
    with pytest.raises(RuntimeError, match="x_T holds NaN or infinity"):
        jit(lambda x: eqxldm.check_finite(x, "x_T"))(jnp.array([0.0, bad, 1.0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_numbers_pass_unchanged(dtype):
    x = jnp.array([0.0, -1.5, jnp.finfo(dtype).max], dtype)
    checked = eqx.filter_jit(lambda x: eqxldm.check_finite(x, "x"))(x)
    assert checked.dtype == x.dtype and jnp.array_equal(checked, x)


@each_way
def test_a_checked_denoiser_gives_what_the_denoiser_gives(jit):
    seen = {}

    def denoiser(x_t, t, cond, *, key=None):
        seen.update(cond=cond, key=key)
        return jnp.concatenate([x_t, x_t]) * t

    x_t, t, key = jnp.array([1.0, -2.0]), jnp.array(0.3), jax.random.key(3)
    checked = eqxldm.checked(denoiser)
    assert isinstance(checked, eqxldm.Denoiser)
    run = jit(lambda x_t, t, key: checked(x_t, t, "label", key=key))
    assert jnp.array_equal(run(x_t, t, key), denoiser(x_t, t, None))
    run(x_t, t, key)
    checked(x_t, t, "label", key=key)
    assert seen["cond"] == "label" and seen["key"] is key


@each_way
@each_bad_number
def test_a_checked_denoiser_says_whether_a_nan_came_in_or_went_out(jit, bad):
    x_t, t = jnp.ones(2), jnp.array(0.5)
    run = lambda denoiser: jit(lambda x_t, t: eqxldm.checked(denoiser)(x_t, t, None))
    with pytest.raises(RuntimeError, match="x_t holds NaN or infinity"):
        # A denoiser that hides what came in; it has to look at it, or the check is left out.
        run(lambda x_t, t, cond, key=None: jnp.nan_to_num(x_t))(x_t.at[1].set(bad), t)
    with pytest.raises(RuntimeError, match=OUT):
        run(lambda x_t, t, cond, key=None: x_t.at[0].set(bad))(x_t, t)
    with pytest.raises(RuntimeError, match=TIME):
        run(lambda x_t, t, cond, key=None: x_t * t)(x_t, t + 1)


def breaks_at(time):
    return lambda x_t, t, cond, key=None: jnp.where(jnp.abs(t - time) < 1e-6, jnp.nan, 0.5 * x_t)


@pytest.mark.parametrize("time", [1.0, 0.5, 0.25])
def test_sampling_with_a_checked_denoiser_stops_at_a_nan(time):
    times, x_T = eqxldm.uniform_times(4), jnp.ones(3)

    def run(denoiser):
        return eqx.filter_jit(eqxldm.sample)(
            denoiser, eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v), eqxldm.DDIM(), times, x_T
        )

    assert jnp.all(jnp.isnan(run(breaks_at(time))))
    with pytest.raises(RuntimeError, match=OUT):
        run(eqxldm.checked(breaks_at(time)))
    # At a time that the grid does not visit nothing breaks, and nothing changes.
    sound = breaks_at(0.6)
    assert jnp.array_equal(run(eqxldm.checked(sound)), run(sound))


def test_the_loss_of_a_checked_denoiser_is_the_loss(key):
    loss = eqx.filter_jit(
        lambda denoiser, x0: eqxldm.denoising_loss(
            denoiser,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_velocity),
            eqxldm.constant_weight,
            x0,
            jnp.array(0.5),
            None,
            key=key,
        )
    )
    x0 = jnp.array([0.3, -1.0])
    gradient = eqx.filter_jit(jax.grad(lambda x0: loss(eqxldm.checked(DOUBLE), x0)))
    assert jnp.array_equal(loss(eqxldm.checked(DOUBLE), x0), loss(DOUBLE, x0))
    assert jnp.array_equal(gradient(x0), jax.grad(lambda x0: loss(DOUBLE, x0))(x0))
    with pytest.raises(RuntimeError, match="x_t holds NaN"):
        loss(eqxldm.checked(DOUBLE), x0.at[0].set(jnp.nan))
