"""`python -m benchmarks.aot.compile tpu CASE`: one case, its row as JSON on stdout."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from . import gpus, hlo, targets

CANARY = "canary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("platform", choices=("tpu", "gpu"))
    parser.add_argument("case", help=f"one of targets.py, or {CANARY}")
    parser.add_argument("--hlo", type=Path, help="write the optimised HLO here")
    args = parser.parse_args()
    cases = targets.TPU if args.platform == "tpu" else targets.GPU
    prepare(args.platform)
    if args.case == CANARY:
        canary(cases[0])
        return
    wanted = next(case for case in cases if case.name == args.case)
    print(json.dumps(row(args.platform, wanted, args.hlo)))


def prepare(platform: str) -> None:
    """Sets what the compilers read; before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is computed while tracing is computed here
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if platform == "tpu":
        # No machine of Google's is asked about, and the compiler's warnings come to stderr.
        os.environ |= dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
        os.environ |= dict(TPU_ACCELERATOR_TYPE="v5litepod-1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        os.environ |= dict(TPU_STDERR_LOG_LEVEL="1", TPU_LOG_DIR="disabled")


def row(platform: str, case: targets.Case, save: Path | None = None) -> dict[str, Any]:
    """Compiles a case and reads the result."""
    import jax

    from eqxldm import sharding

    from . import presets

    mesh = sharding.make_mesh(case.mesh, devices(platform, case))
    program = presets.build(case.preset, mesh, **case.options)
    with jax.set_mesh(mesh):
        lowered = program.lower()
        begin = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - begin
    text = compiled.as_text() or ""
    if save:
        save.write_text(text)
    return measure(case, mesh.size, program, compiled.memory_analysis(), text) | dict(
        compile_seconds=round(seconds, 1)
    )


def canary(case: targets.Case) -> None:
    """Compiles what must be reported as involuntary full rematerialisation, on 8 devices of a TPU.

    From a mesh's columns to its rows, as in https://github.com/openxla/xla/issues/15207.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    found = devices("tpu", case._replace(slice="v5e:2x4"))
    mesh = Mesh(np.array(found).reshape(4, 2), ("x", "y"))
    columns = NamedSharding(mesh, PartitionSpec("y", None, "x"))
    rows = NamedSharding(mesh, PartitionSpec(None, ("x", "y"), None))
    a = jax.ShapeDtypeStruct((16, 16, 16), "float32", sharding=columns)
    c = jax.ShapeDtypeStruct((16, 16, 16), "float32", sharding=rows)
    moved = lambda a, c: c + jax.lax.with_sharding_constraint(a + a, rows)
    jax.jit(moved, out_shardings=rows).lower(a, c).compile()


def devices(platform: str, case: targets.Case) -> list[Any]:
    """The devices of a slice that is not there."""
    from jax.experimental import topologies

    chip, topology = case.slice.split(":")
    if platform == "tpu":
        options = dict(chip_config_name=case.chip.config) if case.chip.config else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=case.slice, **options)
    else:
        config = gpus.target_config(chip)
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=chip, topology=topology, target_config=config
        )
    return list(found.devices)


def measure(case: targets.Case, count: int, program: Any, memory: Any, text: str) -> dict[str, Any]:
    """The row of a compiled program."""
    module = hlo.parse(text)
    found = hlo.collectives(module)
    flops, cycles, chip = program.flops / count, hlo.cycles(module), case.chip
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    result: dict[str, Any] = dict(
        name=case.name,
        mesh=case.mesh,
        options=case.options,
        devices=count,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        memory_bytes=int(chip.memory),
        collectives=hlo.bytes_by_kind(found),
        sent_bytes=hlo.sent_bytes(found),
        flops=round(flops),
        unknown_loops=len(hlo.unknown_loops(module)),
        gathered_whole=[
            f"{c.operation or c.computation} {list(c.arrays[0].dims)}"
            for c in hlo.gathered_whole(found, program.stacked, program.others, program.spans)
        ],
        cudnn_attention="__cudnn$fmha" in text,
    )
    # Of a kernel (Pallas) the compiler has no estimate, so that the sum would leave it out.
    if chip.per_cycle and cycles and "tpu_custom_call" not in text:
        result |= dict(cycles=cycles, seconds=cycles / chip.clock)
        result |= dict(mfu=flops / (cycles * chip.per_cycle))
    result |= dict(seconds_of_links=result["sent_bytes"] / chip.links)
    return result


if __name__ == "__main__":
    main()
