"""Training as pure functions: states, averages, optimizers, steps."""

from .autoencoder import (
    AutoencoderState as AutoencoderState,
    MeanDistance as MeanDistance,
    adaptive_weight as adaptive_weight,
    l1_distance as l1_distance,
    l2_distance as l2_distance,
    make_autoencoder_step as make_autoencoder_step,
)
from .ema import (
    constant as constant,
    exponential as exponential,
    gamma_of as gamma_of,
    posthoc_ema as posthoc_ema,
    posthoc_error as posthoc_error,
    posthoc_weights as posthoc_weights,
    power_function as power_function,
    sigma_of as sigma_of,
    update_ema as update_ema,
)
from .latents import measure_latents as measure_latents
from .loss import (
    drop_condition as drop_condition,
    in_dtype as in_dtype,
    make_loss as make_loss,
)
from .optimizers import (
    adamw as adamw,
    decay_mask as decay_mask,
    muon as muon,
)
from .state import (
    TrainState as TrainState,
    apply_gradients as apply_gradients,
    block_norms as block_norms,
    check_gradients as check_gradients,
    init_state as init_state,
    make_train_step as make_train_step,
)
