"""Where an argument of a compiled program goes: is it sent to other devices, is it copied, is its memory used again?

Followed is what is only moved: the argument, slices of it and updated versions of it, in whatever layout, through loops
and fused operations. What is computed from it, a product or a sum, is something else.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from natsjax.program_text import Computation, Instruction, Program

_IN_PLACE = {"bitcast", "bitcast-convert", "dynamic-update-slice", "scatter", "select", "opt-barrier"}
"""Operations whose result takes the place of what is moved, or is the same memory."""

_ANEW = {"copy", "transpose", "reshape", "convert", "reverse", "concatenate", "pad", "broadcast"}
_PARTS = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast"}
_NAMED_MOVES = ("ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound")
"""Custom calls of XLA for TPUs that move something."""

Places = frozenset[int]
"""Which of an operation's results are followed, by their number (``Instruction.results``)."""


class Move(NamedTuple):
    """An operation that moves an argument, or a part of one.

    Attributes:
      instruction: the operation.
      operand_bytes: of the largest operand that is moved.
    """

    instruction: Instruction
    operand_bytes: int

    @property
    def kind(self) -> str:
        """Its opcode, the same for operations that start and end apart."""
        return self.instruction.opcode.removesuffix("-start")

    @property
    def is_collective(self) -> bool:
        """Whether it goes to other devices."""
        return self.kind in _COLLECTIVES or self.kind in ("send", "ragged-all-to-all")

    @property
    def is_copy(self) -> bool:
        """Whether all of what it is given lies in memory once more."""
        largest = max((x for x in self.instruction.results if x.in_memory), key=lambda x: x.size, default=None)
        return self.kind in _ANEW and largest is not None and largest.size >= self.operand_bytes


def parameter_numbers(program: Program, prefix: str) -> list[int]:
    """Which arguments of the program have a name, as JAX gives it, that begins so: as "loop.buffer"."""
    entry = program.computations[program.entry].values()
    found = [i for i in entry if i.opcode == "parameter" and f'op_name="{prefix}' in i.attributes]
    return sorted(int(i.arguments) for i in found)


def aliased_parameters(text: str) -> set[int]:
    """The arguments whose memory the results take, in the text of a program."""
    header = text[: text.index("\n")]
    return {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+), \{\}", header)}


def moves(program: Program, parameters: Collection[int]) -> list[Move]:
    """All operations that move one of these arguments of the program, or a part of it."""
    follower = _Follower(program)
    follower.results(program.entry, {number: frozenset([0]) for number in parameters})
    return list(follower.found.values())


class _Follower:
    """Goes through computations, as often as a loop finds more to follow."""

    def __init__(self, program: Program):
        self.program = program
        self.found: dict[tuple[str, str], Move] = {}
        self.known: dict[tuple, Places] = {}

    def results(self, name: str, parameters: Mapping[int, Places]) -> Places:
        """Which results of a computation are followed, where these of its parameters are."""
        key = (name, tuple(sorted((n, tuple(sorted(places))) for n, places in parameters.items() if places)))
        if key not in self.known:
            self.known[key] = self._results(name, parameters)
        return self.known[key]

    def _results(self, name: str, parameters: Mapping[int, Places]) -> Places:
        computation = self.program.computations[name]
        places: dict[str, Places] = {}
        root: Places = frozenset()
        for instruction in computation.values():
            if instruction.opcode == "parameter":
                here = parameters.get(int(instruction.arguments), frozenset())
            else:
                here = self._of(name, computation, instruction, places)
            places[instruction.name] = here
            root = here if instruction.is_root else root
        return root

    def _of(self, name: str, computation: Computation, instruction: Instruction, places: dict[str, Places]) -> Places:
        given = [places.get(operand, frozenset()) for operand in instruction.operands]
        if not any(given):
            return frozenset()
        opcode = instruction.opcode
        if opcode == "tuple":
            return self._joined(computation, instruction, given)
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.attributes)
            return frozenset([0]) if index and int(index[1]) in given[0] else frozenset()
        if opcode == "while":
            return self._loop(instruction, given[0])
        called = [self.program.computations.get(c) and c for c in self._called(instruction)]
        if opcode == "conditional":
            branches = zip(called, given[1:], strict=False)
            return frozenset().union(*(self.results(c, {0: g}) for c, g in branches if c))
        if called and called[0] and opcode not in _COLLECTIVES | {"scatter", "reduce", "sort", "reduce-window", "map"}:
            inner = self.results(called[0], dict(enumerate(given)))
            # The type of what starts apart holds its operands too: all of it is followed.
            everything = frozenset(range(len(instruction.results)))
            return everything if inner and opcode.endswith("-start") else inner
        return self._moved(name, computation, instruction, given)

    def _moved(self, name: str, computation: Computation, instruction: Instruction, given: list[Places]) -> Places:
        kind = instruction.opcode.removesuffix("-start").removesuffix("-done").removesuffix("-update")
        everything = frozenset(range(len(instruction.results)))
        if instruction.opcode.endswith(("-done", "-update")):
            return everything
        is_move = kind in _IN_PLACE | _ANEW | _PARTS | _COLLECTIVES or kind in ("send", "ragged-all-to-all")
        if kind == "custom-call":
            is_move = any(f'custom_call_target="{target}"' in instruction.attributes for target in _NAMED_MOVES)
        if not is_move:
            return frozenset()
        if kind in _IN_PLACE | _PARTS and not given[1 if kind == "select" and not given[0] and given[1] else 0]:
            # What is put into something else, or an index: only what it is put into goes on.
            return everything if kind == "select" and any(given[1:]) else frozenset()
        sizes = [x.size for n, g in zip(instruction.operands, given, strict=True) if g for x in computation[n].results]
        self.found[name, instruction.name] = Move(instruction, max(sizes))
        return everything

    def _joined(self, computation: Computation, instruction: Instruction, given: list[Places]) -> Places:
        first, found = 0, set()
        for operand, here in zip(instruction.operands, given, strict=True):
            found |= {first + n for n in here}
            first += len(computation[operand].results)
        return frozenset(found)

    def _loop(self, instruction: Instruction, carried: Places) -> Places:
        body = instruction.attribute("body") or ""
        while True:
            more = carried | self.results(body, {0: carried})
            if more == carried:
                break
            carried = more
        self.results(instruction.attribute("condition") or "", {0: carried})
        return carried

    def _called(self, instruction: Instruction) -> list[str]:
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if branches:
            return re.findall(r"[\w.\-]+", branches[1].replace("%", ""))
        names = ("true_computation", "false_computation", "calls", "to_apply")
        return [name for name in map(instruction.attribute, names) if name]
