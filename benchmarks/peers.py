"""PyTorch's side of `make bench`: the same cases by diffusers and by plain torch.

Attention is torch's scaled_dot_product_attention; the optimizer is AdamW, fused where it can be;
the average is one multi-tensor operation.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from torch_dit import Trainer, official_dit

torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.manual_seed(0)


def network(case, library):
    channels, size, _ = case["shape"]
    if case["model"] == "unet":
        model = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=case["classes"] + 1,
            **case["theirs"],
        )
        return model, lambda x, t, y: model(x, t, class_labels=y).sample
    ours = case["ours"]
    if library == "torch":
        model = official_dit.DiT(
            tuple(case["shape"]), patch_size=ours["patch_size"], depth=ours["depth"],
            width=ours["width"], num_heads=ours["num_heads"], classes=case["classes"],
            learn_sigma=False,
        )  # fmt: skip
        return model, lambda x, t, y: model(x, t, y)
    model = DiTTransformer2DModel(
        num_attention_heads=ours["num_heads"],
        attention_head_dim=ours["width"] // ours["num_heads"],
        in_channels=channels, out_channels=channels, num_layers=ours["depth"], sample_size=size,
        patch_size=ours["patch_size"], num_embeds_ada_norm=case["classes"],
    )  # fmt: skip
    return model, lambda x, t, y: model(x, timestep=t, class_labels=y).sample


def batch(case):
    n = case["batch"]
    x = torch.randn(n, *case["shape"])
    return x, torch.randint(0, 1000, (n,)), torch.arange(n) % case["classes"]


def forward(case, library):
    model, apply = network(case, library)
    model.eval()
    x, t, y = batch(case)

    @torch.inference_mode()
    def run():
        apply(x, t, y)

    return run


def train(case, library):
    model, apply = network(case, library)
    model.train()
    trainer, (x0, _, y) = Trainer(model), batch(case)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def run():
        t = torch.randint(0, 1000, (len(x0),))
        labels = torch.where(torch.rand(len(y)) < 0.1, case["classes"], y)
        eps, a = torch.randn_like(x0), alpha_bar[t][:, None, None, None]
        out = apply(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, labels)
        F.mse_loss(out, eps).backward()
        trainer.step()

    return run


def sample(case, library):
    model, apply = network(case, library)
    model.eval()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(case["steps"])
    noise, _, y = batch(case)
    labels = torch.cat([y, torch.full_like(y, case["classes"])])

    @torch.inference_mode()
    def run():
        x = noise
        for t in scheduler.timesteps:
            out = apply(torch.cat([x, x]), t.expand(len(labels)), labels)
            conditional, null = out.chunk(2)
            x = scheduler.step(null + 4.0 * (conditional - null), t, x).prev_sample

    return run


def discriminator(channels):
    layers = [nn.Conv2d(channels, 32, 4, 2, 1), nn.LeakyReLU(0.2)]
    for width, out, stride in ((32, 64, 2), (64, 128, 1)):
        layers += [nn.Conv2d(width, out, 4, stride, 1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(128, 1, 4, 1, 1))


def autoencoder(case, library):
    """The same step as ours, as latent diffusion's code takes it: two backward passes for the
    adaptive weight, one for the sum, one for the discriminator."""
    channels, levels, patch = case["shape"][0], case["channels"], case["patch_size"]
    inner = channels * patch**2
    model = AutoencoderKL(
        in_channels=inner, out_channels=inner, latent_channels=4, block_out_channels=levels,
        down_block_types=["DownEncoderBlock2D"] * len(levels), layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * len(levels), norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    for block in model.decoder.up_blocks:  # diffusers' decoder has one block more a level
        del block.resnets[1:]
    disc, x = discriminator(channels), torch.rand(case["batch"], *case["shape"]) * 2 - 1
    trainers = Trainer(model), Trainer(copy.deepcopy(disc))
    trainers[1].__init__(disc)

    def run():
        posterior = model.encode(F.pixel_unshuffle(x, patch)).latent_dist
        y = F.pixel_shuffle(model.decode(posterior.sample()).sample, patch)
        nll, gan = F.mse_loss(y, x), -disc(y).mean()
        last = model.decoder.conv_out.weight
        by_nll = torch.autograd.grad(nll, last, retain_graph=True)[0].norm()
        by_gan = torch.autograd.grad(gan, last, retain_graph=True)[0].norm()
        weight = (by_nll / (by_gan + 1e-4)).clamp(0, 1e4).detach()
        kl = posterior.kl().sum() / x.numel()
        disc.requires_grad_(False)
        (nll + 1e-6 * kl + 0.5 * weight * gan).backward()
        disc.requires_grad_(True)
        trainers[0].step()
        real, fake = disc(x), disc(y.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        trainers[1].step()

    return run


def pipeline(case, library):
    """A small pipeline of random weights, saved for the other side, and one picture's latents."""
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        layers_per_block=1,
    )  # fmt: skip
    tokens = lambda: torch.randn(1, case["tokens"], case["width"])
    options = dict(prompt_embeds=tokens(), negative_prompt_embeds=tokens())
    size, common = case["latent"], dict(in_channels=4, sample_size=case["latent"])
    if case["family"] == "Stable Diffusion":
        network = UNet2DConditionModel(
            cross_attention_dim=case["width"], **common, **case["network"]
        )
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
            clip_sample=False, set_alpha_to_one=False,
        )  # fmt: skip
        none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline(
            unet=network, vae=vae, scheduler=scheduler, requires_safety_checker=False, **none
        )
    else:
        network = SD3Transformer2DModel(
            joint_attention_dim=case["width"], pooled_projection_dim=case["pooled"],
            out_channels=4, **common, **case["network"],
        )  # fmt: skip
        parts = ("text_encoder", "tokenizer")
        none = dict.fromkeys(f"{part}{n}" for part in parts for n in ("", "_2", "_3"))
        pipe = StableDiffusion3Pipeline(
            transformer=network,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            **none,
        )
        pooled = lambda: torch.randn(1, case["pooled"])
        options |= dict(pooled_prompt_embeds=pooled(), negative_pooled_prompt_embeds=pooled())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(case["folder"])
    options |= dict(height=2 * size, width=2 * size, output_type="latent")
    options |= dict(guidance_scale=case["guidance"], num_inference_steps=case["steps"])

    def run():
        with torch.no_grad():
            return pipe(**options)[0]

    return run


CASES = dict(
    forward=forward, train=train, sample=sample, autoencoder=autoencoder, pipeline=pipeline
)
