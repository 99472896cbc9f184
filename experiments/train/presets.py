"""The presets, each as the options that it stands for, in the words of the command line."""

from dataclasses import replace

import tyro

from .commands import Train
from .config import DenoiserName, FormName, ObjectiveName, PresetName, SpaceName, default_form
from .few_steps import DIFFERENTIATED, FEW_STEP

# Sizes that train in minutes on two CPU cores; the defaults of Train's options are DiT's recipe.
TWO_CORES = """
    --classifier.steps 1500 --classifier.batch-size 128 --classifier.channels 32
    --classifier.features 128
    --autoencoder.steps 1500 --autoencoder.learning-rate 3e-3 --autoencoder.channels 32 64
    --autoencoder.patch-size 2 --autoencoder.blocks 1 --autoencoder.groups 8
    --autoencoder.latent-channels 8 --autoencoder.no-attention --autoencoder.distance l2
    --autoencoder.perceptual-weight 0.1
    --autoencoder.kl-weight 3e-3 --autoencoder.ema-decay 0.99 --autoencoder.gan-weight 0.25
    --autoencoder.gan-start 1000 --autoencoder.discriminator-channels 32
    --autoencoder.discriminator-layers 2 --autoencoder.discriminator-learning-rate 1e-3
    --latents.batch-size 250 --sampling.solver ddim --sampling.steps 25 --sampling.guidance 1.6
    --diffusion.steps 10000 --diffusion.batch-size 64 --diffusion.learning-rate 4e-3
    --diffusion.warmup 100 --diffusion.cosine-decay --diffusion.b2 0.99 --diffusion.clip-norm 1
    --diffusion.ema-decays 0.999 --diffusion.ema-warmup --diffusion.path cosine
    --diffusion.prediction v --diffusion.no-learned-range --diffusion.dtype float32
    --dit.model dit_s_2 --dit.depth 6 --dit.width 128 --dit.num-heads 4
    --unet.blocks 1 --unet.groups 8 --sampling-batch 500
"""
# DiT's recipe (Peebles & Xie 2023): XL/2, batch 256, 400,000 steps, 250 DDPM steps, w 1.5.
IMAGENET256 = """
    --size 256 256 --samples 50000 --checkpoint-every 2500 --autoencoder.crop-from 288
    --sampling.solver ddpm --sampling.steps 250 --sampling.guidance 1.5
    --sampling.guidance-interval 0 1
"""
# 32 x 32 colour images in some 27 minutes.
CIFAR10 = "--size 32 32 --samples 2000"
# 28 x 28 digits or clothes in ten minutes.
MNIST = """
    --size 28 28 --channels 1 --pad 2 --no-flip --samples 2000 --checkpoint-every 250
    --classifier.steps 700 --classifier.batch-size 256 --classifier.learning-rate 2e-3
    --autoencoder.steps 700 --autoencoder.learning-rate 4e-3 --autoencoder.latent-channels 4
    --autoencoder.kl-weight 1e-2 --autoencoder.gan-start 450
    --latents.batch-size 500 --latents.images-per-shard 10000 --sampling.steps 20
    --diffusion.warmup 50 --diffusion.ema-decays 0.995
"""
# What a step costs differs by a factor of four, so each pair has a number of steps of its own.
MNIST_STEPS = {
    ("latent", "dit"): "--diffusion.steps 3200",
    ("latent", "unet"): "--diffusion.steps 1600 --diffusion.learning-rate 2e-3",
    ("pixel", "dit"): "--diffusion.steps 2000",
    ("pixel", "unet"): "--diffusion.steps 800 --diffusion.learning-rate 2e-3",
}
# Everything tiny: all stages in two minutes, on images that it makes.
SMOKE = """
    --data shapes --condition label --size 32 32 --samples 80 --reference 200
    --checkpoint-every 100 --classifier.steps 60 --classifier.batch-size 32
    --classifier.channels 8 --classifier.features 32 --autoencoder.steps 200
    --autoencoder.batch-size 16 --autoencoder.learning-rate 4e-3 --autoencoder.channels 16 32
    --autoencoder.latent-channels 4 --autoencoder.gan-start 150
    --autoencoder.discriminator-channels 8 --latents.batch-size 100 --latents.images-per-shard 100
    --diffusion.steps 600 --diffusion.batch-size 32 --diffusion.warmup 20
    --diffusion.ema-decays 0.99 --dit.depth 4 --dit.width 96 --dit.num-heads 3
    --sampling.steps 20 --sampling.guidance 1.5 --unet.num-heads 2
    --text.max-length 32 --text.depth 1 --text.num-heads 2
"""
# Emoji of three styles, 32 x 32, from their captions.
TEXT = """
    --data emoji --condition text --size 32 32 --no-flip --samples 1000 --checkpoint-every 500
    --autoencoder.steps 1500 --diffusion.steps 7000 --diffusion.learning-rate 2e-3
    --text.tokens clip --text.merges 8192 --text.max-length 16 --text.depth 2 --text.num-heads 4
    --text.cross-attention --sampling.guidance 2.5 --latents.images-per-shard 1000
"""
# Pixels have patches and levels of their own, so that there are about as many tokens.
PIXEL = "--dit.patch-size 4 --unet.channels 32 64 64"
LATENT = "--dit.patch-size 2 --unet.channels 64 128"
SMALL_UNETS = {"latent": "--unet.channels 16 32", "pixel": "--unet.channels 8 16 32"}
MNIST_UNETS = {"latent": "--unet.channels 64 128", "pixel": "--unet.channels 16 32 64"}

# What newer transformers have: the blocks, and an auxiliary head, by which they are guided.
BLOCKS = "--dit.norm rms --dit.swiglu --dit.rope --dit.qk-norm"
HEAD = "--diffusion.early 0.25 --dit.early-depth 2"
INTERNAL = "--sampling.internal-guidance 1.4"
MODERN = f"{BLOCKS} {HEAD} {INTERNAL}"
# On ImageNet with the rest of LightningDiT's recipe (Yao et al. 2025), and an auxiliary head.
MODERN_IMAGENET = f"""
    {BLOCKS} --diffusion.cosine 1 --diffusion.early 0.25 --dit.early-depth 8
    --diffusion.path flow --diffusion.prediction velocity --diffusion.no-learned-range
    --diffusion.batch-size 1024 --diffusion.learning-rate 2e-4 --diffusion.b2 0.95
    --diffusion.steps 100000 --sampling.solver ddim --sampling.steps 50
"""
# JiT (Li & He 2025): x0 from pixels, the loss in the velocity; times as theirs, t = 1 being noise.
JIT = f"""
    {BLOCKS} --diffusion.path flow --diffusion.prediction x0 --diffusion.weight velocity
    --diffusion.no-learned-range --diffusion.time-mean 0.8 --diffusion.time-stddev 0.8
    --sampling.solver ddim --sampling.steps 50
"""
JIT_IMAGENET = """
    --dit.model dit_b_2 --dit.patch-size 16 --dit.bottleneck 128 --dit.condition-tokens 32
    --dit.tokens-start 4 --diffusion.batch-size 1024 --diffusion.learning-rate 2e-4
    --diffusion.b2 0.95 --diffusion.steps 250000 --diffusion.warmup 6250
    --sampling.guidance 2.9 --sampling.guidance-interval 0 0.9
"""
JIT_SMALL = "--dit.bottleneck 16 --dit.condition-tokens 4 --dit.tokens-start 2"

# The velocity of the linear flow, which large presets learn for any objective but their own.
FLOW = """
    --diffusion.path flow --diffusion.prediction velocity --diffusion.no-learned-range
"""
ONE_CALL = """
    --sampling.solver map --sampling.steps 1 --sampling.guidance 1 --sampling.internal-guidance 1
"""


def changed(command: Train, *words: str) -> Train:
    """The command with options in the words of the command line; of one that comes twice the last
    counts."""
    return tyro.cli(Train, args=" ".join(words).split(), default=command)


def few_steps(found: Train, started: bool) -> Train:
    """Of the preset's steps seven sixteenths to learn the denoiser, and half for the map.

    The map sets in while the rate is still high, or it stays too smooth: samples of one call are
    then right and too alike. A run that starts from a finished one makes a quarter of the steps,
    all for the map, at a quarter of the rate.
    """
    diffusion, few = found.diffusion, found.few
    steps = max(diffusion.steps // (4 if started else 2), 2)
    pretrain = 0 if started else diffusion.steps * 7 // 16
    rate = diffusion.learning_rate / 4 if started else diffusion.learning_rate
    warmup = min(diffusion.warmup, (pretrain + steps) // 2)
    diffusion = replace(diffusion, steps=pretrain + steps, learning_rate=rate, warmup=warmup)
    share = {"meanflow": 0.75, "imf": 0.5, "shortcut": 0.5, "scm": 0.0}[found.objective]
    few = replace(few, pretrain=pretrain, flow_share=share)
    if found.objective == "scm":
        few = replace(few, time_mean=-0.3, time_stddev=1.4)
    return replace(found, diffusion=diffusion, few=few)


def images(size: tuple[int, int], count: int) -> str:
    """Anyone's pictures: the networks' depth by their size, batches and steps by their number.

    Latents are 8 times smaller than images of more than 64 pixels, 4 times smaller than others.
    """
    large, h, w = max(size) > 64, *size
    batch = lambda most: max(1, min(most, 1 << (max(count, 1).bit_length() - 1)))  # 2^k <= count
    steps = lambda most, size: max(200, min(most, 200 * count // batch(size)))
    return f"""
        --size {h} {w} --samples {max(10, min(1000, count))} --checkpoint-every 500
        --reference {max(10, min(10_000, count // 2))}
        --classifier.steps {steps(1500, 128)} --classifier.batch-size {batch(128)}
        --autoencoder.steps {steps(3000, 16)} --autoencoder.batch-size {batch(16)}
        --autoencoder.gan-start {steps(3000, 16) * 2 // 3}
        --autoencoder.channels {"32 64 128" if large else "32 64"} --latents.batch-size {batch(64)}
        --diffusion.steps {steps(20_000, 64)} --diffusion.batch-size {batch(64)}
        --diffusion.warmup {min(100, steps(20_000, 64) // 10)} --diffusion.learning-rate 2e-3
        --dit.depth 8 --dit.width 256 --dit.num-heads 4
    """


def preset(
    name: PresetName,
    space: SpaceName = "latent",
    denoiser: DenoiserName = "dit",
    size: tuple[int, int] = (64, 64),
    count: int = 1000,
    objective: ObjectiveName = "denoising",
    started: bool = False,
    form: FormName | None = None,
) -> Train:
    """The options of a preset for a space, a denoiser, a form (else its own) and an objective.

    `images` asks for size and count, too; `started`: the run begins as a finished one.
    """
    form = default_form(name, space, denoiser) if form is None else form
    small = [TWO_CORES, PIXEL if space == "pixel" else LATENT]
    if name == "imagenet256":
        layers = [IMAGENET256]
    elif name == "cifar10":
        layers = [*small, CIFAR10]
    elif name == "text":
        layers = [*small, TEXT]
    elif name == "smoke":
        layers = [*small, SMOKE, SMALL_UNETS[space]]
    elif name == "images":
        patch = "--dit.patch-size 16" if space == "pixel" and max(size) > 64 else ""
        layers = [*small, images(size, count), patch]
    else:
        layers = [*small, MNIST, f"--data {name}", MNIST_STEPS[space, denoiser], MNIST_UNETS[space]]
    large = name == "imagenet256"
    if form == "modern":
        layers.append(MODERN_IMAGENET if large else MODERN)
    if form == "jit":
        layers += [JIT, JIT_IMAGENET if large else JIT_SMALL]
    if objective == "flow" or (objective != "denoising" and name == "imagenet256"):
        layers.append(FLOW)
    if objective in FEW_STEP:
        layers.append(ONE_CALL)
    if objective in DIFFERENTIATED:
        layers.append("--diffusion.dtype float32")
    default = Train(preset=name, space=space, denoiser=denoiser, form=form, objective=objective)
    found = changed(default, *layers)
    return few_steps(found, started) if objective in FEW_STEP else found
