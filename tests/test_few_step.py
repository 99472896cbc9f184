"""Few-step objectives against data whose average velocity, flow map and consistency function are
known: the loss of each has its minimum there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm import nn
from eqxldm.models import DiT
from eqxldm.objectives import (
    boundary_tangent,
    feature_moments,
    mean_flow_velocity,
    moments_distance,
    split_velocity,
    target_tangent,
    update_moments,
)
from eqxldm.objectives.flow_map import two_times
from eqxldm.training import in_dtype, make_loss

from few_step_truths import (
    FLOW,
    MIXTURE,
    TRIG,
    gaussian_map,
    gaussian_velocity,
    grid,
    slopes,
    velocity,
)


def gaussian_average(z, t, cond=None, *, key=None, h):
    moved = z - gaussian_map(FLOW.path)(z, t, t - h)
    instant = gaussian_velocity(FLOW.path, ex.predict_velocity)(z, t, None)
    return jnp.where(h > 0, moved / jnp.where(h > 0, h, 1), instant)


# Mean flows.


def test_at_the_truth_the_mean_flow_is_the_velocity(x64):
    u, v = MIXTURE.average_velocity(FLOW.path), velocity()
    for t, h in ((0.9, 0.9), (0.7, 0.2), (0.5, 0.0)):
        t, h = jnp.array(t), jnp.array(h)
        V, _ = mean_flow_velocity(u, grid(), t, h, None, v(grid(), t, None))
        np.testing.assert_allclose(V, v(grid(), t, None), atol=1e-8)


# Of (z, t, h); in the paper's order (z, r, t) they are (v, 0, 0), (v, 1, 0) and (v, 1, 1).
WRONG = {"time stands": (0.0, 0.0), "r moves alone": (0.0, -1.0), "both move": (1.0, 0.0)}


@pytest.mark.parametrize("dt, dh", WRONG.values(), ids=WRONG)
def test_wrong_tangents_are_far_from_the_velocity(dt, dh, x64):
    u, v = MIXTURE.average_velocity(FLOW.path), velocity()
    t, h = jnp.array(0.9), jnp.array(0.7)
    tangents = v(grid(), t, None), jnp.array(dt), jnp.array(dh)
    value, slope = jax.jvp(lambda z, t, h: u(z, t, None, h=h), (grid(), t, h), tangents)
    wrong = value + h * slope
    V, _ = mean_flow_velocity(u, grid(), t, h, None, v(grid(), t, None))
    np.testing.assert_allclose(V, v(grid(), t, None), atol=1e-8)
    assert np.sqrt(np.mean((wrong - v(grid(), t, None)) ** 2)) > 0.1


def test_the_derivative_gets_no_gradient(x64):
    t, h, v = jnp.array(0.9), jnp.array(0.7), velocity()(grid(), jnp.array(0.9), None)

    def V(theta):
        return mean_flow_velocity(lambda z, t, c, *, key, h: theta * z * h, grid(), t, h, None, v)[
            0
        ]

    slope = jax.jacfwd(V)(jnp.array(1.0))
    np.testing.assert_allclose(slope, grid() * h)  # of u alone


TWO_TIMES = {
    "mean flow": ex.MeanFlow(power=0.0),
    "improved": ex.improved_mean_flow(power=0.0),
    "distilled": ex.MeanFlow(
        target=ex.TeacherVelocity(gaussian_velocity(FLOW.path, ex.predict_velocity))
    ),
    "shortcut": ex.Shortcut(steps=4, clip=None),
    "split": ex.SplitMeanFlow(),
}


@pytest.mark.parametrize("name", TWO_TIMES)
def test_losses_of_average_velocities_have_their_minimum_at_the_truth(name, x64):
    times = {"t": 0.9, "h": 0.8, "first": 0.3}
    (slope, error), (away, _) = slopes(TWO_TIMES[name], gaussian_average, times, 2000)
    if name in ("shortcut", "split", "distilled"):  # no noise is left in the target
        assert abs(slope) < 1e-6 and away > 0.01
    else:
        assert abs(slope) < 4 * error and away > 10 * error
    # And at steps of 0, where all learn the velocity.
    times = {"t": 0.6, "h": 0.0, "first": 0.0}
    (slope, error), (away, _) = slopes(TWO_TIMES[name], gaussian_average, times, 2000)
    assert abs(slope) < max(4 * error, 1e-6) and away > max(10 * error, 0.01)


@pytest.mark.parametrize(("t", "scale"), [(0.5, 3.0), (0.9, 1.0)])
def test_the_shortest_of_shortcuts_steps_are_guided_within_the_interval(t, scale, key):
    """By a network that says 1 of a condition and 0 of none: guided velocities are the scale."""
    network = lambda z, t, cond, *, key=None, h: jnp.full_like(z, cond)
    objective = ex.Shortcut(steps=4, clip=None, guidance=3.0, null=0.0, interval=(0.1, 0.6))
    error = lambda h: objective.loss(
        network, grid(), dict(t=jnp.array(t), h=jnp.array(h)), 1.0, key=key
    )[0]
    np.testing.assert_allclose(error(0.25 * 2), (1 - scale) ** 2, rtol=1e-6)
    assert error(1.0) == 0  # longer steps take the network's own


def test_shortcuts_do_with_bfloat16(key):
    sizes = dict(patch_size=2, depth=1, width=16, num_heads=2, num_classes=3)
    dit = DiT((2, 4, 4), **sizes, step_embedding=nn.Sinusoid(scale=1.0, offset=0.0), key=key)
    noisy = lambda a: a + 0.1 * jax.random.normal(key, a.shape) if eqx.is_inexact_array(a) else a
    dit, x0 = jax.tree.map(noisy, dit), jax.random.normal(key, (2, 4, 4))
    times = dict(t=jnp.array(0.75), h=jnp.array(0.5))
    error = lambda dit, dtype: ex.Shortcut(steps=4).loss(
        in_dtype(dit, dtype), x0, times, jnp.array(1), key=key
    )[0]
    both = eqx.filter_jit(eqx.filter_value_and_grad(lambda dit: error(dit, jnp.bfloat16)))
    found = both(dit)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(found))
    whole = eqx.filter_jit(lambda dit: error(dit, jnp.float32))(dit)
    np.testing.assert_allclose(found[0], whole, rtol=0.03)


@pytest.mark.parametrize("name", ["mean flow", "improved", "shortcut", "split"])
def test_losses_have_their_minimum_at_the_average_velocity_of_a_mixture(name, x64):
    x0 = jnp.asarray(MIXTURE.draw(5000, seed=0)).reshape(-1, 1)
    times = {"t": 0.9, "h": 0.8, "first": 0.3}
    u = MIXTURE.average_velocity(FLOW.path)
    (slope, error), (away, _) = slopes(TWO_TIMES[name], u, times, len(x0), x0=x0)
    assert abs(slope) < max(4 * error, 1e-6) and away > max(10 * error, 0.01)


def test_the_two_tangents():
    found = ex.DataVelocity()(
        lambda z, t, cond, *, key, h: z + h, grid(), jnp.array(0.5), None, 0 * grid(), None
    )
    np.testing.assert_array_equal(target_tangent(found), 0 * grid())
    np.testing.assert_array_equal(boundary_tangent(found), grid())


def test_times_of_mean_flows(key):
    times = two_times(ex.logit_normal_time(), 0.75, key, 4000)
    t, h = np.asarray(times["t"]), np.asarray(times["h"])
    assert np.mean(h == 0) == 0.75
    assert np.all((h >= 0) & (h <= t) & (t < 1))
    # Two draws that are independent: the smaller of two uniforms of the logit-normal's quantiles.
    from scipy.stats import norm

    quantile = norm.cdf(np.log(t / (1 - t)))
    assert abs(np.mean(quantile) - 2 / 3) < 0.02
    lower = (t - h)[h > 0]
    assert abs(np.mean(norm.cdf(np.log(lower / (1 - lower)))) - 1 / 3) < 0.03


def test_times_of_shortcuts(key):
    times = ex.Shortcut(steps=8, flow_share=0.5).times(key, 4000)
    t, h = np.asarray(times["t"]), np.asarray(times["h"])
    assert np.mean(h == 0) == 0.5
    assert set(np.unique(h[h > 0])) == {1.0, 0.5, 0.25}
    assert np.all((t[h > 0] / h[h > 0]) % 1 == 0) and np.all((h <= t) & (t <= 1))


def test_plain_flow_for_the_first_steps(key):
    network = lambda z, t, cond, *, key=None, h: z * h
    times = {"t": jnp.array(0.9), "h": jnp.array(0.5)}
    objective = ex.MeanFlow(power=0.0, flow_steps=10)
    loss = lambda step: objective.loss(
        network, grid(), times, None, key=key, context=ex.Context(jnp.array(step))
    )[1]["change"]
    assert loss(9) == 0 and loss(10) > 0


# Guidance inside the target.


def linear(weights):
    """A network of two classes and null, whose output is one number a class."""
    return lambda z, t, cond, *, key=None, h: weights[cond] * jnp.ones_like(z)


@pytest.mark.parametrize("scale, mix", [(1.0, 0.5), (2.0, 0.0), (0.2, 0.92)])
def test_fixed_guidance_has_the_fixed_point_it_names(scale, mix):
    null, v, v_u = jnp.array(2), 1.0, 0.4
    guidance = ex.FixedGuidance(null, scale, mix, (0.1, 0.8))
    w = guidance.effective_scale
    guided = v_u + w * (v - v_u)
    network = linear(jnp.array([guided, 0.0, v_u]))
    target = lambda t, cond: guidance(
        network, jnp.zeros(1), jnp.array(t), jnp.array(cond), jnp.array([v]), None
    )
    np.testing.assert_allclose(target(0.5, 0).target, [guided], rtol=1e-5)
    np.testing.assert_allclose(target(0.9, 0).target, [v])  # outside of the interval
    np.testing.assert_allclose(target(0.5, 2).target, [v])  # null learns the data
    np.testing.assert_allclose(target(0.5, 0).boundary(), [guided], rtol=1e-6)


def test_conditioned_guidance_has_the_fixed_point_of_each_scale():
    null, v, v_u = jnp.array(2), 1.0, 0.4
    guidance = ex.ConditionedGuidance(null, largest=4.0)

    def network(z, t, cond, *, key=None, h):
        label, (strength, _, _) = cond
        w = 1 / (1 - strength)
        return jnp.where(label == 2, v_u, v_u + w * (v - v_u)) * jnp.ones_like(z)

    for w in (1.0, 1.7, 4.0):
        cond = ex.guided_condition(jnp.array(0), w, (0.2, 0.7))
        at = lambda t, cond: guidance(
            network, jnp.zeros(1), jnp.array(t), cond, jnp.array([v]), None
        )
        expected = v_u + w * (v - v_u)
        np.testing.assert_allclose(at(0.5, cond).target, [expected], rtol=1e-5)
        np.testing.assert_allclose(at(0.5, cond).boundary(), [expected], rtol=1e-5)
        np.testing.assert_allclose(at(0.9, cond).target, [v], rtol=1e-6)


def test_draws_of_conditioned_guidance(key):
    guidance = ex.ConditionedGuidance(jnp.array(2), largest=4.0, beta=2.0)
    keys = jax.random.split(key, 2000)
    draw = jax.vmap(lambda c, h, k: guidance.draw(c, h, key=k), (None, None, 0))
    _, drawn = draw(jnp.array(0), jnp.array(0.5), keys)
    w = 1 / (1 - np.asarray(drawn[:, 0]))
    # The density w^-2 on [1, 4] has the distribution function (1 - 1/w) / (1 - 1/4).
    assert abs(np.mean(w < 1.6) - (1 - 1 / 1.6) / 0.75) < 0.04
    assert np.all(drawn[:, 1] <= 0.5) and np.all(drawn[:, 2] >= 0.5)
    _, flow = draw(jnp.array(0), jnp.array(0.0), keys)
    np.testing.assert_array_equal(flow[:, 1:], np.tile([0.0, 1.0], (2000, 1)))
    _, dropped = draw(jnp.array(2), jnp.array(0.5), keys)
    assert np.all(dropped[:, 0] == 0)


def test_a_point_is_reached_from_everywhere(key):
    """Of data at a point everything is known: f = mu, u = (z - mu) / t, and all losses are 0."""
    mu = 1.5
    u = lambda z, t, cond=None, *, key=None, h=0.0: (z - mu) / t
    F = lambda x, t, cond=None, *, key=None: (
        (jnp.cos(t * np.pi / 2) * x - mu) / jnp.sin(t * np.pi / 2)
    )
    x0, times = jnp.full(3, mu), {"t": jnp.array(0.8), "h": jnp.array(0.5), "first": jnp.array(0.1)}
    for name, objective in TWO_TIMES.items():
        if name != "distilled":
            loss, _ = objective.loss(u, x0, times, None, key=key)
            assert loss < 1e-9, name
    for objective in (ex.SCM(), ex.EasyConsistency(TRIG, stage=3)):
        assert objective.loss(F, x0, jnp.array(0.8), None, key=key)[0] < 1e-6
    z = jax.random.normal(key, (3,))
    f = ex.consistency_function(F, TRIG)
    once = ex.sample_map(ex.average_velocity_map(u), ex.uniform_times(1), z)
    np.testing.assert_allclose(once, x0, rtol=1e-6)
    twice = ex.sample_map(ex.renoise(f, TRIG.path), np.array([1.0, 0.5, 0.0]), z, key=key)
    np.testing.assert_allclose(twice, x0, rtol=1e-5)


# A network, and everything together.

SIZES: dict = dict(patch_size=2, depth=1, width=16, num_heads=2)
UNSCALED = nn.Sinusoid(scale=1.0, offset=0.0)


def test_a_guided_network_trains_and_begins_as_it_was(key):
    cond = nn.Guided(nn.Labels(3, 16), 16)
    times = dict(time_embedding=UNSCALED, step_embedding=UNSCALED)
    dit = DiT((1, 4, 4), **SIZES, embed_cond=cond, **times, key=key)
    embed = dit.embed_cond
    label = jnp.array(1)
    for w in (1.0, 3.0):
        vector = embed(ex.guided_condition(label, w)).vector
        np.testing.assert_array_equal(vector, embed.embed_cond(label))
    null = jnp.array(3)
    loss = make_loss(
        ex.improved_mean_flow(ex.ConditionedGuidance(null)), null=null, cond_dropout=0.1
    )
    batch = {"x0": jnp.ones((4, 1, 4, 4)), "cond": jnp.arange(4) % 3}
    value = lambda m: loss(m, batch, key, ex.Context(jnp.array(0), (m,)))
    (found, aux), gradients = eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))(dit)
    assert np.isfinite(found) and set(aux) == {"error", "change"}
    # Zero-initialised: the first gradient is of the last layer alone.
    assert np.any(np.asarray(gradients.final_linear.weight))


# The Fréchet loss.


def test_the_frechet_loss_is_the_metrics_distance_and_moves_a_generator(key):
    from eqxldm.metrics import frechet_distance

    rng = np.random.default_rng(0)
    real = rng.standard_normal((4000, 3)) @ rng.standard_normal((3, 3)) + 1
    fake = rng.standard_normal((3000, 3))
    moments = [feature_moments(jnp.asarray(f, jnp.float32)) for f in (real, fake)]
    found = moments_distance(*moments)
    np.testing.assert_allclose(found, frechet_distance(real, fake), rtol=1e-2)
    np.testing.assert_allclose(moments_distance(moments[0], moments[0]), 0, atol=1e-3)

    # An affine generator learns the mean and the covariance of the real features.
    @jax.jit
    def step(params, running, key):
        noise = jax.random.normal(key, (256, 3))
        loss = lambda p: ex.frechet_loss(noise @ p[0] + p[1], moments[0], running, decay=0.9)
        (_, (running, distance)), slope = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, slope), running, distance

    params, running = (jnp.eye(3), jnp.zeros(3)), moments[1]
    for k in jax.random.split(key, 300):
        params, running, distance = step(params, running, k)
    assert distance < 0.05 * found


def test_running_moments_pass_gradients_through_the_batch_alone():
    running = feature_moments(jnp.ones((2, 1)))
    slope = lambda old, new: update_moments(old, new, 0.75).mean[0]
    old, new = jax.grad(slope, (0, 1))(running, jnp.zeros((4, 1)))
    assert old.mean == 0 and np.allclose(new, 0.25 / 4)


WRONG_ARGUMENTS = [
    (lambda: ex.MeanFlow(flow_share=1.5), "flow_share must lie in"),
    (lambda: ex.SplitMeanFlow(flow_share=-0.1), "flow_share must lie in"),
    (lambda: ex.Shortcut(flow_share=2.0), "flow_share must lie in"),
    (lambda: ex.Shortcut(steps=6), "power of two, got 6"),
    (lambda: ex.Shortcut(guidance=1.5), "guidance needs null"),
    (lambda: ex.Shortcut(interval=(0.5, 1.5)), "interval within"),
    (lambda: ex.FixedGuidance(None, mix=1.0), "mix in .0, 1."),
    (lambda: ex.ConditionedGuidance(None, largest=1.0), "largest must exceed 1"),
    (lambda: ex.guided_condition(None, 0.5), "at least 1"),
    (lambda: ex.EasyConsistency(FLOW, q=1.0), "q > 1"),
    (lambda: update_moments(feature_moments(jnp.ones((2, 1))), jnp.ones((2, 1)), 1.0), "decay"),
]


@pytest.mark.parametrize("call, message", WRONG_ARGUMENTS, ids=[m for _, m in WRONG_ARGUMENTS])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_split_velocity_of_two_steps():
    u = lambda z, t, cond, *, key=None, h: t + 0 * z
    found = split_velocity(u, grid(), jnp.array(1.0), jnp.array(0.2), jnp.array(0.6), None)
    np.testing.assert_allclose(found, np.full(7, (0.2 * 1.0 + 0.6 * 0.8) / 0.8), rtol=1e-6)
    clipped = split_velocity(u, grid(), jnp.array(1.0), jnp.array(0.2), jnp.array(0.6), None, 0.5)
    np.testing.assert_allclose(clipped, np.full(7, 0.5))
