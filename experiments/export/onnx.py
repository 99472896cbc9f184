"""A network and a decoder as ONNX, for ONNX Runtime and whatever else reads it."""

# The extra "onnx" need not be there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator
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
OPSET = 20  # of later ones ONNX Runtime does not run all that its quantisation writes
DENOISER, DECODER, SMALL = "denoiser.onnx", "decoder.onnx", "denoiser-int8.onnx"


def save_onnx(
    network: Any, space: Any, shape: tuple[int, ...], cond: Any, folder: Path
) -> list[Path]:
    """Writes `denoiser.onnx`, `(x_t, t, cond) -> out`, and `decoder.onnx`, `z -> pictures`.

    The first axis of all is the batch's, of any length; an unconditional network has no `cond`.
    Each is run by ONNX Runtime afterwards, and the largest difference is said.
    """
    check_packages()
    import jax2onnx

    network, space = plain_attention(network), plain_attention(space)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, *shape)).astype(np.float32), np.array([0.2, 0.5, 0.9], np.float32)
    inputs = named_inputs(x, t, None if cond is None else np.stack([np.asarray(cond)] * 3))
    if cond is None:
        denoise = lambda x_t, t: jax.vmap(lambda x, t: network(x, t))(x_t, t)
    else:
        denoise = lambda x_t, t, cond: jax.vmap(network)(x_t, t, cond)
    decode = lambda z: jax.vmap(space.decode)(z)
    paths = []
    for name, function, given in ((DENOISER, denoise, inputs), (DECODER, decode, {"z": x})):
        path = folder / name
        (batch,) = export.symbolic_shape(BATCH)
        shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in given.values()]
        with only_errors("onnx_ir"):  # it warns of each shape that it cannot name
            written = jax2onnx.to_onnx(
                function, shapes, model_name=path.stem, input_names=list(given),
                output_names=["out"], opset=OPSET,
            )  # fmt: skip
        path.write_bytes(written.SerializeToString())
        (found,) = session(path).run(None, given)
        expected = np.asarray(jax.jit(function)(*given.values()))
        off = float(np.max(np.abs(np.asarray(found) - expected)))
        size = path.stat().st_size
        say(f"{path}: {size:,} bytes; ONNX Runtime differs by {off:.1e} at most")
        paths.append(path)
    return paths


def quantize_onnx(folder: Path, inputs: list[dict[str, np.ndarray]]) -> Path:
    """Writes `denoiser-int8.onnx`, with the convolutions of `denoiser.onnx` in integers.

    The format is QDQ: weights have a scale for each output channel, inputs one for each tensor,
    from the ranges that they take on `inputs`. As in `quantization.KEPT` the first and the last
    convolution stay.

    **Raises** `UserError` for a network that has no other ones.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter(inputs)

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as made:
        # With kernels as constants: as they are exported, each is transposed in every call.
        folded = Path(made, DENOISER)
        quant_pre_process(folder / DENOISER, folded, skip_symbolic_shape=True)
        nodes = onnx.load(folded).graph.node
        found = [node.name for node in nodes if node.op_type == "Conv"]
        if len(found) < 3:
            raise UserError(
                "--format onnx --quantize int8: ONNX Runtime's integers are for convolutions, of "
                "which this network has none but its ends. Take a U-Net's run, or --format jax."
            )
        quantize_static(
            folded, folder / SMALL, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=["Conv"], nodes_to_exclude=[found[0], found[-1]],
        )  # fmt: skip
    return folder / SMALL


def named_inputs(x_t: Any, t: Any, cond: Any) -> dict[str, np.ndarray]:
    """What `denoiser.onnx` is given."""
    given = {"x_t": x_t, "t": t} | ({} if cond is None else {"cond": cond})
    return {name: np.asarray(a) for name, a in given.items()}


def session(path: Path) -> Any:
    """A file as ONNX Runtime runs it on a CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_packages() -> None:
    """Those of the extra, without their warnings; **raises** `UserError` where one is missing."""
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f'--format onnx needs the extra "onnx" ({error.name} is missing): '
            "pip install jax2onnx onnxruntime."
        ) from error
    onnxruntime.set_default_logger_severity(3)  # errors: it warns of every constant it drops


@contextlib.contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Silences the warnings of a package's loggers."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
