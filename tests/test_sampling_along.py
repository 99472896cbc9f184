"""What is done along a sampling run: changed estimates, callbacks, steps, grids that go up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm

from helpers import (
    LATEST,
    MEAN,
    PATHS,
    SOLVERS,
    X_T,
    gaussian_denoiser,
    transported,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
ZERO = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)


def test_denoised_fn_bounds_every_estimate_and_eps_follows(x64):
    path, times = PATHS["cosine"], LATEST * eqxldm.uniform_times(6)
    for solver in SOLVERS.values():
        _, estimates = eqxldm.sample_trajectory(
            gaussian_denoiser(path, eqxldm.predict_v, 3.0, 0.2),
            eqxldm.Diffusion(path, eqxldm.predict_v),
            solver,
            times,
            jnp.asarray(X_T),
            key=jax.random.key(0),
            denoised_fn=lambda x0, x_t, t: jnp.clip(x0, -1, 1),
        )
        assert jnp.max(jnp.abs(estimates)) == 1
    # With x0 held at a point, DDIM goes where the exact denoiser of that point leads.
    held = eqxldm.sample(
        ZERO,
        eqxldm.Diffusion(path, eqxldm.predict_v),
        eqxldm.DDIM(),
        eqxldm.uniform_times(4, 0.9, 0.3),
        jnp.asarray(X_T),
        key=jax.random.key(0),
        denoised_fn=lambda x0, x_t, t: jnp.full_like(x0, MEAN),
    )
    np.testing.assert_allclose(held, transported(path, MEAN, 0.0, 0.9, 0.3, X_T), rtol=1e-12)


FLOW = eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_velocity)


def test_denoised_fn_sees_the_estimate_the_state_and_the_time():
    seen = []

    def look(x0, x_t, t):
        jax.debug.callback(lambda *a: seen.append([float(v[0]) for v in a[:2]] + [float(a[2])]),
                           x0, x_t, t)  # fmt: skip
        return x0

    x = jnp.full(2, 4.0)
    eqxldm.sample(ZERO, FLOW, eqxldm.Euler(), eqxldm.uniform_times(2), x, denoised_fn=look)
    jax.effects_barrier()
    assert sorted(seen, reverse=True) == [[4.0, 4.0, 1.0], [4.0, 4.0, 0.5]]


def test_a_callback_follows_the_run():
    calls = []
    times = eqxldm.uniform_times(4)
    velocity = lambda x_t, t, cond, key=None: jnp.ones_like(x_t)
    run = jax.jit(
        lambda x: eqxldm.sample(
            velocity, FLOW, eqxldm.Euler(), times, x,
            callback=lambda i, t, x, x0: calls.append([int(i), *map(float, (t, x[0], x0[0]))]),
        )
    )  # fmt: skip
    jax.block_until_ready(run(jnp.ones(1)))
    jax.effects_barrier()
    # x_t = x_1 - (1 - t), x0 = x_t - t: everything is known.
    assert calls == [[i, 1 - i / 4, 1 - i / 4, 0.0] for i in range(4)]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_flow_map_is_given_the_step_to_come(steps):
    """The average velocity of straight lines through a point: any number of steps is exact."""
    seen = []

    def average_velocity(x_t, t, cond, *, h=0.0, key=None):
        jax.debug.callback(lambda h: seen.append(float(h)), h)
        return (x_t - 3.0) / t

    times = eqxldm.uniform_times(steps)
    x = eqxldm.sample(
        average_velocity, FLOW, eqxldm.Euler(), times, jnp.array([7.0, -2.0]), with_step=True
    )
    jax.effects_barrier()
    np.testing.assert_allclose(x, 3.0, rtol=1e-6)
    np.testing.assert_allclose(sorted(seen), np.sort(-np.diff(times)), rtol=1e-6)


def test_guidance_and_checks_hand_the_step_on():
    def network(x_t, t, cond, *, h=0.0, key=None):
        return cond * h * jnp.ones_like(x_t)

    guided = eqxldm.checked(eqxldm.guide(network, jnp.array(0.0), 2.0))
    times = eqxldm.uniform_times(4)
    x = eqxldm.sample(
        guided, FLOW, eqxldm.Euler(), times, jnp.ones(1), jnp.array(1.0), with_step=True
    )
    assert float(x[0]) == pytest.approx(1 - 4 * 0.25 * (2 * 0.25))


@each_solver
def test_the_open_loop_is_the_closed_one(solver):
    diffusion = eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v)
    denoiser = lambda x_t, t, cond, key=None: jnp.tanh(x_t)
    times = LATEST * eqxldm.uniform_times(3)
    arguments = (denoiser, diffusion, solver, times, jnp.arange(3.0))
    state, step, rows = eqxldm.sampling_steps(*arguments, key=jax.random.key(2))
    for i in range(eqxldm.nfe(diffusion.path, solver, times)):
        state, _ = jax.jit(step)(state, jax.tree.map(lambda a, i=i: a[i], rows))
    whole = eqxldm.sample(*arguments, key=jax.random.key(2))
    np.testing.assert_allclose(state[0], whole, rtol=1e-5, atol=1e-6)


UP_AND_DOWN = eqxldm.repaint_times(12, jump=3, resamplings=3)


@each_solver
def test_a_grid_goes_back_up_only_where_the_solver_can(solver):
    diffusion = eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v)
    run = lambda: eqxldm.sample(
        ZERO, diffusion, solver, LATEST * UP_AND_DOWN, jnp.ones(2), key=jax.random.key(0)
    )
    if isinstance(solver, eqxldm.DDPM):
        assert solver.goes_back_up and jnp.all(jnp.isfinite(run()))
    else:
        with pytest.raises(ValueError, match="times must descend strictly"):
            run()


@each_path
def test_going_back_up_keeps_the_marginals(path):
    """With a Gaussian's exact denoiser x0 has the same mean and variance as on the way down."""
    mean, std, n = 0.7, 0.5, 20_000
    times = np.append(0.999 * eqxldm.repaint_times(60, jump=10, resamplings=2)[:-1], 0.0)
    diffusion = eqxldm.Diffusion(path, eqxldm.predict_v)
    denoiser, at = gaussian_denoiser(path, eqxldm.predict_v, mean, std), path.coefficients(0.999)
    x_T = at.alpha * mean + jnp.sqrt(at.alpha**2 * std**2 + at.sigma**2) * jax.random.normal(
        jax.random.key(0), (n,)
    )
    x_T = jnp.asarray(x_T, jnp.float32)
    run = jax.jit(
        lambda x, key: eqxldm.sample(
            denoiser, diffusion, eqxldm.DDPM(eqxldm.fixed_large), times, x, key=key
        )
    )
    x0 = np.asarray(run(x_T, jax.random.key(1)))
    down = jax.jit(
        lambda x, key: eqxldm.sample(
            denoiser,
            diffusion,
            eqxldm.DDPM(eqxldm.fixed_large),
            np.append(0.999 * eqxldm.uniform_times(60)[:-1], 0.0),
            x,
            key=key,
        )
    )
    plain = np.asarray(down(x_T, jax.random.key(1)))
    # Five standard errors of a mean and a variance, each of two samples; both have the same bias.
    assert abs(x0.mean() - plain.mean()) < 5 * std * np.sqrt(2 / n)
    assert abs(x0.var() / plain.var() - 1) < 5 * np.sqrt(2 * 2 / n)
    assert abs(x0.mean() - mean) < 0.05 and abs(x0.std() - std) < 0.05


def test_calls_of_a_grid_that_goes_up_are_those_of_its_steps_down():
    down = int(np.sum(np.diff(UP_AND_DOWN) < 0))
    assert eqxldm.nfe(PATHS["cosine"], eqxldm.DDPM(), UP_AND_DOWN) == down
    states, x0 = eqxldm.sample_trajectory(
        ZERO, eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v), eqxldm.DDPM(), UP_AND_DOWN,
        jnp.ones(2), key=jax.random.key(0),
    )  # fmt: skip
    assert states.shape == (down + 1, 2) and x0.shape == (down, 2)


def test_inpainting_by_denoised_fn_gives_the_known_part_back():
    known, mask = jnp.array([0.3, -0.4, 0.0, 0.0]), jnp.array([True, True, False, False])
    diffusion = eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v)
    x = eqxldm.sample(
        gaussian_denoiser(diffusion.path, eqxldm.predict_v, MEAN, 0.05), diffusion, eqxldm.DDPM(),
        eqxldm.repaint_times(40, jump=5, resamplings=2),
        diffusion.sample_prior((4,), key=jax.random.key(0)), key=jax.random.key(1),
        denoised_fn=lambda x0, x_t, t: jnp.where(mask, known, x0),
    )  # fmt: skip
    np.testing.assert_allclose(x[:2], known[:2], atol=1e-6)
    np.testing.assert_allclose(x[2:], MEAN, atol=0.3)
