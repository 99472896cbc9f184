"""What the sampling loop refuses: grids, combinations, noise and outputs that cannot be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import eqxldm

from helpers import (
    PATHS,
    PREDICTIONS,
    SOLVERS,
    sample,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
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
