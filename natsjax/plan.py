"""Will it fit, and how long will it take? Compiles a run's step for hardware that is not here, and says.

    python -m natsjax.plan --config=configs/nats_1b.py:v5p-128 --topology=v5p-128 [--config.GROUP.FIELD=VALUE …]

The step is the very one that ``train.py`` runs, compiled by the accelerator's own compiler: memory is what that
compiler allocates, collectives are what it put into the program. Products of matrices are counted from the model's
sizes, and times are roofline bounds: no run is faster, most are slower. ``--topology=local`` is this machine's devices.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from natsjax import hardware, losses, partition, program_costs, program_text
from natsjax.command_line import flag_help, parse_config_flags, run_command
from natsjax.config import Config
from natsjax.data import ByteTokenizer, RecallTask
from natsjax.errors import UserError
from natsjax.hardware import GIB, Topology
from natsjax.program_costs import ProgramCosts
from natsjax.train_step import Trainer
from natsjax.workdir import write_atomically

_USAGE = (
    "usage: python -m natsjax.plan --config=configs/NAME.py[:HARDWARE] --topology=NAME [--config.GROUP.FIELD=VALUE …]"
)
LIKELY = 0.4
"""Of the roofline's speed: what well-tuned training reaches, for the second estimate of days."""


class Memory(NamedTuple):
    """Bytes on the fullest device.

    Attributes:
      parameters: float32, as they are stored.
      optimizer: its state, and the step and the price controller.
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


class Flops(NamedTuple):
    """Floating-point operations of the products in one optimizer step, over all devices.

    Attributes:
      weights: products with weights: forward, backward, and what rematerialisation repeats.
      attention: over the key-query pairs that count, of contexts that are one document each; a tile computes some
        more.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Of both."""
        return sum(self)


class Roofline(NamedTuple):
    """Least seconds of a step, were each of these all that there is.

    Attributes:
      compute: products at the chip's peak.
      memory: traffic to and from the device's memory.
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
      topology: that it was compiled for.
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
    topology: Topology
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
        return None if self.topology.chip is None else self.memory.total <= self.topology.chip.memory


def plan(config: Config, topology: Topology, vocab_size: int | None = None) -> Plan:
    """Compiles the step of a run for a topology and reads off what it takes.

    Args:
      config: of the run.
      topology: of ``hardware.topology``.
      vocab_size: of the data; None: what the config says of it.

    Raises:
      UserError: the config cannot be divided along its mesh.
    """
    vocab_size = vocab_size_of(config) if vocab_size is None else vocab_size
    mesh = partition.make_mesh(config.mesh, topology.devices)
    trainer = Trainer(config, vocab_size, mesh)
    began = time.monotonic()
    compiled, refusal = _compile(trainer)
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
        costs = program_costs.program_costs(program_text.parse(text), mesh, domains)
        roofline = None if topology.chip is None else _roofline(topology.chip, flops, costs, mesh.size)
    return Plan(
        config=config,
        topology=topology,
        mesh=dict(partition.axes_of(mesh)),
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


def vocab_size_of(config: Config) -> int:
    """The vocabulary's size, without the data; of a trained BPE the size that is asked for."""
    data = config.data
    if data.source == "recall":
        return RecallTask(data.context_length, **dataclasses.asdict(data.recall)).vocab_size
    return ByteTokenizer().vocab_size if data.tokenizer == "byte" else data.vocab_size


# --- memory ---


def _compile(trainer: Trainer) -> tuple[jax.stages.Compiled | None, str | None]:
    lowered = trainer.lower()
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _memory(trainer: Trainer, compiled: jax.stages.Compiled | None, refusal: str | None) -> Memory:
    state = trainer.abstract_state()
    parameters = _bytes(state.parameters)
    others = _bytes(state._replace(parameters=None))
    batch = _bytes(trainer.abstract_batch())
    activations = _bytes(saved_activations(trainer))
    if compiled is None:
        asked = _bytes_asked_for(refusal or "")
        known = 0 if "temporaries" in (refusal or "") else parameters + others + batch
        return Memory(parameters, others, batch, activations, max(0.0, asked - activations - known), 0.0)
    found: Any = compiled.memory_analysis()
    # Padding of arguments, and results that do not replace them, go with the temporaries.
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    rest = found.temp_size_in_bytes + arguments - parameters - others - batch
    activations = min(activations, max(0.0, rest))
    return Memory(parameters, others, batch, activations, rest - activations, found.generated_code_size_in_bytes)


def _bytes(tree: Any) -> float:
    """Of abstract arrays, on one device."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def _bytes_asked_for(refusal: str) -> float:
    """What a compiler that ran out of memory says it would have needed."""
    found = re.search(r"\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT])", refusal)
    if found is None:
        return 0.0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def saved_activations(trainer: Trainer) -> list[jax.ShapeDtypeStruct]:
    """What the forward pass of a microbatch leaves for the backward, parameters apart, with shardings."""
    parameters = trainer.abstract_state().parameters
    rows = trainer.config.train.batch_size // trainer.config.train.num_microbatches
    batch = {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
        for name, x in trainer.abstract_batch().items()
    }

    def residuals(parameters, batch):
        totals = losses.batch_totals(batch)
        noise, price = jax.random.key(0), jnp.float32(1)

        def loss(parameters):
            return losses.loss(parameters, trainer.structure, trainer.config, batch, totals, noise, price)

        return jax.tree.leaves(jax.vjp(loss, parameters, has_aux=True)[1])

    with jax.set_mesh(trainer.mesh):
        saved = jax.eval_shape(residuals, parameters, batch)
    same = {(x.shape, x.dtype) for x in jax.tree.leaves(parameters)}
    return [x for x in saved if (x.shape, x.dtype) not in same]


def _kv_bytes(config: Config) -> tuple[float, float]:
    model = config.model
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    full = per_token * config.data.context_length
    return full, full * (config.nats.kv_budget if model.attention == "nats" else 1)


# --- time ---


def step_flops(config: Config, vocab_size: int) -> Flops:
    """Products of one optimizer step, from the sizes alone; two operations each multiply-and-add.

    A weight costs 2 a token forward and 4 backward; ``model.remat = "full"`` repeats a block's forward but for its last
    product, "dots" only its attention's. Attention costs 2 products of ``head_dim`` forward and 7 backward (both of its
    kernels make the logits and the values' products) for each live pair, and 2 for each pair that the roles' gradient
    looks at (``pallas_kernels/nats_attention``).
    """
    model, train = config.model, config.train
    tokens = train.batch_size * config.data.context_length
    qkvo = model.width * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    scorer = 3 * model.width * model.num_kv_heads if model.attention == "nats" else 0
    mlp = model.width * model.mlp_width
    repeated = qkvo + scorer + 2 * mlp if model.remat == "full" else 0
    block = 6 * (qkvo + scorer + 3 * mlp) + 2 * repeated
    weights = tokens * (block * model.num_layers + 6 * model.width * vocab_size)
    length = config.data.context_length
    pairs = train.batch_size * model.num_layers * model.num_heads * length * (length + 1) / 2
    live, looked_at = 1.0, 0.0
    if model.attention == "nats":
        live = config.nats.kv_budget
        shares = {"exact": 1.0, "sampled": config.nats.sampled_fraction, "visible": 0.0}
        looked_at = shares[config.nats.mask_gradient]
    products = live * (2 + 7 + (0 if model.remat == "none" else 2)) + 2 * looked_at
    return Flops(float(weights), pairs * products * 2 * model.head_dim)


def _roofline(chip: hardware.Chip, flops: Flops, costs: ProgramCosts, num_devices: int) -> Roofline:
    inside = sum(c.bytes_sent for c in costs.collectives if not c.crosses)
    across = sum(c.bytes_sent for c in costs.collectives if c.crosses)
    return Roofline(
        compute=flops.total / num_devices / chip.flops,
        memory=costs.memory_traffic / chip.memory_bandwidth,
        interconnect=inside / chip.interconnect,
        network=across / chip.network,
    )


# --- for people ---

_SHRINK = {
    "parameters": "mesh.fsdp (mesh.data only makes copies)",
    "optimizer": "mesh.fsdp (mesh.data only makes copies)",
    "batch": "train.batch_size",
    "activations": "train.num_microbatches (larger), model.remat = 'full' or mesh.context",
    "temporaries": "train.num_microbatches (larger), mesh.tensor or mesh.context",
    "program": "model.num_layers",
}


def summary(plan: Plan) -> str:
    """The plan as text."""
    lines = [*_what(plan), "", *_memory_lines(plan), "", *_time_lines(plan), "", *_kv_lines(plan)]
    return "\n".join(lines)


def _what(plan: Plan) -> list[str]:
    config, mesh = plan.config, ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    train = config.train
    tokens = train.batch_size * config.data.context_length
    parts = f" in {train.num_microbatches} microbatches" if train.num_microbatches > 1 else ""
    return [
        f"{plan.num_parameters / 1e9:.3f}B parameters, {config.model.attention} attention, on {plan.topology.name}: "
        f"{mesh}",
        f"a step: {train.batch_size} contexts of {config.data.context_length} ({tokens:,} tokens){parts}, "
        f"model.remat={config.model.remat}; compiled in {plan.compile_seconds:.0f} s by jax {jax.__version__}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory, chip = plan.memory, plan.topology.chip
    lines = ["memory of a device, GiB"]
    for name, size in memory._asdict().items():
        unknown = plan.refusal is not None and size == 0
        lines.append(f"  {name:<12} {'?' if unknown else f'{size / GIB:.3f}':>9}")
    available = "" if chip is None else f" of {chip.memory / GIB:.2f}"
    verdict = {True: "it fits", False: "IT DOES NOT FIT", None: "what there is, is not known"}[plan.fits]
    lines.append(f"  {'total':<12} {memory.total / GIB:>9.3f}{available}: {verdict}")
    if plan.refusal is not None:
        lines.append(f"  the compiler: {plan.refusal}")
    if plan.fits is False:
        largest = max(memory._asdict().items(), key=lambda item: item[1])[0]
        lines.append(f"  most is taken by {largest}; what would shrink it: {_SHRINK[largest]}")
    return lines


def _time_lines(plan: Plan) -> list[str]:
    flops, costs, roofline = plan.flops, plan.costs, plan.roofline
    devices = len(plan.topology.devices)
    lines = [
        f"products of a step: {flops.total:.3e} FLOPs ({flops.weights:.3e} with weights, {flops.attention:.3e} in "
        f"attention), {flops.total / devices:.3e} a device"
    ]
    if costs is None:
        return lines
    lines.append("collectives of a step        axes of the mesh          times    GB sent by a device")
    for c in costs.collectives:
        axes = ", ".join(c.axes) + (" (between slices or nodes)" if c.crosses else "")
        lines.append(f"  {c.kind:<26} {axes:<25} {c.times:>5} {c.bytes_sent / 1e9:>15.3f}")
    lines.append(f"to and from a device's memory: {costs.memory_traffic / 1e9:.1f} GB a step")
    if costs.unknown_loops:
        lines.append(f"  ({costs.unknown_loops} loops of unknown length count as one turn)")
    if roofline is None:
        return lines
    seconds = ", ".join(f"{name} {value:.4f}" for name, value in roofline._asdict().items() if value)
    tokens = plan.config.train.batch_size * plan.config.data.context_length
    total = tokens * plan.config.train.num_steps
    hours = roofline.seconds * plan.config.train.num_steps / 3600
    return [
        *lines,
        f"roofline, seconds a step: {seconds}: at least {roofline.seconds:.4f}, bound by {roofline.bound}",
        f"at most {tokens / roofline.seconds:,.0f} tokens/s; {total / 1e9:.1f}B tokens in at least {_duration(hours)}, "
        f"in {_duration(hours / LIKELY)} at {100 * LIKELY:.0f} % of that speed",
    ]


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def _kv_lines(plan: Plan) -> list[str]:
    full, live = plan.kv_bytes
    length = plan.config.data.context_length
    text = f"KV of one sequence of {length} tokens when decoding: {full / 2**20:.1f} MiB in full attention"
    if plan.config.model.attention == "nats":
        text += f", {live / 2**20:.1f} MiB live at nats.kv_budget = {plan.config.nats.kv_budget:g}"
    return [text]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers by name, for ``json``."""
    costs = plan.costs
    return {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "mesh": plan.mesh,
        "attention": plan.config.model.attention,
        "remat": plan.config.model.remat,
        "batch_size": plan.config.train.batch_size,
        "num_microbatches": plan.config.train.num_microbatches,
        "context_length": plan.config.data.context_length,
        "num_parameters": plan.num_parameters,
        "fits": plan.fits,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "memory_available": None if plan.topology.chip is None else plan.topology.chip.memory,
        "refusal": plan.refusal,
        "flops": plan.flops._asdict(),
        "collectives": None if costs is None else [c._asdict() for c in costs.collectives],
        "memory_traffic": None if costs is None else costs.memory_traffic,
        "roofline": None if plan.roofline is None else plan.roofline._asdict() | {"bound": plan.roofline.bound},
        "kv_bytes": {"full": plan.kv_bytes[0], "live": plan.kv_bytes[1]},
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 0, or 1 where the step does not fit.

    Raises:
      UserError: flags, config, topology or mesh do not fit.
    """
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, hardware.known_topologies(), flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "TPU slices joined by the data-centre network", flag_values=values)
    flags.DEFINE_string("json", None, "also write all numbers to this file", flag_values=values)
    flags.DEFINE_string("program", None, "also write the compiled program's text to this file", flag_values=values)
    if "--help" in argv or "-h" in argv:
        print(flag_help(__doc__ or "", values))
        return 0
    config = parse_config_flags(argv, values, _USAGE)
    if not values["topology"].value:
        raise UserError(f"--topology is missing: {hardware.known_topologies()}.")
    files = {name: pathlib.Path(values[name].value) for name in ("json", "program") if values[name].value}
    for name, path in files.items():
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{name}={path}: there is no such folder.")
    if values["topology"].value != "local":
        jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here is left to others
    made = plan(config, hardware.topology(values["topology"].value, values["num_slices"].value))
    print(summary(made))
    texts = {"json": json.dumps(as_json(made), indent=2) + "\n", "program": made.program}
    for name, path in files.items():
        write_atomically(path, texts[name])
    return 1 if made.fits is False else 0


if __name__ == "__main__":
    run_command(main)
