"""Latent diffusion models in JAX and Equinox: pure functions and small modules that compose."""

from jaxtyping import install_import_hook as _install_import_hook

# Every function of the package checks its shapes and dtypes: at trace time under jit, so that a
# compiled step costs nothing more.
_install_import_hook("eqxldm", "beartype.beartype")

from . import nn as nn
from .guidance import guide as guide
from .losses import (
    constant_weight as constant_weight,
    denoising_loss as denoising_loss,
    discrete_time as discrete_time,
    hinge_discriminator_loss as hinge_discriminator_loss,
    hinge_generator_loss as hinge_generator_loss,
    kl_to_standard_normal as kl_to_standard_normal,
    logit_normal_time as logit_normal_time,
    stratified_time as stratified_time,
    uniform_time as uniform_time,
)
from .paths import (
    AbstractPath as AbstractPath,
    Coefficients as Coefficients,
    CosineVP as CosineVP,
    DiscreteVP as DiscreteVP,
    LinearFlow as LinearFlow,
    q_sample as q_sample,
)
from .predictions import (
    Denoiser as Denoiser,
    Prediction as Prediction,
    predict_eps as predict_eps,
    predict_v as predict_v,
    predict_velocity as predict_velocity,
    predict_x0 as predict_x0,
    target as target,
    to_x0_eps as to_x0_eps,
)
from .sampling import sample as sample, sample_trajectory as sample_trajectory
from .schedules import (
    alpha_bar_from_betas as alpha_bar_from_betas,
    betas_from_alpha_bar as betas_from_alpha_bar,
    cosine_betas as cosine_betas,
    linear_betas as linear_betas,
    respace as respace,
    shifted_times as shifted_times,
    stride as stride,
    timestep_times as timestep_times,
    uniform_times as uniform_times,
)
from .solvers import (
    DDIM as DDIM,
    DDPM as DDPM,
    AbstractSolver as AbstractSolver,
    Euler as Euler,
    Interval as Interval,
    fixed_large as fixed_large,
    fixed_small as fixed_small,
    posterior_coefficients as posterior_coefficients,
)
