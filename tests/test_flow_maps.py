"""Flow maps: of a mixture exactly, in any number of steps, of networks of another diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex

from few_step_truths import FLOW, MIXTURE, TRIG, grid, velocity

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
