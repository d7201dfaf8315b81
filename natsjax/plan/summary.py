"""Plans as text for the terminal, and as JSON."""

from collections.abc import Sequence
from typing import Any

import jax

from natsjax.plan.decoding import DecodePlan
from natsjax.plan.hlo_costs import Collective
from natsjax.plan.train_step import CompiledPlan, Plan
from natsjax.runtime.chips import GIB

LIKELY = 0.4
"""Fraction of the roofline's speed, an assumption, for the second estimate of time."""

_SHRINK = {
    "parameters": "mesh.fsdp (mesh.data only makes copies)",
    "optimizer": "mesh.fsdp (mesh.data only makes copies)",
    "batch": "train.batch_size",
    "activations": "train.gradient_accumulation_steps (larger), model.remat (up to 'full') or mesh.context",
    "temporaries": "train.gradient_accumulation_steps (larger), mesh.tensor or mesh.context",
    "program": "model.num_layers",
}
_SHRINK_DECODING = {
    "parameters": "mesh.tensor",
    "buffer": "--decode_batch, --decode_kv or mesh.tensor",
    "temporaries": "mesh.tensor or --decode_batch",
    "program": "model.num_layers",
}


def summary(plan: Plan) -> str:
    """Formats a plan of a training step as text."""
    return "\n".join([*_heading(plan), "", *_memory_lines(plan, _SHRINK), "", *_time_lines(plan), "", _kv_line(plan)])


def _heading(plan: Plan) -> list[str]:
    config, train = plan.config, plan.config.train
    tokens = train.batch_size * config.data.context_length
    parts = f" in {train.gradient_accumulation_steps} microbatches" if train.gradient_accumulation_steps > 1 else ""
    return [
        f"{plan.num_parameters / 1e9:.3f}B parameters, {config.model.layer_pattern} attention, on "
        f"{plan.topology}: {_mesh_text(plan)}",
        f"a step: {train.batch_size} contexts of {config.data.context_length} ({tokens:,} tokens){parts}, "
        f"model.remat={config.model.remat}; compiled in {plan.compile_seconds:.0f} s by jax {jax.__version__}",
    ]


def _mesh_text(plan: CompiledPlan) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"


def _memory_lines(plan: CompiledPlan, shrink: dict[str, str]) -> list[str]:
    memory, chip = plan.memory, plan.chip
    lines = ["memory of a device, GiB"]
    for name, size in memory._asdict().items():
        unknown = plan.refusal is not None and not size
        lines.append(f"  {name:<12} {'?' if unknown else f'{size / GIB:.3f}':>9}")
    available = "" if chip is None else f" of {chip.memory / GIB:.2f}"
    verdict = {True: "it fits", False: "IT DOES NOT FIT", None: "the memory of the device is not known"}[plan.fits]
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


def _kv_line(plan: Plan) -> str:
    full, live = plan.kv_bytes
    length = plan.config.data.context_length
    text = f"KV of one sequence of {length} tokens when decoding: {full / 2**20:.1f} MiB in full attention"
    if plan.config.model.has_roles:
        text += f", {live / 2**20:.1f} MiB live at nats.kv_budget = {plan.config.nats.kv_budget:g}"
    return text


# --- decoding ---


def decode_summary(plan: DecodePlan) -> str:
    """Formats a plan of decoding as text."""
    percent = 100 * plan.slots / plan.full_slots
    chosen = " (chosen; --config.mesh.* sets another)" if plan.mesh_is_chosen else ""
    lines = [
        f"{plan.num_parameters / 1e9:.3f}B parameters, {plan.config.model.layer_pattern} attention, decoding on "
        f"{plan.topology}: {_mesh_text(plan)}{chosen}",
        f"a token of each of {plan.batch} sequences of {plan.context} tokens; a loop of {plan.segment}, "
        f"compiled in {plan.compile_seconds:.0f} s by jax {jax.__version__}",
        "",
        *_memory_lines(plan, _SHRINK_DECODING),
        "",
        f"KV slots of a head: {plan.slots} allocated, full attention takes {plan.full_slots}: {percent:.1f} %",
        f"KV buffer of a device: {plan.memory.buffer / GIB:.3f} GiB, for full attention {plan.full_buffer / GIB:.3f}",
    ]
    if plan.collectives is None or plan.copies is None:
        return "\n".join(lines)
    lines += [
        f"the buffer is updated in place: {'yes, donated' if plan.is_donated else 'NO: IT IS NOT DONATED'}",
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
            f"at most {plan.batch / least:,.0f} tokens/s, {1 / least:,.0f} of each sequence, without the time that "
            f"{sum(c.times for c in plan.collectives)} collectives take to start",
        ]
    return "\n".join(lines)


def decode_as_json(plan: DecodePlan) -> dict[str, Any]:
    """Returns the numbers of a plan of decoding by name, for JSON."""
    same = "batch context slots full_slots full_buffer is_donated copies sent"
    return _common(plan) | {
        **{name: getattr(plan, name) for name in same.split()},
        "collectives": None if plan.collectives is None else [c._asdict() for c in plan.collectives],
        "reads": {"weights": plan.reads[0], "slots": plan.reads[1]},
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the numbers of a plan of a training step by name, for JSON."""
    costs = plan.costs
    return _common(plan) | {
        "remat": plan.config.model.remat,
        "batch_size": plan.config.train.batch_size,
        "gradient_accumulation_steps": plan.config.train.gradient_accumulation_steps,
        "context_length": plan.config.data.context_length,
        "flops": plan.flops._asdict(),
        "collectives": None if costs is None else [c._asdict() for c in costs.collectives],
        "memory_traffic": None if costs is None else costs.memory_traffic,
        "kv_bytes": {"full": plan.kv_bytes[0], "live": plan.kv_bytes[1]},
    }


def _common(plan: CompiledPlan) -> dict[str, Any]:
    return {
        "topology": plan.topology,
        "devices": plan.num_devices,
        "mesh": plan.mesh,
        "attention": plan.config.model.layer_pattern,
        "num_parameters": plan.num_parameters,
        "fits": plan.fits,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "memory_available": None if plan.chip is None else plan.chip.memory,
        "refusal": plan.refusal,
        "roofline": None if plan.roofline is None else plan.roofline._asdict() | {"bound": plan.roofline.bound},
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }
