"""Data flow of an argument in a compiled program: is it sent to other devices, copied, or updated in place?

The argument is followed through operations that only move it: parts and updated versions of it, in any layout, through
loops and fused operations. Values that are computed from it, such as products and sums, are not followed.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from natsjax.plan.hlo import Computation, Instruction, Program
from natsjax.plan.hlo_costs import KINDS

COPIES = {"copy", "transpose", "reshape", "convert", "reverse", "concatenate", "pad", "broadcast"}
"""Operations that write another copy of their operand."""

COLLECTIVES = {*KINDS, "collective-broadcast", "ragged-all-to-all", "send"}
"""Operations that send their operand to other devices."""

_OTHERS = {
    "bitcast",
    "bitcast-convert",
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "opt-barrier",
    "scatter",
    "select",
    "slice",
}
_MOVES = COPIES | COLLECTIVES | _OTHERS
_WITH_FUNCTION = {"all-reduce", "map", "reduce", "reduce-scatter", "reduce-window", "scatter", "sort"}
"""Operations that call a computation for each element, which is not followed."""
_CUSTOM_MOVES = ("AssumeGatherIndicesInBound", "ConcatBitcast")
"""Custom calls of XLA for TPUs that move their operand."""

Places = frozenset[int]
"""Results of an operation that are followed, by their number in ``Instruction.results``."""


def parameters_named(program: Program, prefix: str) -> list[int]:
    """Returns the numbers of the arguments whose JAX name begins with ``prefix``, as "loop.buffer"."""
    entry = program.computations[program.entry].values()
    found = [i for i in entry if i.opcode == "parameter" and f'op_name="{prefix}' in i.attributes]
    return sorted(int(i.arguments) for i in found)


def aliased_parameters(text: str) -> set[int]:
    """Returns the numbers of the arguments whose memory is reused for results, from a program's text."""
    header = text[: text.index("\n")]
    return {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+), \{\}", header)}


def moves(program: Program, parameters: Collection[int]) -> list[Instruction]:
    """Returns all operations that move one of these arguments of the program, or a part of it.

    An asynchronous operation is returned once, as its start.
    """
    follower = _Follower(program)
    follower.results(program.entry, {number: frozenset([0]) for number in parameters})
    return list(follower.found.values())


def kind_of(instruction: Instruction) -> str:
    """Returns the opcode without the suffix of an asynchronous operation."""
    return re.sub("-(start|update|done)$", "", instruction.opcode)


class _Follower:
    """Traversal of computations, repeated for a loop until the set of carried results does not grow."""

    def __init__(self, program: Program):
        self.program = program
        self.found: dict[tuple[str, str], Instruction] = {}
        self.known: dict[tuple, Places] = {}

    def results(self, name: str, parameters: Mapping[int, Places]) -> Places:
        """Returns the results of a computation to follow, given those of its parameters."""
        key = (name, frozenset((number, places) for number, places in parameters.items() if places))
        if key not in self.known:
            self.known[key] = self._results(name, parameters)
        return self.known[key]

    def _results(self, name: str, parameters: Mapping[int, Places]) -> Places:
        computation = self.program.computations[name]
        followed: dict[str, Places] = {}
        root: Places = frozenset()
        for instruction in computation.values():
            if instruction.opcode == "parameter":
                here = parameters.get(int(instruction.arguments), frozenset())
            else:
                given = [followed.get(operand, frozenset()) for operand in instruction.operands]
                here = self._of(name, computation, instruction, given) if any(given) else frozenset()
            followed[instruction.name] = here
            root = here if instruction.is_root else root
        return root

    def _of(self, name: str, computation: Computation, instruction: Instruction, given: Sequence[Places]) -> Places:
        """Returns the results of an operation to follow, given those of its operands."""
        opcode, everything = instruction.opcode, frozenset(range(len(instruction.results)))
        if opcode == "tuple":
            return _joined(computation, instruction, given)
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.attributes)
            return frozenset([0]) if index and int(index[1]) in given[0] else frozenset()
        if opcode == "while":
            return self._loop(instruction, given[0])
        if opcode == "conditional":
            pairs = zip(instruction.called, given[1:], strict=True)
            return frozenset().union(*(self.results(branch, {0: places}) for branch, places in pairs))
        kind = kind_of(instruction)
        if kind != opcode and not opcode.endswith("-start"):
            return everything
        called = [] if kind in _WITH_FUNCTION else [c for c in instruction.called if c in self.program.computations]
        if called:
            inner = self.results(called[0], dict(enumerate(given)))
            # The type of a start has its operands too.
            return everything if inner and opcode.endswith("-start") else inner
        is_move = kind in _MOVES or any(f'custom_call_target="{x}"' in instruction.attributes for x in _CUSTOM_MOVES)
        if not is_move or not any(given[n] for n in _moved_operands(kind, len(given))):
            return frozenset()
        self.found[name, instruction.name] = instruction
        return everything

    def _loop(self, instruction: Instruction, carried: Places) -> Places:
        body, condition = (instruction.attribute(name) or "" for name in ("body", "condition"))
        while not (more := self.results(body, {0: carried})) <= carried:
            carried |= more
        self.results(condition, {0: carried})
        return carried


def _joined(computation: Computation, instruction: Instruction, given: Sequence[Places]) -> Places:
    first, found = 0, set()
    for operand, places in zip(instruction.operands, given, strict=True):
        found |= {first + place for place in places}
        first += len(computation[operand].results)
    return frozenset(found)


def _moved_operands(kind: str, count: int) -> Sequence[int]:
    """Returns the operands that an operation moves; the others are indices."""
    if kind in ("dynamic-slice", "gather"):
        return [0]
    if kind == "dynamic-update-slice":
        return [0, 1]
    if kind == "scatter":  # arrays, indices, updates
        return [n for n in range(count) if n != count // 2]
    return range(1, count) if kind == "select" else range(count)
