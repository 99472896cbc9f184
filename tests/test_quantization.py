"""Weights in 8 bits: what is rounded, what stays, and what a file gives back."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn, pretrained, quantization
from eqxldm.models import DiT, UNet
from eqxldm.pretrained.files import open_safetensors, write_safetensors
from eqxldm.quantization import MODES, Quantized, quantize, weight_bytes
from eqxldm.sharding import parameter_rule, partition_spec, path_name

from helpers import filled, relative_error


@pytest.fixture(scope="module")
def dit():
    sizes = dict(patch_size=2, depth=2, width=32, num_heads=2, num_classes=3)
    return filled(lambda: DiT((4, 8, 8), **sizes, key=jax.random.key(0)))


@pytest.fixture(scope="module")
def smaller(dit):
    """The DiT in each mode."""
    return {mode: eqx.filter_jit(quantize)(dit, mode) for mode in MODES}


X = jax.random.normal(jax.random.key(2), (4, 8, 8))
T, COND = jnp.array(0.4), jnp.array(1)
run = eqx.filter_jit(lambda model, x: model(x, T, COND))


def test_a_weight_is_off_by_half_a_scale_at_most():
    weight = jax.random.normal(jax.random.key(0), (3, 5, 7)).at[1, 2].set(0.0)
    small = Quantized.of(weight, axes=(-1,), kind="int8")
    assert small.values.dtype == jnp.int8 and small.scale.shape == (3, 5, 1)
    off = np.abs(small.as_float(jnp.float32) - weight)
    assert np.all(off <= 0.5001 * np.asarray(small.scale))
    assert np.all(np.asarray(small.as_float(jnp.float32))[1, 2] == 0)
    assert np.max(np.abs(small.values), axis=-1)[0].tolist() == [127] * 5


def test_weights_alone_are_those_of_the_rounded_layer():
    """The layer in 8 bits is the layer whose weight is what 8 bits can say."""
    k = jax.random.split(jax.random.key(0), 4)
    linear, qkv = nn.Linear(6, 5, key=k[0]), nn.QKV(6, num_heads=2, key=k[1])
    conv = nn.Conv(3, 4, 3, stride=2, key=k[2])
    bias = lambda layer, new: eqx.tree_at(lambda m: m.bias, layer, new)
    linear, qkv = bias(linear, jnp.arange(5.0)), bias(qkv, jnp.ones((3, 6)))
    x, image = jax.random.normal(k[3], (7, 6)), jax.random.normal(k[3], (6, 6, 3))
    half = x.astype(jnp.bfloat16)
    for layer, given in ((linear, x), (linear, half), (qkv, x), (conv, image)):
        small = quantize(layer, "int8")
        rounded = eqx.tree_at(lambda m: m.weight, layer, small.weight.as_float(jnp.float32))
        wanted, found = jax.tree.leaves(rounded(given)), jax.tree.leaves(small(given))
        assert [(a.shape, a.dtype) for a in wanted] == [(a.shape, a.dtype) for a in found]
        off = max(map(relative_error, found, wanted))
        assert off < (0.02 if given is half else 1e-6)


def test_integers_are_multiplied_as_integers():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    x[0] *= 1000  # one token's outlier does not spoil the others
    layer = nn.Linear(8, 3, use_bias=False, key=jax.random.key(0))
    layer = eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(w))
    small = quantize(layer, "w8a8")
    s = np.abs(x).max(1, keepdims=True) / np.float32(127)
    q = np.round(x / s).astype(np.int32)
    wanted = (
        (q @ np.asarray(small.weight.values, np.int32).T) * s * np.asarray(small.weight.scale).T
    )
    assert relative_error(small(jnp.asarray(x)), wanted) < 1e-6
    off = np.abs(small(jnp.asarray(x)) - x @ w.T)
    assert off[1:].max() < 0.05 and np.all(np.isfinite(small(jnp.zeros((1, 8)))))
    conv, image = nn.Conv(2, 4, 3, key=jax.random.key(1)), jnp.asarray(rng.normal(size=(6, 6, 2)))
    small_conv = quantize(conv, "w8a8")
    assert 1e-4 < relative_error(small_conv(image), conv(image)) < 0.03
    text = jax.jit(lambda x: small(x)).lower(jnp.asarray(x)).as_text()
    assert "tensor<5x8xi8>" in text and "tensor<5x3xi32>" in text


@pytest.mark.parametrize("mode", MODES)
def test_a_dit_gives_nearly_the_same(dit, smaller, mode):
    small = smaller[mode]
    error = relative_error(run(small, X), run(dit, X))
    assert 1e-6 < error < {"int8": 0.02, "w8a8": 0.04, "fp8": 0.15}[mode]
    half = eqx.filter_eval_shape(run, small, X.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_what_is_sensitive_stays(dit, smaller):
    small = smaller["int8"]
    names = lambda model: {
        path_name(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }
    before, after = names(dit), names(small)
    changed = {name.removesuffix(".values") for name in after if name.endswith(".values")}
    layers = ("attention.qkv", "attention.proj", "fc1", "fc2")
    assert changed == {f"blocks.stacked.{layer}.weight" for layer in layers}
    stayed = before.keys() - changed
    assert all(after[name] == before[name] for name in stayed)
    assert weight_bytes(small) < 0.7 * weight_bytes(dit)
    rest = eqx.filter_eval_shape(quantize, dit, keep="fc1|attention").blocks.stacked
    assert type(rest.fc1) is nn.Linear and type(rest.fc2) is quantization.QuantizedLinear


def test_a_unet_keeps_its_ends():
    sizes: dict[str, Any] = dict(
        channels=(8,), blocks=1, attention_levels=(True,), groups=4, context_size=6
    )
    unet = lambda: quantize(UNet(2, **sizes, key=jax.random.key(0)), "w8a8")
    small = eqx.filter_eval_shape(unet)
    kept = (small.stem, small.head, small.time_embedding.linear1, small.downs[0].resnets[0].shift)
    assert all(type(layer) in (nn.Conv, nn.Linear) for layer in kept)
    assert isinstance(small.middle.resnets[0].block.conv1, quantization.QuantizedConv)


def test_every_parameter_has_a_rule_and_devices_divide_it(smaller):
    for path, _ in jax.tree_util.tree_leaves_with_path(smaller["int8"]):
        rule = parameter_rule(path_name(path))
        assert rule is not None, path_name(path)
        assert not (path_name(path).endswith("values") and rule.is_weight)
    divided = partition_spec("blocks.stacked.fc1.weight.values", (2, 128, 32), {"tensor": 2})
    assert tuple(divided) == (None, "tensor")


@pytest.mark.parametrize("mode", MODES)
def test_a_file_gives_the_same_model_back(dit, smaller, mode, tmp_path):
    small = smaller[mode]
    pretrained.save(dit, tmp_path / "whole.safetensors")
    path = tmp_path / "small.safetensors"
    quantization.save(small, path)
    assert bool(eqx.tree_equal(quantization.load(path), small))
    assert path.stat().st_size < 0.75 * (tmp_path / "whole.safetensors").stat().st_size
    with pytest.raises(pretrained.WeightsError, match=r"quantization\.load"):
        pretrained.load(path)


def test_refused(dit, smaller, tmp_path):
    small, path = smaller["int8"], tmp_path / "a.safetensors"
    for wrong in (dit, jnp.ones(2)):
        with pytest.raises(pretrained.WeightsError, match="no quantised model"):
            quantization.save(wrong, path)
    pretrained.save(dit, path)
    with pytest.raises(pretrained.WeightsError, match=r"pretrained\.load"):
        quantization.load(path)
    with pytest.raises(FileNotFoundError):
        quantization.load(tmp_path / "none.safetensors")
    for again in (small, jnp.ones(3)):
        with pytest.raises(ValueError, match="no linear layer"):
            quantize(again)
    quantization.save(small, path)
    tensors, header = open_safetensors(path)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    write = write_safetensors
    gone = {k: a for k, a in arrays.items() if k != "blocks.stacked.fc1.weight.scale"}
    write(path, gone | {"odd": np.ones(1)}, header)
    with pytest.raises(pretrained.WeightsError) as error:
        quantization.load(path)
    assert "missing: blocks.stacked.fc1.weight.scale" in str(error.value)
    assert "unexpected: odd" in str(error.value)
    for about in ("[]", "{", '{"mode": "int3", "layers": ["blocks.stacked.fc1"]}'):
        write(path, arrays, header | {quantization.QUANTIZED: about})
        with pytest.raises(pretrained.WeightsError, match="header"):
            quantization.load(path)
