"""Decoding on other hardware: memory, collectives and roofline bounds of the compiled loop.

The loop of ``natsjax.decode`` is compiled by the accelerator's own compiler. Memory is that compiler's
``memory_analysis()``; collectives are read from its program, which is also checked for copies of the KV buffer and for
collectives that send it. Reads of the device's memory are counted from the shapes.

Axis letters: ``b`` batch, ``l`` layer, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim, ``c`` slot.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from natsjax.config import Config, MeshConfig
from natsjax.decode import allocation, sampling
from natsjax.decode.buffer import AXES, KVBuffer
from natsjax.decode.decoder import DecodeSettings, check_mesh, decode_layout
from natsjax.decode.loop import Loop, decode_segment
from natsjax.errors import UserError
from natsjax.model.sharding import check_arrays, compute_spec, make_mesh, named_sharding
from natsjax.model.transformer import model_structure
from natsjax.plan import hlo, hlo_costs, hlo_flow, train_step
from natsjax.plan.hlo import Instruction, Program
from natsjax.plan.hlo_costs import Collective
from natsjax.plan.topologies import Topology
from natsjax.plan.train_step import CompiledPlan, Roofline, bytes_on_device
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats
from pallas_kernels.decode_attention import storage_format

_SEQUENCES = 16
"""Default number of sequences per replica of the parameters."""


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """Sizes of the decoding to plan for.

    Attributes:
      batch: number of sequences; None: 16 per replica of the parameters.
      context: tokens of each; None: ``data.context_length``.
      kv: fraction of them that is live in the fullest head; None: ``nats.kv_budget``, 1 for a dense model.
      as_trained: True to use ``config.mesh``, False to choose a mesh (``decode_mesh``).

    Raises:
      UserError: a number is out of range.
    """

    batch: int | None = None
    context: int | None = None
    kv: float | None = None
    as_trained: bool = False

    def __post_init__(self):
        for name in ("batch", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--decode_{name}={value}: it must be at least 1.")
        if self.kv is not None and not 0 < self.kv <= 1:
            raise UserError(f"--decode_kv={self.kv:g}: it must be above 0 and at most 1.")


class DecodeMemory(NamedTuple):
    """Bytes on the fullest device.

    Attributes:
      parameters: parameters in the layout of decoding (``decode_layout``), one copy per replica.
      buffer: keys, values, and the integers stored with them.
      temporaries: all other allocations of the compiler: weights in another layout, activations, results, padding.
      program: code.
    """

    parameters: float
    buffer: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        """Sum of all classes."""
        return sum(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan(CompiledPlan):
    """The decode loop, compiled for a topology.

    What is read from the program is None if the compiler refused it. ``roofline`` is for one token of each sequence.

    Attributes:
      mesh_is_chosen: True if the mesh is not the config's.
      batch: number of sequences.
      context: tokens of each.
      segment: tokens in a call of the loop.
      slots: allocated slots of a head.
      full_slots: slots of a head in full attention.
      full_buffer: bytes on each device of a buffer for full attention.
      is_donated: True if the buffer is updated in place.
      copies: operations that copy an array of the buffer's keys or values, or as much of one: ``opcode dtype[shape]``.
      sent: collectives that send the buffer or a part of it, in the same notation.
      collectives: per device, for one token of each sequence.
      reads: bytes that each device reads for one token of each sequence: weights once, and all allocated slots.
    """

    memory: DecodeMemory
    mesh_is_chosen: bool
    batch: int
    context: int
    segment: int
    slots: int
    full_slots: int
    full_buffer: float
    is_donated: bool | None
    copies: tuple[str, ...] | None
    sent: tuple[str, ...] | None
    collectives: tuple[Collective, ...] | None
    reads: tuple[float, float]


def plan_decode_apart(config: Config, name: str, num_slices: int, request: DecodeRequest) -> DecodePlan:
    """Calls ``plan_decode`` in a process of its own, as ``train_step.plan_apart`` does with a step."""
    remedy = "another --decode_batch or mesh may pass"
    return train_step.apart(functools.partial(plan_decode, config, request=request), name, num_slices, remedy)


def plan_decode(
    config: Config, topology: Topology, request: DecodeRequest | None = None, settings: DecodeSettings | None = None
) -> DecodePlan:
    """Compiles the decode loop of a run for a topology and reads memory and costs from the program.

    Args:
      config: config of the run.
      topology: from ``topologies.topology``.
      request: sizes of the decoding; None: the defaults.
      settings: settings of the decoder; None: the defaults.

    Raises:
      UserError: the model or the batch cannot be divided along the mesh, or the mesh divides sequences.
    """
    request = DecodeRequest() if request is None else request
    settings = DecodeSettings() if settings is None else settings
    vocab_size = train_step.vocab_size_of(config)
    mesh_config = config.mesh if request.as_trained else decode_mesh(config, vocab_size, topology)
    mesh = make_mesh(mesh_config, topology.devices)
    check_mesh(mesh)
    check_arrays(config, vocab_size, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = _SEQUENCES * shards if request.batch is None else request.batch
    if batch % shards:
        raise UserError(
            f"--decode_batch={batch}: it cannot be divided among mesh.data * mesh.fsdp = {shards} devices; give a "
            f"multiple of {shards}."
        )
    context = config.data.context_length if request.context is None else request.context
    slots, full_slots = slots_of(config, context, request.kv, settings.block)
    model = model_structure(config, vocab_size)
    parameters = decode_layout(model, config, mesh)
    buffer, full = (abstract_buffer(config, mesh, batch, n, settings.block) for n in (slots, full_slots))

    lowered = _lower(config, mesh, parameters, buffer, settings.segment)
    compiled, common = train_step.compile_for(lowered, config, topology, mesh, model)
    is_read = {name: x for name, x in parameters.items() if name != "embedding" or config.model.tie_embeddings}
    # Attention reads no other array of the buffer.
    reads = bytes_on_device(is_read), sum(bytes_on_device((group.storage, group.key_end)) for group in buffer)
    roofline: Roofline | None = None
    found: dict[str, Any] = dict.fromkeys(("is_donated", "copies", "sent", "collectives"))
    if compiled is not None:
        program = hlo.parse(common["program"])
        collectives = _of_a_token(program, mesh, topology.domains_of(mesh))
        found = _of_buffer(program, common["program"], buffer) | {"collectives": collectives}
        if topology.chip is not None:
            flops = _flops(config, is_read, buffer, batch // shards)
            roofline = Roofline.of(topology.chip, flops, sum(reads), collectives)
    memory = bytes_on_device(parameters), bytes_on_device(buffer)
    rest = train_step.compiler_memory(compiled, common["refusal"], sum(memory))
    return DecodePlan(
        **common,
        **found,
        mesh_is_chosen=not request.as_trained,
        batch=batch,
        context=context,
        segment=settings.segment,
        slots=slots,
        full_slots=full_slots,
        full_buffer=bytes_on_device(full),
        memory=DecodeMemory(*memory, *rest),
        reads=reads,
        roofline=roofline,
    )


# --- the loop ---


def decode_mesh(config: Config, vocab_size: int, topology: Topology) -> MeshConfig:
    """Chooses the mesh in which a device reads the fewest weights: the largest possible ``tensor``, else replicas.

    ``tensor`` divides KV heads, MLP, vocabulary and the devices of a slice or node.
    """
    together = len(topology.devices) // len(set(topology.domains))
    model = config.model
    tensor = math.gcd(model.num_kv_heads, model.mlp_dim, vocab_size, together)
    return MeshConfig(data=-1, fsdp=1, tensor=tensor, context=1)


def slots_of(config: Config, context: int, kv: float | None, block: int) -> tuple[int, int]:
    """Returns the slots of a head that ``Decoder`` would allocate for a fraction ``kv``, and for full attention."""
    full = allocation.round_up(context, block)
    if kv is None:
        kv = config.nats.kv_budget if config.model.has_roles else 1.0
    return min(allocation.grown(math.ceil(kv * context), block), full), full


def abstract_buffer(config: Config, mesh: Mesh, batch: int, slots: int, block: int) -> KVBuffer:
    """Returns a buffer's shapes, dtypes and shardings, with all layers in one group."""
    model = config.model
    with jax.set_mesh(mesh):
        empty = functools.partial(
            allocation.empty,
            [model.num_layers],
            [slots],
            batch=batch,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            format=storage_format(),
            block=block,
            adds_up=model.has_masks,
            shifts_keys=model.key_shift,
        )
        shapes = jax.eval_shape(empty)
    return jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype, *AXES[x.ndim]), shapes)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    sharding = named_sharding(mesh, compute_spec(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _lower(config: Config, mesh: Mesh, parameters: Any, buffer: KVBuffer, segment: int) -> jax.stages.Lowered:
    """Lowers ``decode_segment``, with greedy sampling, as generation calls it."""
    layers, batch, heads = buffer[0].length.shape
    structure = model_structure(config, parameters["embedding"].shape[0]).structure
    row = _array(mesh, (batch,), jnp.int32, "batch")
    arrays: dict[str, Any] = {
        "token": row,
        "before": row,
        "at": row,
        "sequence": row,
        "remaining": row,
        "done": _array(mesh, (batch,), jnp.bool, "batch"),
        "evicted": _array(mesh, (layers, batch, heads), jnp.int32, None, "batch", "kv_heads"),
        "read": _array(mesh, (layers, batch, heads), jnp.float32, None, "batch", "kv_heads"),
        "most": _array(mesh, (layers, batch, heads), jnp.int32, None, "batch", "kv_heads"),
    }
    loop = Loop(buffer, **arrays)
    greedy = sampling.Sampling()
    policy = Nats() if config.model.has_roles else FullAttention()
    numbers = jax.eval_shape(lambda: greedy.numbers)
    stop, limit = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        return decode_segment.lower(
            parameters, loop, policy, numbers, stop, None, limit, structure=structure, kind=greedy.kind, length=segment
        )


# --- costs ---


def _of_buffer(program: Program, text: str, buffer: KVBuffer) -> dict[str, Any]:
    """Returns ``is_donated``, ``copies`` and ``sent`` of ``DecodePlan``."""
    numbers = hlo_flow.parameters_named(program, "loop.buffer")
    assert len(numbers) == len(jax.tree.leaves(buffer)), "the program's arguments have other names"
    moves = hlo_flow.moves(program, numbers)
    whole = min(bytes_on_device(x) for group in buffer for x in group.storage.arrays)
    copies = [
        move
        for move in moves
        if hlo_flow.kind_of(move) in hlo_flow.COPIES
        if move.results[0].in_memory and move.results[0].size >= whole
    ]
    sent = [move for move in moves if hlo_flow.kind_of(move) in hlo_flow.COLLECTIVES]
    donated = set(numbers) <= hlo_flow.aliased_parameters(text)
    return {"is_donated": donated, "copies": tuple(map(_written, copies)), "sent": tuple(map(_written, sent))}


def _written(instruction: Instruction) -> str:
    array = instruction.results[0]
    return f"{hlo_flow.kind_of(instruction)} {array.dtype}[{','.join(map(str, array.shape))}]"


def _of_a_token(program: Program, mesh: Mesh, domains: list[int]) -> tuple[Collective, ...]:
    """Returns the collectives of a turn of the outermost loop."""
    loops = (
        [i for i in program.computations[run.computation].values() if i.opcode == "while"]
        for run in hlo.executions(program)
    )
    found = next(filter(None, loops))
    loop = max(found, key=lambda i: sum(array.size for array in i.results))
    parts = [program._replace(entry=loop.attribute(name) or "") for name in ("body", "condition")]
    return hlo_costs.summed(c for part in parts for c in hlo_costs.program_costs(part, mesh, domains).collectives)


def _flops(config: Config, weights: Any, buffer: KVBuffer, rows: int) -> float:
    """Counts the FLOPs of products for one token of each sequence of a device."""
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(weights))
    model = config.model
    slots = sum(math.prod(group.key_end.sharding.shard_shape(group.key_end.shape)) for group in buffer)
    return 2.0 * rows * size + 4.0 * slots * (model.num_heads // model.num_kv_heads) * model.head_dim
