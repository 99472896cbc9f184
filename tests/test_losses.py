"""The losses of denoisers, the divergence to a normal, and the hinge losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import PATHS, PREDICTIONS, gaussian_denoiser

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
