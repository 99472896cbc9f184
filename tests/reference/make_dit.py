"""Writes dit_diffusers.safetensors: a tiny DiT of diffusers with inputs, outputs and gradients.

Run it in an environment with torch and diffusers, not in .venv:

    python tests/reference/make_dit.py

Tensors: `weights/<name>` is the state dict, `x`, `timestep`, `label`, `out` a batch, `gradient/x`
and `gradient/<name>` the gradients of `sum(out * probe)`. `official` is the output of the same
network with the two constants in which diffusers departs from the official code put right. The
header has the configuration and the versions. Made with diffusers 0.42.1 and torch 2.13.0.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

SIZES = dict(
    num_attention_heads=3,
    attention_head_dim=8,
    in_channels=3,
    out_channels=6,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=5,
)
GRADIENTS = ["pos_embed.proj.weight", "transformer_blocks.1.attn1.to_k.weight", "proj_out_2.weight"]


def main() -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing that is zero hides
        first = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks[1:]:  # as converted models have it
            block.norm1.emb.load_state_dict(first.state_dict())
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    timestep, label = torch.tensor([0, 37, 500, 999]), torch.tensor([3, 0, 5, 2])
    out = model(x, timestep, label).sample
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # frequencies 10000^(-i / 128)
            block.norm3.eps = 1e-6
        official = model(x, timestep, label).sample
    parameters = dict(model.named_parameters())
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"gradient/{name}": parameters[name].grad for name in GRADIENTS}
    tensors |= dict(x=x.detach(), timestep=timestep, label=label, out=out.detach(), probe=probe)
    tensors |= {"gradient/x": x.grad, "official": official}
    config = {k: v for k, v in model.config.items() if k != "_use_default_values"}
    header = dict(
        config=json.dumps({"_class_name": type(model).__name__, **config}),
        versions=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
    )
    contiguous = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(contiguous, Path(__file__).with_name("dit_diffusers.safetensors"), header)


if __name__ == "__main__":
    main()
