"""Whole pipelines of tiny folders: loading, what is missing, composing, compiling once."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm import pipelines, pretrained
from eqxldm.pipelines import PipelineError, sampling
from eqxldm.sharding import make_mesh

from tiny_pipelines import write_dit, write_json, write_stable_diffusion

SIZE = (8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "stable-diffusion"
    write_stable_diffusion(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def run(pipe, prompts, *, scale=7.5, steps=4, seed=0, solver=None, strength=None, keep=None):
    cond, null = pipe.encode(prompts), pipe.null("blue")
    times = pipe.times(steps)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    x = pipe.noise(keys, *SIZE, times)
    if strength is not None:
        times = pipelines.steps_of_strength(times, strength)
    denoiser = pipelines.GuidedDenoiser(pipe.denoiser, null, jnp.asarray(scale))
    solver = pipe.solver if solver is None else solver
    return pipelines.sample_latents(denoiser, pipe.diffusion, solver, times, x, cond, keep=keep)


def test_parts_compose_with_the_librarys_own_sampler_and_guidance(pipe):
    """`sample` and `guide` give the latents of `sample_latents`: the parts are ordinary ones."""
    for solver in (pipe.solver, ex.UniPC()):
        cond, null, times = pipe.encode(["a fox"]), pipe.null("blue"), pipe.times(4)
        x = pipe.noise(jax.random.split(jax.random.key(0), 1), *SIZE, times)
        guided = ex.guide(pipe.denoiser, null, 7.5)
        one = jax.tree.map(lambda a: a[0], cond)
        expected = jax.jit(
            lambda x, one, guided=guided, solver=solver, times=times: ex.sample(
                guided, pipe.diffusion, solver, times, x, one
            )
        )(x[0], one)
        found = run(pipe, ["a fox"], solver=solver)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    images = pipe.decode(found[None])
    assert images.shape == (1, 3, *SIZE) and bool(jnp.all(jnp.isfinite(images)))


def test_nothing_compiles_again_for_another_prompt_seed_scale_or_strength(pipe):
    run(pipe, ["a fox", "a cat"])  # compiles
    mask = jnp.ones((1, 4, 4)).at[0, 0].set(0)
    keep = pipelines.Keep(mask, jnp.ones((4, 4, 4)), jnp.zeros((2, 4, 4, 4)))
    run(pipe, ["a fox", "a cat"], keep=keep)
    with jax.log_compiles(), jax.numpy_dtype_promotion("standard"):
        before = sampling._step._cached._cache_size(), sampling._put_back._cache_size()
        first = run(pipe, ["a red fox in the snow", ""], scale=3.0, seed=5)
        other = run(pipe, ["x", "y"], scale=1.5, steps=7, strength=0.6)
        kept = run(pipe, ["x", "y"], keep=keep._replace(mask=1 - mask), steps=3)
        after = sampling._step._cached._cache_size(), sampling._put_back._cache_size()
    assert after == before
    assert not np.allclose(first, other) and np.allclose(kept[:, :, 1:], 1)


def test_prompts_matter_and_are_cut_aloud(pipe):
    first, second = run(pipe, ["a fox", "a cat"])
    assert not np.allclose(first, second)
    encoding = pipe.encode_and_tell(["word " * 100])
    assert "word" in encoding.cut[0][0]
    assert pipe.encode_and_tell(["a fox"]).cut == (("",),)


def test_text_encoders_can_be_dropped_and_parts_loaded_one_by_one(folder):
    texts = pipelines.load(folder, parts=["text_encoder"])
    cond = texts.encode(["a fox"])
    assert texts.network is None and cond.tokens.shape == (1, 77, 8)
    with pytest.raises(PipelineError, match="the network is not loaded"):
        _ = texts.denoiser
    rest = pipelines.load(folder, parts=["unet", "vae"], dtype=jnp.bfloat16)
    assert not rest.texts and pipelines.load(folder).without_texts().texts == ()
    with pytest.raises(PipelineError, match="text encoders are not loaded"):
        rest.encode(["a fox"])
    dtypes = {a.dtype for a in jax.tree.leaves(eqx.filter(rest.network, eqx.is_inexact_array))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    dtypes = {a.dtype for a in jax.tree.leaves(eqx.filter(rest.autoencoder, eqx.is_array))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    times = rest.times(2)
    x = rest.noise(jax.random.split(jax.random.key(0), 1), *SIZE, times)
    out = pipelines.sample_latents(rest.denoiser, rest.diffusion, rest.solver, times, x, cond)
    assert out.dtype == jnp.float32
    with pytest.raises(PipelineError, match="no part unett; it has text_encoder, unet, vae"):
        pipelines.load(folder, parts=["unett"])


def test_weights_lie_on_a_mesh(folder):
    mesh = make_mesh({"tensor": 2})
    pipe = pipelines.load(folder, parts=["unet"], mesh=mesh)
    leaves = jax.tree.leaves(eqx.filter(pipe.network, eqx.is_array))
    assert all(leaf.sharding.mesh.shape["tensor"] == 2 for leaf in leaves)
    assert any("tensor" in str(leaf.sharding.spec) for leaf in leaves)


def test_one_tensor_at_a_time_is_read(folder, monkeypatch):
    """No tensor is asked for before the one before it lies on its device."""
    from eqxldm.pretrained import layout

    waited = []
    block = jax.block_until_ready
    monkeypatch.setattr(layout.jax, "block_until_ready", lambda a: waited.append(1) or block(a))
    pipe = pipelines.load(folder, parts=["unet"])
    assert len(waited) == len(jax.tree.leaves(eqx.filter(pipe.network, eqx.is_array)))


def test_the_learned_variance_of_a_dit_is_left_out(tmp_path):
    write_dit(tmp_path)
    pipe = pipelines.load(tmp_path)
    assert isinstance(pipe.diffusion.prediction, ex.LearnedRange)
    cond, times = pipe.encode([1, 2]), pipe.times(3)
    denoiser = pipelines.GuidedDenoiser(pipe.denoiser, pipe.null(), jnp.asarray(4.0))
    x = pipe.noise(jax.random.split(jax.random.key(0), 2), *pipe.default_size, times)
    z = pipelines.sample_latents(denoiser, pipe.diffusion, pipe.solver, times, x, cond)
    assert z.shape == x.shape and not np.allclose(z[0], z[1])
    with pytest.raises(PipelineError, match="labels, integers"):
        pipe.encode(["a fox"])
    with pytest.raises(PipelineError, match="draws 8 x 8 only"):
        pipe.check_size(16, 16)


def test_sizes_and_steps(pipe):
    assert pipe.default_size == (8, 8) and pipe.multiple == 4
    assert pipe.latent_shape(8, 12) == (4, 4, 6)
    with pytest.raises(
        PipelineError, match=r"multiples of 4 for this model\. The nearest is 8 x 12"
    ):
        pipe.latent_shape(7, 13)
    grid = pipe.times(4)
    for strength, steps in ((1.0, 4), (0.6, 2), (0.25, 1)):
        assert len(pipelines.steps_of_strength(grid, strength)) == steps + 1
    assert len(pipelines.steps_of_strength(grid, 0.6, round_up=True)) == 4
    for strength in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            pipelines.steps_of_strength(grid, strength)
    with pytest.raises(ValueError, match="leaves none of 4 steps"):
        pipelines.steps_of_strength(grid, 0.2)


def test_skip_layers_is_at_the_steps_that_are_meant():
    times = np.linspace(1, 0, 11)

    class Network(eqx.Module):
        def __call__(self, x_t, t, cond, *, key=None, skip=()):
            return x_t + len(skip)

    skip = pipelines.skip_layers(times, (7, 8), 2.0, 0.1, 0.45)
    guided = pipelines.GuidedDenoiser(Network(), jnp.zeros(()), jnp.asarray(3.0), skip=skip)
    shifts = [float(guided(jnp.zeros(1), jnp.float32(t), jnp.ones(()))[0]) for t in times]
    assert shifts == [0, 0, -4, -4, -4, 0, 0, 0, 0, 0, 0]  # out + 2 (out_c - (out_c + 2))


MISSING = {
    "there is no such folder": lambda f: shutil.rmtree(f),
    "no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "Missing: vae/": lambda f: shutil.rmtree(f / "vae"),
    "unet is incomplete. Missing: config.json": lambda f: (f / "unet" / "config.json").unlink(),
    "vae holds no weights": lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
    "pickle, which can run code": lambda f: (
        f / "unet" / "diffusion_pytorch_model.safetensors"
    ).rename(f / "unet" / "diffusion_pytorch_model.bin"),
    "truncated": lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
    "names files that are not there: b.safetensors": lambda f: (
        (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        write_json(
            f / "vae" / "diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"w": "b.safetensors"}},
        ),
    ),
    "no file .*scheduler_config.json": lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    "merges.txt": lambda f: (f / "tokenizer" / "merges.txt").unlink(),
    "LumaPipeline is not one of those known here": lambda f: write_json(
        f / "model_index.json", {"_class_name": "LumaPipeline"}
    ),
    r"Missing: tokenizer \(not named in model_index.json\)": lambda f: write_json(
        f / "model_index.json",
        {
            k: v
            for k, v in json.loads((f / "model_index.json").read_text()).items()
            if k != "tokenizer"
        },
    ),
}


@pytest.mark.parametrize("message", MISSING)
def test_what_is_missing_is_said(message, copy):
    MISSING[message](copy)
    with pytest.raises(PipelineError, match=message):
        pipelines.load(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    vocabulary = json.loads((copy / "tokenizer" / "vocab.json").read_text())
    end = vocabulary.pop("<|endoftext|>")
    write_json(copy / "tokenizer" / "vocab.json", vocabulary | {"q1": end, "<|endoftext|>": 514})
    with pytest.raises(PipelineError, match="ids up to 514, and the text encoder knows 514"):
        pipelines.load(copy, parts=["text_encoder"]).encode(["a fox"])


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [("unet", "sample_size", value) for value in ("64", [1, 2, 3], [], -8, 1e9, 2**40, [8, "8"])]
    + [("unet", "block_out_channels", value) for value in (5, "x", [], [4, None], {"a": 1})]
    + [("vae", "block_out_channels", value) for value in (5, ["a"], [[4]])],
)
def test_sizes_of_a_configuration_that_are_none_are_refused(copy, part, option, value):
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises((PipelineError, pretrained.WeightsError), match=option):
        bare = pipelines.load(copy, parts=())
        bare.check_size(*bare.default_size)
