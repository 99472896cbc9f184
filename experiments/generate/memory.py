"""The memory that a run needs, and the memory that is there."""

from typing import Any

import jax

from eqxldm.devices import GIB, device_memory, memory_bytes

from ..train.terminal import UserError


def available() -> int | None:
    """Bytes that one device, or on a CPU the machine, still has; None where nobody says."""
    counted = device_memory()
    if counted is not None and "limit" in counted:
        return counted["limit"] - counted["in_use"]
    if (known := memory_bytes(jax.devices()[0].device_kind)) is not None:
        return known
    return _host_memory()


def _host_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:  # no Linux
        pass
    return None


def show(count: float) -> str:
    """
    >>> show(3 * 2**30), show(2**20)
    ('3.0 GiB', '1.0 MiB')
    """
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def check_fits(what: str, needed: int, advice: str) -> None:
    """Refuses what needs more than there is."""
    there = available()
    if there is not None and needed > there:
        raise UserError(f"{what} needs {show(needed)}, and {show(there)} are there. {advice}")


def step_bytes(step: Any, *arguments: Any) -> int:
    """The temporary memory of a jitted step, as the compiler counts it; 0 where it does not."""
    compiled = step.lower(*arguments).compile()
    analysis = getattr(compiled, "compiled", compiled).memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)
