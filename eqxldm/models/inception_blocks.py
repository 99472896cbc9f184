"""The layers of Inception v3 as a table: names of the published file, widths, kernels."""

from typing import Literal, NamedTuple


class Unit(NamedTuple):
    """A convolution with its norm: the name, the width, the kernel, and what it is `of`.

    `of` is another unit of the block, `""` its input, or `pool`. `pooled`: in the stem, a maximum
    of 3 x 3 by 2 follows.
    """

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    of: str = ""
    stride: int = 1
    padded: bool = True
    pooled: bool = False


class Block(NamedTuple):
    """Its units, those whose outputs are joined, and what `pool` is.

    `average`: of 3 x 3; `largest`: the maximum of 3 x 3; `half`: the same by steps of 2.
    """

    units: tuple[Unit, ...]
    outputs: tuple[str, ...]
    pool: Literal["average", "largest", "half"]


ROW, COLUMN, SQUARE = (1, 7), (7, 1), (3, 3)

STEM = (
    Unit("Conv2d_1a_3x3", 32, SQUARE, stride=2, padded=False),
    Unit("Conv2d_2a_3x3", 32, SQUARE, padded=False),
    Unit("Conv2d_2b_3x3", 64, SQUARE, pooled=True),
    Unit("Conv2d_3b_1x1", 80),
    Unit("Conv2d_4a_3x3", 192, SQUARE, padded=False, pooled=True),
)


def _halving(name: str, out: int, of: str) -> Unit:
    return Unit(name, out, SQUARE, of, stride=2, padded=False)


def _block_a(pool: int) -> Block:
    """35 x 35."""
    units = (
        Unit("branch1x1", 64),
        Unit("branch5x5_1", 48),
        Unit("branch5x5_2", 64, (5, 5), "branch5x5_1"),
        Unit("branch3x3dbl_1", 64),
        Unit("branch3x3dbl_2", 96, SQUARE, "branch3x3dbl_1"),
        Unit("branch3x3dbl_3", 96, SQUARE, "branch3x3dbl_2"),
        Unit("branch_pool", pool, of="pool"),
    )
    outputs = ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool")
    return Block(units, outputs, "average")


def _block_b() -> Block:
    """35 x 35 to 17 x 17."""
    units = (
        _halving("branch3x3", 384, ""),
        Unit("branch3x3dbl_1", 64),
        Unit("branch3x3dbl_2", 96, SQUARE, "branch3x3dbl_1"),
        _halving("branch3x3dbl_3", 96, "branch3x3dbl_2"),
    )
    return Block(units, ("branch3x3", "branch3x3dbl_3", "pool"), "half")


def _block_c(width: int) -> Block:
    """17 x 17; `width` is that inside of the branches."""
    units = (
        Unit("branch1x1", 192),
        Unit("branch7x7_1", width),
        Unit("branch7x7_2", width, ROW, "branch7x7_1"),
        Unit("branch7x7_3", 192, COLUMN, "branch7x7_2"),
        Unit("branch7x7dbl_1", width),
        Unit("branch7x7dbl_2", width, COLUMN, "branch7x7dbl_1"),
        Unit("branch7x7dbl_3", width, ROW, "branch7x7dbl_2"),
        Unit("branch7x7dbl_4", width, COLUMN, "branch7x7dbl_3"),
        Unit("branch7x7dbl_5", 192, ROW, "branch7x7dbl_4"),
        Unit("branch_pool", 192, of="pool"),
    )
    outputs = ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool")
    return Block(units, outputs, "average")


def _block_d() -> Block:
    """17 x 17 to 8 x 8."""
    units = (
        Unit("branch3x3_1", 192),
        _halving("branch3x3_2", 320, "branch3x3_1"),
        Unit("branch7x7x3_1", 192),
        Unit("branch7x7x3_2", 192, ROW, "branch7x7x3_1"),
        Unit("branch7x7x3_3", 192, COLUMN, "branch7x7x3_2"),
        _halving("branch7x7x3_4", 192, "branch7x7x3_3"),
    )
    return Block(units, ("branch3x3_2", "branch7x7x3_4", "pool"), "half")


def _block_e(pool: Literal["average", "largest"]) -> Block:
    """8 x 8."""
    units = (
        Unit("branch1x1", 320),
        Unit("branch3x3_1", 384),
        Unit("branch3x3_2a", 384, (1, 3), "branch3x3_1"),
        Unit("branch3x3_2b", 384, (3, 1), "branch3x3_1"),
        Unit("branch3x3dbl_1", 448),
        Unit("branch3x3dbl_2", 384, SQUARE, "branch3x3dbl_1"),
        Unit("branch3x3dbl_3a", 384, (1, 3), "branch3x3dbl_2"),
        Unit("branch3x3dbl_3b", 384, (3, 1), "branch3x3dbl_2"),
        Unit("branch_pool", 192, of="pool"),
    )
    outputs = (
        "branch1x1",
        "branch3x3_2a",
        "branch3x3_2b",
        "branch3x3dbl_3a",
        "branch3x3dbl_3b",
        "branch_pool",
    )
    return Block(units, outputs, pool)


BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("largest"),
}
