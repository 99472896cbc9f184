"""The chips and slices to compile for, and what is compiled for each."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One device as JAX counts them: a chip, of TPU7x one of its two halves.

    `peak` in dense bfloat16 FLOP/s, `memory` in bytes, `bandwidth` to it and `links` to other chips
    in bytes a second. `per_cycle` are the FLOPs of all its matrix units in one cycle, so that
    `clock = peak / per_cycle` turns the compiler's cycles into seconds.
    """

    kind: str
    peak: float
    memory: float
    bandwidth: float
    links: float
    per_cycle: int = 0
    config: str = ""

    @property
    def clock(self) -> float:
        return self.peak / self.per_cycle


# Peak, memory, bandwidth and links: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; links are
# those of all neighbours together, one direction. `per_cycle`: 2 FLOPs a cell of a systolic array,
# 128 x 128 before v6e and 256 x 256 from then on, four of them a core (v4: Jouppi et al. 2023,
# table 4, at 1.05 GHz). For v6e and TPU7x so many give clocks of 1.75 and 2.2 GHz, and no plain
# product comes out above the peak. A v4 chip is one device with two cores ("megacore").
GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.2e12, 150e9, 8 * 2 * 128**2,
               "megacore"),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 0.82e12, 100e9, 4 * 2 * 128**2),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2.76e12, 300e9, 8 * 2 * 128**2),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1.64e12, 224e9, 4 * 2 * 256**2),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, 96 * GIB, 3.69e12, 300e9, 4 * 2 * 256**2),
    "h100": Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 450e9),
}  # fmt: skip


class Case(NamedTuple):
    """A preset on a slice: `chip:topology`, the sizes of the mesh, the preset's own options."""

    preset: str
    slice: str
    mesh: dict[str, int]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"{self.preset} {self.slice} {mesh}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.slice.split(":")[0]]


def case(preset: str, where: str, mesh: str, **options: Any) -> Case:
    """A case; the mesh as in `--mesh`, an axis that is not named being 1."""
    sizes = dict(part.split("=") for part in mesh.split(","))
    return Case(preset, where, {axis: int(size) for axis, size in sizes.items()}, options)


# The published batch of 256 where it fills the chips, more on large slices. At least eight images
# a chip for the autoencoder: with fewer the compiler cuts each into strips to fill its batch axis.
TPU = [
    case("DiT-XL/2", "v5e:2x2", "fsdp=4", batch=256),
    case("DiT-XL/2", "v5e:2x4", "fsdp=8", batch=256),
    case("DiT-XL/2", "v5e:4x4", "fsdp=8,tensor=2", batch=256),
    case("DiT-XL/2", "v5e:8x8", "data=8,fsdp=8", batch=1024),
    case("DiT-XL/2", "v5e:16x16", "data=16,fsdp=16", batch=4096),
    case("DiT-XL/2", "v4:2x2x1", "fsdp=4", batch=256),
    case("DiT-XL/2", "v4:4x4x4", "data=8,fsdp=8", batch=2048),
    case("DiT-XL/2", "v5p:2x2x1", "fsdp=4", batch=256),
    case("DiT-XL/2", "v5p:4x8x8", "data=32,fsdp=8", batch=8192),
    case("DiT-XL/2", "v6e:2x2", "fsdp=4", batch=256),
    case("DiT-XL/2", "v6e:2x4", "fsdp=8", batch=256),
    case("DiT-XL/2", "v6e:16x16", "data=16,fsdp=16", batch=4096),
    case("DiT-XL/2", "tpu7x:2x2x1", "fsdp=8", batch=256),
    case("DiT-XL/2", "tpu7x:4x8x8", "data=64,fsdp=8", batch=8192),
    case("DiT-B/2", "v5e:2x2", "data=4", batch=256),
    case("DiT-B/2", "v6e:2x4", "data=8", batch=256),
    case("Modern-XL/2", "v5e:2x4", "fsdp=8", batch=256),
    case("Modern-XL/2", "v6e:2x4", "fsdp=8", batch=256),
    case("autoencoder", "v5e:2x4", "data=8", batch=64),
    case("autoencoder", "v6e:2x4", "fsdp=8", batch=64),
    case("autoencoder", "v4:2x2x1", "fsdp=4", batch=32),
    case("autoencoder", "v5p:2x2x1", "fsdp=4", batch=96),
    case("autoencoder", "tpu7x:2x2x1", "fsdp=8", batch=96),
    case("autoencoder", "v5e:16x16", "data=32,fsdp=8", batch=2048),
    case("sampler", "v5e:2x4", "data=8", batch=256),
    case("sampler", "v4:2x2x1", "data=4", batch=256),
    case("sampler", "v5p:2x2x1", "data=4", batch=256),
    case("sampler", "v6e:2x4", "data=8", batch=256),
    case("sampler", "tpu7x:2x2x1", "data=8", batch=512),
    # Published networks, at the sizes of their authors where the slice has the memory.
    case("sample:Wan-1.3B", "v5e:2x2", "tensor=4", batch=1, steps=50, sequence_axis="tensor"),
    case("sample:Wan-1.3B", "v6e:2x2", "tensor=4", batch=1, steps=50, sequence_axis="tensor"),
    case("train:Wan-1.3B", "v5e:2x4", "fsdp=8", batch=8, size=(33, 480, 832)),
    case("train:Wan-1.3B", "v6e:2x4", "fsdp=8", batch=8),
    case("sample:SD3-medium", "v5e:2x4", "data=8", batch=8, steps=28),
    case("sample:SD3-medium", "v6e:2x4", "data=8", batch=16, steps=28),
    case("train:SD3-medium", "v5e:2x4", "fsdp=8", batch=16),
    case("train:SD3-medium", "v6e:2x4", "fsdp=8", batch=32),
    case("sample:FLUX.1-dev", "v5e:2x4", "tensor=8", batch=1, steps=28),
    case("sample:FLUX.1-dev", "v6e:2x4", "tensor=8", batch=1, steps=28),
    case("sample:LLaDA-8B", "v5e:2x4", "tensor=8", batch=1, length=512, steps=256),
    case("sample:LLaDA-8B", "v6e:2x4", "tensor=8", batch=1, length=512, steps=256),
]
SHORT = ("DiT-XL/2 v5e:2x4 fsdp=8", "DiT-XL/2 v6e:2x4 fsdp=8")

GPU = [
    case("DiT-XL/2", "h100:1x1x1", "data=1", batch=256, attention="cudnn"),
    case("DiT-XL/2", "h100:1x1x8", "data=8", batch=2048, attention="cudnn"),
    case("DiT-XL/2", "h100:1x1x8", "fsdp=8", batch=2048, attention="cudnn"),
    case("DiT-XL/2", "h200:1x1x1", "data=1", batch=256, attention="cudnn"),
    case("DiT-XL/2", "h200:1x1x8", "fsdp=8", batch=2048, attention="cudnn"),
    case("sampler", "h200:1x1x1", "data=1", batch=128, attention="cudnn"),
]
