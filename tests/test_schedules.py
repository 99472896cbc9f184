"""The schedules of published folders: their grids, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import eqxldm as ex
from eqxldm.pipelines import InterpolatedVP, PipelineError, load_schedule, read_schedule

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
STABLE = BETAS | dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def schedule(name, **options):
    return read_schedule(dict(_class_name=name, _diffusers_version="0.30") | options)


def test_stable_diffusions_grid_starts_at_981_and_ends_at_the_first_timestep(tmp_path):
    config = dict(_class_name="DDIMScheduler") | STABLE
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    read = load_schedule(tmp_path)
    times = read.times(50)
    np.testing.assert_allclose(1000 * times[:-1] - 1, np.arange(981, 0, -20))
    assert times[-1] == 0.001 and isinstance(read.solver, ex.DDIM)
    assert float(read.diffusion.path.sigma(times[-1])) == pytest.approx(0.029, abs=1e-3)
    whole = schedule("DDIMScheduler", **STABLE | dict(set_alpha_to_one=True))
    assert whole.times(50)[-1] == 0
    # Published PNDM files say PLMS; the table is the same.
    pndm = schedule("PNDMScheduler", **STABLE, skip_prk_steps=True)
    np.testing.assert_array_equal(pndm.times(50), times)


def test_a_last_step_to_nowhere_is_left_out():
    """Without an offset the last timestep is the first of the table, where the run ends."""
    times = schedule("DDIMScheduler", **STABLE | dict(steps_offset=0)).times(10)
    assert len(times) == 10 and times[-1] == 0.001
    with pytest.raises(PipelineError, match="nothing would be done"):
        schedule("DDIMScheduler", **STABLE | dict(steps_offset=0)).times(1)


def test_spacings():
    def kept(name, spacing, steps=4, **more):
        times = schedule(name, **BETAS, timestep_spacing=spacing, **more).times(steps)
        return (1000 * times[:-1] - 1).round(3).tolist()

    for name, more in (("EulerDiscreteScheduler", {}), ("DDIMScheduler", dict(clip_sample=False))):
        assert kept(name, "leading", **more) == [750, 500, 250, 0]
        assert kept(name, "trailing", **more) == [999, 749, 499, 249]
    assert kept("EulerDiscreteScheduler", "linspace", 3) == [999, 499.5, 0]
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        assert kept(name, "leading", steps_offset=1) == [801, 601, 401, 201]
        assert kept(name, "linspace") == [999, 749, 500, 250]


def test_the_start_of_eulers_noise_is_sigma_of_the_first_timestep():
    for spacing, exact in (("leading", 1.0), ("linspace", None), ("trailing", None)):
        read = schedule("EulerDiscreteScheduler", **BETAS, timestep_spacing=spacing)
        times = read.times(4)
        expected = exact or float(read.diffusion.path.sigma(times[0]))
        assert read.start_std(times) == expected <= 1


def test_zero_terminal_snr_and_v():
    read = schedule(
        "DDIMScheduler", **STABLE, timestep_spacing="trailing", prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    assert read.times(5)[0] == 1 and float(read.diffusion.path.alpha(1.0)) == 0
    ex.check_combination(read.diffusion, read.solver, read.times(5))
    euler = schedule("EulerDiscreteScheduler", **BETAS, rescale_betas_zero_snr=True)
    at = euler.diffusion.path.coefficients(1.0)
    assert float(at.sigma / at.alpha) == pytest.approx(4096, rel=1e-6)


def test_flows():
    """Stable Diffusion 3's grid is shifted twice, FLUX.1's once by the number of tokens."""
    twice = schedule("FlowMatchEulerDiscreteScheduler", shift=3.0).times(28)
    assert twice[0] == 1 and twice[-1] == 0 and twice[-2] == pytest.approx(0.00893, abs=1e-5)
    config = dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    flux = read_schedule(config | dict(base_shift=0.5, max_shift=1.15), every_nth=True)
    times = flux.times(4, tokens=4096)
    np.testing.assert_allclose(times, ex.shift_time(np.linspace(1, 0, 5), np.exp(1.15)))
    with pytest.raises(PipelineError, match="tokens="):
        flux.times(4)


WRONG = {
    "LMSDiscreteScheduler is not one of DDIM": dict(_class_name="LMSDiscreteScheduler"),
    "None is not one of": {},
    "not known here: wobble": dict(_class_name="DDIMScheduler", clip_sample=False, wobble=1),
    "clip_sample = True .False.": dict(_class_name="DDIMScheduler"),
    "beta_schedule = 'odd' is not one of": dict(_class_name="PNDMScheduler", beta_schedule="odd"),
    "timestep_spacing = 'odd'": dict(_class_name="PNDMScheduler", timestep_spacing="odd"),
    "prediction_type = 'odd'": dict(_class_name="PNDMScheduler", prediction_type="odd"),
    "use_karras_sigmas = True": dict(_class_name="EulerDiscreteScheduler", use_karras_sigmas=True),
    "algorithm_type = 'dpmsolver'": dict(
        _class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver"
    ),
    "solver_order = 1": dict(_class_name="DPMSolverMultistepScheduler", solver_order=1),
    "solver_type = 'bh1'": dict(_class_name="UniPCMultistepScheduler", solver_type="bh1"),
    "at the last timestep no data is left": dict(
        _class_name="DDIMScheduler", clip_sample=False, rescale_betas_zero_snr=True
    ),
    "invert_sigmas = True": dict(_class_name="FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
    "time_shift_type = 'odd'": dict(
        _class_name="FlowMatchEulerDiscreteScheduler", time_shift_type="odd"
    ),
}


@pytest.mark.parametrize("message, config", WRONG.items(), ids=WRONG)
def test_what_is_not_known_is_refused_by_name(message, config):
    with pytest.raises(PipelineError, match=message):
        read_schedule(config)


def test_options_of_other_schedulers_are_left_alone():
    """SDXL's file is Euler's with what PNDM and DDIM had."""
    carried = STABLE | dict(skip_prk_steps=True, sample_max_value=1.0, timestep_spacing="leading")
    assert schedule("EulerDiscreteScheduler", **carried).times(30)[-1] == 0
    assert schedule("UniPCMultistepScheduler", **carried, solver_type="midpoint").times(30)[-1] == 0


def test_too_many_steps(tmp_path):
    with pytest.raises(PipelineError, match="would visit timestep 1000"):
        schedule("DDIMScheduler", **STABLE).times(1000)
    for name in ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        with pytest.raises(PipelineError, match="allows 1 to 1000"):
            schedule(name, **STABLE).times(1001)
    with pytest.raises(PipelineError, match="there is no file"):
        load_schedule(tmp_path)


@given(t=st.floats(0.002, 0.999))
def test_the_interpolated_path_is_the_tables_and_its_slopes_are_its_own(t):
    alpha_bar = ex.alpha_bar_from_betas(ex.scaled_linear_betas())
    path, smooth = InterpolatedVP(alpha_bar), ex.DiscreteVP(alpha_bar)
    i = np.round(1000 * t) / 1000
    for name in ("alpha", "sigma"):
        np.testing.assert_allclose(getattr(path, name)(i), getattr(smooth, name)(i), rtol=1e-9)
    at = path.coefficients(t)
    assert float(at.alpha**2 + at.sigma**2) == pytest.approx(1)
    # Near data sigma / alpha grows as sqrt(t): a chord of it over a step h is off by at most
    # h^2 / (32 t^2), relatively, t at the step's left end, and logSNR by twice that.
    left = np.floor(1000 * t) / 1000
    bound = (1e-3 / left) ** 2 / 16 + 2e-5
    assert float(path.logsnr(t)) == pytest.approx(float(smooth.logsnr(t)), abs=bound)
    middle = (np.floor(1000 * t) + 0.5) / 1000  # away from the corners
    at = path.coefficients(middle)
    for name in ("alpha", "sigma"):
        ends = [getattr(path, name)(middle + d) for d in (-1e-7, 1e-7)]
        slope = (ends[1] - ends[0]) / 2e-7
        assert float(getattr(at, f"d{name}")) == pytest.approx(float(slope), rel=1e-5, abs=1e-5)
    single = jax.jit(lambda t: path.coefficients(t).sigma)(jnp.float32(t))
    assert float(single) == pytest.approx(float(path.sigma(t)), abs=2e-4)
