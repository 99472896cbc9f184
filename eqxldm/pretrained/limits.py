"""What a configuration from outside may ask for: refused by name, before anything is built."""

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from .layout import Tensor, WeightsError, array_leaves

# No number of a published configuration is near it, and none that says a size near the second.
LARGEST, LARGEST_SIZE = 2**24, 2**20
NESTED = 32
# What a model may have more than its file before they are compared name by name.
_SPARE = 10**8
# `num_layers`, `layers_per_block`, `transformer_layers_per_block`, `depth`, `decoder_blocks`, ...
_LAYERS = re.compile(r"(^|_)(layers|depth|blocks)($|_)")
_SIZES = re.compile("channels|width|dim|size|heads|shape|groups|embed|classes")
# Those that every level of a network has: what they say is multiplied.
_PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "blocks", "transformer_depth")


def check_config(config: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses numbers with which making the model would take minutes, or all memory.

    Every number is finite and at most `LARGEST`, sizes `LARGEST_SIZE`. The file's tensors have room
    for the layers: there are no more of these than of tensors, or than its longest stack of layers
    has, or 64.

    **Raises** `WeightsError` that names the field.

    >>> check_config({"num_layers": 10**7}, {}, "config.json")
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: config.json: num_layers = 10000000 is too much: the \
tensors beside it have room for 64 layers.
    """
    stacks = [t.shape[0] for name, t in tensors.items() if "stacked" in name and t.shape]
    room, levels, per_level = max([64, len(tensors), *stacks]), 1, {}
    for path, value in _fields(config, source):
        name = path.rpartition(".")[2]
        if isinstance(value, list):
            levels = max(levels, len(value))
            if len(value) > max(room, 1024):
                raise WeightsError(f"{source}: {path} has {len(value)} entries, which is too much.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        most = LARGEST_SIZE if _SIZES.search(name) else LARGEST
        if not math.isfinite(value) or abs(value) > most:
            raise WeightsError(f"{source}: {path} = {value} is too much: such go to {most}.")
        if not _LAYERS.search(name):
            continue
        if name in _PER_LEVEL:
            per_level[name] = max(per_level.get(name, 1), value)
        total = levels * math.prod(per_level.values()) if name in _PER_LEVEL else value
        if total > room:
            raise WeightsError(
                f"{source}: {path} = {value} is too much: the tensors beside it have room for "
                f"{room} layers."
            )


def check_count(model: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses a model of many more numbers than the file has.

    >>> import jax
    >>> check_count(jax.ShapeDtypeStruct((10**9,), "float32"), {}, "a.safetensors")
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: a.safetensors: its configuration is of a model with \
1000000000 numbers, the file has 0.
    """
    needed = sum(math.prod(leaf.shape) for leaf in array_leaves(model).values())
    there = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if needed > there + _SPARE:
        raise WeightsError(
            f"{source}: its configuration is of a model with {needed} numbers, the file has "
            f"{there}."
        )


def _fields(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """Every field of nested JSON by its path, also those of lists."""
    waiting = deque([("", value, 0)])
    while waiting:  # by depth: lists, which are levels, come before what is in them
        name, value, depth = waiting.popleft()
        if depth > NESTED:
            raise WeightsError(f"{source}: {name[:60]} is nested deeper than {NESTED}.")
        if isinstance(value, dict):
            inside = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
        elif isinstance(value, list):
            yield name, value
            inside = [(name, item) for item in value]
        else:
            yield name, value
            continue
        waiting += [(key, item, depth + 1) for key, item in inside]
