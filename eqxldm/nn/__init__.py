"""Layers: small modules of one example, from which the models are built."""

from .activations import gelu as gelu, gelu_tanh as gelu_tanh, quick_gelu as quick_gelu
from .alignment import Aligned as Aligned
from .attention import (
    QKV as QKV,
    Attention as Attention,
    AttentionBlock as AttentionBlock,
    CrossAttention as CrossAttention,
    SelfAttention as SelfAttention,
    attend as attend,
    attend_in_blocks as attend_in_blocks,
    cudnn_attend as cudnn_attend,
)
from .causal_conv import (
    CausalConv3d as CausalConv3d,
    CausalResnetBlock as CausalResnetBlock,
    ClipDownsample as ClipDownsample,
    ClipUpsample as ClipUpsample,
    FrameCache as FrameCache,
    TimeDownsample as TimeDownsample,
    TimeUpsample as TimeUpsample,
    average_down as average_down,
    repeat_up as repeat_up,
)
from .conditioning import (
    Conditioning as Conditioning,
    embed_condition as embed_condition,
    embed_times as embed_times,
)
from .constraints import (
    divide_tokens as divide_tokens,
    fusion_barrier as fusion_barrier,
    replicate_activation as replicate_activation,
)
from .conv import (
    Conv as Conv,
    ConvPair as ConvPair,
    depth_to_space as depth_to_space,
    max_pool as max_pool,
    space_to_depth as space_to_depth,
    upsample_nearest as upsample_nearest,
)
from .embeddings import (
    LabelEmbedding as LabelEmbedding,
    Labels as Labels,
    Sinusoid as Sinusoid,
    TimeEmbedding as TimeEmbedding,
    Vector as Vector,
    VectorEmbedding as VectorEmbedding,
    check_label as check_label,
    sincos_features as sincos_features,
    sincos_positions as sincos_positions,
    sinusoidal as sinusoidal,
)
from .few_step import (
    GuidanceEmbedding as GuidanceEmbedding,
    Guided as Guided,
    Weighted as Weighted,
)
from .fields import with_fields as with_fields
from .flash_attention import flash_attend as flash_attend
from .linear import (
    Linear as Linear,
    normal as normal,
    xavier_uniform as xavier_uniform,
    zeros as zeros,
)
from .modulation import Modulation as Modulation, modulate as modulate
from .norms import (
    GroupNorm as GroupNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
    layer_norm as layer_norm,
)
from .patchify import (
    patch_grid as patch_grid,
    patch_sizes as patch_sizes,
    patchify as patchify,
    unpatchify as unpatchify,
)
from .resize import (
    bicubic_matrix as bicubic_matrix,
    bilinear_matrix as bilinear_matrix,
    resize as resize,
    resize_and_crop as resize_and_crop,
    sparse_bicubic_matrix as sparse_bicubic_matrix,
    tf1_matrix as tf1_matrix,
)
from .resnet import (
    ConditionedResnetBlock as ConditionedResnetBlock,
    ResnetBlock as ResnetBlock,
)
from .rope import (
    RoPE as RoPE,
    Rotation as Rotation,
    grid_positions as grid_positions,
)
from .spatial_transformer import (
    SpatialTransformer as SpatialTransformer,
    TransformerBlock as TransformerBlock,
)
from .spectral import SpectralConv as SpectralConv, spectral_norm as spectral_norm
from .stack import (
    Stack as Stack,
    save_matmuls as save_matmuls,
    save_narrow as save_narrow,
)
