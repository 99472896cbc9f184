"""Layers: small modules of one example, from which the models are built."""

from .attention import SelfAttention as SelfAttention, attend as attend
from .conv import (
    Conv as Conv,
    depth_to_space as depth_to_space,
    space_to_depth as space_to_depth,
    upsample_nearest as upsample_nearest,
)
from .embeddings import (
    LabelEmbedding as LabelEmbedding,
    TimeEmbedding as TimeEmbedding,
    sincos_positions as sincos_positions,
    sinusoidal as sinusoidal,
)
from .linear import (
    Linear as Linear,
    normal as normal,
    xavier_uniform as xavier_uniform,
    zeros as zeros,
)
from .modulation import Modulation as Modulation, modulate as modulate
from .norms import GroupNorm as GroupNorm, layer_norm as layer_norm
from .patchify import patchify as patchify, unpatchify as unpatchify
from .resnet import AttentionBlock as AttentionBlock, ResnetBlock as ResnetBlock
