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
    consistency_tangent,
    feature_moments,
    mean_flow_velocity,
    moments_distance,
    split_velocity,
    target_tangent,
    update_moments,
)
from eqxldm.objectives.flow_map import two_times
from eqxldm.training import in_dtype, make_loss

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
TRIG = ex.Diffusion(ex.CosineVP(), ex.predict_v)
MIXTURE = ex.GaussianMixture([0.3, 0.7], [-1.0, 1.2], [0.2, 0.4])
MEAN, STD = 1.0, 0.5  # of the Gaussian, whose maps are closed forms: cheap


def grid():
    return jnp.linspace(-1.5, 1.5, 7)  # float64 under x64


def velocity(path=FLOW.path):
    return MIXTURE.denoiser(path, ex.predict_velocity)


def gaussian_map(path):
    """`x_s = alpha_s m + sqrt(v_s / v_t) (x_t - alpha_t m)`, `v = alpha^2 std^2 + sigma^2`."""

    def flow_map(x_t, t, s):
        at_t, at_s = path.coefficients(t), path.coefficients(s)
        spread = lambda at: jnp.hypot(at.alpha * STD, at.sigma)
        centred = (x_t - at_t.alpha * MEAN) / spread(at_t)
        return at_s.alpha * MEAN + spread(at_s) * centred

    return flow_map


def gaussian_velocity(path, prediction):
    return ex.GaussianMixture([1.0], [MEAN], [STD]).denoiser(path, prediction)


def gaussian_average(z, t, cond=None, *, key=None, h):
    moved = z - gaussian_map(FLOW.path)(z, t, t - h)
    instant = gaussian_velocity(FLOW.path, ex.predict_velocity)(z, t, None)
    return jnp.where(h > 0, moved / jnp.where(h > 0, h, 1), instant)


def gaussian_consistency(diffusion):
    """The network of the exact consistency function on any path."""

    def network(x_t, t, cond=None, *, key=None):
        x0 = gaussian_map(diffusion.path)(x_t, t, jnp.zeros_like(t))
        at = diffusion.path.coefficients(t)
        return diffusion.target(x0, t, (x_t - at.alpha * x0) / at.sigma)

    return network


def off(network, theta):
    """The truth and a little of something else: smooth in everything it is given."""

    def moved(x_t, t, cond=None, *, key=None, **options):
        h = options.get("h", 0.0)
        return network(x_t, t, cond, key=key, **options) + theta * (x_t + jnp.cos(t + h))

    return moved


# The exact solutions.


def test_the_flow_map_of_a_mixture_is_its_transport(x64):
    z = jnp.linspace(-3, 3, 9)
    for path in (ex.LinearFlow(), ex.CosineVP()):
        flow_map = jax.jit(MIXTURE.flow_map(path))
        for t, s in ((1.0, 0.0), (0.9, 0.3), (0.4, 0.4)):
            expected = MIXTURE.transport(path, t, s, np.asarray(z))
            found = flow_map(z, jnp.array(t), jnp.array(s))
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_flow_map_of_a_mixture_has_the_derivatives_of_its_ode(x64):
    flow_map, v = MIXTURE.flow_map(FLOW.path), velocity()
    t, s = jnp.array(0.8), jnp.array(0.3)
    x_s, dx_ds = jax.jvp(lambda s: flow_map(grid(), t, s), (s,), (jnp.array(1.0),))
    np.testing.assert_allclose(dx_ds, v(x_s, s, None), rtol=1e-9)
    # Along its own trajectory the end does not move.
    both = lambda x, t: flow_map(x, t, s)
    along = jax.jvp(both, (grid(), t), (v(grid(), t, None), jnp.array(1.0)))[1]
    np.testing.assert_allclose(along, np.zeros(7), atol=1e-9)


def test_the_average_velocity_of_a_mixture_is_the_mean_of_the_velocity(x64):
    t, h = jnp.array(0.9), jnp.array(0.6)
    nodes, weights = np.polynomial.legendre.leggauss(20)

    @jax.jit
    @jax.vmap
    def v(s):
        return velocity()(MIXTURE.flow_map(FLOW.path)(grid(), t, s), s, None)

    mean = weights / 2 @ v(jnp.asarray(0.9 - 0.3 * (1 + nodes)))
    u = MIXTURE.average_velocity(FLOW.path)
    np.testing.assert_allclose(u(grid(), t, None, h=h), mean, atol=1e-6)
    np.testing.assert_array_equal(u(grid(), t, None, h=0.0), velocity()(grid(), t, None))


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


def slopes(objective, network, times, n, thetas=(0.0, 0.3)):
    """The slope of the loss in theta, a mean over `n` examples, and how sure: `(mean, error)`."""
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (n, 1))
    times = jax.tree.map(jnp.asarray, times)

    def one(theta, x0, key):
        return objective.loss(off(network, theta), x0, times, None, key=key)[0]

    slope = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))
    keys = jax.random.split(jax.random.key(1), n)
    found = [np.asarray(slope(jnp.asarray(theta), x0, keys)) for theta in thetas]
    return [(np.mean(s), np.std(s) / np.sqrt(n)) for s in found]


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


# Consistency.


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


# Sampling.


def test_any_number_of_steps_of_the_exact_map_end_at_the_same_place(x64):
    flow_map = ex.average_velocity_map(MIXTURE.average_velocity(FLOW.path))
    expected = MIXTURE.transport(FLOW.path, 1.0, 0.0, np.asarray(grid()))
    for times in (ex.uniform_times(1), ex.uniform_times(2), np.array([1.0, 0.9, 0.2, 0.05, 0.0])):
        found = jax.jit(lambda z, times=times: ex.sample_map(flow_map, times, z))(grid())
        np.testing.assert_allclose(found, expected, atol=1e-10)
    v = lambda x, t, cond, *, key=None: velocity()(x, t, cond)
    ode = ex.sample(v, FLOW, ex.Heun(), ex.uniform_times(100), grid())
    np.testing.assert_allclose(ode, expected, atol=5e-3)


def test_renoising_draws_the_marginal_of_the_time_between(key):
    f = lambda x, t, cond=None, *, key=None: jnp.full_like(x, 2.0)
    step = ex.renoise(f, TRIG.path)
    half = step(jnp.zeros(20_000), jnp.array(1.0), jnp.array(0.5), None, key=key)
    assert abs(jnp.mean(half) - 2 / np.sqrt(2)) < 0.02
    assert abs(jnp.std(half) - 1 / np.sqrt(2)) < 0.02
    a, b = (
        ex.sample_map(step, np.array([1.0, 0.6, 0.3]), jnp.zeros(2), key=jax.random.key(k))
        for k in (0, 1)
    )
    assert not np.allclose(a, b)


def test_what_sample_map_refuses(key):
    flow_map = ex.average_velocity_map(lambda x, t, cond, *, key=None, h: x)
    with pytest.raises(ValueError, match="must descend, from noise at 1"):
        ex.sample_map(flow_map, np.array([0.0, 1.0]), grid())
    with pytest.raises(ValueError, match="renoise draws noise and needs a key"):
        step = ex.renoise(lambda x, t, cond=None, *, key=None: x, TRIG.path)
        ex.sample_map(step, ex.uniform_times(2), grid())


PATHS = {
    "linear": ex.LinearFlow(),
    "cosine": ex.CosineVP(),
    "shifted": ex.CosineVP(0.5),
    "ddpm": ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000))),
}
NETWORKS = {"eps": ex.predict_eps, "x0": ex.predict_x0, "v": ex.predict_v}


@pytest.mark.parametrize("source", PATHS)
def test_a_network_of_one_diffusion_is_one_of_another(source, x64):
    for prediction in NETWORKS.values():
        found = ex.change_diffusion(
            MIXTURE.denoiser(PATHS[source], prediction),
            ex.Diffusion(PATHS[source], prediction),
            FLOW,
        )
        for t in (0.1, 0.6, 0.95):
            t = jnp.array(t)
            np.testing.assert_allclose(
                found(grid(), t, None), velocity()(grid(), t, None), rtol=1e-6
            )
    # Derivatives too, which few-step training takes, in time and place together.
    if source != "ddpm":  # whose times lie on a cubic between the table's
        one = jnp.array(1.0)
        slope = lambda f: jax.jvp(lambda x, t: f(x, t, None), (grid(), t), (grid(), one))[1]
        np.testing.assert_allclose(slope(found), slope(velocity()), rtol=1e-6)


def test_both_ends_of_a_changed_diffusion():
    v = lambda x, t, cond, *, key=None: 0.3 * x + t
    found = ex.change_diffusion(v, TRIG, FLOW)
    for t in (0.0, 1.0):
        t = jnp.array(t)
        value, slope = jax.jvp(lambda t: found(grid(), t, None), (t,), (jnp.array(1.0),))
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
        lo, hi = (
            found(grid(), jnp.array(s), None) for s in ((0.0, 0.01) if t == 0 else (0.99, 1.0))
        )
        np.testing.assert_allclose(slope, (hi - lo) / 0.01, atol=0.1)
    same = lambda x, t, cond, *, key=None: x
    assert ex.change_diffusion(same, FLOW, FLOW) is same


def test_angles_of_times(key):
    t = ex.angle_time(-0.3, 1.4)(key, 4000)
    tau = np.log(np.tan(np.asarray(t) * np.pi / 2))
    assert abs(np.mean(tau) + 0.3) < 0.02 and abs(np.std(tau) - 1.4) < 0.03


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
