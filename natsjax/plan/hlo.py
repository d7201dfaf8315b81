"""Parser of a compiled program's text (XLA's HLO) into computations and instructions.

``jax.stages.Compiled.as_text()`` is the only public source for the collectives of a compiled program, with their
devices and loops. Layouts name memory spaces; ``S(0)``, which the text omits, is the device's memory.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """One array of a type.

    Attributes:
      dtype: XLA's name, as "bf16".
      shape: shape on one device.
      in_memory: True if it is in the device's memory, not in a faster one.
    """

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        bits = _BITS.match(self.dtype)
        return math.prod(self.shape) * max(1, int(bits[1]) // 8 if bits else 1)


class Instruction(NamedTuple):
    """One operation.

    Attributes:
      name: unique in its computation.
      opcode: as "all-reduce".
      results: arrays of its type; several for a tuple.
      operands: names of instructions.
      arguments: text in the brackets, as the number of a constant or a parameter.
      attributes: rest of the line.
      is_root: True if its value is the computation's.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the name of a computation in an attribute such as ``body=%region.1``."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls; for a conditional, of its branches in order."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            return re.findall(r"[\w.\-]+", branches[1].replace("%", ""))
        names = ("true_computation", "false_computation", "calls", "to_apply")
        return [name for name in map(self.attribute, names) if name]


Computation = dict[str, Instruction]
"""Instructions by name, in the order of the text."""


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the main computation.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads the text of a compiled program (``jax.stages.Compiled.as_text()``).

    Raises:
      ValueError: the text is not a program.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Program(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), not re.search(r"S\([1-9]\d*\)", layout))
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _closing(f"({rest}", 0) - 1
    arguments = rest[:close]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, opcode, arrays(text[:end]), operands, arguments, rest[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at ``start``."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


# --- loops ---


class Execution(NamedTuple):
    """A computation that is executed as a whole, not fused into an operation.

    Attributes:
      computation: name of the computation.
      times: executions in one run of the program; a loop of unknown length counts as one turn.
    """

    computation: str
    times: int


def executions(program: Program) -> Iterator[Execution]:
    """Yields the entry computation and all that it calls and loops over, without fused computations."""
    todo = [Execution(program.entry, 1)]
    while todo:
        here = todo.pop()
        yield here
        for instruction in program.computations[here.computation].values():
            if instruction.opcode == "while":
                length = loop_length(program, instruction)
                todo.append(Execution(instruction.attribute("body") or "", here.times * (length or 1)))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                todo += [Execution(name, here.times) for name in instruction.called if name in program.computations]


def loop_length(program: Program, loop: Instruction) -> int | None:
    """Returns the number of turns of a ``while``; None if the program does not have it.

    XLA writes the number on some platforms. Otherwise, the only number in a condition "less than" is taken as the
    length: JAX's loops over known ranges count up to it from 0 in steps of 1.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations.get(loop.attribute("condition") or "", {})
    inner = [program.computations.get(i.attribute("calls") or "", {}) for i in condition.values()]
    instructions = [i for computation in [condition, *inner] for i in computation.values()]
    bounds = {int(i.arguments) for i in instructions if i.opcode == "constant" and i.arguments.isdecimal()}
    less = any(i.opcode == "compare" and "direction=LT" in i.attributes for i in instructions)
    return bounds.pop() if less and len(bounds) == 1 else None


# --- devices ---


def device_groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """Returns the groups of devices of a collective, by their place in the mesh: int ``[groups, size]``.

    For a permutation, these are pairs of sender and receiver.

    Raises:
      ValueError: an unknown notation.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    found = re.search(r"replica_groups=(.*)", text)
    if pairs or (found and found[1].startswith("{{")):
        lists = re.findall(r"\{([\d,]+)\}", pairs[1] if pairs else found[1].split("}}")[0] + "}")  # type: ignore[index]
        return np.array([[int(n) for n in group.split(",")] for group in lists])
    if found is None or found[1].startswith("{}"):
        return np.arange(num_devices)[None]
    tiled = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", found[1])
    if tiled:
        return _iota(tiled[2], tiled[3]).reshape(_numbers(tiled[1]))
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?\]|[\d,]+)(?:T\(([\d,]+)\))?\))? ?\{(.*?)\}", found[1])
    if mesh is None:
        raise ValueError(f"replica groups in a notation that is not understood: {found[1][:120]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    order = np.arange(num_devices)
    if mesh[2] is not None and "[" in mesh[2]:
        order = _iota(mesh[2].rpartition("[")[2].rstrip("]"), mesh[3]).reshape(-1)
    elif mesh[2] is not None:
        order = np.array(_numbers(mesh[2]))
    return _groups_of_axes(order, sizes, mesh[4])


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, transposition: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids if transposition is None else ids.transpose(_numbers(transposition))


def _groups_of_axes(order: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
    """Groups devices along ``axes``: whole axes, ``'a'``, or the k devices within m of an axis, ``'a':(m)k``."""
    chosen = {name: (m, k) for name, m, k in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    split: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        if name not in chosen:
            split.append(size)
        elif not chosen[name][1]:
            grouped.append(len(split))
            split.append(size)
        else:
            before, part = (int(n) for n in chosen[name])
            grouped.append(len(split) + 1)
            split += [before, part, size // (before * part)]
    ids = order.reshape(split)
    group = math.prod(split[axis] for axis in grouped)
    return np.moveaxis(ids, grouped, range(ids.ndim - len(grouped), ids.ndim)).reshape(-1, group)
