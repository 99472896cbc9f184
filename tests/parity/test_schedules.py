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
from schedulers import draw_config


def network(x, timestep, sin):
    """Of the noised latent as the network sees it, and of the timestep that it is told."""
    return 0.6 * x + 0.2 * sin(2 * x + timestep / 150)


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
    record_property(name, {"latents": float(error)})
