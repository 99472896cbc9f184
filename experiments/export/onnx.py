"""A network and a decoder as ONNX, for ONNX Runtime and whatever else reads it."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import export

from eqxldm.nn import attend, cudnn_attend, with_fields
from eqxldm.nn.attention import attend_plainly

from ..train.terminal import UserError, say

BATCH = "batch"  # the name of the axis of any length


def save_onnx(
    network: Any, space: Any, shape: tuple[int, ...], cond: Any, folder: Path
) -> list[Path]:
    """Writes `denoiser.onnx`, `(x_t, t, cond) -> out`, and `decoder.onnx`, `z -> pictures`.

    The first axis of all is the batch's, of any length; an unconditional network has no `cond`.
    Each is run by ONNX Runtime afterwards, and the largest difference is said.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f'--format onnx needs the extra "onnx" ({error.name} is missing): '
            "pip install jax2onnx onnxruntime."
        ) from error
    network, space = plain_attention(network), plain_attention(space)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, *shape)).astype(np.float32), np.array([0.2, 0.5, 0.9], np.float32)
    inputs: dict[str, Any] = {"x_t": x, "t": t}
    if cond is None:
        denoise = lambda x_t, t: jax.vmap(lambda x, t: network(x, t))(x_t, t)
    else:
        denoise = lambda x_t, t, cond: jax.vmap(network)(x_t, t, cond)
        inputs["cond"] = np.stack([np.asarray(cond)] * 3)
    decode = lambda z: jax.vmap(space.decode)(z)
    paths = []
    for name, function, given in (("denoiser", denoise, inputs), ("decoder", decode, {"z": x})):
        path = folder / f"{name}.onnx"
        (batch,) = export.symbolic_shape(BATCH)
        shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in given.values()]
        written = jax2onnx.to_onnx(
            function, shapes, model_name=name, input_names=list(given), output_names=["out"]
        )
        path.write_bytes(written.SerializeToString())
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found: Any = session.run(None, given)[0]
        expected = np.asarray(jax.jit(function)(*given.values()))
        off = float(np.max(np.abs(found - expected)))
        size = path.stat().st_size
        say(f"{path}: {size:,} bytes; ONNX Runtime differs by {off:.1e} at most")
        paths.append(path)
    return paths


def plain_attention(model: Any) -> Any:
    """The model with attention as one formula: ONNX has no choice of the platform."""
    if isinstance(model, list | tuple) and not hasattr(model, "_fields"):
        return type(model)(map(plain_attention, model))
    if not isinstance(model, eqx.Module):
        return model
    changed = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value is attend or value is cudnn_attend:
            changed[field.name] = attend_plainly
        elif isinstance(value, eqx.Module | list | tuple):
            changed[field.name] = plain_attention(value)
    return with_fields(model, **changed)
