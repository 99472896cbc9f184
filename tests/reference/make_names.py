"""Writes names_*.txt: every tensor of the published networks, a line `name size size ...` each.

Run it in an environment with torch, diffusers and transformers:

    .venv-parity/bin/python tests/reference/make_names.py

The networks are made on torch's meta device, which takes no memory. Made with diffusers 0.42.1
and transformers 5.24.0.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def clip(kind, width, depth, heads):
    """In files the names have a `text_model.` that the module without projection has not."""
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth)
    module = kind(CLIPTextConfig(**sizes, num_attention_heads=heads, projection_dim=width))
    return (
        module
        if kind is CLIPTextModelWithProjection
        else torch.nn.ModuleDict({"text_model": module})
    )


XXL = dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
# A tied copy, which is not in the file.
COPIES = ["encoder.embed_tokens.weight"]
NETWORKS = {
    "sd_vae": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    ),
    "sd_unet": lambda: UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_eps=1e-5,
        act_fn="silu",
    ),
    "dit_xl_2": lambda: DiTTransformer2DModel(out_channels=8),
    "clip_l": lambda: clip(CLIPTextModel, 768, 12, 12),
    "clip_h": lambda: clip(CLIPTextModel, 1024, 23, 16),
    "t5_xxl": lambda: T5EncoderModel(T5Config(**XXL)),
    "umt5_xxl": lambda: UMT5EncoderModel(UMT5Config(**XXL, vocab_size=256384)),
    "minilm_l6": lambda: BertModel(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
    ),
    "clip_bigg": lambda: clip(CLIPTextModelWithProjection, 1280, 32, 20),
}


def main() -> None:
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            state = make().state_dict()
        state = {key: value for key, value in state.items() if key not in COPIES}
        lines = [" ".join([key, *map(str, value.shape)]) for key, value in sorted(state.items())]
        path = Path(__file__).with_name(f"names_{name}.txt")
        path.write_text("\n".join(lines) + "\n")
        total = sum(value.numel() for value in state.values())
        print(
            f"{path.name}: {len(lines)} tensors, {total:,} numbers, {path.stat().st_size:,} bytes"
        )


if __name__ == "__main__":
    main()
