"""The hybrid loss: DDPM's with the bound that teaches the variance."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm

from helpers import PATHS, reference, relative_error
from normals import LEARNED, optimal

pytestmark = pytest.mark.usefixtures("strict_dtypes")
LEARNED_EPS = LEARNED(eqxldm.predict_eps)
VALUES = 2 * np.arange(256) / 255 - 1
approximate = eqxldm.approximate_gaussian_log_likelihood

REFERENCE = reference("vb_linear_1000")


def stand_in(x_t, t, cond=None, *, key=None):
    """The network with a learned variance of the reference values, of the integer timestep."""
    timestep = jnp.round(1000 * t - 1).astype(x_t.dtype)
    eps = 0.6 * x_t + 0.2 * jnp.sin(2 * x_t + timestep / 150)
    return jnp.concatenate([eps, jnp.tanh(0.5 * x_t + timestep / 1000 - 0.5)])


def hybrid(denoiser, x0, t, eps, **settings):
    with mock.patch("jax.random.normal", lambda key, shape, dtype: eps):
        return eqxldm.hybrid_loss(
            denoiser,
            eqxldm.Diffusion(PATHS["discrete"], LEARNED_EPS),
            x0,
            t,
            None,
            key=jax.random.key(0),
            **settings,
        )


def reference_inputs(dtype):
    t = (REFERENCE["t"] + 1) / 1000
    return tuple(jnp.asarray(a, dtype) for a in (REFERENCE["x0"], t, REFERENCE["eps"]))


def hybrids(dtype, **settings):
    each = jax.jit(jax.vmap(lambda x0, t, eps: hybrid(stand_in, x0, t, eps, **settings)))
    return np.asarray(each(*reference_inputs(dtype)))


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-10), ("float32", 1e-5)])
def test_hybrid_loss_equals_reference(dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        loss = hybrids(dtype, log_likelihood=approximate)
        mse = hybrids(dtype, log_likelihood=approximate, vlb_weight=0.0)
    np.testing.assert_allclose(loss, REFERENCE["train_loss"], rtol=bound)
    np.testing.assert_allclose(mse, REFERENCE["train_mse"], rtol=bound)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-10), ("float32", 1e-5)])
def test_step_bits_equal_reference(dtype, bound):
    path, prediction = PATHS["discrete"], LEARNED_EPS
    times = eqxldm.timestep_times(1000, np.arange(1000))
    with jax.enable_x64(dtype == "float64"):
        table = eqxldm.step_table(path, times, eqxldm.learned_range)
        x0, eps = (jnp.asarray(REFERENCE[name], dtype) for name in ("x0", "eps"))
        for i, timestep in enumerate(REFERENCE["t"]):
            row = jax.tree.map(lambda a, t=timestep: a[999 - t], table)
            assert float(row.t) == pytest.approx((timestep + 1) / 1000, rel=1e-6)
            x_t = eqxldm.q_sample(path, x0[i], row.t, eps[i])
            assert relative_error(x_t, REFERENCE["x_t"][i]) < bound
            out, where = eqxldm.split_output(prediction, x_t, stand_in(x_t, row.t))
            parts = eqxldm.to_x0_eps(prediction, path.coefficients(row.t), x_t, out)
            estimate = eqxldm.Estimate(*parts, where)
            bits = eqxldm.step_bits(row, x0[i], estimate, approximate)
            assert bits.dtype == dtype
            assert relative_error(bits, REFERENCE["vb_bpd"][i]) < bound
            exactly = eqxldm.step_bits(row, x0[i], estimate)
            assert relative_error(exactly, bits) < (2e-4 if timestep == 0 else bound)
            assert (exactly != bits) == (timestep == 0)


def test_hybrid_loss_adds_the_weighted_bits_to_the_mean_square():
    plain, one, half = (hybrids("float32", vlb_weight=w) for w in (0.0, 1.0, 0.5))
    np.testing.assert_allclose(half, (plain + one) / 2, rtol=1e-6)
    assert np.all(one > plain)


@pytest.mark.parametrize("i", [0, 1, 4])
def test_bits_of_the_hybrid_loss_teach_the_variance_and_not_the_mean(i):
    def loss(change, vlb_weight):
        def denoiser(x_t, t, cond, *, key=None):
            eps, where = jnp.split(stand_in(x_t, t), 2)
            return jnp.concatenate([eps + change[0], where + change[1]])

        return hybrid(denoiser, *(a[i] for a in reference_inputs("float32")), vlb_weight=vlb_weight)

    change = jnp.zeros((2, *REFERENCE["x0"][i].shape), jnp.float32)
    plain, mixed = (jax.jit(jax.grad(lambda c, w=w: loss(c, w)))(change) for w in (0.0, 1.0))
    assert jnp.array_equal(mixed[0], plain[0]) and jnp.all(plain[0] != 0)
    assert jnp.all(plain[1] == 0) and jnp.all(mixed[1] != 0)
    assert jnp.all(jnp.isfinite(mixed))


def test_hybrid_loss_is_the_bound_on_average_over_the_timesteps(x64, key):
    # The bits of all timesteps with one noise are the steps of the bound with that noise.
    timesteps = 12
    alpha_bar = eqxldm.alpha_bar_from_betas(eqxldm.linear_betas(timesteps, 0.01, 0.5))
    path, prediction = eqxldm.DiscreteVP(alpha_bar), LEARNED_EPS
    x0, noise = jnp.asarray(VALUES[[10, 128, 250]]), jnp.array([0.3, -1.0, 0.8])
    times = eqxldm.timestep_times(timesteps, np.arange(timesteps))
    with mock.patch("jax.random.normal", lambda key, shape, dtype: noise):
        bound = eqxldm.variational_bound(
            optimal(path, prediction),
            eqxldm.Diffusion(path, prediction),
            times,
            x0,
            key=key,
            variance=eqxldm.learned_range,
        )

        def loss(t, vlb_weight):
            return eqxldm.hybrid_loss(
                optimal(path, prediction),
                eqxldm.Diffusion(path, prediction),
                x0,
                t,
                None,
                key=key,
                vlb_weight=vlb_weight,
            )

        bits = jax.jit(jax.vmap(lambda t: loss(t, 1.0) - loss(t, 0.0)))(jnp.asarray(times[:-1]))
    # The losses are of a size of 1 and may be float32: 1e-7, some times.
    np.testing.assert_allclose(bits, bound.steps, atol=1e-6, rtol=1e-6)


def test_the_hybrid_loss_refuses_what_makes_no_sense(key):
    def loss(t=0.5, path=PATHS["discrete"], prediction=LEARNED_EPS, size=4):
        denoiser = lambda x_t, t, cond, key=None: jnp.zeros(size)
        t = jnp.array(t)
        return eqxldm.hybrid_loss(
            denoiser, eqxldm.Diffusion(path, prediction), jnp.ones(2), t, None, key=key
        )

    assert jnp.isfinite(loss())
    for wrong in ({"prediction": eqxldm.predict_eps}, {"path": PATHS["cosine"]}):
        with pytest.raises(ValueError, match="the hybrid loss needs a table of timesteps"):
            loss(**wrong)
    with pytest.raises(ValueError, match="LearnedRange needs twice the channels"):
        loss(size=2)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*got 1.5"):
        loss(t=1.5)
