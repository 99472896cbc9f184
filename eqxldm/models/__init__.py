"""The networks, one example at a time: autoencoders, DiT, MMDiT, FLUX, Wan, U-Net."""

from ..nn.stack import save_matmuls as save_matmuls, save_narrow as save_narrow
from .autoencoder import (
    AutoencoderConfig as AutoencoderConfig,
    AutoencoderKL as AutoencoderKL,
    kl_f4 as kl_f4,
    kl_f8 as kl_f8,
    kl_f16 as kl_f16,
)
from .bert import (
    BERT as BERT,
    BERTBlock as BERTBlock,
    BERTConfig as BERTConfig,
    BERTOutput as BERTOutput,
    bert_base as bert_base,
    minilm_l6 as minilm_l6,
)
from .byte_text import ByteTextConfig as ByteTextConfig, ByteTextEncoder as ByteTextEncoder
from .caption_encoder import (
    CaptionEncoder as CaptionEncoder,
    CaptionEncoderConfig as CaptionEncoderConfig,
    EncodedCaption as EncodedCaption,
    EncodedCaptionConfig as EncodedCaptionConfig,
)
from .clip_text import (
    CLIPOutput as CLIPOutput,
    CLIPText as CLIPText,
    CLIPTextConfig as CLIPTextConfig,
    clip_text_bigg as clip_text_bigg,
    clip_text_h as clip_text_h,
    clip_text_l as clip_text_l,
)
from .counting import multiply_adds as multiply_adds, parameter_count as parameter_count
from .discriminator import (
    DiscriminatorConfig as DiscriminatorConfig,
    PatchDiscriminator as PatchDiscriminator,
    patch_layers as patch_layers,
)
from .dit import (
    DiT as DiT,
    DiTConfig as DiTConfig,
    DiTOutputs as DiTOutputs,
)
from .dit_blocks import (
    BlockContext as BlockContext,
    CrossAttentionDiTBlock as CrossAttentionDiTBlock,
    DiTBlock as DiTBlock,
    OutputHead as OutputHead,
)
from .dit_sizes import (
    dit_b_2 as dit_b_2,
    dit_b_4 as dit_b_4,
    dit_b_8 as dit_b_8,
    dit_l_2 as dit_l_2,
    dit_l_4 as dit_l_4,
    dit_l_8 as dit_l_8,
    dit_s_2 as dit_s_2,
    dit_s_4 as dit_s_4,
    dit_s_8 as dit_s_8,
    dit_xl_2 as dit_xl_2,
    dit_xl_4 as dit_xl_4,
    dit_xl_8 as dit_xl_8,
    jit_b_16 as jit_b_16,
    jit_h_16 as jit_h_16,
    jit_l_16 as jit_l_16,
)
from .encoder_block import EncoderBlock as EncoderBlock
from .flux import (
    Flux as Flux,
    FluxConfig as FluxConfig,
    SingleBlock as SingleBlock,
    flux1_dev as flux1_dev,
    flux1_schnell as flux1_schnell,
)
from .image_encoders import (
    CLIPImage as CLIPImage,
    CLIPImageConfig as CLIPImageConfig,
    DINOv2 as DINOv2,
    DINOv2Config as DINOv2Config,
    ImageOutput as ImageOutput,
    clip_image_b_32 as clip_image_b_32,
    clip_image_l_14 as clip_image_l_14,
    clip_image_l_14_336 as clip_image_l_14_336,
    clip_input as clip_input,
    dinov2_b as dinov2_b,
    dinov2_input as dinov2_input,
    dinov2_l as dinov2_l,
    dinov2_s as dinov2_s,
)
from .inception import (
    Inception as Inception,
    InceptionConfig as InceptionConfig,
    InceptionOutput as InceptionOutput,
    inception_input as inception_input,
)
from .joint_blocks import JointBlock as JointBlock, JointStream as JointStream
from .latents import NormalisedLatents as NormalisedLatents, Posterior as Posterior
from .lpips import (
    LPIPS as LPIPS,
    AlexLPIPS as AlexLPIPS,
    AlexLPIPSConfig as AlexLPIPSConfig,
    LPIPSConfig as LPIPSConfig,
)
from .mmdit import (
    MMDiT as MMDiT,
    MMDiTConfig as MMDiTConfig,
    mmdit_sd3_medium as mmdit_sd3_medium,
    mmdit_sd35_large as mmdit_sd35_large,
    mmdit_sd35_medium as mmdit_sd35_medium,
)
from .sentence_encoder import (
    SentenceEncoder as SentenceEncoder,
    SentenceEncoderConfig as SentenceEncoderConfig,
    SentenceOutput as SentenceOutput,
    first_token as first_token,
    mean_token as mean_token,
)
from .sound_autoencoder import (
    SoundAutoencoder as SoundAutoencoder,
    SoundAutoencoderConfig as SoundAutoencoderConfig,
    SoundBlock as SoundBlock,
)
from .t5 import (
    T5Block as T5Block,
    T5Config as T5Config,
    T5Encoder as T5Encoder,
    relative_buckets as relative_buckets,
    t5_base as t5_base,
    t5_large as t5_large,
    t5_small as t5_small,
    t5_xl as t5_xl,
    t5_xxl as t5_xxl,
    umt5_xxl as umt5_xxl,
)
from .tiling import (
    decode_sliced as decode_sliced,
    decode_tiled as decode_tiled,
    encode_sliced as encode_sliced,
    encode_tiled as encode_tiled,
)
from .tiny_autoencoder import (
    TinyAutoencoder as TinyAutoencoder,
    TinyAutoencoderConfig as TinyAutoencoderConfig,
)
from .token_blocks import (
    AdaptiveTokenBlock as AdaptiveTokenBlock,
    Cached as Cached,
    LlamaBlock as LlamaBlock,
    TokenContext as TokenContext,
)
from .token_transformer import (
    TokenTransformer as TokenTransformer,
    TokenTransformerConfig as TokenTransformerConfig,
    llada_8b as llada_8b,
    mdlm_small as mdlm_small,
)
from .two_towers import (
    Exchange as Exchange,
    TowersBlock as TowersBlock,
    TwoTowers as TwoTowers,
    TwoTowersConfig as TwoTowersConfig,
)
from .unet import UNet as UNet, UNetConfig as UNetConfig
from .unet_sizes import (
    unet_ddpm as unet_ddpm,
    unet_sd1 as unet_sd1,
    unet_sd2 as unet_sd2,
    unet_sdxl as unet_sdxl,
)
from .video_autoencoder import (
    CausalVideoAutoencoder as CausalVideoAutoencoder,
    CausalVideoAutoencoderConfig as CausalVideoAutoencoderConfig,
)
from .video_autoencoder_sizes import (
    wan21_autoencoder as wan21_autoencoder,
    wan22_autoencoder as wan22_autoencoder,
)
from .wan import (
    WanBlock as WanBlock,
    WanConfig as WanConfig,
    WanTransformer as WanTransformer,
    wan_t2v_1_3b as wan_t2v_1_3b,
    wan_t2v_14b as wan_t2v_14b,
    wan_ti2v_5b as wan_ti2v_5b,
)
