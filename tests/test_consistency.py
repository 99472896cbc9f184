"""Consistency objectives against exact solutions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm import nn
from eqxldm.objectives import (
    consistency_tangent,
)
from eqxldm.training import in_dtype

from few_step_truths import FLOW, MIXTURE, TRIG, gaussian_map, gaussian_velocity, grid, slopes


def gaussian_consistency(diffusion):
    """The network of the exact consistency function on any path."""

    def network(x_t, t, cond=None, *, key=None):
        x0 = gaussian_map(diffusion.path)(x_t, t, jnp.zeros_like(t))
        at = diffusion.path.coefficients(t)
        return diffusion.target(x0, t, (x_t - at.alpha * x0) / at.sigma)

    return network


def consistency_velocity(x_t, t, cond=None, *, key=None):
    """`F` of the exact consistency function of the mixture: `f = cos x - sin F`."""
    x0 = MIXTURE.flow_map(TRIG.path)(x_t, t, jnp.zeros_like(t))
    phi = t * np.pi / 2
    return (jnp.cos(phi) * x_t - x0) / jnp.sin(phi)


def test_the_consistency_tangent_is_zero_at_the_truth(x64):
    v = MIXTURE.denoiser(TRIG.path, ex.predict_v)
    for t in (0.6, 0.95):
        t = jnp.array(t)
        tangent = lambda r=1.0, t=t: consistency_tangent(
            consistency_velocity, grid(), t, None, v(grid(), t, None), r
        )[1]
        np.testing.assert_allclose(tangent(), np.zeros(7), atol=1e-8)
        # Without what warms up it is another loss.
        assert np.max(np.abs(tangent(0.0))) > 0.05 * np.cos(t * np.pi / 2)
        f = ex.consistency_function(consistency_velocity, TRIG)(grid(), t)
        expected = MIXTURE.transport(TRIG.path, float(t), 0.0, np.asarray(grid()))
        np.testing.assert_allclose(f, expected, atol=1e-10)


def test_scm_has_its_minimum_at_the_truth(x64):
    F, t = gaussian_consistency(TRIG), 0.5
    teacher = gaussian_velocity(TRIG.path, ex.predict_v)
    (slope, _), (away, _) = slopes(ex.SCM(teacher), F, t, 50)
    assert abs(slope) < 1e-6 and away > 0.01
    (slope, error), (away, _) = slopes(ex.SCM(norm_eps=None), F, t, 2000)
    assert abs(slope) < 4 * error and away > 10 * error


def test_scm_warms_up_its_tangent_and_weighs_by_time(key):
    network = nn.Weighted(lambda x, t, cond, *, key=None: 0.5 * x, key=key)
    loss = lambda objective, network, step: objective.loss(
        network, grid(), jnp.array(0.5), None, key=key, context=ex.Context(jnp.array(step))
    )
    half = loss(ex.SCM(norm_eps=None, warmup=10), network, 5)
    full = loss(ex.SCM(norm_eps=None, warmup=10), network, 20)
    assert half[1]["tangent"] != full[1]["tangent"]
    # The normalised tangent has the norm |g| / (|g| + c).
    g = full[1]["tangent"] * np.sqrt(7)
    square = loss(ex.SCM(warmup=10), network, 20)[0]
    np.testing.assert_allclose(square * 7, (g / (g + 0.1)) ** 2, rtol=1e-4)
    # exp(w) l - w.
    heavier = eqx.tree_at(lambda n: n.weight_head.bias, network, jnp.array([0.7]))
    np.testing.assert_allclose(
        loss(ex.SCM(warmup=10), heavier, 20)[0], np.exp(0.7) * square - 0.7, rtol=1e-5
    )
    half_precision = in_dtype(heavier, jnp.bfloat16)
    np.testing.assert_allclose(half_precision.log_weight(jnp.array(0.5)), 0.7, rtol=1e-6)


@pytest.mark.parametrize("diffusion", [FLOW, TRIG], ids=["flow", "trigonometric"])
def test_easy_consistency_approaches_the_truth_as_its_stages_go_on(diffusion, x64):
    # A large constant makes the distance the square one, whose slope is that of the mean.
    network = gaussian_consistency(diffusion)
    (early, _), (late, error) = (
        slopes(ex.EasyConsistency(diffusion, stage=stage, c=1e3), network, 0.7, 100_000, (0.0,))[0]
        for stage in (2, 6)
    )
    assert abs(early) > 10 * error and abs(late) < abs(early) / 4


def test_easy_consistency_begins_as_the_denoisers_own_loss(key):
    objective = ex.EasyConsistency(FLOW, stage=1, stage_steps=5, c=0.0)
    loss = lambda step: objective.loss(
        lambda x, t, cond, *, key=None: 0 * x,
        jnp.ones(3), jnp.array(0.3), None, key=key, context=ex.Context(jnp.array(step)),
    )  # fmt: skip
    eps = jax.random.normal(jax.random.split(key)[0], (3,))
    x_t = 0.7 + 0.3 * eps  # f = x_t, where the network says that nothing moves
    distance = np.sqrt(np.sum((x_t - 1) ** 2))
    np.testing.assert_allclose(loss(0)[0], distance / (0.3 / 0.7), rtol=1e-5)
    assert loss(30)[1]["gap"] < loss(0)[1]["gap"]  # r is near t
