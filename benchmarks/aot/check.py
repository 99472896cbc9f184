"""`python -m benchmarks.aot.check tpu`: what the compiler says of the presets on slices of a pod.

Compiles each case of `targets.py` for a slice that need not be there, from the code that a run
uses, each in a process of its own. Prints one table and compares it with the committed one in
benchmarks/results: exit code 1, with a line for each reason, if a case does not compile or fit, if
the compiler reports involuntary full rematerialisation, if a block's parameter is gathered outside
its block, or if the peak of memory or the bytes sent grew by more than a tenth.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import targets
from .compile import CANARY

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GROWTH = 1.1
SECONDS = 1800  # of one compile
SHORT_KINDS = dict(zip(
    ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"),
    ("ag", "rs", "ar", "aa", "cp"), strict=True,
))  # fmt: skip
UNHEARD = "The compiler's warnings do not arrive: a program that must give one gave none."
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("platform", choices=("tpu", "gpu"))
    parser.add_argument("--short", action="store_true", help="one v5e and one v6e slice")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--update", action="store_true", help="write the committed table")
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    args = parser.parse_args()
    cases = targets.TPU if args.platform == "tpu" else targets.GPU
    cases = [case for case in cases if re.search(args.only, case.name)]
    if args.short:
        cases = [case for case in cases if case.name in targets.SHORT]
    if not cases:
        raise SystemExit(f"No case matches; --list names those of {args.platform}.")
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    committed = RESULTS / f"{args.platform}.json"
    before = {row["name"]: row for row in _read(committed)}
    rows, begin = [], time.time()
    print(header(args.platform), flush=True)
    names = {case.name for case in (targets.TPU if args.platform == "tpu" else targets.GPU)}
    kept = {name: row for name, row in before.items() if name in names}
    for case in cases:
        rows.append(compiled(args.platform, case))
        print(line(args.platform, rows[-1]), flush=True)
        kept[case.name] = stored(rows[-1])
        if args.update:  # after each, so that an interruption loses one
            committed.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    print(LEGEND)
    if args.platform == "tpu":
        print(PROXY)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    heard = args.platform == "gpu" or canary_heard()
    wrong = [] if heard else [UNHEARD]
    wrong += [reason for row in rows for reason in reasons(row, before.get(row["name"]))]
    for reason in wrong:
        print(reason, file=sys.stderr)
    print(f"{len(rows)} compiled in {time.time() - begin:.0f} s, {len(wrong)} complaints.")
    raise SystemExit(1 if wrong else 0)


def compiled(platform: str, case: targets.Case) -> Row:
    """The row of a case, compiled in another process; a crash of the compiler is a row too."""
    command = [sys.executable, "-m", "benchmarks.aot.compile", platform, case.name]
    base: Row = dict(name=case.name, mesh=case.mesh, options=case.options)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return base | dict(error=f"not compiled within {SECONDS} s")
    base["involuntary"] = involuntary(done.stderr)
    if done.returncode:
        return base | dict(error=last_error(done.stderr, done.returncode))
    return base | json.loads(done.stdout.splitlines()[-1])


def canary_heard() -> bool:
    """Whether a program that must be reported is: else no report would mean nothing."""
    command = [sys.executable, "-m", "benchmarks.aot.compile", "tpu", CANARY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    return involuntary(done.stderr) > 0


def involuntary(log: str) -> int:
    """How often a compiler's log reports involuntary full rematerialisation.

    >>> involuntary("W0 spmd.cc:1] [SPMD] Involuntary full rematerialization. The compiler")
    1
    """
    return len(re.findall(r"involuntary full rematerialization", log, re.IGNORECASE))


def last_error(log: str, code: int) -> str:
    """The reason of a failed process in one line.

    >>> last_error("Traceback\\n  File x\\nValueError: no such mesh\\n  hint\\n", 1)
    'ValueError: no such mesh'
    """
    found = re.search(r"Ran out of memory in memory space hbm[^\n]*", log)
    if found:
        return found[0].strip()
    errors = re.findall(r"^(?:[\w.]*(?:Error|Exception)\b.*|F\d{4} .*)$", log, re.MULTILINE)
    return (errors[-1] if errors else f"the compiler ended with code {code}")[:300]


def reasons(row: Row, before: Row | None) -> list[str]:
    """Why a row fails, one line each.

    >>> row = dict(name="a", peak_bytes=10, memory_bytes=99, sent_bytes=0)
    >>> reasons(row, None), reasons(row, dict(peak_bytes=8))
    ([], ['a: peak memory grew by 25 %, from 0.00 to 0.00 GiB a chip; --update accepts it.'])
    """
    name = row["name"]
    if "error" in row:
        return [f"{name}: {row['error']}"]
    found = []
    if row["peak_bytes"] > row["memory_bytes"]:
        found.append(
            f"{name}: needs {gib(row['peak_bytes'])} GiB a chip of {gib(row['memory_bytes'])}."
        )
    if row.get("involuntary"):
        found.append(f"{name}: {row['involuntary']} involuntary full rematerialisations.")
    for gathered in row.get("gathered_whole", []):
        found.append(f"{name}: a block's parameter is gathered outside its block: {gathered}")
    if row.get("unknown_loops"):
        found.append(f"{name}: {row['unknown_loops']} loops of unknown length: cycles count once.")
    if row.get("options", {}).get("attention") == "cudnn" and not row["cudnn_attention"]:
        found.append(f"{name}: attention is not cuDNN's.")
    for key, what in (("peak_bytes", "peak memory"), ("sent_bytes", "traffic")):
        old = (before or {}).get(key, 0)
        if old and row[key] > GROWTH * old:
            found.append(
                f"{name}: {what} grew by {100 * (row[key] / old - 1):.0f} %, from {gib(old)} to "
                f"{gib(row[key])} GiB a chip; --update accepts it."
            )
    return found


LEGEND = """
GiB a device: what comes in, what is made on the way, the peak beside the memory. Collectives: bytes
of the whole arrays, GB a step; ag all-gather, rs reduce-scatter, ar all-reduce, aa all-to-all, cp
collective-permute. TFLOP: a device, of the model, nothing recomputed."""
PROXY = """Cycles and MFU are the compiler's estimate, without waiting for other chips: they rank
variants and promise no time."""


def header(platform: str) -> str:
    columns = "preset | slice | mesh | batch | in | made | peak | collectives | compile | TFLOP"
    columns += " | cycles | MFU |" if platform == "tpu" else " | cuDNN |"
    return f"| {columns}\n|{'---|' * columns.count('|')}"


def line(platform: str, row: Row) -> str:
    """A row of the table, in Markdown."""
    start = f"| {' | '.join(row['name'].rsplit(' ', 2))} | {row['options'].get('batch', '')} |"
    if "error" in row:
        return f"{start} {row['error'][:120]} |"
    moved = ", ".join(f"{SHORT_KINDS[k]} {v / 1e9:.2f}" for k, v in row["collectives"].items())
    cells = [
        gib(row["argument_bytes"]),
        gib(row["temporary_bytes"]),
        f"{gib(row['peak_bytes'])} of {row['memory_bytes'] / 2**30:.0f}",
        moved or "none",
        f"{row['compile_seconds']:.0f} s",
        f"{row['flops'] / 1e12:.2f}",
    ]
    if platform == "gpu":
        cells.append("yes" if row["cudnn_attention"] else "no")
    elif "cycles" in row:
        cells += [f"{row['cycles'] / 1e6:.0f} M", f"{row['mfu']:.0%}".replace("%", " %")]
    else:
        cells += ["no estimate"] * 2  # a kernel
    return f"{start} {' | '.join(cells)} |"


def stored(row: Row) -> Row:
    """What the committed table keeps: not the seconds of this machine."""
    return {key: value for key, value in row.items() if key != "compile_seconds"}


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _read(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
