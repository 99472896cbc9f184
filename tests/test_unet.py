"""The U-Net: diffusers' numbers, published sizes and names, conditions, and what goes wrong."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm
from eqxldm import nn, pretrained
from eqxldm.models import UNet, parameter_count, unet_ddpm, unet_sd1, unet_sd2, unet_sdxl
from eqxldm.models.config import arguments
from eqxldm.pretrained.files import WEIGHTS, write_safetensors

from helpers import filled, reference, relative_error

KEY = jax.random.key(0)
T = jnp.array(0.3)
SIZES = dict(channels=(8, 16), blocks=1, attention_levels=(False, True), groups=4)


def small(in_channels=2, **changes):
    return filled(lambda: UNet(in_channels, **{**SIZES, **changes}, key=KEY))


def run(model, *arguments):
    params, static = eqx.partition(model, eqx.is_array)
    return jax.jit(lambda p, *a: eqx.combine(p, static)(*a))(params, *arguments)


def fixture(name, folder):
    """`(folder, values)` of what diffusers has made."""
    values = dict(reference(f"unet_{name}"))
    tensors = {k[8:]: v for k, v in values.items() if k.startswith("weights/")}
    folder.mkdir()
    (folder / "config.json").write_text(str(values["config"]))
    write_safetensors(folder / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
    return folder, tensors, values


# What diffusers computes.


@pytest.mark.parametrize("name", ["condition", "plain"])
def test_forward_gradients_and_weights_equal_those_of_diffusers(name, tmp_path):
    folder, tensors, values = fixture(name, tmp_path / "unet")
    unet = pretrained.load(folder)
    params, static = eqx.partition(unet, eqx.is_inexact_array)
    inputs = {k: jnp.asarray(values[k]) for k in ("x", "context") if k in values}
    t = jnp.array((37 + 1) / 1000)

    def loss(params, inputs):
        cond = (jnp.array(1), inputs["context"]) if "context" in inputs else None
        out = eqx.combine(params, static)(inputs["x"], t, cond)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), (by_params, by_inputs) = gradient(params, inputs)
    assert relative_error(out, values["out"]) < 2e-5
    for key, value in by_inputs.items():
        assert relative_error(value, values[f"grad.{key}"]) < 2e-5, key
    found = pretrained.to_state(eqx.combine(by_params, static), pretrained.unet.diffusers_layout)
    flat = np.concatenate([found[key].ravel() for key in tensors])[::7]
    assert relative_error(flat, values["grad"]) < 2e-5

    pretrained.export(unet, tmp_path / "again")
    again = pretrained.load(tmp_path / "again")
    assert eqx.tree_equal(again, unet)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    made = json.loads(str(values["config"]))
    differ = {k for k in config.keys() & made.keys() if config[k] != made[k]}
    # One number for all levels there is a list of them here; 4 x the first width is said.
    assert differ <= {"attention_head_dim", "time_embedding_dim", "mid_block_scale_factor"}


def test_the_published_sizes():
    sd, ddpm = (eqx.filter_eval_shape(make, key=KEY) for make in (unet_sd1, unet_ddpm))
    assert parameter_count(sd) == 859_520_964  # Stable Diffusion 1.x
    assert parameter_count(ddpm) == 35_746_307  # DDPM, CIFAR-10: 35.7 M in the paper
    assert sd.downs[1].attentions[0].blocks[0].self_attention.qkv.num_heads == 8
    sd2, xl = (eqx.filter_eval_shape(make, key=KEY) for make in (unet_sd2, unet_sdxl))
    assert parameter_count(sd2) == 865_910_724
    assert parameter_count(xl) == 2_567_463_684
    assert {
        level.attentions[0].blocks[0].self_attention.qkv.weight.shape[1] // n
        for level, n in zip(xl.downs[1:], xl.config.num_heads[1:], strict=True)
    } == {64}
    context = jax.ShapeDtypeStruct((77, 768), jnp.float32)
    apply = lambda make, x, cond: eqx.filter_eval_shape(
        lambda x, cond: make(key=KEY)(x, T, cond), jax.ShapeDtypeStruct(x, jnp.float32), cond
    )
    assert apply(unet_sd1, (4, 64, 96), context).shape == (4, 64, 96)
    assert apply(unet_ddpm, (3, 32, 32), None).shape == (3, 32, 32)


NO_NULL = nn.Labels(3, 32, has_null=False, stddev=1.0)
DDPM_TIME = nn.Sinusoid(size=8, freq_shift=1, sin_first=True)
OPTIONS = {
    "unconditional": dict(),
    "labels": dict(num_classes=3, num_heads=(1, 4), time_width=12),
    "no null": dict(embed_cond=NO_NULL, middle_attention=False),
    "context": dict(context_size=6, num_heads=2, transformer_depth=2, linear_projection=True),
    "both": dict(context_size=6, num_classes=3, out_channels=4, attention_levels=(True, False)),
    "xl": dict(context_size=6, added_size=9, number_size=2, transformer_depth=(1, 2)),
    "ddpm": dict(time_embedding=DDPM_TIME, downsample_padding=(0, 1), norm_eps=1e-6),
    "no attention": dict(attention_levels=(False, False), middle_attention=False),
    "remat": dict(remat=jax.checkpoint_policies.nothing_saveable),
    "one level": dict(channels=(8,), attention_levels=(True,)),
}
each_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)


def cond_of(changes):
    label = jnp.array(1) if {"num_classes", "embed_cond"} & changes.keys() else None
    context = jnp.ones((5, 6)) if "context_size" in changes else None
    if "added_size" in changes:  # 9 = 5 + 2 x 2
        return nn.Conditioning(jnp.ones(5), context, numbers=jnp.array([1024.0, 512.0]))
    return (label, context) if "num_classes" in changes and context is not None else (
        label if context is None else context
    )  # fmt: skip


@each_option
def test_our_files_give_back_the_identical_module(changes, tmp_path):
    unet = small(**changes)
    pretrained.save(unet, tmp_path / "a.safetensors")
    again = pretrained.load(tmp_path / "a.safetensors")
    assert eqx.tree_equal(again, unet)
    assert again.config == unet.config


@each_option
def test_diffusers_folders_give_back_the_same_network(changes, tmp_path):
    if "num_heads" in changes and "context_size" not in changes:
        changes = changes | dict(num_heads=(2, 4))  # of one size, 4
    unet = small(**changes)
    pretrained.export(unet, tmp_path)
    again = pretrained.load(tmp_path)
    arrays = lambda model: jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert all((a == b).all() for a, b in zip(arrays(again), arrays(unet), strict=True))
    found, expected = (arguments(model.config) for model in (again, unet))
    if "num_classes" in changes:  # nothing says which row is the null one
        rows = nn.Labels(4, unet.config.time_width, has_null=False, stddev=1.0)
        expected |= dict(num_classes=None, embed_cond=rows)
    used = np.array([*expected.pop("attention_levels"), expected.pop("middle_attention")])
    num_heads = [np.array([*c["num_heads"], c["num_heads"][-1]])[used] for c in (found, expected)]
    assert num_heads[0].tolist() == num_heads[1].tolist()
    ignored = {"num_heads", "remat", "attention_levels", "middle_attention"}
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


def test_networks_that_diffusers_cannot_hold_are_refused(tmp_path):
    both = (True, True)
    refused = {
        r"heads have different sizes: \[4, 8\]": dict(num_heads=(1, 4), attention_levels=both),
        r"downsample_padding is \(1, 0\)": dict(downsample_padding=(1, 0)),
        "a context but no attention in the middle": dict(context_size=6, middle_attention=False),
    }
    for message, changes in refused.items():
        with pytest.raises(pretrained.WeightsError, match=message):
            pretrained.export(small(**changes), tmp_path)
        assert list(tmp_path.iterdir()) == []


# What it computes.


@each_option
def test_starts_at_zero_and_takes_any_size_that_divides(changes):
    fresh = UNet(2, **{**SIZES, **changes}, key=KEY)
    x, cond = jnp.ones((2, 4, 6)), cond_of(changes)
    out = run(fresh, x, T, cond)
    assert out.shape == (changes.get("out_channels", 2), 4, 6)
    assert not jnp.any(out)


def test_every_leaf_is_used_and_every_condition_matters():
    changes = OPTIONS["both"]
    unet, x = small(**changes), jax.random.normal(KEY, (2, 4, 4))
    params, static = eqx.partition(unet, eqx.is_inexact_array)
    inputs = dict(x=x, t=T, context=jax.random.normal(KEY, (5, 6)))

    def out(params, inputs, label=1):
        model = eqx.combine(params, static)
        return model(inputs["x"], inputs["t"], (jnp.asarray(label), inputs["context"]))

    gradients = jax.jit(jax.grad(lambda p, i: jnp.sum(out(p, i) ** 2), argnums=(0, 1)))(
        params, inputs
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)
    compiled = jax.jit(out)
    assert relative_error(compiled(params, inputs, 2), compiled(params, inputs, 1)) > 1e-3


def test_bfloat16_computes_in_bfloat16_with_a_float32_time():
    unet, x = small(num_classes=3), jax.random.normal(KEY, (2, 4, 4))
    low = run(unet, x.astype(jnp.bfloat16), T, jnp.array(1))
    assert low.dtype == jnp.bfloat16
    assert relative_error(low.astype(jnp.float32), run(unet, x, T, jnp.array(1))) < 0.05
    near, far = (run(unet, x, jnp.array(t), jnp.array(1)) for t in (0.998, 0.999))
    assert jnp.any(near != far)


def test_remat_and_cudnn_are_choices_that_do_not_change_the_tree():
    kept, again = small(), small(remat=jax.checkpoint_policies.nothing_saveable)
    x = jax.random.normal(KEY, (2, 4, 4))
    gradient = lambda unet: eqx.filter_jit(eqx.filter_grad(lambda unet: jnp.sum(unet(x, T) ** 2)))(
        unet
    )
    for a, b in zip(*map(jax.tree.leaves, (gradient(kept), gradient(again))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs bfloat16 or float16"):
        small(attention=nn.cudnn_attend)(x, T)


@pytest.mark.parametrize("solver", [eqxldm.DDIM(), eqxldm.Heun(), eqxldm.DDPM()], ids=str)
def test_sampling_and_guidance_take_it_as_they_take_the_dit(solver):
    unet = small(num_classes=3)
    denoiser = eqxldm.guide(unet, unet.null, 2.0)
    x_T = jax.random.normal(KEY, (2, 4, 4))
    x0 = eqxldm.sample(
        denoiser,
        eqxldm.Diffusion(eqxldm.CosineVP(), eqxldm.predict_v),
        solver,
        eqxldm.uniform_times(3),
        x_T,
        jnp.array(1),
        key=KEY,
    )
    assert x0.shape == x_T.shape and bool(jnp.isfinite(x0).all())


def test_guidance_over_a_context_and_a_label():
    unet = small(**OPTIONS["both"] | dict(out_channels=2))
    null, cond = (unet.null, jnp.zeros((5, 6))), (jnp.array(1), jnp.ones((5, 6)))
    x = jax.random.normal(KEY, (2, 4, 4))
    guided = eqx.filter_jit(lambda unet: eqxldm.guide(unet, null, 3.0)(x, T, cond))(unet)
    without, given = run(unet, x, T, null), run(unet, x, T, cond)
    np.testing.assert_allclose(guided, without + 3.0 * (given - without), rtol=1e-4, atol=1e-4)


# Bad input.

REFUSED = {
    "levels": (dict(channels=()), "need at least one level"),
    "blocks": (dict(blocks=0), r"sizes of at least 1, got .*blocks \(0,\)"),
    "attention": (dict(attention_levels=(True,)), "one entry for each of the 2 levels"),
    "num_heads": (dict(num_heads=(1, 1, 1)), "heads needs one entry for each of the 2 levels"),
    "odd heads": (dict(num_heads=3), "width 16 does not divide into 3 heads"),
    "depths": (dict(transformer_depth=(1,)), "transformer_depth needs one entry for each"),
    "added": (dict(added_size=9), "added_size must be positive and needs a context_size"),
    "groups": (dict(groups=3), "8 channels do not divide into 3 groups"),
    "two conditions": (
        dict(num_classes=3, embed_cond=nn.Linear(5, 32, key=KEY)),
        "num_classes or embed_cond, not both",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(2, **{**SIZES, **changes}, key=KEY)


CALLS = {
    "channels": ({}, (3, 4, 4), None, "need 2 channels, got 3"),
    "size": ({}, (2, 4, 5), None, "a 4 x 5 input does not divide by 2, as 2 levels need"),
    "needless label": ({}, (2, 4, 4), jnp.array(1), "unconditional, so cond must be None"),
    "no label": (dict(num_classes=3), (2, 4, 4), None, "conditional, but cond is None"),
    "no context": (
        OPTIONS["context"],
        (2, 4, 4),
        None,
        r"must be an array \(tokens, 6\), got None",
    ),
    "other context": (OPTIONS["context"], (2, 4, 4), jnp.ones((5, 4)), r"got \(5, 4\)"),
    "no numbers": (
        OPTIONS["xl"],
        (2, 4, 4),
        nn.Conditioning(jnp.ones(5), jnp.ones((5, 6))),
        "together 9 features, 2 a number; got 5 in the vector and 0 numbers",
    ),
    "needless vector": (
        OPTIONS["context"],
        (2, 4, 4),
        nn.Conditioning(jnp.ones(5), jnp.ones((5, 6))),
        "the network takes tokens alone",
    ),
    "no pair": (OPTIONS["both"], (2, 4, 4), jnp.array(1), r"must be a pair \(label, context\)"),
}


@pytest.mark.parametrize(("changes", "shape", "cond", "message"), CALLS.values(), ids=CALLS)
def test_inputs_that_do_not_fit_are_refused(changes, shape, cond, message):
    with pytest.raises(ValueError, match=message):
        UNet(2, **{**SIZES, **changes}, key=KEY)(jnp.ones(shape), T, cond)


def test_a_network_without_a_null_label_says_so():
    with pytest.raises(ValueError, match="only a network with num_classes has a null label"):
        _ = small().null
    with pytest.raises(ValueError, match="no row for 'no label'; all its rows are classes"):
        _ = small(embed_cond=NO_NULL).null
    assert small(num_classes=3).null == 3


UNKNOWN = {
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "mid_block_type": None,
    "down_block_types": ["DownBlock2D", "KDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"],
    "downsample_padding": 2,
    "center_input_sample": True,
    "class_embed_type": "timestep",
}


@pytest.mark.parametrize("option", UNKNOWN)
def test_a_config_with_what_we_have_not_is_refused(option, tmp_path):
    folder, _, values = fixture("plain", tmp_path / "unet")
    config = json.loads(str(values["config"])) | {option: UNKNOWN[option]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(pretrained.WeightsError, match=f"has not .in brackets.: .*{option} = "):
        pretrained.load(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(addition_embed_type="image"), r"addition_embed_type = 'image' \(None or 'text_time'"),
        (dict(addition_embed_type="text_time"), r"addition_time_embed_dim = None \(a number\)"),
        (dict(transformer_layers_per_block=[1, 2]), r"= \[1, 2\] \(a number, or 4 of them\)"),
        (dict(transformer_layers_per_block=[[1], 1, 1, 1]), "transformer_layers_per_block = "),
    ],
)
def test_what_we_have_not_of_sdxl_is_named(options, message):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.unet.from_diffusers(options, key=KEY)


def test_files_of_2022_have_other_names_for_attention(tmp_path):
    folder, tensors, _ = fixture("plain", tmp_path / "unet")
    expected = pretrained.load(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if "attentions" in name else name
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    write_safetensors(folder / f"{WEIGHTS}.safetensors", renamed, {"format": "pt"})
    assert eqx.tree_equal(pretrained.load(folder), expected)


def test_a_condition_that_is_no_label_cannot_be_written_down(tmp_path):
    unet = small(embed_cond=nn.Linear(5, 32, key=KEY))
    assert run(unet, jnp.ones((2, 4, 4)), T, jnp.ones(5)).shape == (2, 4, 4)
    with pytest.raises(
        pretrained.WeightsError, match=r"UNetConfig: embed_cond = .* cannot be written down"
    ):
        pretrained.save(unet, tmp_path / "a.safetensors")
