"""Bytes that a compiled program moves: between devices, by collective and mesh axes, and to and from memory.

XLA's ``cost_analysis()`` has neither: it counts the body of a loop once, whatever its length, and no communication.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from natsjax.plan import hlo
from natsjax.plan.hlo import Array, Computation, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Collectives of one kind along the same mesh axes, for one device in one run of the program.

    Bytes are the fewest that a device can send: V (n - 1) / n for a gather, reduce-scatter or all-to-all of V bytes
    among n devices, and twice that for an all-reduce. If the n devices are in d slices or nodes, a gather sends
    V (d - 1) / n across, between devices at the same place in each, and V (n - d) / n inside.

    Attributes:
      kind: one of ``KINDS``, as compiled: a gather that XLA compiles to an all-reduce is an all-reduce.
      axes: mesh axes that the collective runs along.
      times: number of executions.
      bytes_inside: bytes sent within a slice or node, in all executions.
      bytes_across: bytes sent to other slices or nodes.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes_inside: float
    bytes_across: float


class ProgramCosts(NamedTuple):
    """Bytes that a program moves, per device, in one run.

    Attributes:
      collectives: of all kinds, largest first.
      memory_traffic: bytes read from and written to the device's memory: operands and results of each operation, with
        a fusion as one operation and a slice by its own size. Repeated reads of a tile count once; all branches of a
        conditional count.
      unknown_loops: number of loops whose length is not in the program; they count as one turn.
    """

    collectives: tuple[Collective, ...]
    memory_traffic: float
    unknown_loops: int


def program_costs(program: Program, mesh: Mesh, domains: Sequence[int]) -> ProgramCosts:
    """Reads the costs of a compiled program.

    Args:
      program: from ``hlo.parse``.
      mesh: mesh that it was compiled for.
      domains: slice or node of each device of ``mesh``, in order.
    """
    found = []
    traffic = 0.0
    unknown = 0
    shape = tuple(mesh.shape.values())
    for run in hlo.executions(program):
        computation = program.computations[run.computation]
        for instruction in computation.values():
            if instruction.opcode == "while" and hlo.loop_length(program, instruction) is None:
                unknown += 1
            traffic += run.times * _memory_traffic(program, computation, instruction)
        for kind, collective, given in _collectives_of(program, computation):
            if collective.opcode == "send":
                groups = _same_place(domains)
            else:
                groups = hlo.device_groups(collective, mesh.size)
            axes = _axes(groups, mesh.axis_names, shape)
            inside, across = _bytes_sent(kind, given, groups, domains)
            found.append(Collective(kind, axes, run.times, run.times * inside, run.times * across))
    return ProgramCosts(summed(found), traffic, unknown)


def summed(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Sums collectives of the same kind and axes; the largest sum comes first."""
    total: dict[tuple[str, tuple[str, ...]], Collective] = {}
    for c in collectives:
        _, _, *sums = total.get((c.kind, c.axes), Collective(c.kind, c.axes, 0, 0.0, 0.0))
        times, inside, across = (a + b for a, b in zip(sums, c[2:], strict=True))
        total[c.kind, c.axes] = Collective(c.kind, c.axes, int(times), inside, across)
    return tuple(sorted(total.values(), key=lambda c: -(c.bytes_inside + c.bytes_across)))


def _collectives_of(program: Program, computation: Computation) -> Iterator[tuple[str, Instruction, int]]:
    """Yields ``(kind, instruction, bytes of its operands)`` for each collective that a computation runs.

    XLA for TPUs fuses a collective into the operations that start it, overlap with it and end it. These pieces share a
    channel and are yielded once.
    """
    seen = set()
    for instruction in computation.values():
        # Between TPU slices the hosts communicate, for devices at the same place in each ("ALL_REDUCE", "ONE_TO_ONE").
        host = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if instruction.opcode == "send" and host:
            kind = host[1].lower().replace("_", "-")
            given = sum(array.size for array in _results(computation, instruction.operands[0]))
            yield kind if kind in KINDS else "collective-permute", instruction, given
        for kind, collective, inside in _fused_collectives(program, computation, instruction):
            channel = re.search(r"channel_id=\d+", collective.attributes)
            piece = (kind, channel and channel[0], *(array.shape for array in collective.results))
            if inside is not computation and piece in seen:
                continue
            seen.add(piece)
            yield kind, collective, sum(x.size for name in collective.operands for x in _results(inside, name))


def _fused_collectives(program: Program, computation: Computation, instruction: Instruction):
    """Yields ``(kind, instruction, its computation)`` for each collective that an operation is or has fused into it."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        yield kind, instruction, computation
    called = instruction.attribute("calls")
    if instruction.opcode in ("fusion", "custom-call") and called in program.computations:
        inner = program.computations[called]
        for fused in inner.values():
            for kind, collective, inside in _fused_collectives(program, inner, fused):
                # XLA for TPUs writes a reduce-scatter as a fusion of an all-reduce and the slice taken of it.
                scatters = kind == "all-reduce" and "all-reduce-scatter" in called
                yield "reduce-scatter" if scatters else kind, collective, inside


def collective_results(program: Program) -> list[tuple[str, Array]]:
    """Returns every array that a collective produces on a device, with the kind of the collective."""
    return [
        (kind, array)
        for run in hlo.executions(program)
        for kind, collective, _ in _collectives_of(program, program.computations[run.computation])
        for array in collective.results
    ]


def _same_place(domains: Sequence[int]) -> np.ndarray:
    """Groups the devices at the same place in each slice: int ``[groups, slices]``."""
    return np.stack([np.flatnonzero(np.asarray(domains) == domain) for domain in sorted(set(domains))], axis=-1)


def _axes(groups: np.ndarray, names: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, shape))  # [axis, group, member]
    varies = (places != places[..., :1]).any(axis=(1, 2))
    return tuple(name for name, along in zip(names, varies, strict=True) if along)


def _bytes_sent(kind: str, given: int, groups: np.ndarray, domains: Sequence[int]) -> tuple[float, float]:
    """Returns the bytes that each device sends inside its slice or node and across, for operands of ``given`` bytes."""
    places = np.asarray(domains)[groups]
    size = groups.shape[-1]
    if kind == "collective-permute":
        crossing = float(np.mean(places[:, 0] != places[:, 1]))
        return given * (1 - crossing), given * crossing
    parts = max(len(set(group)) for group in places.tolist())
    if kind == "all-to-all":
        return given * (1 / parts - 1 / size), given * (1 - 1 / parts)
    whole = given * size if kind == "all-gather" else given
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * whole * (size - parts) / size, rounds * whole * (parts - 1) / size


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
"""Operations without traffic of their own."""

_SLICES = {"slice", "dynamic-slice", "gather"}
"""Operations that read only the part of their first operand that they return."""


def _memory_traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.name.startswith("async-collective-done"):
        return 0
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0
    results = instruction.results
    if opcode.endswith("-start"):  # its type holds its operands, then its results
        results = results[sum(len(_results(computation, name)) for name in instruction.operands) :]
        opcode = opcode.removesuffix("-start")
    called = program.computations.get(instruction.attribute("calls") or "")
    if opcode == "fusion" and called:
        return _fusion_traffic(program, computation, instruction, called, results)
    if opcode in _SLICES:
        return results[0].size + _in_memory(results[:1])
    if opcode == "dynamic-update-slice":
        return 2 * _in_memory(_results(computation, instruction.operands[1]))
    if instruction.opcode == "copy-start":  # its type holds its result, then its operand
        return _in_memory(instruction.results)
    operands = sum(_in_memory(_results(computation, name)) for name in instruction.operands)
    return operands + _in_memory(results)


def _in_memory(arrays: Sequence[Array]) -> float:
    return sum(array.size for array in arrays if array.in_memory)


def _fusion_traffic(
    program: Program, computation: Computation, fusion: Instruction, fused: Computation, results: Sequence[Array]
) -> float:
    """Returns the bytes of a fusion's operands, or of the slices read from them, and of its results or updates."""
    total = 0.0
    for index, name in enumerate(fusion.operands):
        whole = _in_memory(_results(computation, name))
        total += min(whole, _part_read(program, fused, _parameter(fused, index), whole)) if whole else 0
    roots = [instruction for instruction in fused.values() if instruction.is_root]
    if len(roots) == 1 and roots[0].opcode == "tuple":
        roots = [fused[name] for name in roots[0].operands if name in fused]
    updated = [_updated(fused, root) for root in roots]
    if len(updated) == len(results):
        pairs = zip(results, updated, strict=True)
        return total + sum(min(a.size, part) if part is not None else a.size for a, part in pairs if a.in_memory)
    return total + _in_memory(results)


def _parameter(computation: Computation, index: int) -> str:
    """Returns the name of a computation's parameter."""
    return next(i.name for i in computation.values() if i.opcode == "parameter" and int(i.arguments) == index)


def _part_read(program: Program, fused: Computation, name: str, whole: float) -> float:
    """Returns the bytes that are read of a value inside a fusion: ``whole``, or those of the slices taken of it."""
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
        elif user.opcode in _SLICES and user.operands[0] == name:
            part += sum(array.size for array in user.results)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            part += 0  # the rest is neither read nor written
        else:
            return whole
    return part


def _updated(fused: Computation, root: Instruction) -> int | None:
    """Returns the bytes that a fusion updates in place in one of its parameters; None: it writes the whole result."""
    while root.opcode == "bitcast" and root.operands[0] in fused:
        root = fused[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return None
    return sum(array.size for array in _results(fused, root.operands[1]))
