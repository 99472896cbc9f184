"""Collects nothing without torch and diffusers; sums up the errors at the end of a run."""

import os
from collections import defaultdict
from importlib.util import find_spec

THERE = all(find_spec(name) for name in ("torch", "diffusers"))
collect_ignore_glob = [] if THERE else ["*.py"]

if THERE:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)  # pytest has a process a core


def pytest_report_header():
    return f"SEED={os.environ.get('SEED', 0)} draws the configurations" if THERE else None


def pytest_terminal_summary(terminalreporter):
    found = defaultdict(list)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, errors in report.user_properties:
                found[name].append(errors)
    if found:
        seed = os.environ.get("SEED", 0)
        terminalreporter.section(f"largest relative error, SEED={seed}")
    for name, errors in sorted(found.items()):
        kinds = {kind: max(e.get(kind, 0.0) for e in errors) for kind in errors[0]}
        figures = "  ".join(f"{kind} {error:.1e}" for kind, error in kinds.items())
        terminalreporter.write_line(f"{name:24} {len(errors)} configurations  {figures}")
