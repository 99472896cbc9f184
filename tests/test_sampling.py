"""The sampling loop: calls, traces, trajectories, dtypes, grids, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jaxtyping import TypeCheckError

import eqxldm

from helpers import (
    LATEST,
    MEAN,
    ODE_SOLVERS,
    PATHS,
    PREDICTIONS,
    SOLVERS,
    STD,
    X_T,
    gaussian_denoiser,
    sample,
    transported,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_ode_solver = pytest.mark.parametrize("solver", ODE_SOLVERS.values(), ids=ODE_SOLVERS)
ZERO = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)


def test_ascending_grids_are_refused_wherever_a_grid_is_given():
    up = eqxldm.uniform_times(4)[::-1]
    path, prediction, x = PATHS["linear"], eqxldm.predict_v, jnp.ones(2)
    key = jax.random.key(0)
    for call in (
        lambda: eqxldm.sample(
            ZERO, eqxldm.Diffusion(path, prediction), eqxldm.DDIM(), up, x, key=key
        ),
        lambda: eqxldm.sample_trajectory(
            ZERO, eqxldm.Diffusion(path, prediction), eqxldm.DDIM(), up, x, key=key
        ),
        lambda: eqxldm.ddim_invert(ZERO, eqxldm.Diffusion(path, prediction), up, x),
    ):
        with pytest.raises(ValueError, match=r"these ascend\. Reverse them, or use encode"):
            call()


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
@each_prediction
@each_solver
def test_what_cannot_work_is_refused_and_all_else_is_finite(path, prediction, solver):
    """From t = 1 to t = 0, where the singular ends are."""
    alpha = float(path.alpha(1.0))
    singular = alpha == 0 and (
        prediction in (eqxldm.predict_eps, eqxldm.predict_score)
        or solver is SOLVERS["euler_maruyama"]
    )
    times = eqxldm.uniform_times(3)
    arguments = (ZERO, eqxldm.Diffusion(path, prediction), solver, times, jnp.ones(2))
    if singular:
        with pytest.raises(ValueError, match=r"at t = 1, where alpha = 0 and sigma = 1"):
            eqxldm.check_combination(eqxldm.Diffusion(path, prediction), solver, times)
        with pytest.raises(ValueError, match=r"start=0\.999"):
            jax.jit(lambda key: eqxldm.sample(*arguments, key=key))(jax.random.key(0))
    else:
        eqxldm.check_combination(eqxldm.Diffusion(path, prediction), solver, times)
        assert jnp.all(jnp.isfinite(eqxldm.sample(*arguments, key=jax.random.key(0))))


@pytest.mark.parametrize(
    "solver, prediction, message",
    [
        (eqxldm.DDPM(), eqxldm.predict_v, "DDPM draws noise and cannot run from data to noise"),
        (eqxldm.DDIM(0.5), eqxldm.predict_v, "DDIM draws noise"),
        (eqxldm.DPMSolverPP2M(1.0), eqxldm.predict_v, "DPMSolverPP2M draws noise"),
        (eqxldm.EulerMaruyama(), eqxldm.predict_v, "EulerMaruyama draws noise"),
        (eqxldm.DDIM(), eqxldm.predict_x0, "says nothing about eps at t = 0.*end=0.001"),
        (eqxldm.DPMSolverPP2M(), eqxldm.predict_v, "infinite coefficients at t = 0"),
    ],
)
def test_what_cannot_encode_says_so(solver, prediction, message):
    times = eqxldm.uniform_times(4)
    with pytest.raises(ValueError, match=message):
        eqxldm.encode(
            ZERO, eqxldm.Diffusion(PATHS["linear"], prediction), solver, times, jnp.ones(2)
        )


def test_what_is_singular_between_the_ends_is_told_apart():
    half = lambda at: (0 * at.alpha + 0.5, 0 * at.alpha + 0.5)
    with pytest.raises(ValueError, match=r"at t = 0\.5, where .*off that time, or use"):
        eqxldm.check_combination(
            eqxldm.Diffusion(PATHS["linear"], half), eqxldm.DDIM(), eqxldm.uniform_times(4)
        )
    with pytest.raises(ValueError, match=r"DDPM\(learned_range\) needs a network"):
        eqxldm.check_combination(
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.DDPM(eqxldm.learned_range),
            eqxldm.uniform_times(4),
        )


@pytest.mark.parametrize(
    "times, message",
    [
        ([1.0], "at least two entries"),
        ([], "at least two entries"),
        ([0.5, 1.0, 0.0], r"descend strictly.*times\[1\] = 1.0 and times\[2\] = 0.0"),
        ([1.0, 1.0, 0.0], r"times\[0\] = 1.0 and times\[1\] = 1.0"),
        ([1.1, 0.0], r"lie in \[0, 1\], got times\[0\] = 1.1"),
        ([1.0, -0.1], r"got times\[1\] = -0.1"),
        ([1.0, np.nan], r"got times\[1\] = nan"),
    ],
)
def test_a_wrong_grid_is_refused(times, message):
    with pytest.raises(ValueError, match=message):
        sample(eqxldm.DDIM(), PATHS["linear"], np.array(times), jnp.ones(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_noise_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="x_T holds NaN or infinity"):
        eqxldm.sample(
            ZERO,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.DDIM(),
            eqxldm.uniform_times(2),
            jnp.array([1.0, bad]),
            key=jax.random.key(0),
        )


@pytest.mark.parametrize("every", [0, 5])
def test_a_wrong_every_is_refused(every):
    with pytest.raises(ValueError, match=r"every must lie in 1 \.\. 4"):
        eqxldm.sample_trajectory(
            ZERO,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.DDIM(),
            eqxldm.uniform_times(4),
            jnp.ones(2),
            key=jax.random.key(0),
            every=every,
        )


def test_integer_noise_is_named():
    with pytest.raises(TypeCheckError, match="parameter 'x_T'"):
        eqxldm.sample(
            ZERO,
            eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_v),
            eqxldm.DDIM(),
            eqxldm.uniform_times(2),
            jnp.ones(3, int),
            key=jax.random.key(0),
        )


def test_outputs_of_the_wrong_shape_are_explained():
    def run(prediction, solver, shape):
        denoiser = lambda x_t, t, cond, key=None: jnp.zeros(shape)
        eqxldm.sample(
            denoiser,
            eqxldm.Diffusion(PATHS["linear"], prediction),
            solver,
            eqxldm.uniform_times(2),
            jnp.ones(3),
            key=jax.random.key(0),
        )

    with pytest.raises(ValueError, match=r"output has the shape \(5,\), x_t \(3,\)"):
        run(eqxldm.predict_v, eqxldm.DDIM(), (5,))
    with pytest.raises(ValueError, match="Then wrap the prediction in LearnedRange"):
        run(eqxldm.predict_v, eqxldm.DDIM(), (6,))
    with pytest.raises(ValueError, match="LearnedRange needs twice the channels"):
        run(eqxldm.LearnedRange(eqxldm.predict_v), eqxldm.DDIM(), (3,))
    with pytest.raises(ValueError, match=r"DDPM\(learned_range\) needs a network"):
        run(eqxldm.predict_v, eqxldm.DDPM(eqxldm.learned_range), (3,))


FLOW = eqxldm.Diffusion(PATHS["linear"], eqxldm.predict_velocity)


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
