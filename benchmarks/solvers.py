"""`make bench-solvers`: what a solver costs beside the network, in passes over the state.

Each solver runs over a state of a million numbers with one matrix product as its network. In the
compiled loop the operations as large as the state are counted (fusions, and the copies that the
loop's buffers need), and the time of a step, less that of the product alone, is compared with that
of one copy of the state. Random numbers are a pass too, an expensive one: listed apart.
"""

import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import eqxldm as ex

SIZE, WIDTH, STEPS, REPEATS = 1 << 20, 64, 20, 15
SOLVERS = {
    "DDIM()": ex.DDIM(),
    "Euler()": ex.Euler(),
    "Heun()": ex.Heun(),
    "DPMSolverPP2M()": ex.DPMSolverPP2M(),
    "DPMSolverPP3M()": ex.DPMSolverPP3M(),
    "UniPC()": ex.UniPC(),
    "DDPM()": ex.DDPM(),
    "DDIM(1.0)": ex.DDIM(1.0),
    "EulerMaruyama()": ex.EulerMaruyama(),
    "DPMSolverPP2M(1.0)": ex.DPMSolverPP2M(1.0),
}
PATH, TIMES = ex.CosineVP(), ex.uniform_times(STEPS, start=0.98)


def network(x_t, t, cond, *, key=None):
    return (x_t.reshape(-1, WIDTH) @ cond).reshape(x_t.shape)


def run(solver, x, weight, key):
    return ex.sample(network, ex.Diffusion(PATH, ex.predict_v), solver, TIMES, x, weight, key=key)


def alone(calls, x, weight, key):
    """The network as often, and nothing else."""
    body = lambda x, _: (network(x, None, weight), None)
    return jax.lax.scan(body, x, length=calls)[0]


def noises(x, weight, key):
    """As many random states as there are steps."""
    body = lambda x, i: (jax.random.normal(jax.random.fold_in(key, i), x.shape), None)
    return jax.lax.scan(body, x, jnp.arange(STEPS))[0]


def large_operations(compiled) -> tuple[int, int]:
    """`(fusions, copies)` as large as the state in the loop, but for the network's product."""
    fusions = copies = 0
    network = re.compile(r"kind=kCustom| dot\(|custom-call\(")
    for computation in re.split(r"\n(?=%|ENTRY)", compiled.as_text()):
        if re.match(r"ENTRY|%?fused|%?wrapped", computation) or not network.search(computation):
            continue
        for line in computation.splitlines():
            if network.search(line):
                continue
            shape = re.search(r"= \(?f32\[([\d,]+)\]", line)
            if shape and math.prod(map(int, shape.group(1).split(","))) == SIZE:
                fusions += " fusion(" in line
                copies += " copy(" in line
    return fusions, copies


def milliseconds(functions: dict, *args) -> dict[str, float]:
    """Medians, the functions taking turns, waiting for the device."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(*args))
    for _ in range(REPEATS):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*args))
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, (SIZE,))
    weight = jnp.eye(WIDTH)
    compiled = {
        name: jax.jit(lambda x, w, k, s=s: run(s, x, w, k)).lower(x, weight, key).compile()
        for name, s in SOLVERS.items()
    }
    calls = {name: ex.nfe(PATH, s, TIMES) for name, s in SOLVERS.items()}
    functions = dict(compiled)
    for n in sorted(set(calls.values())):
        function = jax.jit(lambda x, w, k, n=n: alone(n, x, w, k))
        functions[f"network {n}"] = function.lower(x, weight, key).compile()
    functions["noise"] = jax.jit(noises)
    functions["copy"] = jax.jit(lambda x, w, k: x + 1)
    medians = milliseconds(functions, x, weight, key)

    scale = 1e6 / SIZE
    copy, noise = medians["copy"] * scale, medians["noise"] / STEPS * scale
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {SIZE} float32")
    print(f"one copy: {copy:.3f} ns an element; normal noise: {noise:.3f} ns an element")
    own = large_operations(functions[f"network {STEPS}"])
    print(f"the network's own loop: {own[0]} fusions, {own[1]} copies, which are not subtracted")
    print(f"{'solver':<20}{'fusions':>8}{'copies':>8}{'ns/element/call':>17}{'copies of time':>16}")
    rows = []
    for name in SOLVERS:
        fusions, copies = large_operations(compiled[name])
        network_alone = medians[f"network {calls[name]}"] / calls[name] * scale - own[1] * copy
        spent = medians[name] / calls[name] * scale - network_alone
        print(f"{name:<20}{fusions:>8}{copies:>8}{spent:>17.3f}{spent / copy:>16.1f}")
        rows.append(dict(solver=name, fusions=fusions, copies=copies, ns=spent, copy_ns=copy))
    if any(row["fusions"] > 2 for row in rows):
        raise SystemExit("A solver takes more than two passes over the state.")
    if out := os.environ.get("OUT"):
        Path(out, "solvers.json").write_text(json.dumps(dict(noise_ns=noise, rows=rows), indent=1))


if __name__ == "__main__":
    main()
