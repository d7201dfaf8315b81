"""Time of an optimizer step by part of the model, from a profile of the compiled program.

XLA's profiler has the time of each operation of the program; the program's text has the functions of ours from which
each operation came. A fusion counts for the function of its last operation, and what the compiler added (copies, the
zeros in which a scan stacks what its backward needs) has no source. Times are those of the threads that started an
operation: if it is divided among more threads, the time of the others is not seen.
"""

import collections
import re
import tempfile
from typing import Any

import jax

from natsjax.train.logs.step_breakdown import seconds_by_operation

PARTS = (  # (part, what its innermost function of ours matches: "folder/file.py:function")
    ("attention", r"pallas_kernels/|nats_attention/|xla/"),
    ("roles", r"model/roles\.py:|role_statistics\.py:|:Scorer\.|:MaskedAttention\.|:RoleSampling\."),
    ("projections and rotary", r":Attention\.|:rotate"),
    ("MLP", r":MLP\."),
    ("norms", r":RMSNorm\."),
    ("logits and loss", r"losses\.py:|cross_entropy\.py:|:Transformer\.output_weight"),
    ("optimizer", r"optax/|transforms/|_src/|schedules/|tree_utils/"),
    ("residual stream", r":Block\."),
    ("embedding and scan over layers", r":Transformer\."),
)
COLLECTIVES = "collectives, waiting for other devices included"
REST = "no source, and the rest"


class Sources:
    """From which function each operation of a compiled program came."""

    def __init__(self, text: str):
        tables = {name: _table(text, name) for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}
        self._files = {number: line.strip('"') for number, line in tables["FileNames"].items()}
        self._functions = {number: line.strip('"') for number, line in tables["FunctionNames"].items()}
        self._locations = {number: _fields(line) for number, line in tables["FileLocations"].items()}
        self._frames = {number: _fields(line) for number, line in tables["StackFrames"].items()}
        found = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = [^\n]*?stack_frame_id=(\d+)", text, re.MULTILINE)
        self._frame_of = {operation: int(frame) for operation, frame in found}

    def stack(self, operation: str) -> list[str]:
        """Returns ``folder/file.py:function``, the innermost first."""
        names = []
        number = self._frame_of.get(operation, 0)
        while number in self._frames:
            frame = self._frames[number]
            location = self._locations[frame["file_location_id"]]
            folder_and_file = "/".join(self._files[location["file_name_id"]].split("/")[-2:])
            names.append(f"{folder_and_file}:{self._functions[location['function_name_id']]}")
            parent = frame.get("parent_frame_id", 0)
            number = parent if parent != number else 0
        return names

    def part(self, operation: str) -> str:
        """Returns one of ``PARTS``, by the innermost function that belongs to one; or ``COLLECTIVES`` or ``REST``."""
        if re.match(r"all-|reduce-scatter|collective-|psum|pmax|pmin", operation):
            return COLLECTIVES
        for name in self.stack(operation):
            for part, pattern in PARTS:
                if re.search(pattern, name):
                    return part
        return REST


def _table(text: str, name: str) -> dict[int, str]:
    """Returns the numbered lines below a heading."""
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    lines = found.group(1).splitlines() if found else []
    return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines}


def _fields(line: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", line)}


def breakdown(step: Any, steps: int = 3) -> dict[str, float]:
    """Returns seconds per step by part, of a ``train_step.Ours`` that has been called before; the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        times = seconds_by_operation(folder)
    sources = Sources(step.trainer.lower().compile().as_text())
    by_part: dict[str, float] = collections.Counter()
    for operation, time in times.items():
        by_part[sources.part(operation)] += time / steps
    return dict(sorted(by_part.items(), key=lambda item: -item[1]))


TORCH_PARTS = (
    ("attention", r"scaled_dot_product"),
    ("products of matrices", r"aten::(mm|addmm|bmm)$"),
    ("optimizer", r"adamw|Optimizer|linalg_vector_norm|aten::mul_$"),
    ("fused operations", r"CompiledFxGraph|cpp_fused"),
)


def torch_breakdown(step: Any, steps: int = 3) -> dict[str, float]:
    """Returns seconds per step by kind of operation, of a ``train_step_torch.Step`` that has been called before."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    by_part: dict[str, float] = collections.Counter()
    for event in profile.key_averages():
        part = next((part for part, pattern in TORCH_PARTS if re.search(pattern, event.key)), REST)
        by_part[part] += event.self_cpu_time_total / 1e6 / steps
    return dict(sorted(by_part.items(), key=lambda item: -item[1]))


def print_breakdown(steps: dict[str, Any]) -> None:
    """Prints a Markdown table per contestant; ``steps`` by name, of ``train_step.measure``."""
    for name, step in steps.items():
        by_part = torch_breakdown(step) if name.startswith("torch") else breakdown(step)
        total = sum(by_part.values())
        print(f"\n| {name} | ms a step, summed over threads that start operations | share |\n|---|---|---|")
        for part, seconds in by_part.items():
            print(f"| {part} | {1000 * seconds:.0f} | {100 * seconds / total:.0f} % |")
