"""Where an argument of a compiled program goes: is it sent to other devices, is it copied, is its memory used again?

Followed is what is only moved: the argument, parts of it and updated versions of it, in whatever layout, through loops
and fused operations. What is computed from it, a product or a sum, is something else.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from natsjax.plan.hlo import Computation, Instruction, Program
from natsjax.plan.hlo_costs import KINDS

COPIES = {"copy", "transpose", "reshape", "convert", "reverse", "concatenate", "pad", "broadcast"}
"""Operations that write what they move once more."""

COLLECTIVES = {*KINDS, "collective-broadcast", "ragged-all-to-all", "send"}
"""Operations that send it to other devices."""

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
"""Operations that call a computation for each element: nothing is followed into it."""
_CUSTOM_MOVES = ("AssumeGatherIndicesInBound", "ConcatBitcast")
"""Custom calls of XLA for TPUs that move something."""

Places = frozenset[int]
"""Which results of an operation are followed, by their number in ``Instruction.results``."""


def parameters_named(program: Program, prefix: str) -> list[int]:
    """The arguments of the program whose name, as JAX gives it, begins so: as "loop.buffer"."""
    entry = program.computations[program.entry].values()
    found = [i for i in entry if i.opcode == "parameter" and f'op_name="{prefix}' in i.attributes]
    return sorted(int(i.arguments) for i in found)


def aliased_parameters(text: str) -> set[int]:
    """The arguments whose memory the results take, from the text of a program."""
    header = text[: text.index("\n")]
    return {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+), \{\}", header)}


def moves(program: Program, parameters: Collection[int]) -> list[Instruction]:
    """All operations that move one of these arguments of the program, or a part of it.

    What starts and ends apart is there once, where it starts.
    """
    follower = _Follower(program)
    follower.results(program.entry, {number: frozenset([0]) for number in parameters})
    return list(follower.found.values())


def kind_of(instruction: Instruction) -> str:
    """The opcode, the same for an operation that starts and ends apart."""
    return re.sub("-(start|update|done)$", "", instruction.opcode)


class _Follower:
    """Goes through computations, once more where a loop carries more than was known."""

    def __init__(self, program: Program):
        self.program = program
        self.found: dict[tuple[str, str], Instruction] = {}
        self.known: dict[tuple, Places] = {}

    def results(self, name: str, parameters: Mapping[int, Places]) -> Places:
        """Which results of a computation are followed, where these of its parameters are."""
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
        """Which results of an operation are followed, where these of its operands are."""
        opcode, everything = instruction.opcode, frozenset(range(len(instruction.results)))
        if opcode == "tuple":
            return _joined(computation, instruction, given)
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.attributes)
            return frozenset([0]) if index and int(index[1]) in given[0] else frozenset()
        if opcode == "while":
            return self._loop(instruction, given[0])
        if opcode == "conditional":
            pairs = zip(_called(instruction), given[1:], strict=True)
            return frozenset().union(*(self.results(branch, {0: places}) for branch, places in pairs))
        kind = kind_of(instruction)
        if kind != opcode and not opcode.endswith("-start"):
            return everything
        called = [] if kind in _WITH_FUNCTION else [c for c in _called(instruction) if c in self.program.computations]
        if called:
            inner = self.results(called[0], dict(enumerate(given)))
            # The type of what starts holds its operands too.
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
    """The operands that an operation moves; the others say where from or where to."""
    if kind in ("dynamic-slice", "gather"):
        return [0]
    if kind == "dynamic-update-slice":
        return [0, 1]
    if kind == "scatter":  # arrays, indices, updates
        return [n for n in range(count) if n != count // 2]
    return range(1, count) if kind == "select" else range(count)


def _called(instruction: Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if branches:
        return re.findall(r"[\w.\-]+", branches[1].replace("%", ""))
    names = ("true_computation", "false_computation", "calls", "to_apply")
    return [name for name in map(instruction.attribute, names) if name]
