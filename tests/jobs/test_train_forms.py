"""The forms of the transformer in the job, guidance as a condition, and the tables' command."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm import nn, training
from experiments.train import commands, diffusion, few_steps, methods, networks, seeds, tables
from experiments.train.__main__ import PRESETS
from experiments.train.conditions import Labels, Nothing
from experiments.train.networks import Pixels
from experiments.train.presets import preset
from experiments.train.terminal import UserError

from helpers import perturbed

LABELS = Labels(3, 3)
SHAPE = (1, 8, 8)


def changed(found, **groups):
    parts = {name: dataclasses.replace(getattr(found, name), **v) for name, v in groups.items()}
    return dataclasses.replace(found, **parts)


def tiny(**groups):
    """The modern form on pixels of 8 x 8, for seconds of training."""
    found = preset("smoke", space="pixel", form="modern")
    found = changed(found, dit=dict(depth=2, width=16, num_heads=2, patch_size=4, early_depth=1))
    found = changed(found, diffusion=dict(steps=3, batch_size=4, warmup=1))
    pictures = dataclasses.replace(found.pictures, channels=1)
    found = dataclasses.replace(found, size=(8, 8), pictures=pictures)
    return changed(found, **groups)


@pytest.mark.parametrize("form", ["modern", "jit"])
def test_every_preset_has_every_form(form):
    space = "pixel" if form == "jit" else "latent"
    for name in PRESETS:
        found = preset(name, space=space, form=form)
        commands.check_options(found.config, found.sampling, found.compute)
        if name in ("mnist", "imagenet256"):
            condition = LABELS if name == "mnist" else Nothing()
            commands.check_networks(found.config, found.sampling, condition, None)
        assert found.dit.swiglu and found.dit.rope and found.dit.norm == "rms"
        assert not found.diffusion.learned_range


def test_jit_is_the_published_size_on_imagenet():
    found = preset("imagenet256", space="pixel", form="jit").config
    make = lambda: networks.make_denoiser(found, (3, 256, 256), Labels(1000, 1000))
    config, jit = eqx.filter_eval_shape(make).config, ex.models.jit_b_16
    expected = eqx.filter_eval_shape(jit, key=jax.random.key(0)).config
    same = dict(remat=config.remat, attention=config.attention)
    assert config == dataclasses.replace(expected, **same)


REFUSED = {
    "unet": ({}, dict(denoiser="unet", form="modern"), "it is of --denoiser dit"),
    "latents": ({}, dict(form="jit"), "it is for --space pixel"),
    "early": (dict(diffusion=dict(early=1.0)), {}, "needs --denoiser dit and --dit.early-depth"),
    "internal": (dict(sampling=dict(internal_guidance=2.0)), {}, "with an auxiliary head"),
    "interval": (dict(sampling=dict(internal_interval=(0.5, 0.5))), {}, "internal-interval must"),
    "conditioned": (dict(few=dict(conditioned=True)), {}, "of --objective imf"),
    "range": (
        dict(diffusion=dict(path="ddpm", prediction="eps", learned_range=True, cosine=1.0)), {},
        "takes no --diffusion.cosine",
    ),
    "table": (
        dict(diffusion=dict(path="ddpm", prediction="eps"), sampling=dict(shift=2.0)), {},
        "timesteps of a table are not moved",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name):
    groups, fields, message = REFUSED[name]
    found = dataclasses.replace(changed(preset("smoke"), **groups), **fields)
    with pytest.raises(UserError, match=message):
        commands.check_options(found.config, found.sampling, found.compute)


def test_guidance_is_a_condition_of_imf():
    """It trains, and a network that is told of its guidance answers to the scale it is told."""
    found = preset("smoke", space="pixel", objective="imf", form="modern")
    found = changed(found, few=dict(conditioned=True, largest=3.0, pretrain=1))
    config = dataclasses.replace(found.config, dit=tiny().dit)
    commands.check_options(config, found.sampling, found.compute)
    make = lambda: networks.make_denoiser(config, SHAPE, LABELS, remat="nothing")
    network = eqx.filter_jit(make)()
    assert isinstance(network.embed_cond, nn.GuidanceEmbedding)
    method = methods.make_method(config, LABELS.null)
    batch = {"x0": jnp.zeros((2, *SHAPE)), "cond": jnp.array([0, 3])}
    for objective in (method.objective, method.plain):
        loss = training.make_loss(objective)
        shapes = jax.eval_shape(lambda b, f=loss: f(network, b, jax.random.key(0), None)[0], batch)
        assert shapes.shape == ()
    with pytest.raises(ValueError, match="needs images with classes"):
        networks.make_denoiser(config, SHAPE, Nothing())
    # It starts as a finished network of the classes alone, whatever the guidance.
    plain = dataclasses.replace(
        config, objective="flow", few=dataclasses.replace(config.few, conditioned=False)
    )
    old = perturbed(networks.make_denoiser(plain, SHAPE, LABELS, remat="nothing"))
    started, x = few_steps.warm_start(network, old), jnp.cos(jnp.arange(64.0).reshape(SHAPE))
    t, label = jnp.array(0.7), jnp.array(2)
    told = ex.guided_condition(label, 2.0, (0.1, 0.9))
    run = eqx.filter_jit(lambda network, *args, **options: network(*args, **options))
    np.testing.assert_allclose(
        run(started, x, t, told, h=jnp.array(0.5)), run(old, x, t, label), atol=1e-5
    )
    # Sampled at two scales, of a network whose embedding of them is not silent.
    loud = jax.tree.map(lambda a: a + 0.3 if eqx.is_inexact_array(a) else a, network)
    of = lambda scale: dataclasses.replace(found.sampling, solver="map", guidance=scale)
    run = lambda scale: methods.guided(loud, LABELS.null, of(scale), jnp.float32, True)
    x = jax.random.normal(jax.random.key(1), SHAPE)
    calls = [jax.jit(lambda x, s=s: run(s)(x, 0.9 * jnp.ones(()), 1, h=0.5))(x) for s in (1.0, 3.0)]
    assert float(jnp.max(jnp.abs(calls[0] - calls[1]))) > 1e-4
    assert methods.check_sampling(method, of(3.0)) == 1
    with pytest.raises(UserError, match="takes at least 1"):
        methods.check_sampling(method, of(0.5))


def test_seeds_are_trained_side_by_side_as_the_job_would():
    config, space = tiny().config, Pixels(1)
    data = {
        "image": jax.random.randint(jax.random.key(2), (20, 8, 8, 1), 0, 256).astype(jnp.uint8),
        "cond": jnp.arange(20) % 3,
    }
    built = seeds.build(config, LABELS, space, SHAPE, data, 2)
    trained, seconds = seeds.train(built, data, "two")
    assert len(trained) == 2 and seconds > 0 and built.multiply_adds > 0

    # Seed 1 alone, step by step.
    one = dataclasses.replace(config, seed=1)
    state, static, optimizer = diffusion.diffusion_state(one, SHAPE, LABELS, remat="nothing")
    step = jax.jit(diffusion.diffusion_step(one, LABELS, space, static, optimizer))
    key = seeds.keys(2)[1]
    for _ in range(3):
        rows = jax.random.randint(jax.random.fold_in(key, state.step), (4,), 0, 20)
        state, _ = step(state, jax.tree.map(lambda a, r=rows: a[r], data), key)
    alone = jax.tree.leaves(state.ema[0])
    together = jax.tree.leaves(eqx.filter(trained[1], eqx.is_inexact_array))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    sampling = dataclasses.replace(tiny().sampling, steps=2, guidance=1.0)
    draw = seeds.Draw(built, sampling, space, SHAPE, LABELS.null, 2)
    images, rate = draw(trained[0], np.array([0, 1, 2]), jax.random.key(0))
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8 and rate > 0


def test_rows_of_the_tables_and_their_text(tmp_path):
    options = tables.Modern(steps=50)
    rows = tables.modern_rows(options, (8, 8, 8))
    assert set(rows) == set(tables.VARIANTS)
    assert {row.command.diffusion.steps for row in rows.values()} == {50}
    assert rows["time shift"].command.diffusion.time_shift == pytest.approx(8**-0.5)
    assert rows["time shift"].sampling["plain"].shift == pytest.approx(8**-0.5)
    both = rows["blocks, head"].sampling
    assert list(both) == [
        "guided", "plain", "guidance 2.4", "internal 1.4", "guided, internal 1.4",
        "guidance 2.4, internal 1.4",
    ]  # fmt: skip
    assert rows["blocks, head"].command.dit == preset("cifar10", form="modern").dit
    assert [(how.guidance, how.internal_guidance) for how in both.values()] == [
        (1.6, 1.0), (1.0, 1.0), (2.4, 1.0), (1.0, 1.4), (1.6, 1.4), (2.4, 1.4),
    ]  # fmt: skip
    few = tables.few_rows(tables.FewSteps(steps=80), (8, 8, 8))
    assert {row.command.diffusion.steps for row in few.values()} == {75}
    for row in [*rows.values(), *few.values()]:
        for sampling in row.sampling.values():
            commands.check_options(row.command.config, sampling, row.command.compute)
    scores = {"fd": [1.0, 2.0], "accuracy": [0.5, 0.7], "images_per_second": [10.0, 30.0]}
    found = {"parameters": 2_000_000, "multiply_adds": 30_000_000, "seeds": 2}
    found["sampled"] = dict.fromkeys(["guided", "plain", "internal 1.4", "guidance 2.4"], scores)
    lines = tables._lines({"all": found}, "modern")
    assert lines[2] == "| all | 2.00 M | 30.0 M | 1.50 ± 0.71 | 1.50 ± 0.71 | 0.600 ± 0.141 |"
    assert lines[3] == "| all: internal 1.4 | | |  | 1.50 ± 0.71 | |"
    assert lines[4] == "| all: guidance 2.4 | | | 1.50 ± 0.71 | | 0.600 ± 0.141 |"
    found["sampled"] = {"1": scores | {"guidance": 1.6}, "50": scores | {"guidance": 1.0}}
    lines = tables._lines({"flow": found}, "few-steps")
    assert lines[2:] == [
        "| flow | 1, guided | 1.50 ± 0.71 | 0.600 ± 0.141 | 20 |",
        "| flow | 50 | 1.50 ± 0.71 | 0.600 ± 0.141 | 20 |",
    ]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(found))
    assert tables._finished(path, {"seeds": 2}) == found
    assert tables._finished(path, {"seeds": 3}) is None
