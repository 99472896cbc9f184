"""What an optimised HLO text says: loops, estimated cycles, collectives.

Pure functions of the text that `jax.stages.Compiled.as_text()` gives. A loop's body counts as often
as it runs, a branch as if it were always taken.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128, "token": 0,
}  # fmt: skip
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Attributes that name a computation which the instruction runs. The function of a reduction
# (`to_apply`) is one scalar operation; only `call` runs one as a whole.
CALLS = re.compile(
    r"(?:calls|called_computations|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An element type and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * BITS.get(self.dtype, 32) // 8


class Instruction(NamedTuple):
    """`name = result opcode(arguments), attributes`."""

    name: str
    result: tuple[Array, ...]  # of a tuple, however nested, its arrays in order
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return NAME.findall(self.arguments) or [a.split()[-1] for a in self.arguments.split(", ")]

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, where it made one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def operation(self) -> str:
        """The operation of the program that this comes from, as JAX named it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Module(NamedTuple):
    """The computations by name, each a list of instructions of which the last is the result."""

    entry: str
    computations: dict[str, list[Instruction]]


class Collective(NamedTuple):
    """One collective operation, run `times` times, over groups of `group` devices.

    `arrays` are the whole ones: what an all-gather puts out, what a reduction takes in.
    """

    kind: str
    arrays: tuple[Array, ...]
    times: int
    group: int
    operation: str
    computation: str

    @property
    def bytes(self) -> int:
        """Of all times together."""
        return self.times * sum(array.bytes for array in self.arrays)


def parse(text: str) -> Module:
    """The module of an HLO text.

    >>> module = parse(EXAMPLE)
    >>> module.entry, [i.opcode for i in module.computations["main"]]
    ('main', ['parameter', 'while'])
    """
    entry, computations, body = "", {}, None
    for line in text.splitlines():
        if line[:1] not in (" ", "\t", "}", "") and line.endswith("{") and "->" in line:
            first = line.removeprefix("ENTRY ").split(" ", 1)[0]
            body = computations[first.lstrip("%")] = []
            entry = first.lstrip("%") if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and " = " in line:
            body.append(_instruction(line))
    if not entry:
        raise ValueError("parse: the text has no ENTRY computation, so it is no HLO module.")
    return Module(entry, computations)


def walk(module: Module, *, into_estimates: bool = True) -> Iterator[tuple[Instruction, str, int]]:
    """`(instruction, computation, times)` of all that runs, from the entry on.

    Without `into_estimates` not into what an instruction with its own estimate of cycles calls, nor
    into what another core runs meanwhile.
    """

    def visit(name: str, times: int) -> Iterator[tuple[Instruction, str, int]]:
        for instruction in module.computations[name]:
            yield instruction, name, times
            control = instruction.opcode in ("while", "conditional", "call")
            beside = instruction.opcode == "call-start"  # on another core
            if into_estimates or control or (instruction.cycles is None and not beside):
                for called, n in _called(module, name, instruction):
                    yield from visit(called, times * n)

    return visit(module.entry, 1)


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often the body of a `while` of `computation` runs; None if that cannot be seen.

    As the compiler noted it (`known_trip_count`), else from the counter: it is compared with a
    constant in the condition, starts from a constant and grows by one.

    >>> module = parse(EXAMPLE)
    >>> trip_count(module, "main", module.computations["main"][-1])
    3
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = _table(module, _attribute(loop, "condition"))
    body = _table(module, _attribute(loop, "body"))
    test, result = condition[""], body[""]
    if test.opcode != "compare" or result.opcode != "tuple":
        return None
    counter, limit = (_resolve(condition, name) for name in test.operands)
    strict = "direction=LT" in test.attributes
    if not strict and "direction=LE" not in test.attributes:
        return None
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = int(_attribute(counter, "index"))
    update = _resolve(body, result.operands[index])
    if update.opcode != "add":
        return None
    old, step = (_resolve(body, name) for name in update.operands)
    if old.opcode == "constant":
        old, step = step, old
    same = old.opcode == "get-tuple-element" and int(_attribute(old, "index")) == index
    if not same or step.opcode != "constant":
        return None
    here = _table(module, computation)
    before = _resolve(here, loop.operands[0])
    start = _resolve(here, before.operands[index]) if before.opcode == "tuple" else before
    first = int(start.arguments) if start.opcode == "constant" else 0
    distance = int(limit.arguments) - first + (not strict)
    return max(0, math.ceil(distance / int(step.arguments)))


def unknown_loops(module: Module) -> list[str]:
    """The names of the loops whose trip count cannot be seen; they count as one."""
    return [
        i.name
        for i, computation, _ in walk(module)
        if i.opcode == "while" and trip_count(module, computation, i) is None
    ]


def cycles(module: Module) -> int:
    """The compiler's estimates summed over all that runs, loops as often as they do.

    >>> cycles(parse(EXAMPLE))
    30
    """
    return sum(times * (i.cycles or 0) for i, _, times in walk(module, into_estimates=False))


def cycles_by_operation(module: Module) -> Counter[str]:
    """The same for each operation of the program: where the time goes."""
    found: Counter[str] = Counter()
    for i, _, times in walk(module, into_estimates=False):
        if i.cycles:
            found[i.operation or i.opcode] += times * i.cycles
    return found


def collectives(module: Module) -> list[Collective]:
    """Every collective operation that runs, once each.

    An asynchronous one counts where it starts. What a TPU spreads over several fusions is one: the
    parts share the channel. A TPU's reduce-scatter is an all-reduce in a computation of that name.

    >>> [(c.kind, c.arrays, c.times, c.group) for c in collectives(parse(EXAMPLE))]
    [('all-gather', (Array(dtype='bf16', dims=(8, 4)),), 3, 4)]
    """
    found: dict[object, Collective] = {}
    for i, computation, times in walk(module):
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays, group = i.result, _group(i.attributes)
        if i.opcode == "all-gather-start":
            arrays = arrays[len(arrays) // 2 :]  # what goes in, then what comes out
        elif i.opcode == "reduce-scatter-start":
            arrays = arrays[: len(arrays) // 2]  # the whole ones go in
        elif i.opcode == "collective-permute-start":
            arrays = arrays[1:2]
        elif i.opcode == "reduce-scatter":
            arrays = tuple(Array(a.dtype, (group, *a.dims)) for a in arrays)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", i.attributes)
        key = (
            (kind, channel[1]) if channel and "chain_id" in i.attributes else (computation, i.name)
        )
        one = Collective(kind, arrays, times, group, i.operation, computation)
        if key not in found or times < found[key].times:  # a part may lie in a loop meanwhile
            found[key] = one
    return list(found.values())


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
    """The bytes of each kind that occurs.

    >>> bytes_by_kind(collectives(parse(EXAMPLE)))
    {'all-gather': 192}
    """
    totals = {k: sum(c.bytes for c in found if c.kind == k) for k in KINDS}
    return {kind: size for kind, size in totals.items() if size}


def sent_bytes(found: list[Collective]) -> int:
    """The bytes that a device sends for these with rings: `(n - 1) / n` of the whole array.

    An all-reduce is a reduce-scatter and an all-gather; a permute sends all it has.

    >>> sent_bytes(collectives(parse(EXAMPLE)))
    144
    """

    def share(one: Collective) -> float:
        n = one.group
        ring = (n - 1) / n
        return {"all-reduce": 2 * ring, "collective-permute": 1.0}.get(one.kind, ring)

    return round(sum(share(one) * one.bytes for one in found))


def gathered_whole(
    found: list[Collective],
    stacked: Sequence[tuple[int, ...]],
    others: Sequence[tuple[int, ...]] = (),
    spans: Sequence[int] = (),
) -> list[Collective]:
    """The all-gathers that collect a block's parameter outside of its block.

    `stacked` are the shapes of the blocks' parameters, depth first; `others` those of all other
    parameters. Such an all-gather has as many elements as all blocks' together, or the shape of
    one block's, which is no other parameter's, and runs less often than there are blocks. `spans`
    are the numbers of blocks of the parts that a stack runs in, where it is more than one.

    >>> found = collectives(parse(EXAMPLE))
    >>> gathered_whole(found, [(3, 8, 4)]), len(gathered_whole(found, [(5, 8, 4)]))
    ([], 1)
    """
    plain = lambda dims: tuple(sorted(d for d in dims if d > 1))  # as gathers and layouts leave it
    large = [shape for shape in stacked if len(plain(shape)) > 2]
    wholes = {n * math.prod(shape[1:]) for shape in large for n in (shape[0], *spans)}
    depths = {plain(shape[1:]): min(spans, default=shape[0]) for shape in large}
    known = {plain(shape) for shape in others}

    def wrong(one: Collective) -> bool:
        for array in one.arrays:
            dims = plain(array.dims)
            if math.prod(dims) in wholes or (dims not in known and one.times < depths.get(dims, 0)):
                return True
        return False

    return [one for one in found if one.kind == "all-gather" and wrong(one)]


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    opcode, rest_after = rest[end:].lstrip().split("(", 1)
    close = _closing("(" + rest_after, 0) - 1
    arrays = tuple(
        Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", rest[:end])
    )
    attributes = rest_after[close + 1 :]
    return Instruction(name.lstrip("%"), arrays, opcode, rest_after[:close], attributes)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"{instruction.opcode} {instruction.name} has no {name}.")
    return found[1]


def _called(module: Module, computation: str, i: Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if i.opcode == "while":
        times = trip_count(module, computation, i)
        return [(_attribute(i, "body"), 1 if times is None else times)]
    if i.opcode in ("call", "call-start"):  # the latter as on TPU7x's sparse cores
        return [(_attribute(i, "to_apply"), 1)]
    if i.opcode in ("async-update", "async-done"):
        return []
    names = []
    for found in CALLS.finditer(i.attributes):
        names += [name.strip(" %") for name in found[1].strip("{}").split(",")]
    return [(name, 1) for name in names if name in module.computations]


def _table(module: Module, computation: str) -> dict[str, Instruction]:
    """A computation's instructions by name; the result under the empty name."""
    body = module.computations[computation]
    return {i.name: i for i in body} | {"": body[-1]}


def _resolve(table: dict[str, Instruction], name: str) -> Instruction:
    """The instruction of this name, or what it is a copy of."""
    one = table[name]
    while one.opcode in ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"):
        one = table[one.operands[0]]
    return one


def _group(attributes: str) -> int:
    """How many devices take part in one group of a collective."""
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? *\{([^}]*)\}"
    if found := re.search(mesh, attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'([^']*)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if "source_target_pairs" in attributes:
        return 2
    raise ValueError(f"a collective's groups are not understood: {attributes[:200]}")


EXAMPLE = """
HloModule example

%body (p.0: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %p.0 = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.0), index=0
  %w = bf16[2,4]{1,0} get-tuple-element(%p.0), index=1
  %whole = bf16[8,4]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = bf16[2,4]{1,0} negate(%w), backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %out = (s32[], bf16[2,4]{1,0}) tuple(%next, %y)
}

%cond (p.1: (s32[], bf16[2,4])) -> pred[] {
  %p.1 = (s32[], bf16[2,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %p = (s32[], bf16[2,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[2,4]{1,0}) while(%p), condition=%cond, body=%body
}
"""
