"""The sampling loop: calls, traces, trajectories, dtypes and where it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import eqxldm

from helpers import (
    LATEST,
    MEAN,
    ODE_SOLVERS,
    PATHS,
    SOLVERS,
    STD,
    X_T,
    gaussian_denoiser,
    sample,
    transported,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_ode_solver = pytest.mark.parametrize("solver", ODE_SOLVERS.values(), ids=ODE_SOLVERS)
ZERO = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)


def test_clipping_at_clean_data_is_finite():
    """Over a traced grid Heun's last call is at t = 0, where eps cannot follow a clipped x0."""

    @jax.jit
    def run(times):
        return eqxldm.sample(
            ZERO,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.Heun(),
            times,
            jnp.ones(2),
            key=jax.random.key(0),
            denoised_fn=lambda x0, x_t, t: jnp.clip(x0, -0.1, 0.1),
        )

    assert jnp.all(jnp.isfinite(run(jnp.array([0.9, 0.5, 0.0]))))


@each_path
def test_a_path_has_nothing_to_train_and_may_be_an_argument_of_jit(path):
    assert jax.tree.leaves(path) == []
    times, x_T = eqxldm.uniform_times(4, LATEST), jnp.ones(2)

    def run(path, x_T):
        denoiser = gaussian_denoiser(path, eqxldm.predict_v, MEAN, STD)
        return eqxldm.sample(
            denoiser,
            eqxldm.Diffusion(path, eqxldm.predict_v),
            eqxldm.DDIM(),
            times,
            x_T,
            key=jax.random.key(0),
        )

    np.testing.assert_allclose(jax.jit(run)(path, x_T), run(path, x_T), rtol=1e-5)


class Custom(eqxldm.AbstractPath):
    """As users write one: with jax, derivatives by jax, an angle of their own."""

    def coefficients(self, t):
        t = jnp.asarray(t, float)
        both = lambda t: (jnp.cos(jnp.pi / 2 * t**2), jnp.sin(jnp.pi / 2 * t**2))
        (alpha, sigma), (dalpha, dsigma) = jax.jvp(both, (t,), (jnp.ones_like(t),))
        return eqxldm.Coefficients(alpha, sigma, dalpha, dsigma)


@each_ode_solver
def test_paths_and_predictions_written_with_jax_work_under_jit(solver, x64):
    path = Custom()
    prediction = lambda at: (jnp.cos(at.alpha), 2 + jnp.sin(at.sigma))
    times = eqxldm.uniform_times(300, 0.9, 0.1)
    x = sample(solver, path, times, X_T, prediction=prediction)
    np.testing.assert_allclose(x, transported(path, MEAN, STD, 0.9, 0.1, X_T), atol=0.02)


@each_solver
def test_a_traced_grid_serves_many_grids_with_one_compilation(solver):
    path, traces = PATHS["cosine"], []
    denoiser = gaussian_denoiser(path, eqxldm.predict_v, MEAN, STD)
    x_T = jnp.asarray(X_T, jnp.float32)

    @jax.jit
    def run(times):
        traces.append(times)
        return eqxldm.sample(
            denoiser,
            eqxldm.Diffusion(path, eqxldm.predict_v),
            solver,
            times,
            x_T,
            key=jax.random.key(0),
        )

    for end in (0.01, 0.1):
        times = eqxldm.uniform_times(6, LATEST, end)
        closed_over = eqxldm.sample(
            denoiser,
            eqxldm.Diffusion(path, eqxldm.predict_v),
            solver,
            times,
            x_T,
            key=jax.random.key(0),
        )
        np.testing.assert_allclose(run(jnp.asarray(times, jnp.float32)), closed_over, atol=1e-5)
    assert len(traces) == 1


def test_a_traced_grid_with_a_singular_time_is_an_error_and_not_nan():
    @jax.jit
    def run(times):
        return eqxldm.sample(
            ZERO,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_eps),
            eqxldm.DDIM(),
            times,
            jnp.ones(2),
            key=jax.random.key(0),
        )

    with pytest.raises(Exception, match="A coefficient of the solver is infinite"):
        jax.block_until_ready(run(jnp.array([1.0, 0.5, 0.0])))


def test_the_network_sees_times_in_the_dtype_of_its_input(x64):
    seen = []

    def denoiser(x_t, t, cond, *, key=None):
        seen.append((x_t.dtype, t.dtype))
        return x_t * t

    x = eqxldm.sample(
        denoiser,
        eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
        eqxldm.DDIM(),
        eqxldm.uniform_times(2),
        jnp.ones(2, jnp.float32),
        key=jax.random.key(0),
    )
    assert x.dtype == jnp.float32 and seen == [(jnp.float32, jnp.float32)]


CALLS = {name: 11 if name == "heun" else 6 for name in SOLVERS}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_is_called_as_often_as_reported(name):
    calls = []

    def denoiser(x_t, t, cond, *, key=None):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.zeros_like(x_t)

    times, path = LATEST * eqxldm.uniform_times(6), PATHS["discrete"]
    x = eqxldm.sample(
        denoiser,
        eqxldm.Diffusion(path, eqxldm.predict_v),
        SOLVERS[name],
        times,
        jnp.ones(3),
        key=jax.random.key(0),
    )
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(calls) == CALLS[name] == eqxldm.nfe(path, SOLVERS[name], times)
    np.testing.assert_allclose(sorted(set(calls), reverse=True), times[:-1], rtol=1e-6)


@each_solver
def test_sampling_compiles_once_and_repeats_exactly(solver):
    traces = []

    def denoiser(x_t, t, cond, *, key=None):
        traces.append(x_t.shape)
        return cond * x_t

    times = LATEST * eqxldm.uniform_times(4)

    @jax.jit
    def run(x_T, cond, scale, key):
        guided = eqxldm.guide(denoiser, jnp.array(0.2), scale)
        return eqxldm.sample(
            guided,
            eqxldm.Diffusion(PATHS["discrete"], eqxldm.predict_v),
            solver,
            times,
            x_T,
            cond,
            key=key,
        )

    x_T = jnp.arange(3.0)
    first = run(x_T, jnp.array(0.5), jnp.array(2.0), jax.random.key(0))
    again = run(x_T, jnp.array(0.5), jnp.array(2.0), jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    other = run(x_T + 1, jnp.array(0.1), jnp.array(4.0), jax.random.key(1))
    assert len(traces) == 1 and not np.allclose(first, other)


@each_solver
def test_sample_is_the_end_of_the_trajectory_and_maps_over_a_batch(solver):
    denoiser = lambda x_t, t, cond, key=None: cond * x_t
    times = LATEST * eqxldm.uniform_times(4)
    diffusion = eqxldm.Diffusion(PATHS["discrete"], eqxldm.predict_v)
    arguments = (denoiser, diffusion, solver, times)
    x_T = jax.random.normal(jax.random.key(0), (3, 2, 2))
    cond, keys = jnp.array([0.1, 0.2, 0.3]), jax.random.split(jax.random.key(1), 3)
    one = lambda x, c, k: eqxldm.sample(*arguments, x, c, key=k)
    batch = jax.jit(jax.vmap(one))(x_T, cond, keys)
    for i in range(3):
        states, estimates = eqxldm.sample_trajectory(*arguments, x_T[i], cond[i], key=keys[i])
        assert states.shape == (5, 2, 2) and estimates.shape == (4, 2, 2)
        np.testing.assert_array_equal(states[0], x_T[i])
        np.testing.assert_allclose(states[-1], batch[i], rtol=1e-5, atol=1e-6)
        eager = one(x_T[i], cond[i], keys[i])
        np.testing.assert_allclose(eager, batch[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [eqxldm.DDPM(), eqxldm.Heun()], ids=["ddpm", "heun"])
@settings(max_examples=10)
@given(every=st.integers(1, 7))
def test_every_kth_state_is_one_of_all(solver, every):
    denoiser = lambda x_t, t, cond, key=None: jnp.sin(x_t)
    times = LATEST * eqxldm.uniform_times(7)
    diffusion = eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v)
    arguments = (denoiser, diffusion, solver, times, jnp.ones(2))
    states, estimates = eqxldm.sample_trajectory(*arguments, key=jax.random.key(0))
    some, some_x0 = eqxldm.sample_trajectory(*arguments, key=jax.random.key(0), every=every)
    chosen = np.unique(np.append(np.arange(0, 8, every), 7))
    np.testing.assert_allclose(some, states[chosen], rtol=1e-6)
    np.testing.assert_allclose(some_x0, estimates[chosen[1:] - 1], rtol=1e-6)


@each_solver
def test_bfloat16_noise_gives_bfloat16_and_leaves_the_schedule_alone(solver):
    """The state is float32 between calls: only what the network sees and says is rounded."""
    seen = []

    def denoiser(x_t, t, cond, *, key=None):
        seen.append((x_t.dtype, t.dtype))
        return jnp.full_like(x_t, 0.25)

    times = LATEST * eqxldm.uniform_times(50)
    diffusion = eqxldm.Diffusion(PATHS["discrete"], eqxldm.predict_x0)
    arguments = (denoiser, diffusion, solver, times)
    x = eqxldm.sample(*arguments, jnp.ones(3, jnp.bfloat16), key=jax.random.key(0))
    assert x.dtype == jnp.bfloat16 and seen == [(jnp.bfloat16, jnp.float32)]
    wide = eqxldm.sample(*arguments, jnp.ones(3), key=jax.random.key(0))
    np.testing.assert_array_equal(x, wide.astype(jnp.bfloat16))


@each_solver
def test_gradients_through_sampling_are_finite(solver):
    denoiser = lambda x_t, t, cond, key=None: jnp.tanh(cond * x_t)
    times = LATEST * eqxldm.uniform_times(4)

    def end(x_T, cond):
        return jnp.sum(
            eqxldm.sample(
                denoiser,
                eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v),
                solver,
                times,
                x_T,
                cond,
                key=jax.random.key(0),
            )
        )

    for gradient in jax.grad(end, (0, 1))(jnp.array([0.0, 1.0]), jnp.array(0.7)):
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


@each_path
def test_the_prior_is_where_the_forward_process_ends(path):
    """Of unit data: the exploding path needs sigma(1), which N(0, 1) is not."""
    diffusion = eqxldm.Diffusion(path, eqxldm.predict_v)
    x_T = diffusion.sample_prior((40_000,), key=jax.random.key(0))
    at = path.coefficients(1.0)
    noised = float(np.sqrt(at.alpha**2 * 0.5**2 + at.sigma**2))
    # Five standard errors of a standard deviation, and what is left of the data.
    assert np.std(x_T) == pytest.approx(diffusion.prior_std, rel=5 / np.sqrt(2 * 40_000))
    assert diffusion.prior_std == pytest.approx(noised, rel=0.01)


def test_samples_of_the_exploding_path_have_the_spread_of_the_data():
    """x0 at +1 and -1: from N(0, I) their mean |x| would be far below 1."""
    data = eqxldm.GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.05, 0.05])
    path = eqxldm.VarianceExploding(0.02, 50.0)
    diffusion = eqxldm.Diffusion(path, eqxldm.predict_eps)
    x_T = diffusion.sample_prior((2000,), key=jax.random.key(1))
    denoiser, times = data.denoiser(path, eqxldm.predict_eps), eqxldm.uniform_times(60)
    x0 = eqxldm.sample(denoiser, diffusion, eqxldm.DDIM(), times, x_T)
    assert float(jnp.mean(jnp.abs(x0))) == pytest.approx(1, abs=0.01)


@each_solver
def test_only_a_solver_that_draws_noise_needs_a_key(solver):
    diffusion = eqxldm.Diffusion(PATHS["cosine"], eqxldm.predict_v)
    run = lambda **key: eqxldm.sample(
        ZERO, diffusion, solver, LATEST * eqxldm.uniform_times(3), jnp.ones(2), **key
    )
    if solver.draws_noise:
        with pytest.raises(ValueError, match=r"draws noise and needs a key: sample\(\.\.\., key="):
            run()
    else:
        keys = jax.random.split(jax.random.key(0))
        np.testing.assert_array_equal(run(), run(key=keys[0]))
        np.testing.assert_array_equal(run(), run(key=keys[1]))
