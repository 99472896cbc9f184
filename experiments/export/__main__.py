"""`python -m experiments.export --run-dir runs/mnist`: a finished run as a file for other programs.

`make export RUN=runs/mnist FORMAT=jax` writes a bundle, which JAX alone runs; `FORMAT=onnx` the
denoiser and the decoder as ONNX.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm import uniform_times
from eqxldm.quantization import quantize
from eqxldm.serving.export import PLATFORMS, Exportable, save_bundle
from eqxldm.serving.pipeline import Decoder
from eqxldm.sharding import make_mesh

from ..train.__main__ import given, parsed
from ..train.checks import check_writable
from ..train.commands import Which, run_folder
from ..train.conditions import Captions, FrozenCaptions, Labels
from ..train.config import Config, SamplingConfig
from ..train.finished import Finished, open_finished
from ..train.methods import Method, check_sampling, make_solver, make_times
from ..train.options import check, read_options
from ..train.processes import exit_with
from ..train.run import RunFolder
from ..train.streams import stream_number
from ..train.terminal import Signals, UserError, run_main, say
from .onnx import DENOISER, check_packages, quantize_onnx, save_onnx
from .states import States


@dataclass(frozen=True)
class Export(Which):
    """Write a finished run as a file that other programs run."""

    format: Literal["jax", "onnx"] = "jax"  # A bundle for JAX alone, or two files of ONNX.
    # By default in the run folder: model.bundle, or denoiser.onnx and decoder.onnx.
    out: Path | None = None
    # The denoiser in 8 bits; of onnx int8 alone, a third file with convolutions of integers.
    quantize: Literal["int8", "w8a8", "fp8"] | None = None


def export(command: Export) -> list[Path]:
    """Writes the files; returns where."""
    check(command)
    Signals()
    if command.out is not None:
        onnx = command.format == "onnx"
        check_writable(command.out / DENOISER if onnx else command.out, "--out")
    finished, sampling = open_finished(run_folder(command)), command.sampling
    run, config, method = finished.run, finished.config, finished.method
    condition = finished.condition
    check_sampling(method, sampling, prefix="")
    check_exportable(method, config, sampling, command.format)
    if command.format == "onnx":
        check_packages()
        if command.quantize not in (None, "int8"):
            raise UserError(f"--quantize {command.quantize}: --format onnx has int8 alone.")
    folder, path = command.out or run.path, command.out or run.file("model.bundle")
    if isinstance(condition, FrozenCaptions):
        raise UserError(
            f"{run.path}: its captions are read by a frozen encoder (--text.tokens frozen), which "
            "a file does not hold. `make serve` serves the run itself."
        )
    trained = finished.networks(make_mesh(), command.sigma_rel)
    # From the mesh to one device.
    trained = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)) if eqx.is_array(a) else a, trained)
    network = trained.denoiser
    if command.format == "onnx":
        files = save_onnx(network, trained.space, trained.shape, example(condition), folder)
        if command.quantize is not None:
            states = States.of(method, sampling, trained, condition)
            files.append(quantize_onnx(folder, states.calibration()))
            rows = {"float32": files[0], "int8": files[-1]}
            say("\n" + states.table(method, rows))
        return files
    if command.quantize is not None:
        network = quantize(network, command.quantize)
    guided = trained.null is not None and sampling.guidance != 1
    by_map = sampling.solver == "map"
    model = Exportable(
        network,
        Decoder(trained.space),
        method.diffusion,
        None if by_map else make_solver(method, sampling),
        uniform_times(sampling.steps) if by_map else make_times(method, sampling),
        trained.shape,
        example(condition),
        trained.null if guided else None,
        sampling.guidance_interval,
        config.pictures.pad,
        method.flow_map,
    )
    said = settings(command, finished)
    save_bundle(model, path, said, platforms=PLATFORMS)
    say(f"{path}: {path.stat().st_size:,} bytes")
    return [path]


def check_exportable(method: Method, config: Config, sampling: SamplingConfig, form: str) -> None:
    """A file holds a network of one time or a flow map, and a fixed guidance scale."""
    if form == "onnx" and (config.objective == "scm" or sampling.solver == "map"):
        raise UserError(
            "--format onnx: a flow map has no file of ONNX, which holds a network of one time. "
            "Give --format jax, or another --solver; --objective scm has the map alone."
        )
    if config.objective == "scm" and sampling.solver != "map":
        raise UserError(
            f"--solver {sampling.solver}: a consistency function is sampled by its map. Give "
            "--solver map, or --objective scm, whose default it is."
        )
    if method.conditioned:
        raise UserError("--few.conditioned: a network whose condition is guidance has no file.")
    if sampling.guidance_schedule != "fixed" or sampling.internal_guidance != 1:
        raise UserError(
            "--guidance-schedule and --internal-guidance: a file's guidance has one scale, which "
            "whoever runs it chooses. Leave them out."
        )


def example(condition: Any) -> Any:
    """A condition of one image, as an array; None where there is none."""
    if isinstance(condition, Labels):
        return np.zeros((), np.int32)
    return np.asarray(condition.null, np.int32) if isinstance(condition, Captions) else None


def settings(command: Export, finished: Finished) -> dict[str, Any]:
    """What a program needs to know of the run beside the functions."""
    sampling, config, condition = command.sampling, finished.config, finished.condition
    said: dict[str, Any] = {"kind": condition.kind}
    if isinstance(condition, Labels):
        names = finished.about["class_names"]
        said |= {"classes": condition.classes, "names": list(map(str, names))}
    if isinstance(condition, Captions):
        said |= {"length": condition.max_length, "merges": condition.merges}
    return {
        "name": finished.run.path.name,
        "size": list(config.size),
        "channels": config.pictures.channels,
        "path": config.diffusion.path,
        "prediction": config.diffusion.prediction,
        "learned_range": config.diffusion.learned_range,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": sampling.shift,
        "map_alone": config.objective == "scm",
        "condition": said,
        "null": None if condition.null is None else np.asarray(condition.null).tolist(),
        "stream": stream_number("samples"),
        "quantize": command.quantize,
    }


def with_objective(args: Sequence[str]) -> Sequence[str]:
    """The arguments with the objective of the run that they name, whose usual solver it brings."""
    folder = given(args, "--run-dir")
    if not folder or given(args, "--objective"):
        return args
    with contextlib.suppress(UserError):  # which comes again when the run is read
        config = read_options(Config, RunFolder(Path(folder[0])))
        return [*args, "--objective", config.objective]
    return args


def main(args: Sequence[str] | None = None) -> None:
    args = with_objective(sys.argv[1:] if args is None else args)
    export(parsed(Export, args, prog="python -m experiments.export", description=__doc__))


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
