"""Training objectives, side by side: each draws its times and gives the loss of one example."""

from .adversarial import (
    hinge_discriminator_loss as hinge_discriminator_loss,
    hinge_generator_loss as hinge_generator_loss,
    kl_to_standard_normal as kl_to_standard_normal,
)
from .base import AbstractObjective as AbstractObjective, Context as Context
from .denoising import Denoising as Denoising, denoising_loss as denoising_loss
from .hybrid import Hybrid as Hybrid, hybrid_loss as hybrid_loss
