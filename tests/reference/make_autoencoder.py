# Run where torch and diffusers are installed: python tests/reference/make_autoencoder.py
"""Writes autoencoder_*.npz: tiny AutoencoderKLs of diffusers with what they compute.

Each file holds the weights under diffusers' names (float16: the model has exactly these), an input
`x`, its raw `moments` (mean and log-variance before the clamp), the `image` decoded from the mean,
and the gradients of `sum(cos(k) image_k) + sum(cos(k) moments_k)`: `grad.x`, and `grad`, those of
all parameters in the file's order, flat and one after the other.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

MODELS = {
    "attention": dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    ),
    "plain": dict(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=2,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def probe(y):
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum()


for name, sizes in MODELS.items():
    torch.manual_seed(0)
    depth = len(sizes["block_out_channels"])
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **sizes,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).half().float())
    x = torch.rand(1, sizes["in_channels"], 16, 24) * 2 - 1
    x.requires_grad_(True)
    moments = model.encode(x).latent_dist.parameters
    image = model.decode(moments.chunk(2, 1)[0]).sample
    (probe(image) + probe(moments)).backward()
    arrays = {k: p.detach().numpy().astype(np.float16) for k, p in model.named_parameters()}
    arrays["grad"] = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
    results = {"x": x, "moments": moments, "image": image, "grad.x": x.grad}
    arrays |= {k: v.detach().numpy()[0] for k, v in results.items()}
    path = Path(__file__).parent / f"autoencoder_{name}.npz"
    np.savez_compressed(path, **arrays)
    print(
        path, path.stat().st_size, sum(p.numel() for p in model.parameters()), moments.abs().max()
    )
