"""Smaller weights: linear layers and convolutions in 8 bits.

`quantize` gives the same module with other layers in it, so everything that takes a model takes a
quantised one. A weight `W` becomes integers `q` and one scale for each of its outputs,

    s_o = max_i |W_oi| / 127,   q_oi = round(W_oi / s_o),   W_oi ~ s_o q_oi,

a quarter of the bytes of float32. What is small or sensitive stays as it was (`KEPT`): embeddings,
modulation, norms, the first and the last layer.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .nn import QKV, Conv, Linear
from .nn.conv import NO_PADDING
from .paths import at_least_float32
from .pretrained.files import open_safetensors, write_safetensors
from .pretrained.io import HEADER
from .pretrained.layout import WeightsError, array_leaves, own_layout, unfill
from .pretrained.limits import check_config
from .pretrained.records import from_json, to_json
from .sharding import path_name

Mode = Literal["int8", "w8a8", "fp8"]
MODES: tuple[Mode, ...] = ("int8", "w8a8", "fp8")
QUANTIZED = "eqxldm.quantized"  # the entry of a file's header
# The layers that stay: patches, time, labels and texts in; modulation; the last layer; the U-Net's
# first and last convolution (`stem`, `head`) and its shifts by the time.
KEPT = r"\w*embedding|embed_cond|\w*modulation|final_\w+|stem|head|lm_head|shift|pooled|project"
FLOAT8 = jnp.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": 448.0}  # that 8 bits hold: integers, and floats of 4 + 3 bits


class Quantized(eqx.Module):
    """A weight in 8 bits: `values * scale`, the scale float32 and one for each output.

    >>> weight = Quantized.of(jnp.array([[1.0, -2.0], [0.0, 0.5]]), axes=(1,), kind="int8")
    >>> weight.values.tolist(), weight.as_float(jnp.float32).tolist()[0][1]
    ([[64, -127], [0, 127]], -2.0)
    """

    values: Array
    scale: Float[Array, "..."]

    @classmethod
    def of(cls, weight: Array, *, axes: tuple[int, ...], kind: str) -> "Quantized":
        """The nearest such weight; `axes` are those summed over, whose numbers share a scale."""
        wide = weight.astype(jnp.float32)
        scale = _scale(wide, axes, LARGEST[kind])
        return cls(_rounded(wide / scale, kind), scale)

    def as_float(self, dtype: Any) -> Array:
        """The weight in floating point."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


class QuantizedLinear(Linear):
    """`nn.Linear` with a weight in 8 bits.

    **Arguments**: `layer`, a `Linear`, or one whose arrays have leading axes, of an `nn.Stack`.
    `mode`: see `quantize`.

    >>> layer = QuantizedLinear(Linear(4, 3, key=jax.random.key(0)), "int8")
    >>> layer(jnp.ones((5, 4))).shape, layer.weight.values.dtype
    ((5, 3), dtype('int8'))
    """

    weight: Any
    mode: Mode = eqx.field(static=True)

    def __init__(self, layer: Linear, mode: Mode):
        self.weight = Quantized.of(layer.weight, axes=(-1,), kind=_kind(mode))
        self.bias, self.mode = layer.bias, mode

    def __call__(self, x: Float[Array, "*leading in"]) -> Float[Array, "*leading out"]:
        y = _product(x, self.weight.values, self.weight.scale, self.mode)
        return y if self.bias is None else y + self.bias.astype(x.dtype)


class QuantizedQKV(QKV):
    """`nn.QKV` with a weight in 8 bits; arguments as in `QuantizedLinear`.

    >>> layer = QuantizedQKV(QKV(8, num_heads=2, key=jax.random.key(0)), "w8a8")
    >>> [part.shape for part in layer(jnp.ones((5, 8)))]
    [(5, 2, 4), (5, 2, 4), (5, 2, 4)]
    """

    weight: Any
    mode: Mode = eqx.field(static=True)

    def __init__(self, layer: QKV, mode: Mode):
        self.weight = Quantized.of(layer.weight, axes=(-1,), kind=_kind(mode))
        self.bias, self.num_heads, self.mode = layer.bias, layer.num_heads, mode

    def __call__(self, x: Float[Array, "n in"]) -> list[Float[Array, "n heads size"]]:
        rows = lambda a: a.reshape(-1, a.shape[-1])
        y = _product(x, rows(self.weight.values), rows(self.weight.scale), self.mode)
        if self.bias is not None:
            y = y + self.bias.reshape(-1).astype(x.dtype)
        y = y.reshape(len(x), 3, self.num_heads, -1)
        return [y[:, i] for i in range(3)]


class QuantizedConv(Conv):
    """`nn.Conv` with a weight in 8 bits; arguments as in `QuantizedLinear`.

    With mode `w8a8` the whole image has one scale, but for a 1 x 1 kernel, where each pixel has its
    own. In `fp8` only the weight is: convolutions of such floats exist on few devices.

    >>> layer = QuantizedConv(Conv(2, 4, 3, key=jax.random.key(0)), "w8a8")
    >>> layer(jnp.ones((6, 6, 2))).shape
    (6, 6, 4)
    """

    weight: Any
    mode: Mode = eqx.field(static=True)

    def __init__(self, layer: Conv, mode: Mode):
        self.weight = Quantized.of(layer.weight, axes=(-4, -3, -2), kind=_kind(mode))
        self.bias, self.mode = layer.bias, mode
        self.stride, self.padding = layer.stride, layer.padding

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        values, scale = self.weight.values, self.weight.scale
        if values.shape[:2] == (1, 1) and self.stride == 1 and self.padding == NO_PADDING:
            return self._with_bias(_product(x, values[0, 0].T, scale[0, 0].T, self.mode))
        integers = self.mode == "w8a8"
        given = x
        if integers:
            x_scale = _scale(x.astype(jnp.float32), None, LARGEST["int8"])
            given = _rounded(x.astype(jnp.float32) / x_scale, "int8")
            scale = scale * x_scale
        y = jax.lax.conv_general_dilated(
            given[None],
            values if integers else values.astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.int32 if integers else None,
        )[0]
        wide = at_least_float32(x.dtype)
        return self._with_bias((y.astype(wide) * scale[0, 0, 0].astype(wide)).astype(x.dtype))


KINDS: dict[type, type] = {
    Linear: QuantizedLinear,
    QKV: QuantizedQKV,
    Conv: QuantizedConv,
}


def quantize(model: PyTree, mode: Mode = "int8", *, keep: str = KEPT) -> PyTree:
    """The model with its linear layers and convolutions in 8 bits.

    **Arguments**:

    - `mode`: `int8`, weights of integers, computed in the dtype of the input: a quarter of the
      memory. `w8a8`: the input is rounded to integers too, each token with a scale of its own, so
      that the products are of integers, which GPUs and TPUs have twice as many of as of bfloat16.
      `fp8`: weights and inputs are floats of 8 bits (e4m3), for
      devices that have them (H100 and newer); others compute the same, without gain.
    - `keep`: a regular expression; a layer stays as it is if a name on its path fits, such as
      `final_linear`.

    The quantised model is for use: gradients of its weights do not exist.

    **Raises** `ValueError` for another mode, and for a model in which nothing is quantised.

    >>> from eqxldm.models import DiT
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=64, num_heads=2, key=jax.random.key(0))
    >>> small = quantize(dit)
    >>> small(jnp.ones((4, 8, 8)), jnp.array(0.5)).shape
    (4, 8, 8)
    >>> weight_bytes(small.blocks) < 0.6 * weight_bytes(dit.blocks)
    True
    """
    kept = re.compile(rf"(^|\.)({keep})(\.|$)")
    chosen = [
        path
        for path, layer in _layers(model).items()
        if type(layer) in KINDS and not kept.search(path)
    ]
    if not chosen:
        raise ValueError(
            f"quantize: {type(model).__name__} has no linear layer or convolution that keep = "
            f"{keep!r} leaves."
        )
    return _replaced(model, mode, frozenset(chosen))


def weight_bytes(model: PyTree) -> int:
    """The bytes of all arrays of a model; shapes are enough.

    >>> weight_bytes(Linear(4, 2, key=jax.random.key(0)))
    40
    """
    sizes = (np.dtype(a.dtype).itemsize * a.size for a in array_leaves(model).values())
    return sum(sizes)


def save(model: PyTree, path: str | Path) -> None:
    """Writes a quantised model of the library to one safetensors file, for `load`.

    As `pretrained.save`, with the names of the quantised layers in the header; floats of 8 bits are
    written as their bits.

    **Raises** `WeightsError` if the model is not quantised, or has no configuration.

    >>> import tempfile
    >>> from eqxldm.models import DiT
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=1, width=16, num_heads=2, key=jax.random.key(0))
    >>> path = Path(tempfile.mkdtemp()) / "dit.safetensors"
    >>> save(quantize(dit), path)
    >>> bool(eqx.tree_equal(load(path), quantize(dit)))
    True
    """
    small = QuantizedLinear | QuantizedQKV | QuantizedConv
    found = {p: layer.mode for p, layer in _layers(model).items() if isinstance(layer, small)}
    if not found or not hasattr(model, "config"):
        raise WeightsError(
            f"quantization.save: {type(model).__name__} is no quantised model of the library: "
            "quantization.quantize(model) makes one; pretrained.save writes others."
        )
    about = {"mode": next(iter(found.values())), "layers": sorted(found)}
    tensors = unfill(model, own_layout(model))
    bits = {k: a.view(np.uint8) if a.dtype == FLOAT8 else a for k, a in tensors.items()}
    header = {HEADER: json.dumps(to_json(model.config)), QUANTIZED: json.dumps(about)}
    write_safetensors(Path(path), bits, header)


def load(path: str | Path) -> PyTree:
    """The quantised model of a file that `save` wrote, bit for bit.

    **Raises** `FileNotFoundError`; `WeightsError` for any other file, and if its tensors are not
    those of the model that its header describes.
    """
    path = Path(path)
    tensors, header = open_safetensors(path)
    if not {HEADER, QUANTIZED} <= header.keys():
        raise WeightsError(
            f"{path} holds no quantised model: quantization.save writes one, and pretrained.load "
            "reads the others."
        )
    try:
        config, about = json.loads(header[HEADER]), json.loads(header[QUANTIZED])
        mode, layers = about["mode"], frozenset(map(str, about["layers"]))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: its header is damaged ({error}).") from error
    check_config(config, tensors, str(path))
    build = from_json(config).build
    try:
        like = eqx.filter_eval_shape(
            lambda key: _replaced(build(key=key), mode, layers), jax.random.key(0)
        )
    except Exception as error:  # whatever a constructor raises for a number that makes no sense
        raise WeightsError(f"{path}: no model can be made of its header: {error}") from error
    if unknown := sorted(layers - _layers(like).keys()):
        raise WeightsError(f"{path}: its model has no layers {', '.join(unknown)[:500]}.")
    return _filled(path, like, tensors)


def _filled(path: Path, like: PyTree, tensors: Any) -> PyTree:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {k: a for k, a in leaves if isinstance(a, jax.ShapeDtypeStruct)}
    names = {path_name(k) for k in wanted}
    problems = [f"missing: {name}" for name in sorted(names - tensors.keys())]
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - names)]
    arrays = {}
    for key, shape in wanted.items():
        if (name := path_name(key)) not in tensors:
            continue
        array = tensors[name].read()
        if shape.dtype == FLOAT8 and array.dtype == np.uint8:
            array = array.view(FLOAT8)
        if array.shape != shape.shape or (
            array.dtype != shape.dtype and not jnp.issubdtype(shape.dtype, jnp.inexact)
        ):
            problems.append(
                f"wrong: {name} is {array.dtype}{array.shape}, not {shape.dtype}{shape.shape}"
            )
            continue
        arrays[key] = jnp.asarray(array)
    if problems:
        lines = "\n  ".join(problems[:100])
        raise WeightsError(f"{path} does not fit {type(like).__name__}:\n  {lines}")
    return jax.tree.unflatten(treedef, [arrays.get(k, a) for k, a in leaves])


def _layers(model: PyTree) -> dict[str, Any]:
    """The linear layers and convolutions by their paths, quantised or not."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_layer)
    return {path_name(path): leaf for path, leaf in found if _is_layer(leaf)}


def _replaced(model: PyTree, mode: Mode, chosen: frozenset[str]) -> PyTree:
    if mode not in MODES:
        raise ValueError(f"quantize: mode must be one of {', '.join(MODES)}, got {mode!r}.")

    def replace(path: Any, leaf: Any) -> Any:
        # Of the library's own three alone: a subclass computes something else.
        kind = KINDS.get(type(leaf))
        return leaf if kind is None or path_name(path) not in chosen else kind(leaf, mode)

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=_is_layer)


def _is_layer(leaf: Any) -> bool:
    return isinstance(leaf, tuple(KINDS))


def _kind(mode: Mode) -> str:
    return "fp8" if mode == "fp8" else "int8"


def _scale(x: Array, axes: tuple[int, ...] | None, largest: float) -> Array:
    """What makes the largest magnitude `largest`; 1 where all are zero."""
    size = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return jnp.where(size > 0, size / largest, 1.0)


def _rounded(x: Array, kind: str) -> Array:
    return x.astype(FLOAT8) if kind == "fp8" else jnp.round(x).astype(jnp.int8)


def _product(x: Array, values: Array, scale: Array, mode: Mode) -> Array:
    """`x W^T` for `values` (out, in) and `scale` (out, 1)."""
    wide = at_least_float32(x.dtype)
    if mode == "int8":  # integers below 128 are exact in bfloat16, too
        y = x @ values.T.astype(x.dtype)
        return (y.astype(wide) * scale[:, 0].astype(wide)).astype(x.dtype)
    kind = _kind(mode)
    precise = x.astype(jnp.float32)
    x_scale = _scale(precise, (-1,), LARGEST[kind])
    y = jax.lax.dot_general(
        _rounded(precise / x_scale, kind),
        values,
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32 if kind == "fp8" else jnp.int32,
    )
    return (y.astype(jnp.float32) * x_scale * scale[:, 0]).astype(x.dtype)
