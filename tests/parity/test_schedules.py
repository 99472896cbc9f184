"""Schedulers against diffusers': the same latents from the same noise and network."""

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch

import eqxldm as ex
from eqxldm.pipelines import load_schedule

from harness import BOUND, Draw, each_configuration
from helpers import relative_error


def network(x, timestep, sin):
    """Of the noised latent as the network sees it, and of the timestep that it is told."""
    return 0.6 * x + 0.2 * sin(2 * x + timestep / 150)


def draw_config(draw):
    """A scheduler and its options; the steps."""
    kind = [
        "DDIM",
        "EulerDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "FlowMatchEulerDiscrete",
    ]
    name = kind[draw.number % len(kind)]
    steps = draw.between(2, 30)
    if name == "FlowMatchEulerDiscrete":
        dynamic = draw.one(True, False)
        options = dict(shift=draw.one(1.0, 3.0, 1.7), use_dynamic_shifting=dynamic)
        options |= dict(shift_terminal=draw.one(None, None, 0.02))
        options |= dict(time_shift_type=draw.one("exponential", "linear"), max_shift=1.2)
        return name, options, steps
    spacing = draw.one("leading", "trailing", "linspace")
    options = dict(
        timestep_spacing=spacing,
        prediction_type=draw.one("epsilon", "v_prediction", "sample"),
        steps_offset=draw.one(0, 1),
    )
    options |= draw.one(
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="linear"),
        dict(beta_schedule="squaredcos_cap_v2"),
    )
    zero = draw.one(True, False)
    if options["prediction_type"] != "epsilon" and spacing == "trailing":
        # The others come closer to zero than what stands for zero.
        options["rescale_betas_zero_snr"] = zero and options["beta_schedule"] == "scaled_linear"
    if name == "DDIM":
        options |= dict(clip_sample=False, set_alpha_to_one=draw.one(True, False))
        # Elsewhere diffusers' step ends beside the timestep that the network is told next.
        steps = draw.one(2, 5, 8, 10, 20, 25)
        if spacing == "linspace":
            steps = options["num_train_timesteps"] = draw.between(10, 30)
    if name in ("DPMSolverMultistep", "UniPCMultistep"):
        options["solver_order"] = draw.one(2, 3) if name.startswith("DPM") else draw.between(1, 3)
    return name, options, steps


def theirs(scheduler, steps, noise, mu):
    options = {} if mu is None else dict(mu=mu)
    scheduler.set_timesteps(steps, **options)
    x = torch.from_numpy(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, timestep)
        out = network(scaled, timestep, torch.sin)
        x = scheduler.step(out, timestep, x, return_dict=False)[0]
    return x.numpy()


def ours(schedule, steps, noise, tokens):
    times = schedule.times(steps, tokens)
    flow = isinstance(schedule.diffusion.path, ex.LinearFlow)

    def denoiser(x_t, t, cond, *, key=None):
        return network(x_t, schedule.timesteps * t - (not flow), jnp.sin)

    x_T = jnp.asarray(noise) * schedule.start_std(times)
    run = lambda x: ex.sample(denoiser, schedule.diffusion, schedule.solver, times, x)
    return jax.jit(run)(x_T)


# diffusers hands torch's tensors to NumPy in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@each_configuration
def test_latents(number, tmp_path, record_property):
    draw = Draw("schedules", number)
    name, options, steps = draw_config(draw)
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    tokens = draw.one(64, 256, 1024, 4096)
    mu = None
    if options.get("use_dynamic_shifting"):
        mu = 0.5 + (1.2 - 0.5) * (tokens - 256) / (4096 - 256)
    noise = draw.normal(1, 4, 6, 6)
    scheduler.save_config(tmp_path)
    schedule = load_schedule(tmp_path)
    expected = theirs(scheduler, steps, noise, mu)
    found = ours(schedule, steps, noise, tokens)
    error = relative_error(found, expected)
    # diffusers' Euler has a state sigma_max times as large as the latent, which float32 rounds.
    sigma_max = 0.0 if name != "EulerDiscrete" else float(scheduler.sigmas.max())
    assert error <= BOUND + 2e-7 * sigma_max, (name, options, steps, error)
    record_property(name, {"latents": error})
