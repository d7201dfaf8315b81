"""What a compiled step moves: between devices, by kind of collective and axis of the mesh, and to and from memory."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from natsjax import program_text
from natsjax.program_text import Array, Computation, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Collectives of one kind along the same axes, of one device in one run of the program.

    Attributes:
      kind: of ``KINDS``; what XLA made of it: a gather that it turned into an all-reduce is an all-reduce.
      axes: of the mesh, those along which its devices lie.
      crosses: some of its devices are in different slices or nodes.
      times: how many run.
      bytes_sent: by each device, over all of them, in the cheapest way: a gather of V bytes among n devices sends
        V (n - 1) / n, so does a reduce-scatter or an all-to-all of V bytes, an all-reduce twice that.
    """

    kind: str
    axes: tuple[str, ...]
    crosses: bool
    times: int
    bytes_sent: float


class ProgramCosts(NamedTuple):
    """What a program moves, for each device, in one run.

    Attributes:
      collectives: of all kinds, largest first.
      memory_traffic: bytes read from and written to the device's memory: the operands and results of each operation,
        fused ones as one, of a slice only the slice. Tiles that a kernel reads more than once count once.
      unknown_loops: loops whose length the program does not say; they count as one turn.
    """

    collectives: tuple[Collective, ...]
    memory_traffic: float
    unknown_loops: int


def program_costs(program: Program, mesh: Mesh, domains: Sequence[int]) -> ProgramCosts:
    """Reads the costs off a compiled program.

    Args:
      program: of ``program_text.parse``.
      mesh: that it was compiled for.
      domains: of each device of ``mesh``, in order, the slice or node.
    """
    counts: dict[tuple[str, tuple[str, ...], bool], int] = collections.Counter()
    bytes_sent: dict[tuple[str, tuple[str, ...], bool], float] = collections.defaultdict(float)
    traffic = 0.0
    unknown = 0
    shape = tuple(mesh.shape.values())
    for run in program_text.executions(program):
        computation = program.computations[run.computation]
        for instruction in computation.values():
            if instruction.opcode == "while" and program_text.loop_length(program, instruction) is None:
                unknown += 1
            traffic += run.times * _memory_traffic(program, computation, instruction)
            for kind, collective, inside in _collectives(program, computation, instruction):
                groups = program_text.device_groups(collective, mesh.size)
                axes = _axes(groups, mesh.axis_names, shape)
                crosses = any(len({domains[device] for device in group}) > 1 for group in groups)
                counts[kind, axes, crosses] += run.times
                bytes_sent[kind, axes, crosses] += run.times * _bytes_sent(kind, collective, inside, groups.shape[-1])
    collected = [Collective(*kind, count, bytes_sent[kind]) for kind, count in counts.items()]
    return ProgramCosts(tuple(sorted(collected, key=lambda c: -c.bytes_sent)), traffic, unknown)


def _collectives(program: Program, computation: Computation, instruction: Instruction):
    """``(kind, instruction, its computation)`` of each collective that an operation is, or has fused into it."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        yield kind, instruction, computation
    called = instruction.attribute("calls")
    if instruction.opcode in ("fusion", "custom-call") and called in program.computations:
        inner = program.computations[called]
        for fused in inner.values():
            for kind, collective, inside in _collectives(program, inner, fused):
                # XLA for TPUs writes a reduce-scatter as an all-reduce that is fused with the slice taken of it.
                scatters = kind == "all-reduce" and "all-reduce-scatter" in called
                yield "reduce-scatter" if scatters else kind, collective, inside


def collective_results(program: Program) -> list[tuple[str, Array]]:
    """Every array that a collective makes on a device, with the kind of the collective."""
    return [
        (kind, array)
        for run in program_text.executions(program)
        for instruction in program.computations[run.computation].values()
        for kind, collective, _ in _collectives(program, program.computations[run.computation], instruction)
        for array in collective.results
    ]


def _axes(groups: np.ndarray, names: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, shape))  # [axis, group, member]
    varies = (places != places[..., :1]).any(axis=(1, 2))
    return tuple(name for name, along in zip(names, varies, strict=True) if along)


def _bytes_sent(kind: str, instruction: Instruction, inside: Computation, size: int) -> float:
    given = sum(array.size for name in instruction.operands for array in _results(inside, name))
    match kind:
        case "all-gather":
            return given * (size - 1)
        case "all-reduce":
            return 2 * given * (size - 1) / size
        case "collective-permute":
            return given
    return given * (size - 1) / size


def _results(computation: Computation, name: str) -> tuple[Array, ...]:
    return computation[name].results if name in computation else ()


# --- memory ---

_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "iota",
    "async-start",
    "opt-barrier",
}
"""Operations that move nothing themselves."""


def _memory_traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    if instruction.opcode.endswith("-start"):  # its type holds both its operands and its results
        return _in_memory(instruction.results)
    called = program.computations.get(instruction.attribute("calls") or "")
    if instruction.opcode == "fusion" and called:
        return _fusion_traffic(program, computation, instruction, called)
    if instruction.opcode == "dynamic-slice":
        return 2 * _in_memory(instruction.results)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_memory(_results(computation, instruction.operands[1]))
    operands = sum(_in_memory(_results(computation, name)) for name in instruction.operands)
    return operands + _in_memory(instruction.results)


def _in_memory(arrays: Sequence[Array]) -> float:
    return sum(array.size for array in arrays if array.in_memory)


def _fusion_traffic(program: Program, computation: Computation, fusion: Instruction, fused: Computation) -> float:
    """Of a fusion: its operands, where only slices of them are read these, and its results, of updates the updates."""
    total = 0.0
    for index, name in enumerate(fusion.operands):
        whole = _in_memory(_results(computation, name))
        total += min(whole, _part_read(program, fused, _parameter(fused, index), whole)) if whole else 0
    roots = [instruction for instruction in fused.values() if instruction.is_root]
    if len(roots) == 1 and roots[0].opcode == "tuple":
        roots = [fused[name] for name in roots[0].operands if name in fused]
    updated = [_updated(fused, root) for root in roots]
    if len(updated) == len(fusion.results):
        pairs = zip(fusion.results, updated, strict=True)
        return total + sum(min(a.size, part) if part is not None else a.size for a, part in pairs if a.in_memory)
    return total + _in_memory(fusion.results)


def _parameter(computation: Computation, index: int) -> str:
    """The name of a computation's parameter."""
    return next(i.name for i in computation.values() if i.opcode == "parameter" and int(i.arguments) == index)


def _part_read(program: Program, fused: Computation, name: str, whole: float) -> float:
    """Bytes of a value inside a fusion that are read: ``whole``, or the slices that are taken of it."""
    part = 0.0
    for user in fused.values():
        if name not in user.operands:
            continue
        inner = program.computations.get(user.attribute("calls") or "")
        if user.opcode == "bitcast":
            part += _part_read(program, fused, user.name, whole)
        elif user.opcode == "fusion" and inner:
            places = [index for index, operand in enumerate(user.operands) if operand == name]
            part += sum(_part_read(program, inner, _parameter(inner, index), whole) for index in places)
        elif user.opcode == "dynamic-slice" and user.operands[0] == name:
            part += sum(array.size for array in user.results)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            part += 0  # what is not updated stays where it is
        else:
            return whole
    return part


def _updated(fused: Computation, root: Instruction) -> int | None:
    """Bytes that a fusion's result changes of what one of its parameters was; None: all of it."""
    while root.opcode == "bitcast" and root.operands[0] in fused:
        root = fused[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return None
    return sum(array.size for array in _results(fused, root.operands[1]))
