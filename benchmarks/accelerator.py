"""`python benchmarks/accelerator.py`: training steps on one GPU or TPU core, in many variants.

DiT from latents, bfloat16 with float32 parameters, optimizer and EMA: images a second, model
FLOP/s, their share of the device's peak (MFU), and memory, for each attention, remat policy and
scanned or unrolled blocks; then Stable Diffusion's U-Net and the encoder of its autoencoder. The
loss of each variant is first compared with the plain one's. On a CPU the same with small sizes, to
try the script. Results also go to $OUT or benchmarks/results, accelerator-*.json.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import eqxldm as ex
from eqxldm import models, nn
from eqxldm.devices import peak_flops
from eqxldm.training import adamw, exponential, init_state, make_loss, make_train_step

KEY = jax.random.key(0)
AVERAGES = (exponential(0.9999),)
POLICIES = {
    "keep all": None,
    "keep products": models.save_matmuls,
    "recompute all": jax.checkpoint_policies.nothing_saveable,
}


class HalfPrecision(eqx.Module):
    """A denoiser that computes in bfloat16; its parameters stay float32."""

    network: eqx.Module

    @property
    def null(self):
        return self.network.null

    def __call__(self, x_t, t, cond, *, key=None):
        return self.network(x_t.astype(jnp.bfloat16), t, cond).astype(jnp.float32)


def training_step(network, shape, batch):
    """`(run, loss, memory)`: a step over fixed latents, its first loss, bytes as compiled."""
    optimizer = adamw(1e-4)
    state, static = init_state(HalfPrecision(network), optimizer, num_emas=1)
    path = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000)))
    diffusion = ex.Diffusion(path, ex.LearnedRange(ex.predict_eps))
    objective = ex.Denoising(diffusion, time_sampler=ex.discrete_time(1000))
    loss = make_loss(objective, null=network.null, cond_dropout=0.1)
    step = make_train_step(loss, static, optimizer, ema_decays=AVERAGES)
    step = jax.jit(step, donate_argnums=0)
    data = {
        "x0": jax.random.normal(KEY, (batch, *shape)),
        "cond": jnp.zeros(batch, jnp.int32),
    }
    memory = step.lower(state, data, KEY).compile().memory_analysis()
    state, metrics = step(state, data, KEY)
    first = float(metrics["loss"])

    def run():
        nonlocal state
        state, metrics = step(state, data, KEY)
        return metrics["loss"]

    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return run, first, used


def seconds(run, budget):
    """The median time of a call: several are dispatched, then waited for."""
    jax.block_until_ready(run())
    times = []
    while sum(times) < budget or len(times) < 3:
        begin = time.perf_counter()
        for _ in range(5):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 5)
    return statistics.median(times)


def dit_rows(small, budget):
    sizes = [("dit_s_2", 4)] if small else [("dit_xl_2", 256), ("dit_b_2", 512), ("dit_s_2", 1024)]
    shape = (4, 8, 8) if small else (4, 32, 32)
    attentions = {"cuDNN": nn.cudnn_attend} if jax.default_backend() == "gpu" else {}
    attentions["XLA"] = nn.attend
    for unroll in (1, True):
        for name, batch in sizes:
            plain = None
            for attention, function in attentions.items():
                for policy, remat in POLICIES.items():
                    variant = dict(attention=attention, remat=policy, unrolled=unroll is True)
                    make = lambda options=(function, remat, unroll), name=name: getattr(
                        models, name
                    )(shape, attention=options[0], remat=options[1], unroll=options[2], key=KEY)
                    dit = make()
                    flops = 6 * models.multiply_adds(dit) * batch
                    row = measured(name, variant, lambda d=dit, b=batch: training_step(d, shape, b),
                                   batch, flops, budget)  # fmt: skip
                    if "loss" in row:
                        plain = row["loss"] if plain is None else plain
                        row["agrees"] = abs(row["loss"] - plain) < 0.02 * plain
                    yield row


def sampler_row(small, budget):
    """A batch of 16 by 50 guided steps of DDIM, compiled once, in bfloat16."""
    name, shape = ("dit_s_2", (4, 8, 8)) if small else ("dit_xl_2", (4, 32, 32))
    batch, steps = (2, 4) if small else (16, 50)

    def make():
        attention = nn.cudnn_attend if jax.default_backend() == "gpu" else nn.attend
        dit = getattr(models, name)(shape, attention=attention, key=KEY)
        params, static = eqx.partition(dit, eqx.is_array)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        path = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000)))
        diffusion = ex.Diffusion(path, ex.LearnedRange(ex.predict_eps))
        times = ex.timestep_times(1000, ex.trailing_timesteps(1000, steps))

        @jax.jit
        def draw(params, x_T, labels):
            dit = HalfPrecision(eqx.combine(params, static))
            guided = ex.guide(dit, dit.null, 4.0)
            one = lambda x, label: ex.sample(guided, diffusion, ex.DDIM(), times, x, label)
            return jax.vmap(one)(x_T, labels)

        x_T, labels = jax.random.normal(KEY, (batch, *shape)), jnp.zeros(batch, jnp.int32)
        memory = draw.lower(params, x_T, labels).compile().memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return lambda: draw(params, x_T, labels), 0.0, used

    yield measured(f"{name}, {steps} guided steps", {}, make, batch, None, budget)


def other_rows(small, budget):
    context = 8 if small else 768
    sizes = dict(channels=(32, 64), attention_levels=(True, False)) if small else {}
    batch, shape = (2, (4, 8, 8)) if small else (32, (4, 32, 32))

    class Conditioned(eqx.Module):
        unet: models.UNet

        def __call__(self, x, t, cond, *, key=None):
            return self.unet(x.astype(jnp.bfloat16), t, jnp.ones((77, context))).astype(jnp.float32)

    unet = Conditioned(models.unet_sd1(context_size=context, key=KEY, **sizes))
    optimizer = adamw(1e-4)

    def unet_step():
        state, static = init_state(unet, optimizer, num_emas=1)
        x = jax.random.normal(KEY, (batch, *shape))

        def loss(model, x, key, context):
            return jnp.mean(jax.vmap(lambda x: model(x, jnp.array(0.5), None))(x) ** 2), {}

        step = make_train_step(loss, static, optimizer, ema_decays=AVERAGES)
        step = jax.jit(step, donate_argnums=0)
        memory = step.lower(state, x, KEY).compile().memory_analysis()

        def run():
            nonlocal state
            state, metrics = step(state, x, KEY)
            return metrics["loss"]

        return run, float(run()), memory.argument_size_in_bytes + memory.temp_size_in_bytes

    yield measured("U-Net of SD 1", {}, unet_step, batch, None, budget)

    side = 32 if small else 256
    images = jnp.zeros((batch, 3, side, side), jnp.bfloat16)
    ae = models.kl_f8(key=KEY, **(dict(channels=(32, 64)) if small else {}))

    def encoder():
        params, static = eqx.partition(ae, eqx.is_array)
        encode = jax.jit(lambda p, x: jax.vmap(lambda x: eqx.combine(p, static).encode(x))(x))
        memory = encode.lower(params, images).compile().memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return lambda: encode(params, images), 0.0, used

    yield measured(
        f"encoder of SD's autoencoder, {side} x {side}", {}, encoder, batch, None, budget
    )


def measured(name, variant, make, batch, flops, budget):
    """One row; a variant that does not fit or compile says why."""
    row = dict(name=name, batch=batch, **variant)
    try:
        run, row["loss"], used = make()
        taken = seconds(run, budget)
    except Exception as error:  # out of memory, no such kernel
        return row | dict(error=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    stats = jax.devices()[0].memory_stats() or {}
    row |= dict(seconds=taken, images_per_second=batch / taken, compiled_bytes=used)
    row |= dict(peak_bytes=stats.get("peak_bytes_in_use"))
    if flops:
        row["flops_per_second"] = flops / taken
        peak = peak_flops(jax.devices()[0].device_kind)
        row["mfu"] = flops / taken / peak if peak else None
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant")
    parser.add_argument("--minutes", type=float, default=1e9, help="no variant starts after them")
    args = parser.parse_args()
    budget, begin = args.seconds, time.monotonic()
    small = jax.default_backend() == "cpu"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| model | batch | variant | ms | images/s | TFLOP/s | MFU | GiB compiled |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    parts = sampler_row, other_rows, dit_rows
    for row in itertools.chain.from_iterable(part(small, budget) for part in parts):
        rows.append(row)
        kind = [row[k] for k in ("attention", "remat") if k in row]
        kind += ["unrolled"] if row.get("unrolled") else []
        head = f"| {row['name']} | {row['batch']} | {', '.join(kind)}"
        if "error" in row:
            print(f"{head} | {row['error']} | | | | |", flush=True)
            continue
        wrong = "" if row.get("agrees", True) else " (loss differs!)"
        rate = f"{row['flops_per_second'] / 1e12:.1f}" if "flops_per_second" in row else ""
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
        print(
            f"{head}{wrong} | {1e3 * row['seconds']:.1f} | {row['images_per_second']:.0f} "
            f"| {rate} | {mfu} | {row['compiled_bytes'] / 2**30:.2f} |",
            flush=True,
        )
        if time.monotonic() - begin > 60 * args.minutes:
            break
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, rows=rows)
    (folder / f"accelerator-{jax.default_backend()}.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
