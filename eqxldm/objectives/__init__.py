"""Training objectives, side by side: each draws its times and gives the loss of one example."""

from .adversarial import (
    hinge_discriminator_loss as hinge_discriminator_loss,
    hinge_generator_loss as hinge_generator_loss,
    kl_to_standard_normal as kl_to_standard_normal,
)
from .auxiliary import (
    alignment_loss as alignment_loss,
    cosine_loss as cosine_loss,
    dispersive_loss as dispersive_loss,
)
from .base import (
    AbstractObjective as AbstractObjective,
    Context as Context,
    OneTimeObjective as OneTimeObjective,
)
from .consistency import (
    SCM as SCM,
    EasyConsistency as EasyConsistency,
    consistency_tangent as consistency_tangent,
)
from .denoising import Denoising as Denoising, denoising_loss as denoising_loss
from .flow_map import (
    MeanFlow as MeanFlow,
    boundary_tangent as boundary_tangent,
    improved_mean_flow as improved_mean_flow,
    mean_flow_velocity as mean_flow_velocity,
    target_tangent as target_tangent,
)
from .frechet import (
    FeatureMoments as FeatureMoments,
    feature_moments as feature_moments,
    frechet_loss as frechet_loss,
    moments_distance as moments_distance,
    update_moments as update_moments,
)
from .hybrid import Hybrid as Hybrid, hybrid_loss as hybrid_loss
from .joint import JointDenoising as JointDenoising
from .shortcut import (
    Shortcut as Shortcut,
    SplitMeanFlow as SplitMeanFlow,
    split_velocity as split_velocity,
)
from .velocity_targets import (
    AbstractVelocityTarget as AbstractVelocityTarget,
    ConditionedGuidance as ConditionedGuidance,
    DataVelocity as DataVelocity,
    FixedGuidance as FixedGuidance,
    TeacherVelocity as TeacherVelocity,
    guided_condition as guided_condition,
)
