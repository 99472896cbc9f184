"""Our side of `make bench`: each case is a function that does its work once and waits for it."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp

import eqxldm as ex
from eqxldm import pipelines
from eqxldm.models import AutoencoderKL, DiT, PatchDiscriminator, UNet
from eqxldm.nn import Conditioning
from eqxldm.training import (
    AutoencoderState,
    adamw,
    exponential,
    init_state,
    l2_distance,
    make_autoencoder_step,
    make_loss,
    make_train_step,
)

KEY = jax.random.key(0)
PATH = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000)))
EPS = ex.Diffusion(PATH, ex.predict_eps)


def network(case):
    make = {"dit": DiT, "unet": UNet}[case["model"]]
    shape = tuple(case["shape"])
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in case["ours"].items()}
    first = shape if make is DiT else shape[0]
    return make(first, num_classes=case["classes"], **sizes, key=KEY)


def batch(case):
    x = jax.random.normal(KEY, (case["batch"], *case["shape"]))
    return x, jnp.arange(case["batch"]) % case["classes"]


def forward(case):
    params, static = eqx.partition(network(case), eqx.is_array)
    x, labels = batch(case)

    @jax.jit
    def apply(params, x, labels):
        model = eqx.combine(params, static)
        return jax.vmap(lambda x, y: model(x, jnp.array(0.5), y))(x, labels)

    return lambda: jax.block_until_ready(apply(params, x, labels))


def train(case):
    optimizer = adamw(1e-4)
    model = network(case)
    state, static = init_state(model, optimizer, num_emas=1)
    loss = make_loss(
        ex.Denoising(EPS, time_sampler=ex.discrete_time(1000)), null=model.null, cond_dropout=0.1
    )
    step = jax.jit(
        make_train_step(loss, static, optimizer, ema_decays=(exponential(0.999),)), donate_argnums=0
    )
    x0, labels = batch(case)
    data = {"x0": x0, "cond": labels}

    def run():
        nonlocal state
        state, _ = step(state, data, KEY)
        jax.block_until_ready(state)

    return run


def sample(case):
    params, static = eqx.partition(network(case), eqx.is_array)
    x, labels = batch(case)
    times = ex.timestep_times(1000, ex.respace(1000, [case["steps"]]))

    @jax.jit
    def draw(params, x, labels, keys):
        model = eqx.combine(params, static)
        denoiser = ex.guide(model, model.null, 4.0)
        one = lambda x, y, key: ex.sample(denoiser, EPS, ex.DDIM(), times, x, y, key=key)
        return jax.vmap(one)(x, labels, keys)

    keys = jax.random.split(KEY, case["batch"])
    return lambda: jax.block_until_ready(draw(params, x, labels, keys))


def autoencoder(case):
    """A step of the autoencoder and its discriminator."""
    channels, *_ = case["shape"]
    sizes = dict(
        channels=tuple(case["channels"]), blocks=1, patch_size=case["patch_size"], groups=8
    )
    ae = AutoencoderKL(channels, 4, **sizes, key=KEY)
    disc = PatchDiscriminator(channels, channels=32, layers=2, groups=8, key=KEY)
    optimizers = adamw(1e-4), adamw(1e-4)
    ae_state, ae_static = init_state(ae, optimizers[0], num_emas=1)
    disc_state, disc_static = init_state(disc, optimizers[1])
    state = AutoencoderState(ae_state, disc_state)
    step = make_autoencoder_step(
        ae_static, disc_static, *optimizers, distance=l2_distance, ema_decays=(exponential(0.999),)
    )
    step, x = jax.jit(step, donate_argnums=0), batch(case | {"classes": 1})[0]

    def run():
        nonlocal state
        state, _ = step(state, x, KEY)
        jax.block_until_ready(state)

    return run


def pipeline(case):
    """One picture's latents from a saved pipeline, the condition given as its encodings."""
    network = "transformer" if "pooled" in case else "unet"
    pipe = pipelines.load(case["folder"], parts=(network, "vae"))
    keys = jax.random.split(KEY, 4)
    tokens, nothing = (jax.random.normal(k, (case["tokens"], case["width"])) for k in keys[:2])
    vector = jax.random.normal(keys[2], (case["pooled"],)) if "pooled" in case else None
    cond, null = (Conditioning(vector, tokens=t) for t in (tokens, nothing))
    size = 2 * case["latent"]
    times = (
        pipe.times(case["steps"], size, size) if vector is not None else pipe.times(case["steps"])
    )
    x = jax.random.normal(keys[3], (1, 4, case["latent"], case["latent"]))
    guided = pipelines.GuidedDenoiser(pipe.denoiser, null, jnp.asarray(case["guidance"]))
    arguments = guided, pipe.diffusion, pipe.solver, times, x, jax.tree.map(lambda a: a[None], cond)
    return lambda: jax.block_until_ready(pipelines.sample_latents(*arguments))


def compile_seconds(depth, batch=8):
    """Tracing and compiling DiT-XL/2's training step with so many blocks; nothing is run."""
    optimizer = adamw(1e-4)
    make = lambda: DiT(
        (4, 32, 32), patch_size=2, depth=depth, width=1152, num_heads=16, num_classes=1000,
        learn_sigma=True, key=KEY,
    )  # fmt: skip
    state, static = eqx.filter_eval_shape(lambda: init_state(make(), optimizer, num_emas=1))
    diffusion = ex.Diffusion(PATH, ex.LearnedRange(ex.predict_eps))
    objective = ex.Denoising(diffusion, time_sampler=ex.discrete_time(1000))
    loss = make_loss(objective, null=1000, cond_dropout=0.1)
    step = jax.jit(
        make_train_step(loss, static, optimizer, ema_decays=(exponential(0.9999),)),
        donate_argnums=0,
    )
    x = jax.ShapeDtypeStruct((batch, 4, 32, 32), jnp.float32)
    begin = time.perf_counter()
    data = {"x0": x, "cond": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    step.lower(state, data, KEY).compile()
    return time.perf_counter() - begin


CASES = dict(
    forward=forward, train=train, sample=sample, autoencoder=autoencoder, pipeline=pipeline
)
