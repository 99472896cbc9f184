# Run where torch and diffusers are installed: python tests/reference/make_unet.py
"""Writes unet_*.npz: tiny U-Nets of diffusers with what they compute.

Each file holds `config`, the weights under diffusers' names after `weights/` (float16: the model
has exactly these), the inputs `x`, `timestep`, and `context` or `label`, the output `out`, and the
gradients of `sum(cos(k) out_k)`: `grad.x`, `grad.context`, and `grad`, those of all parameters in
the file's order, flat, one after the other, every seventh number.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

COMMON = dict(block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2)
MODELS = {
    "condition": UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=6,
        num_class_embeds=3,
        **COMMON,
    ),
    "plain": UNet2DModel(
        in_channels=1,
        out_channels=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        **COMMON,
    ),
}

for name, model in MODELS.items():
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).half().float())
    inputs = dict(x=torch.randn(1, model.config.in_channels, 8, 12, requires_grad=True))
    arguments = dict(timestep=torch.tensor([37]))
    if name == "condition":
        inputs["context"] = torch.randn(1, 5, 6, requires_grad=True)
        arguments |= dict(encoder_hidden_states=inputs["context"], class_labels=torch.tensor([1]))
    out = model(inputs["x"], **arguments).sample
    (out * torch.cos(torch.arange(out.numel())).reshape(out.shape)).sum().backward()
    arrays = {
        f"weights/{k}": p.detach().numpy().astype(np.float16) for k, p in model.named_parameters()
    }
    arrays["grad"] = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])[::7]
    arrays |= {k: v.detach().numpy()[0] for k, v in inputs.items()} | {
        "out": out.detach().numpy()[0]
    }
    arrays |= {f"grad.{k}": v.grad.numpy()[0] for k, v in inputs.items()}
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    arrays["config"] = json.dumps(config | {"_class_name": type(model).__name__})
    path = Path(__file__).parent / f"unet_{name}.npz"
    np.savez_compressed(path, **arrays)
    size = sum(p.numel() for p in model.parameters())
    print(path, path.stat().st_size, size, out.abs().max())
