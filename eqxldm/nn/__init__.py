"""Layers: small modules of one example, from which the models are built."""

from .attention import (
    Attention as Attention,
    NormedSelfAttention as NormedSelfAttention,
    RMSNorm as RMSNorm,
    SelfAttention as SelfAttention,
    attend as attend,
    cudnn_attend as cudnn_attend,
)
from .conv import (
    Conv as Conv,
    ConvPair as ConvPair,
    depth_to_space as depth_to_space,
    space_to_depth as space_to_depth,
    upsample_nearest as upsample_nearest,
)
from .embeddings import (
    LabelEmbedding as LabelEmbedding,
    TimeEmbedding as TimeEmbedding,
    check_label as check_label,
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
