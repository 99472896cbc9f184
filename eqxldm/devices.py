"""What makers say of accelerators, the memory in use, and what must not run at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

GIB = 2**30


class _Device(NamedTuple):
    """Dense bfloat16 FLOP/s (products, sums in float32) and memory of one JAX device."""

    flops: float
    memory: float


# The key is `device_kind`. NVIDIA: data sheets, without sparsity; where only the figure with
# sparsity is printed, half of it. Google: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x};
# the names are libtpu's; jax.experimental.pallas.tpu.get_tpu_info_for_chip has the same figures.
_DEVICES = {
    "NVIDIA A100-PCIE-40GB": _Device(312e12, 40 * GIB),
    "NVIDIA A100-SXM4-40GB": _Device(312e12, 40 * GIB),
    "NVIDIA A100 80GB PCIe": _Device(312e12, 80 * GIB),
    "NVIDIA A100-SXM4-80GB": _Device(312e12, 80 * GIB),
    "NVIDIA H100 PCIe": _Device(756e12, 80 * GIB),
    "NVIDIA H100 NVL": _Device(835e12, 94 * GIB),
    "NVIDIA H100 80GB HBM3": _Device(989e12, 80 * GIB),  # SXM
    "NVIDIA H800": _Device(989e12, 80 * GIB),
    "NVIDIA H200": _Device(989e12, 141 * GIB),
    "NVIDIA H200 NVL": _Device(835e12, 141 * GIB),
    "NVIDIA GH200 480GB": _Device(989e12, 96 * GIB),
    "NVIDIA B200": _Device(2250e12, 180 * GIB),
    "NVIDIA GB200": _Device(2500e12, 186 * GIB),  # one of the two of a superchip
    "NVIDIA L4": _Device(121e12, 24 * GIB),
    "NVIDIA L40": _Device(181e12, 48 * GIB),
    "NVIDIA L40S": _Device(362e12, 48 * GIB),
    "NVIDIA A10": _Device(125e12, 24 * GIB),
    "NVIDIA A10G": _Device(70e12, 24 * GIB),
    "NVIDIA RTX A6000": _Device(154.8e12, 48 * GIB),
    "NVIDIA RTX 6000 Ada Generation": _Device(364.2e12, 48 * GIB),
    "NVIDIA GeForce RTX 3090": _Device(71e12, 24 * GIB),
    "NVIDIA GeForce RTX 4090": _Device(165.2e12, 24 * GIB),
    "NVIDIA GeForce RTX 5090": _Device(209.5e12, 32 * GIB),
    # A device is one of the chip's two cores: half the chip's figures.
    "TPU v2": _Device(46e12 / 2, 16 * GIB / 2),
    "TPU v3": _Device(123e12 / 2, 32 * GIB / 2),
    "TPU7x": _Device(2307e12 / 2, 192 * GIB / 2),
    # A device is a chip. Of v4 and v5p it has two cores that work as one; programs for v4 that are
    # compiled without a TPU are for cores, of half of this.
    "TPU v4": _Device(275e12, 32 * GIB),
    "TPU v5": _Device(459e12, 95 * GIB),
    "TPU v5 lite": _Device(197e12, 16 * GIB),
    "TPU v6 lite": _Device(918e12, 32 * GIB),
}
# Names that other versions, or their documentation, use for the same.
_ALIASES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "TPU v7x": "TPU7x",
    "TPU7": "TPU7x",
}


def peak_flops(device_kind: str, dtype: Any = "bfloat16") -> float | None:
    """The dense FLOP/s of one JAX device, as the maker gives it; None where it is not known.

    A multiplication and an addition are two. `dtype` is that of the products' operands: float32
    means what XLA does with it by default, TF32 on a GPU (half the rate of bfloat16) and one
    bfloat16 pass on a TPU.

    >>> peak_flops("NVIDIA H200"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    device = _find(device_kind)
    if device is None:
        return None
    gpu = device_kind.startswith("NVIDIA")
    shares = {"bfloat16": 1.0, "float16": 1.0 if gpu else None, "float32": 0.5 if gpu else 1.0}
    share = shares.get(jnp.dtype(dtype).name)
    return None if share is None else share * device.flops


def memory_bytes(device_kind: str) -> int | None:
    """The memory of one JAX device, as the maker gives it; a program gets somewhat less.

    >>> memory_bytes("TPU v5 lite") // 2**30, memory_bytes("cpu")
    (16, None)
    """
    device = _find(device_kind)
    return None if device is None else int(device.memory)


def device_memory() -> dict[str, int] | None:
    """`{"in_use", "peak", "limit"}` in bytes, of the local device with the highest peak.

    None where the backend does not count, as on a CPU. `peak` is since the process began.

    >>> memory = device_memory()
    """
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not counted:
        return None
    fullest = max(counted, key=lambda stats: stats.get("peak_bytes_in_use", 0))
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: int(fullest[key]) for name, key in names.items() if key in fullest}


def _find(device_kind: str) -> _Device | None:
    return _DEVICES.get(_ALIASES.get(device_kind, device_kind))


def one_program_at_a_time() -> bool:
    """Whether a program must have ended before the next one with collectives is dispatched.

    So it is between processes on CPUs: programs run there at the same time, in an order that may
    differ between the processes, and the collectives of one wait for those of another for ever.

    >>> one_program_at_a_time()
    False
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"
