"""Latent diffusion models in JAX and Equinox: pure functions and small modules that compose."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

from . import _typecheck as _typecheck

_typecheck.install()  # before the other modules: their functions check what they are given

if _TYPE_CHECKING:
    from . import (
        audio as audio,
        checkpoints as checkpoints,
        data as data,
        devices as devices,
        discrete as discrete,
        digests as digests,
        distributed as distributed,
        durable as durable,
        metrics as metrics,
        models as models,
        nn as nn,
        pipelines as pipelines,
        pretrained as pretrained,
        quantization as quantization,
        serving as serving,
        sharding as sharding,
        telemetry as telemetry,
        text as text,
        training as training,
    )

from .argument_errors import ArgumentError as ArgumentError
from .caching import sample_cached as sample_cached
from .checks import (
    check_finite as check_finite,
    check_time as check_time,
    checked as checked,
)
from .diffusion import Diffusion as Diffusion, Estimate as Estimate
from .flow_maps import (
    FlowMap as FlowMap,
    average_velocity_map as average_velocity_map,
    change_diffusion as change_diffusion,
    consistency_function as consistency_function,
    renoise as renoise,
    sample_map as sample_map,
)
from .gaussian_mixture import (
    GaussianMixture as GaussianMixture,
)
from .time_shift import dimension_shift as dimension_shift, shifted_time as shifted_time
from .times import (
    angle_time as angle_time,
    discrete_time as discrete_time,
    karras_times as karras_times,
    leading_timesteps as leading_timesteps,
    linspace_timesteps as linspace_timesteps,
    logit_normal_time as logit_normal_time,
    logsnr_times as logsnr_times,
    parse_respacing as parse_respacing,
    repaint_times as repaint_times,
    respace as respace,
    shift_time as shift_time,
    shifted_times as shifted_times,
    stratified_time as stratified_time,
    stride as stride,
    time_at_angle as time_at_angle,
    timestep_times as timestep_times,
    trailing_timesteps as trailing_timesteps,
    uniform_time as uniform_time,
    uniform_times as uniform_times,
)
from .guidance import (
    AdaptiveScale as AdaptiveScale,
    autoguide as autoguide,
    bounded_scale as bounded_scale,
    cosine_scale as cosine_scale,
    guide as guide,
    internal_guide as internal_guide,
    linear_scale as linear_scale,
)
from .joint import (
    Together as Together,
    one_part as one_part,
    together as together,
)
from .likelihood import (
    Bound as Bound,
    StepTable as StepTable,
    approximate_gaussian_log_likelihood as approximate_gaussian_log_likelihood,
    discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood,
    normal_kl as normal_kl,
    prior_bits as prior_bits,
    step_bits as step_bits,
    step_table as step_table,
    variational_bound as variational_bound,
)
from .loss_weights import (
    constant_weight as constant_weight,
    convert_weight as convert_weight,
    elbo_weight as elbo_weight,
    min_snr_weight as min_snr_weight,
    p2_weight as p2_weight,
    sigmoid_weight as sigmoid_weight,
    snr_weight as snr_weight,
    truncated_snr_weight as truncated_snr_weight,
    velocity_weight as velocity_weight,
)
from .objectives import (
    AbstractObjective as AbstractObjective,
    AbstractVelocityTarget as AbstractVelocityTarget,
    ConditionedGuidance as ConditionedGuidance,
    Context as Context,
    DataVelocity as DataVelocity,
    Denoising as Denoising,
    EasyConsistency as EasyConsistency,
    FixedGuidance as FixedGuidance,
    Hybrid as Hybrid,
    JointDenoising as JointDenoising,
    MeanFlow as MeanFlow,
    SCM as SCM,
    Shortcut as Shortcut,
    SplitMeanFlow as SplitMeanFlow,
    TeacherVelocity as TeacherVelocity,
    alignment_loss as alignment_loss,
    cosine_loss as cosine_loss,
    denoising_loss as denoising_loss,
    dispersive_loss as dispersive_loss,
    frechet_loss as frechet_loss,
    guided_condition as guided_condition,
    hinge_discriminator_loss as hinge_discriminator_loss,
    hinge_generator_loss as hinge_generator_loss,
    hybrid_loss as hybrid_loss,
    improved_mean_flow as improved_mean_flow,
    kl_to_standard_normal as kl_to_standard_normal,
)
from .paths import (
    AbstractPath as AbstractPath,
    Coefficients as Coefficients,
    CosineVP as CosineVP,
    DiscreteVP as DiscreteVP,
    LinearFlow as LinearFlow,
    VarianceExploding as VarianceExploding,
    posterior_coefficients as posterior_coefficients,
    q_posterior as q_posterior,
    q_sample as q_sample,
    time_at_logsnr as time_at_logsnr,
    transition_coefficients as transition_coefficients,
)
from .predictions import (
    Denoiser as Denoiser,
    Inverse as Inverse,
    LearnedRange as LearnedRange,
    Prediction as Prediction,
    convert as convert,
    inverse as inverse,
    predict_eps as predict_eps,
    predict_score as predict_score,
    predict_v as predict_v,
    predict_velocity as predict_velocity,
    predict_x0 as predict_x0,
    split_output as split_output,
    target as target,
    to_x0_eps as to_x0_eps,
)
from .sampling import (
    Loop as Loop,
    Trajectory as Trajectory,
    check_combination as check_combination,
    ddim_invert as ddim_invert,
    encode as encode,
    nfe as nfe,
    sample as sample,
    sample_trajectory as sample_trajectory,
    sampling_steps as sampling_steps,
)
from .betas import (
    alpha_bar_from_betas as alpha_bar_from_betas,
    betas_from_alpha_bar as betas_from_alpha_bar,
    cosine_betas as cosine_betas,
    linear_betas as linear_betas,
    rescale_zero_terminal_snr as rescale_zero_terminal_snr,
    scaled_linear_betas as scaled_linear_betas,
    shift_alpha_bar as shift_alpha_bar,
    sigmoid_betas as sigmoid_betas,
)
from .solvers import (
    AbstractSolver as AbstractSolver,
    DDIM as DDIM,
    DDPM as DDPM,
    DPMSolverPP2M as DPMSolverPP2M,
    DPMSolverPP3M as DPMSolverPP3M,
    Euler as Euler,
    EulerMaruyama as EulerMaruyama,
    Heun as Heun,
    Interval as Interval,
    Plan as Plan,
    UniPC as UniPC,
    fixed_large as fixed_large,
    fixed_small as fixed_small,
    forward_diffusion as forward_diffusion,
    intervals as intervals,
    learned_range as learned_range,
    log_variance as log_variance,
    one_call_a_step as one_call_a_step,
)

# Imported when they are first named: many programs need only a few of them.
_LAZY = (
    "audio",
    "checkpoints",
    "data",
    "devices",
    "discrete",
    "digests",
    "distributed",
    "durable",
    "metrics",
    "models",
    "nn",
    "pipelines",
    "pretrained",
    "quantization",
    "serving",
    "sharding",
    "telemetry",
    "text",
    "training",
)


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        return _importlib.import_module("importlib.metadata").version(__name__)
    if name in _LAZY:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})
