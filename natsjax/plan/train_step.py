"""A training step on other hardware: memory, collectives and roofline bounds of the compiled program.

The step of ``train.py`` is compiled by the accelerator's own compiler. Memory is that compiler's ``memory_analysis()``;
collectives and traffic are read from its program, because ``cost_analysis()`` counts a loop as one turn and does not
know the mesh. FLOPs are counted from the model's sizes, for the same reason; a test compares them with the traced step.
"""

import concurrent.futures.process
import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from natsjax.config import Config
from natsjax.data import ByteTokenizer, Corpus, RecallTask, load_tokenizer
from natsjax.data.corpus import CORPUS_FILE
from natsjax.data.mixture import parse_mixture
from natsjax.errors import UserError
from natsjax.kv_fraction import live_fraction
from natsjax.model import sharding
from natsjax.model.transformer import ModelStructure
from natsjax.plan import hlo, hlo_costs, topologies
from natsjax.plan.hlo_costs import Collective, ProgramCosts
from natsjax.plan.topologies import Topology
from natsjax.runtime import chips
from natsjax.train import losses
from natsjax.train.flops import Flops, step_flops
from natsjax.train.step import Trainer

Made = TypeVar("Made")


class CompilerCrashed(UserError):
    """A crash of the compiler, which ended the process that it ran in."""


class Memory(NamedTuple):
    """Bytes on the fullest device.

    Attributes:
      parameters: stored parameters (``model.param_dtype``).
      optimizer: state of the optimizer, with the step and the state of the budget controller.
      batch: arrays of a batch.
      activations: arrays that the forward pass of a microbatch saves for the backward pass; as traced, without padding.
      temporaries: all other allocations of the compiler: gradients, gathered weights, a layer's intermediate arrays.
      program: code.
    """

    parameters: float
    optimizer: float
    batch: float
    activations: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        """Sum of all classes."""
        return sum(self)


class Roofline(NamedTuple):
    """Least seconds of a step, by each resource alone.

    Attributes:
      compute: matrix products at the chip's peak.
      memory: traffic to and from the device's memory; no bound if a cache serves a part of it, as a GPU's may.
      interconnect: collectives inside a slice or node, over all links.
      network: collectives between slices or nodes.
    """

    compute: float
    memory: float
    interconnect: float
    network: float

    @classmethod
    def of(cls, chip: chips.Chip, flops: float, memory: float, collectives: Sequence[Collective]) -> "Roofline":
        """Divides FLOPs, bytes of memory traffic and bytes of collectives, each per device, by the chip's peaks."""
        inside, across = (sum(getattr(c, f"bytes_{where}") for c in collectives) for where in ("inside", "across"))
        return cls(
            flops / chip.flops, memory / chip.memory_bandwidth, inside / chip.interconnect, across / chip.network
        )

    @property
    def seconds(self) -> float:
        """Time of the slowest resource."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the slowest resource."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledPlan:
    """A program compiled for a topology: fields that training and decoding have in common.

    Attributes:
      topology: name of the topology.
      chip: the devices; None if they are unknown.
      mesh: axes and sizes.
      memory: bytes on each device.
      refusal: the compiler's reason for refusing the program. ``memory.temporaries`` is then its own figure, and the
        costs that are read from the program are unknown.
      roofline: None if the chip is unknown or the compiler refused.
      program: text of the compiled program; empty if the compiler refused.
      compile_seconds: time of the compilation, on this machine.
    """

    config: Config
    topology: str
    num_devices: int
    chip: chips.Chip | None
    mesh: dict[str, int]
    num_parameters: int
    memory: Any
    refusal: str | None
    roofline: Roofline | None
    program: str
    compile_seconds: float

    @property
    def fits(self) -> bool | None:
        """True if the program fits into a device's memory; None if that is unknown."""
        if self.refusal is not None:
            return False
        return None if self.chip is None else self.memory.total <= self.chip.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(CompiledPlan):
    """A training step, compiled for a topology.

    Attributes:
      flops: FLOPs of a step.
      costs: communication and memory traffic of a step, per device; None if the compiler refused.
      kv_bytes: bytes of one sequence of the context's length in decoding, over all layers and heads: in full attention,
        and live at ``nats.kv_budget``.
    """

    memory: Memory
    flops: Flops
    costs: ProgramCosts | None
    kv_bytes: tuple[float, float]


def plan_step(config: Config, topology: Topology, vocab_size: int | None = None) -> Plan:
    """Compiles the step of a run for a topology and reads memory and costs from the program.

    Args:
      config: config of the run.
      topology: from ``topologies.topology``.
      vocab_size: size of the vocabulary; None: from the config.

    Raises:
      UserError: the model or the batch cannot be divided along the mesh.
    """
    vocab_size = vocab_size_of(config) if vocab_size is None else vocab_size
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    trainer = Trainer(config, vocab_size, mesh)
    compiled, common = compile_for(trainer.lower(), config, topology, mesh, trainer.model)
    flops = step_flops(config, vocab_size)
    costs: ProgramCosts | None = None
    roofline: Roofline | None = None
    if compiled is not None:
        costs = hlo_costs.program_costs(hlo.parse(common["program"]), mesh, topology.domains_of(mesh))
        if topology.chip is not None:
            per_device = flops.total / mesh.size
            roofline = Roofline.of(topology.chip, per_device, costs.memory_traffic, costs.collectives)
    memory = _memory(trainer, compiled, common["refusal"])
    return Plan(**common, memory=memory, flops=flops, costs=costs, roofline=roofline, kv_bytes=_kv_bytes(config))


def plan_apart(config: Config, name: str, num_slices: int = 1) -> Plan:
    """Calls ``plan_step`` in a process of its own: see ``apart``.

    Args:
      config: config of the run.
      name: name of the topology, for ``topologies.topology``.
      num_slices: number of slices, for the same.

    Raises:
      UserError: an unknown topology, or a model or batch that cannot be divided along the mesh.
      CompilerCrashed: the compiler crashed.
    """
    remedy = "another train.gradient_accumulation_steps, model.remat or mesh may pass"
    return apart(functools.partial(plan_step, config), name, num_slices, remedy)


def apart(plan: Callable[[Topology], Made], name: str, num_slices: int, remedy: str) -> Made:
    """Calls ``plan(topology)`` in a process of its own, which a compiler may crash; its standard error is not shown.

    Raises:
      UserError: an unknown topology, or any error of ``plan``.
      CompilerCrashed: the compiler crashed; the message ends with ``remedy``.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "stderr"
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(_plan_here, plan, name, num_slices, log).result()
            except concurrent.futures.process.BrokenProcessPool as error:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
                fatal = next((line.partition("] ")[2] for line in lines if line.startswith("F")), "")
                raise CompilerCrashed(
                    f"--topology={name}: the compiler crashed on this step{f' ({fatal.strip()})' if fatal else ''}; "
                    f"{remedy}."
                ) from error


def _plan_here(plan: Callable[[Topology], Made], name: str, num_slices: int, log: pathlib.Path) -> Made:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)  # also for the compilers, which do not use Python's sys.stderr
    if name != "local":
        jax.config.update("jax_platforms", "cpu")  # leave this machine's accelerator to other processes
    return plan(topologies.topology(name, num_slices))


def compile_for(
    lowered: jax.stages.Lowered, config: Config, topology: Topology, mesh: Mesh, model: ModelStructure
) -> tuple[jax.stages.Compiled | None, dict[str, Any]]:
    """Compiles a program; returns it, None if it ran out of a device's memory, and fields of ``CompiledPlan``."""
    began = time.monotonic()
    compiled, refusal = compile_program(lowered)
    seconds = time.monotonic() - began
    return compiled, {
        "config": config,
        "topology": topology.name,
        "num_devices": len(topology.devices),
        "chip": topology.chip,
        "mesh": dict(sharding.axes_of(mesh)),
        "num_parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(model.parameters)),
        "refusal": refusal,
        "program": "" if compiled is None else compiled.as_text() or "",
        "compile_seconds": seconds,
    }


def compile_program(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
    """Returns the compiled program, or the compiler's message if it ran out of a device's memory."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def vocab_size_of(config: Config) -> int:
    """Returns the size of the vocabulary, from the prepared corpus or the tokenizer if they exist, else the config.

    Raises:
      UserError: ``data.tokenizer`` names a folder without a tokenizer.
    """
    data = config.data
    if data.source == "recall":
        return RecallTask(data.context_length, **dataclasses.asdict(data.recall)).vocab_size
    if data.mixture:
        folders = [folder for folder, _ in parse_mixture(data.mixture)]
        here = [folder for folder in folders if (pathlib.Path(folder) / CORPUS_FILE).exists()]
        if here:
            return Corpus.load(here[0]).tokenizer.vocab_size
    if data.prepared_dir and (pathlib.Path(data.prepared_dir) / CORPUS_FILE).exists():
        return Corpus.load(data.prepared_dir).tokenizer.vocab_size
    if data.tokenizer == "bpe":
        return data.vocab_size
    if data.tokenizer == "byte":
        return ByteTokenizer().vocab_size
    return load_tokenizer(data.tokenizer, tiktoken_pattern=data.tiktoken_pattern).vocab_size


# --- memory ---


def _memory(trainer: Trainer, compiled: jax.stages.Compiled | None, refusal: str | None) -> Memory:
    state = trainer.abstract_state()
    parameters = bytes_on_device(state.parameters)
    others = bytes_on_device(state._replace(parameters=None))
    batch = bytes_on_device(trainer.abstract_batch())
    activations = bytes_on_device(saved_activations(trainer))
    rest, code = compiler_memory(compiled, refusal, parameters + others + batch)
    if compiled is None:
        return Memory(parameters, others, batch, activations, max(0.0, rest - activations), code)
    activations = min(activations, max(0.0, rest))
    return Memory(parameters, others, batch, activations, rest - activations, code)


def compiler_memory(compiled: jax.stages.Compiled | None, refusal: str | None, arguments: float) -> tuple[float, float]:
    """Returns the bytes that the compiler allocates besides the arguments, and those of the code.

    Args:
      compiled: the program; None if the compiler refused it.
      refusal: the compiler's message.
      arguments: bytes of the arguments without padding. Their padding, and results that do not replace them, count
        with the rest.
    """
    if compiled is None:
        known = 0.0 if "temporaries" in (refusal or "") else arguments
        return max(0.0, bytes_asked_for(refusal or "") - known), 0.0
    found: Any = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes + total - arguments, found.generated_code_size_in_bytes


def bytes_on_device(tree: Any) -> float:
    """Returns the bytes that abstract arrays take on one device, without padding."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def bytes_asked_for(refusal: str) -> float:
    """Returns the bytes that a compiler reports as needed when it runs out of memory; 0 if it reports none."""
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", refusal)
    if found is None:
        return 0.0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def saved_activations(trainer: Trainer) -> list[jax.ShapeDtypeStruct]:
    """Returns the arrays that the forward pass of a microbatch saves for the backward pass, without parameters."""
    parameters = trainer.abstract_state().parameters
    rows = trainer.config.train.batch_size // trainer.config.train.gradient_accumulation_steps
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), trainer.abstract_batch()
    )

    def residuals(parameters, batch):
        totals = losses.batch_totals(batch)
        noise, kv_penalty = jax.random.key(0), jnp.float32(1)

        def loss(parameters):
            return losses.loss(parameters, trainer.structure, trainer.config, batch, totals, noise, kv_penalty)

        return jax.tree.leaves(jax.vjp(loss, parameters, has_aux=True)[1])

    with jax.set_mesh(trainer.mesh):
        saved = jax.eval_shape(residuals, parameters, batch)
    same = {_kind(x) for x in jax.tree.leaves(parameters)}
    return [x for x in saved if _kind(x) not in same]


def _kind(x: jax.ShapeDtypeStruct) -> tuple:
    """Returns what identifies a saved parameter; a gathered one has another shape on each device."""
    return x.shape, x.dtype, x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _kv_bytes(config: Config) -> tuple[float, float]:
    model = config.model
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    full = per_token * config.data.context_length
    return full, full * live_fraction(config)
