"""What a step takes on hardware that is not here: memory, collectives and roofline bounds of the compiled program.

The step is the very one that ``train.py`` runs, compiled by the accelerator's own compiler: memory is what that
compiler allocates, collectives and traffic are read off its program. Products of matrices are counted from the model's
sizes; a test counts those that the step traces.
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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.data import ByteTokenizer, Corpus, RecallTask, load_tokenizer
from natsjax.data.corpus import CORPUS_FILE
from natsjax.data.mixture import parse_mixture
from natsjax.errors import UserError
from natsjax.kv_fraction import live_fraction
from natsjax.model import sharding
from natsjax.plan import hlo, hlo_costs, topologies
from natsjax.plan.hlo_costs import ProgramCosts
from natsjax.plan.topologies import Topology
from natsjax.runtime import chips
from natsjax.train import losses
from natsjax.train.flops import Flops, step_flops
from natsjax.train.step import Trainer

Made = TypeVar("Made")


class CompilerCrashed(UserError):
    """A compiler ended the process that it ran in."""


class Memory(NamedTuple):
    """Bytes on the fullest device.

    Attributes:
      parameters: float32, as they are stored.
      optimizer: its state, and the step and the KV penalty controller.
      batch: what is read of the data.
      activations: what the forward pass leaves for the backward, of a microbatch; as traced, without padding.
      temporaries: the rest of what the compiler allocates: gradients, gathered weights, what a layer needs.
      program: the code.
    """

    parameters: float
    optimizer: float
    batch: float
    activations: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        """Of all classes."""
        return sum(self)


class Roofline(NamedTuple):
    """Least seconds of a step, were each of these all that there is.

    Attributes:
      compute: products at the chip's peak.
      memory: traffic to and from the device's memory; no bound where a cache serves a part of it, as a GPU's may.
      interconnect: collectives inside a slice or node, over all links.
      network: collectives between slices or nodes.
    """

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the longest."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
      config: of the run.
      topology: its name.
      num_devices: of it.
      chip: what they can do; None where that is not known.
      mesh: axes and sizes.
      num_parameters: of the model.
      memory: on each device.
      refusal: why the compiler refused the program; then ``memory.temporaries`` is what it said, and the costs that
        would be read off the program are unknown.
      flops: of a step.
      costs: of a step, for each device; None where the compiler refused.
      roofline: None where the chip is not known, or the compiler refused.
      program: the compiled program's text; empty where the compiler refused.
      kv_bytes: of one sequence of the context's length in decoding, all layers and heads: full attention's, and live at
        ``nats.kv_budget`` of it.
      compile_seconds: it took here.
    """

    config: Config
    topology: str
    num_devices: int
    chip: chips.Chip | None
    mesh: dict[str, int]
    num_parameters: int
    memory: Memory
    refusal: str | None
    flops: Flops
    costs: ProgramCosts | None
    roofline: Roofline | None
    program: str
    kv_bytes: tuple[float, float]
    compile_seconds: float

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into a device's memory; None where that is not known."""
        if self.refusal is not None:
            return False
        return None if self.chip is None else self.memory.total <= self.chip.memory


def plan_step(config: Config, topology: Topology, vocab_size: int | None = None) -> Plan:
    """Compiles the step of a run for a topology and reads off what it takes.

    Args:
      config: of the run.
      topology: of ``hardware.topology``.
      vocab_size: of the data; None: what the config says of it.

    Raises:
      UserError: the config cannot be divided along its mesh.
    """
    vocab_size = vocab_size_of(config) if vocab_size is None else vocab_size
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    trainer = Trainer(config, vocab_size, mesh)
    began = time.monotonic()
    compiled, refusal = compile_program(trainer.lower())
    seconds = time.monotonic() - began
    memory = _memory(trainer, compiled, refusal)
    flops = step_flops(config, vocab_size)
    costs: ProgramCosts | None = None
    roofline: Roofline | None = None
    text = ""
    if compiled is not None:
        text = compiled.as_text() or ""
        domain = dict(zip(topology.devices, topology.domains, strict=True))
        domains = [domain[device] for device in mesh.devices.flat]
        costs = hlo_costs.program_costs(hlo.parse(text), mesh, domains)
        roofline = None if topology.chip is None else _roofline(topology.chip, flops, costs, mesh.size)
    return Plan(
        config=config,
        topology=topology.name,
        num_devices=len(topology.devices),
        chip=topology.chip,
        mesh=dict(sharding.axes_of(mesh)),
        num_parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.model.parameters)),
        memory=memory,
        refusal=refusal,
        flops=flops,
        costs=costs,
        roofline=roofline,
        program=text,
        kv_bytes=_kv_bytes(config),
        compile_seconds=seconds,
    )


def plan_apart(config: Config, name: str, num_slices: int = 1) -> Plan:
    """``plan_step`` as ``apart`` does it.

    Args:
      config: of the run.
      name: of the topology, for ``hardware.topology``.
      num_slices: for the same.

    Raises:
      UserError: an unknown topology, or a config that cannot be divided along its mesh.
      CompilerCrashed: the compiler did.
    """
    remedy = "another train.gradient_accumulation_steps, model.remat or mesh may pass"
    return apart(functools.partial(plan_step, config), name, num_slices, remedy)


def apart(plan: Callable[[Topology], Made], name: str, num_slices: int, remedy: str) -> Made:
    """``plan(topology)`` in a process of its own, which a compiler may take down; what that one prints is not shown.

    Args:
      plan: what to do.
      name: of the topology, for ``hardware.topology``.
      num_slices: for the same.
      remedy: what may help where the compiler crashes.

    Raises:
      UserError: an unknown topology, or what ``plan`` raises.
      CompilerCrashed: the compiler did.
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
        os.dup2(file.fileno(), 2)  # of the compilers too, which are not Python
    if name != "local":
        jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here is left to others
    return plan(topologies.topology(name, num_slices))


def vocab_size_of(config: Config) -> int:
    """The vocabulary's size: of the prepared corpus or the tokenizer where they are here, else as the config says.

    Raises:
      UserError: ``data.tokenizer`` names a folder that holds none.
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


def compile_program(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
    """The compiled program, or the compiler's sentence where it ran out of a device's memory."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _memory(trainer: Trainer, compiled: jax.stages.Compiled | None, refusal: str | None) -> Memory:
    state = trainer.abstract_state()
    parameters = bytes_on_device(state.parameters)
    others = bytes_on_device(state._replace(parameters=None))
    batch = bytes_on_device(trainer.abstract_batch())
    activations = bytes_on_device(saved_activations(trainer))
    if compiled is None:
        asked = bytes_asked_for(refusal or "")
        known = 0 if "temporaries" in (refusal or "") else parameters + others + batch
        return Memory(parameters, others, batch, activations, max(0.0, asked - activations - known), 0.0)
    found: Any = compiled.memory_analysis()
    # Padding of arguments, and results that do not replace them, go with the temporaries.
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    rest = found.temp_size_in_bytes + arguments - parameters - others - batch
    activations = min(activations, max(0.0, rest))
    return Memory(parameters, others, batch, activations, rest - activations, found.generated_code_size_in_bytes)


def bytes_on_device(tree: Any) -> float:
    """What abstract arrays take of one device, without padding."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def bytes_asked_for(refusal: str) -> float:
    """What a compiler that ran out of a device's memory says it would have needed; 0 where it says nothing of that."""
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", refusal)
    if found is None:
        return 0.0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def saved_activations(trainer: Trainer) -> list[jax.ShapeDtypeStruct]:
    """What the forward pass of a microbatch leaves for the backward, parameters apart, with shardings."""
    parameters = trainer.abstract_state().parameters
    rows = trainer.config.train.batch_size // trainer.config.train.gradient_accumulation_steps
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), trainer.abstract_batch()
    )

    def residuals(parameters, batch):
        totals = losses.batch_totals(batch)
        noise, price = jax.random.key(0), jnp.float32(1)

        def loss(parameters):
            return losses.loss(parameters, trainer.structure, trainer.config, batch, totals, noise, price)

        return jax.tree.leaves(jax.vjp(loss, parameters, has_aux=True)[1])

    with jax.set_mesh(trainer.mesh):
        saved = jax.eval_shape(residuals, parameters, batch)
    same = {_kind(x) for x in jax.tree.leaves(parameters)}
    return [x for x in saved if _kind(x) not in same]


def _kind(x: jax.ShapeDtypeStruct) -> tuple:
    """By which a saved parameter is known; one that is gathered has another share on each device."""
    return x.shape, x.dtype, x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _kv_bytes(config: Config) -> tuple[float, float]:
    model = config.model
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    full = per_token * config.data.context_length
    return full, full * live_fraction(config)


# --- time ---


def _roofline(chip: chips.Chip, flops: Flops, costs: ProgramCosts, num_devices: int) -> Roofline:
    inside = sum(c.bytes_inside for c in costs.collectives)
    across = sum(c.bytes_across for c in costs.collectives)
    return Roofline(
        compute=flops.total / num_devices / chip.flops,
        memory=costs.memory_traffic / chip.memory_bandwidth,
        interconnect=inside / chip.interconnect,
        network=across / chip.network,
    )
