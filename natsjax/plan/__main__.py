"""Will it fit, and how long will it take? Compiles a run's step for hardware that is not here, and says.

    python -m natsjax.plan --config=configs/nats_1b.py:v5p-128 --topology=v5p-128 [--config.GROUP.FIELD=VALUE …]

Memory is what the accelerator's own compiler allocates for the step of ``train.py``, and collectives are what it put
into the program (``plan.train_step``). Times are roofline estimates, by the vendors' peaks: most runs are slower.
``--topology=local`` is this machine's devices. ``--search`` compiles the step under every rematerialisation policy,
each with the fewest microbatches that fit. TPU flags in LIBTPU_INIT_ARGS count, as they do for a run.

``--decode`` compiles the loop that decodes instead (``natsjax.plan.decoding``), on a mesh for serving unless
``--config.mesh.*`` is given.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from natsjax.config import Config
from natsjax.config_fields import resolve_paths
from natsjax.errors import UserError
from natsjax.plan import topologies
from natsjax.plan.decoding import DecodePlan, DecodeRequest, plan_decode_apart
from natsjax.plan.hlo_costs import Collective
from natsjax.plan.train_step import CompilerCrashed, Plan, plan_apart
from natsjax.runs.workdir import write_atomically
from natsjax.runtime.chips import GIB
from natsjax.runtime.files import check_files
from natsjax.runtime.flags import flag_help, parse_config_flags, run_command

_USAGE = (
    "usage: python -m natsjax.plan --config=configs/NAME.py[:HARDWARE] --topology=NAME [--config.GROUP.FIELD=VALUE …]"
)
LIKELY = 0.4
"""Of the roofline's speed, an assumption: for the second estimate of time."""

_SHRINK = {
    "parameters": "mesh.fsdp (mesh.data only makes copies)",
    "optimizer": "mesh.fsdp (mesh.data only makes copies)",
    "batch": "train.batch_size",
    "activations": "train.num_microbatches (larger), model.remat (up to 'full') or mesh.context",
    "temporaries": "train.num_microbatches (larger), mesh.tensor or mesh.context",
    "program": "model.num_layers",
}
_SHRINK_DECODING = {
    "parameters": "mesh.tensor",
    "buffer": "--decode_batch, --decode_kv or mesh.tensor",
    "temporaries": "mesh.tensor or --decode_batch",
    "program": "model.num_layers",
}


def summary(plan: Plan) -> str:
    """The plan as text."""
    lines = [*_what(plan), "", *_memory_lines(plan, _SHRINK), "", *_time_lines(plan), "", *_kv_lines(plan)]
    return "\n".join(lines)


def _what(plan: Plan) -> list[str]:
    config, mesh = plan.config, ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    train = config.train
    tokens = train.batch_size * config.data.context_length
    parts = f" in {train.num_microbatches} microbatches" if train.num_microbatches > 1 else ""
    return [
        f"{plan.num_parameters / 1e9:.3f}B parameters, {config.model.attention} attention, on {plan.topology}: {mesh}",
        f"a step: {train.batch_size} contexts of {config.data.context_length} ({tokens:,} tokens){parts}, "
        f"model.remat={config.model.remat}; compiled in {plan.compile_seconds:.0f} s by jax {jax.__version__}",
    ]


def _memory_lines(plan: Plan | DecodePlan, shrink: dict[str, str]) -> list[str]:
    memory, chip = plan.memory, plan.chip
    lines = ["memory of a device, GiB"]
    for name, size in memory._asdict().items():
        unknown = plan.refusal is not None and not size
        lines.append(f"  {name:<12} {'?' if unknown else f'{size / GIB:.3f}':>9}")
    available = "" if chip is None else f" of {chip.memory / GIB:.2f}"
    verdict = {True: "it fits", False: "IT DOES NOT FIT", None: "what there is, is not known"}[plan.fits]
    least = "at least " if plan.refusal is not None else ""
    lines.append(f"  {'total':<12} {least}{memory.total / GIB:>9.3f}{available}: {verdict}")
    if plan.refusal is not None:
        lines.append(f"  the compiler: {plan.refusal}")
    if plan.fits is False and memory.total > 0 and (plan.refusal is None or memory.temporaries):
        largest = max(memory._asdict().items(), key=lambda item: item[1])[0]
        lines.append(f"  most is taken by {largest}; what would shrink it: {shrink[largest]}")
    return lines


def _time_lines(plan: Plan) -> list[str]:
    flops, costs, roofline = plan.flops, plan.costs, plan.roofline
    devices = plan.num_devices
    lines = [
        f"products of a step: {flops.total:.3e} FLOPs ({flops.weights:.3e} with weights, {flops.attention:.3e} in "
        f"attention), {flops.total / devices:.3e} a device"
    ]
    if costs is None:
        return lines
    lines += _collective_lines(costs.collectives, "step", "GB", 1e9)
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


def _collective_lines(collectives: Sequence[Collective], of: str, unit: str, size: float) -> list[str]:
    across = any(c.bytes_across for c in collectives)
    more = "   and to other slices or nodes" if across else ""
    lines = [f"{f'collectives of a {of}':<25} axes of the mesh         times   {unit} sent by a device{more}"]
    for c in collectives:
        text = f"  {c.kind:<23} {', '.join(c.axes):<22} {c.times:>7} {c.bytes_inside / size:>21.3f}"
        lines.append(text + (f" {c.bytes_across / size:>30.3f}" if across else ""))
    return lines


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"


def _kv_lines(plan: Plan) -> list[str]:
    full, live = plan.kv_bytes
    length = plan.config.data.context_length
    text = f"KV of one sequence of {length} tokens when decoding: {full / 2**20:.1f} MiB in full attention"
    if plan.config.model.has_roles:
        text += f", {live / 2**20:.1f} MiB live at nats.kv_budget = {plan.config.nats.kv_budget:g}"
    return [text]


# --- decoding ---


def decode_summary(plan: DecodePlan) -> str:
    """The plan as text."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    chosen = " (chosen; --config.mesh.* sets another)" if plan.mesh_is_chosen else ""
    share = plan.slots / plan.full_slots
    lines = [
        f"{plan.num_parameters / 1e9:.3f}B parameters, {plan.config.model.attention} attention, decoding on "
        f"{plan.topology}: {mesh}{chosen}",
        f"a token of each of {plan.batch} sequences of {plan.context} tokens; a loop of {plan.segment}, "
        f"compiled in {plan.compile_seconds:.0f} s by jax {jax.__version__}",
        "",
        *_memory_lines(plan, _SHRINK_DECODING),
        "",
        f"KV slots of a head: {plan.slots} allocated, full attention takes {plan.full_slots}: {100 * share:.1f} %",
        f"KV buffer of a device: {plan.memory.buffer / GIB:.3f} GiB, for full attention {plan.full_buffer / GIB:.3f}",
    ]
    if plan.collectives is None or plan.copies is None:
        return "\n".join(lines)
    lines += [
        f"the buffer is updated where it lies: {'yes, donated' if plan.is_donated else 'NO: IT IS NOT DONATED'}",
        f"copies of it in the program: {', '.join(plan.copies) or 'none'}",
        f"collectives that send it or a part of it: {', '.join(plan.sent or ()) or 'none'}",
        "",
        *_collective_lines(plan.collectives, "token", "MB", 1e6),
        f"reads of a token by a device: {plan.reads[0] / 1e9:.3f} GB of weights, {plan.reads[1] / 1e9:.3f} GB of slots",
    ]
    if plan.roofline is not None:
        seconds = ", ".join(f"{name} {1e3 * value:.4f}" for name, value in plan.roofline._asdict().items() if value)
        least = plan.roofline.seconds
        lines += [
            f"roofline, milliseconds a token: {seconds}: at least {1e3 * least:.4f}, bound by {plan.roofline.bound}",
            f"at most {plan.batch / least:,.0f} tokens/s, {1 / least:,.0f} of each sequence; what the collectives' "
            f"{sum(c.times for c in plan.collectives)} starts take is not in it",
        ]
    return "\n".join(lines)


def decode_as_json(plan: DecodePlan) -> dict[str, Any]:
    """The plan's numbers by name, for ``json``."""
    roofline = None if plan.roofline is None else plan.roofline._asdict() | {"bound": plan.roofline.bound}
    same = "topology mesh num_parameters batch context slots full_slots full_buffer fits refusal is_donated copies sent"
    return {name: getattr(plan, name) for name in same.split()} | {
        "devices": plan.num_devices,
        "attention": plan.config.model.attention,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "memory_available": None if plan.chip is None else plan.chip.memory,
        "collectives": None if plan.collectives is None else [c._asdict() for c in plan.collectives],
        "reads": {"weights": plan.reads[0], "slots": plan.reads[1]},
        "roofline": roofline,
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers by name, for ``json``."""
    costs = plan.costs
    return {
        "topology": plan.topology,
        "devices": plan.num_devices,
        "mesh": plan.mesh,
        "attention": plan.config.model.attention,
        "remat": plan.config.model.remat,
        "batch_size": plan.config.train.batch_size,
        "num_microbatches": plan.config.train.num_microbatches,
        "context_length": plan.config.data.context_length,
        "num_parameters": plan.num_parameters,
        "fits": plan.fits,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "memory_available": None if plan.chip is None else plan.chip.memory,
        "refusal": plan.refusal,
        "flops": plan.flops._asdict(),
        "collectives": None if costs is None else [c._asdict() for c in costs.collectives],
        "memory_traffic": None if costs is None else costs.memory_traffic,
        "roofline": None if plan.roofline is None else plan.roofline._asdict() | {"bound": plan.roofline.bound},
        "kv_bytes": {"full": plan.kv_bytes[0], "live": plan.kv_bytes[1]},
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


# --- trying out ---


def search(config: Config, name: str, num_slices: int = 1) -> Iterator[Plan]:
    """Plans with every rematerialisation policy, each with the fewest microbatches that fit, or the most there are.

    Args:
      config: of the run; ``model.remat`` and ``train.num_microbatches`` are what is tried.
      name: of the topology, for ``hardware.topology``.
      num_slices: for the same.

    Raises:
      UserError: see ``planning.plan_apart``.
    """
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(config.model, remat=remat)
        shards, made = 1, None
        for count in range(1, config.train.batch_size + 1):
            if config.train.batch_size % (count * shards):
                continue
            train = dataclasses.replace(config.train, num_microbatches=count)
            try:
                made = plan_apart(dataclasses.replace(config, model=model, train=train), name, num_slices)
            except CompilerCrashed as crash:
                print(f"model.remat = {remat}, train.num_microbatches = {count}: {crash}\n", flush=True)
                continue
            shards = made.mesh.get("data", 1) * made.mesh.get("fsdp", 1)
            if made.fits is not False:
                break
        if made is not None:
            yield made


def search_table(plans: Sequence[Plan]) -> str:
    """What was tried, the fastest first."""

    def seconds(made: Plan) -> float:
        return made.roofline.seconds if made.roofline is not None and made.fits else float("inf")

    lines = ["--config.model.remat --config.train.num_microbatches  GiB a device  seconds a step at least"]
    for made in sorted(plans, key=seconds):
        config, roofline = made.config, made.roofline
        bound = "" if roofline is None else f"{roofline.seconds:.4f} ({roofline.bound})"
        size = f"{made.memory.total / GIB:.2f}" + ("" if made.fits is not False else ": does not fit")
        lines.append(f"{config.model.remat:<20} {config.train.num_microbatches:<32} {size:<13} {bound}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 0, or 1 where the step does not fit.

    Raises:
      UserError: flags, config, topology or mesh do not fit.
    """
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, topologies.known_topologies(), flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "TPU slices joined by the data-centre network", flag_values=values)
    flags.DEFINE_bool("search", False, "try rematerialisation policies and numbers of microbatches", flag_values=values)
    flags.DEFINE_string("json", None, "also write all numbers to this file", flag_values=values)
    flags.DEFINE_string("program", None, "also write the compiled program's text to this file", flag_values=values)
    flags.DEFINE_bool("decode", False, "plan the loop that decodes, not the training step", flag_values=values)
    flags.DEFINE_integer("decode_batch", None, "sequences; by default 16 a replica of the weights", flag_values=values)
    flags.DEFINE_integer("decode_context", None, "tokens of each; by default data.context_length", flag_values=values)
    flags.DEFINE_float("decode_kv", None, "share of them that is live; by default nats.kv_budget", flag_values=values)
    if "--help" in argv or "-h" in argv:
        print(flag_help(__doc__ or "", values))
        return 0
    config = resolve_paths(parse_config_flags(argv, values, _USAGE))
    if not values["topology"].value:
        raise UserError(f"--topology is missing: {topologies.known_topologies()}.")
    files = {name: pathlib.Path(values[name].value).expanduser() for name in ("json", "program") if values[name].value}
    for name, path in files.items():
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{name}={path}: there is no such folder.")
        check_files(f"--{name}={path}", [path])
    if files and values["search"].value:
        raise UserError("--json and --program are of one plan; leave out --search.")
    topology = (values["topology"].value, values["num_slices"].value)
    asked = {name: values[f"decode_{name}"].value for name in ("batch", "context", "kv")}
    if values["decode"].value:
        if values["search"].value:
            raise UserError("--search tries what the training step does; leave it out for --decode.")
        as_trained = any(argument.startswith("--config.mesh.") for argument in argv)
        decoding = plan_decode_apart(config, *topology, DecodeRequest(**asked, as_trained=as_trained))
        return _report(decoding, decode_summary(decoding), decode_as_json(decoding), files)
    for name, value in asked.items():
        if value is not None:
            raise UserError(f"--decode_{name}={value}: it is for --decode.")
    if values["search"].value:
        plans = []
        for made in search(config, *topology):
            print(f"{summary(made)}\n", flush=True)
            plans.append(made)
        print(search_table(plans))
        return 0 if any(made.fits is not False for made in plans) else 1
    made = plan_apart(config, *topology)
    return _report(made, summary(made), as_json(made), files)


def _report(made: Plan | DecodePlan, text: str, numbers: dict[str, Any], files: dict[str, pathlib.Path]) -> int:
    """Writes and prints; the exit status."""
    unwritten = files.pop("program", None) if made.refusal is not None else None
    texts = {"json": json.dumps(numbers, indent=2) + "\n", "program": made.program}
    for name, path in files.items():
        write_atomically(path, texts[name])
    print(text)
    if unwritten is not None:
        print(f"--program={unwritten} is not written: there is no program.")
    return 1 if made.fits is False else 0


if __name__ == "__main__":
    run_command(main)
