"""Time of one optimizer step: NAtS against its dense baseline, and the dense baseline against PyTorch.

    python -m benchmarks.train_step --output=docs             the table of docs/scaling.md, and docs/train_step.json
    python -m benchmarks.train_step --devices=2               a CPU device for each of two cores
    python -m benchmarks.train_step --breakdown               also where the time of each step goes
    python -m benchmarks.train_step --remat                   also NAtS with every rematerialization policy
    python -m benchmarks.train_step --optimizers              also the dense model with every update rule

The model is that of ``configs/speeches.py``; a step has ``--tokens`` tokens, so that a longer context means a smaller
batch. Every row of a batch is one document of random tokens, all of them predicted. A step is the whole of it: forward,
backward, clipping, AdamW, and the loss as a number of the host. Every round times each contestant once, so that
whatever else the machine does hits all of them; a ratio is the median over rounds.

Contestants: ``dense``; ``nats`` with ``nats.mask_gradient`` "exact"; ``sampled`` with "sampled"; and ``torch``, the
dense model as an ``nn.Module`` under ``torch.compile``, where PyTorch is installed (``benchmarks.train_step_torch``).
It takes over the parameters of ``dense`` and must give the same losses and norms of the gradient, or the program stops.
With ``--remat`` also ``nats`` with ``model.remat`` "dots" and "full" (it is "none" otherwise), under these names. With
``--optimizers`` also ``dense`` with the other update rules of ``optimizer.name``, under these names.

A fresh scorer would keep far more keys than a trained one. ``nats.initial_roles`` is therefore set to fractions (some
GLOBAL, the rest half LOCAL, half SLIDING) that keep about ``nats.kv_budget`` at the context's length; the KV fraction
that the timed steps reported is printed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks.attention import race, ratio
from benchmarks.attention_contestants import Contestant
from configs import speeches
from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.kv_fraction import random_kv_fraction
from natsjax.runtime.files import try_files, unwritable
from natsjax.runtime.flags import Parser, run_command
from natsjax.train.step import StepMetrics, Trainer
from pallas_kernels.nats_attention.tiling import num_cores

MAX_DIFFERENCE = 1e-4
"""Largest relative difference of the losses and the gradients' norms of ``dense`` and ``torch``."""

NATS_MOST = {1024: 1.25, 8192: 1.0}
"""Tokens of a context to the largest seconds of ``nats`` over those of ``dense`` that the project allows itself."""

UPDATE_RULES = ("muon", "lion", "adafactor", "schedule_free")
"""Update rules besides AdamW, which all contestants have otherwise."""

TORCH_LEAST = 0.75
"""The smallest seconds of ``torch`` over those of ``dense`` at 1024 tokens; the aim is 0.9."""


class Case(NamedTuple):
    """A size of step.

    Attributes:
      length: tokens in a context.
      batch: sequences.
      devices: number of devices.
    """

    length: int
    batch: int
    devices: int = 1


class Row(NamedTuple):
    """The measurements of a case.

    Attributes:
      case: its sizes.
      mesh: axes of more than one device, and their sizes.
      roles: ``nats.initial_roles``.
      kv_fraction: of ``nats``, the median of the timed steps.
      seconds: medians by contestant.
      ratios: by name: ``nats / dense``, ``sampled / dense``, ``torch / dense``.
      others: fraction of the cores' time that other processes used, in [0, 1]; None if the system does not report it.
    """

    case: Case
    mesh: dict[str, int]
    roles: tuple[float, float, float]
    kv_fraction: float
    seconds: dict[str, float]
    ratios: dict[str, float]
    others: float | None


def roles_for(kv_fraction: float, length: int, window: int) -> tuple[float, float, float]:
    """Returns fractions of GLOBAL, LOCAL, SLIDING that, drawn at random, keep a fraction of one document's KV.

    Of the tokens that are not GLOBAL half are LOCAL and half SLIDING. Where the fraction is less than any of GLOBAL
    gives, the thriftiest are returned.

    Args:
      kv_fraction: expected KV fraction.
      length: of the document, tokens.
      window: ``nats.window``, tokens.
    """

    def roles(is_global: float) -> tuple[float, float, float]:
        return is_global, (1 - is_global) / 2, (1 - is_global) / 2

    def kept(is_global: float) -> float:
        return random_kv_fraction([length], (window,), roles(is_global))

    grid = np.geomspace(1 / length, 1 - 1e-4, 300)  # the config wants some of each
    few = float(min(grid, key=kept))  # with fewer GLOBAL tokens LOCAL ones live longer
    many = float(grid[-1])
    for _ in range(30 if kept(few) < kv_fraction else 0):
        middle = (few + many) / 2
        few, many = (middle, many) if kept(middle) < kv_fraction else (few, middle)
    return roles(few)


def mesh_sizes(devices: int, batch: int, num_kv_heads: int) -> dict[str, int]:
    """Returns fields of ``config.mesh`` that divide the batch, or else the heads.

    Raises:
      UserError: neither can be divided among so many devices.
    """
    if devices == 1:
        return {}
    if batch % devices == 0:
        return {"data": devices}
    if num_kv_heads % devices == 0:
        return {"tensor": devices}
    raise UserError(
        f"--devices={devices} divides neither a batch of {batch} nor {num_kv_heads} KV heads; use another number, or "
        "other --lengths or --tokens."
    )


def base_config() -> ml_collections.ConfigDict:
    """Returns the config with the sizes of the model, and AdamW, which PyTorch's contestant has."""
    config = speeches.get_config()
    config.optimizer.name = "adamw"
    config.optimizer.peak_learning_rate = 4e-3
    return config


def configs_of(case: Case, remat: bool = False, optimizers: bool = False) -> dict[str, Config]:
    """Returns the configs of our contestants by name.

    Args:
      case: sizes.
      remat: also those of the rematerialization policies.
      optimizers: also those of the update rules.

    Raises:
      UserError: the case cannot be run on its devices.
    """
    config = base_config()
    config.data.context_length = case.length
    config.train.batch_size = case.batch
    for axis, size in mesh_sizes(case.devices, case.batch, config.model.num_kv_heads).items():
        config.mesh[axis] = size
    config.nats.initial_roles = roles_for(config.nats.kv_budget, case.length, config.nats.window)
    nats = Config.from_dict(config)
    configs = {
        "dense": dataclasses.replace(nats, model=dataclasses.replace(nats.model, layer_types=("dense",))),
        "nats": dataclasses.replace(nats, nats=dataclasses.replace(nats.nats, mask_gradient="exact")),
        "sampled": dataclasses.replace(nats, nats=dataclasses.replace(nats.nats, mask_gradient="sampled")),
    }
    for policy in ("dots", "full") if remat else ():
        model = dataclasses.replace(nats.model, remat=policy)
        configs[policy] = dataclasses.replace(configs["nats"], model=model)
    for rule in UPDATE_RULES if optimizers else ():
        schedule = "constant" if rule == "schedule_free" else nats.optimizer.schedule
        optimizer = dataclasses.replace(nats.optimizer, name=rule, schedule=schedule)
        configs[rule] = dataclasses.replace(configs["dense"], optimizer=optimizer)
    return configs


def batch_of(case: Case, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random tokens: every row one document, every token predicted."""
    shape = (case.batch, case.length)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (case.batch, case.length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weight": np.ones(shape, np.float32),
        "positions": np.tile(np.arange(case.length, dtype=np.int32), (case.batch, 1)),
        "document_end": np.full(shape, case.length, np.int32),
    }


class Ours:
    """One step of ours after another: ``step()`` returns the loss before it; ``metrics`` keeps what they reported."""

    def __init__(self, config: Config, vocab_size: int, batch: dict[str, np.ndarray]):
        self.trainer = Trainer(config, vocab_size)
        self.state = self.trainer.init()
        self.batch = batch
        self.metrics: list[StepMetrics] = []

    def __call__(self) -> float:
        """Takes a step."""
        self.state, metrics = self.trainer.step(self.state, self.batch)
        self.metrics.append(metrics)
        return float(metrics["loss"])


def torch_rival(dense: Ours) -> tuple[str, Any] | None:
    """Builds PyTorch's ``(name, step)`` from the state of ``dense``, compiled or else eager; None without PyTorch.

    Raises:
      SystemExit: its losses or gradients are not ours.
    """
    if importlib.util.find_spec("torch") is None:
        print("torch: not installed, not timed.")
        return None
    from benchmarks import train_step_torch

    train_step_torch.torch.set_num_threads(num_cores())
    config, trainer = dense.trainer.config, dense.trainer
    parameters = jax.tree.map(np.asarray, dense.state.parameters)

    def start(compiled):
        rates = trainer.schedule  # of the step's number
        return train_step_torch.Step(config, trainer.vocab_size, parameters, dense.batch, rates, compiled)

    name, step = "torch", start(True)
    try:
        found = step()
    except RuntimeError as error:  # of torch.compile: for example no C++ compiler
        reason = str(error).strip().splitlines()[0]
        print(f"torch.compile does not work here ({type(error).__name__}: {reason}); timed eagerly instead.")
        name, step = "torch (eager)", start(False)
        found = step()
    for count in (0, 1):
        theirs = {"loss": step() if count else found, "gradient's norm": step.gradient_norm}
        mine = {"loss": dense(), "gradient's norm": float(dense.metrics[-1]["gradient_norm"])}
        for what, value in mine.items():
            if not abs(theirs[what] - value) <= MAX_DIFFERENCE * abs(value):
                raise SystemExit(
                    f"the {what} of step {count} is {value} of dense and {theirs[what]} of {name}: their times would "
                    "not be of the same work."
                )
    return name, step


class OtherLoad:
    """Load of other processes on the cores, from its creation on."""

    def __init__(self):
        self.began = self._now()

    def share(self) -> float | None:
        """Returns the fraction of the cores' time, in [0, 1]; None if the system does not report it."""
        now = self._now()
        if now is None or self.began is None:
            return None
        wall, busy, own = (x - y for x, y in zip(now, self.began, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        path = pathlib.Path("/proc/stat")
        if not path.exists():
            return None
        line = path.read_text(encoding="ascii").split("\n")[0]
        user, nice, system, _, _, interrupt, soft, steal, *_ = map(int, line.split()[1:])
        busy = (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


def measure(case: Case, repeats: int, remat: bool = False, optimizers: bool = False) -> tuple[Row, dict[str, Any]]:
    """Measures a row of the table; also returns the contestants."""
    configs = configs_of(case, remat, optimizers)
    vocab_size = configs["dense"].data.vocab_size
    batch = batch_of(case, vocab_size)
    steps: dict[str, Any] = {name: Ours(config, vocab_size, batch) for name, config in configs.items()}
    rival = torch_rival(steps["dense"])
    if rival is not None:
        steps[rival[0]] = rival[1]
    for step in steps.values():
        step()  # compiles
    load = OtherLoad()
    times = race([Contestant(name, step) for name, step in steps.items()], repeats)
    kept = [float(metrics["kv_fraction"]) for metrics in steps["nats"].metrics[-repeats:]]
    row = Row(
        case=case,
        mesh={axis: size for axis, size in steps["dense"].trainer.mesh.shape.items() if size > 1},
        roles=configs["nats"].nats.initial_roles,
        kv_fraction=statistics.median(kept),
        seconds={name: statistics.median(values) for name, values in times.items()},
        ratios={f"{name} / dense": ratio(values, times["dense"]) for name, values in times.items() if name != "dense"},
        others=load.share(),
    )
    return row, steps


def verdict(name: str, length: int, value: float) -> str:
    """Formats a ratio, with its bar if there is one."""
    if name == "nats / dense" and length in NATS_MOST:
        most = NATS_MOST[length]
        return f"{value:.2f} (≤ {most:g}: {'met' if value <= most else 'missed'})"
    if name.startswith("torch") and length == 1024:
        return f"{value:.2f} (≥ {TORCH_LEAST:g}: {'met' if value >= TORCH_LEAST else 'missed'})"
    return f"{value:.2f}"


def print_table(rows: list[Row]) -> None:
    """Prints the table as Markdown."""
    print("\n| context, batch | mesh | seconds a step | ratio of seconds | KV | others' share of the CPU |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row.mesh.items()) or "1 device"
        times = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row.seconds.items())
        ratios = ", ".join(f"{name} {verdict(name, row.case.length, value)}" for name, value in row.ratios.items())
        others = "?" if row.others is None else f"{100 * row.others:.0f} %"
        kept = f"{100 * row.kv_fraction:.1f} %"
        print(f"| {row.case.length}, {row.case.batch} | {mesh} | {times} | {ratios} | {kept} | {others} |")
    print()
    for row in rows:
        roles = ", ".join(
            f"{100 * x:.1f} % {name}" for x, name in zip(row.roles, ("GLOBAL", "LOCAL", "SLIDING"), strict=True)
        )
        print(f"Roles at {row.case.length} tokens: {roles}.")


def write_json(path: pathlib.Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Writes all measurements."""
    table = [row._asdict() | {"case": row.case._asdict()} for row in rows]
    path.write_text(json.dumps(about | {"rows": table}, indent=2) + "\n", encoding="utf-8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192], help="tokens in a context")
    parser.add_argument("--tokens", type=int, default=8192, help="in a step; a batch has at least one sequence")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--devices", type=int, default=1, help="devices of a step; on a CPU one for each core is best")
    parser.add_argument("--breakdown", action="store_true", help="also print where the time of each step goes")
    parser.add_argument("--remat", action="store_true", help="also time NAtS with every rematerialization policy")
    parser.add_argument("--optimizers", action="store_true", help="also time the dense model with every update rule")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder for train_step.json")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "repeats", "devices"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: it must be at least 1.")
    if min(arguments.lengths) < 2:
        parser.error(f"--lengths={min(arguments.lengths)}: a context has at least 2 tokens.")
    if arguments.output is not None and not arguments.output.is_dir():
        parser.error(f"--output={arguments.output}: there is no such folder.")
    if arguments.output is not None:
        try:
            try_files([arguments.output / "train_step.json"])
        except OSError as error:
            parser.error(str(unwritable(f"--output={arguments.output}", error)))
    return arguments


def ask_for_devices(wanted: int) -> None:
    """Sets the number of CPU devices, which JAX must know before its first use.

    Raises:
      SystemExit: there are not so many, or more (a mesh takes all there are).
    """
    with contextlib.suppress(RuntimeError):  # too late: what there is may be right
        jax.config.update("jax_num_cpu_devices", wanted)
    if jax.device_count() != wanted:
        raise SystemExit(f"--devices={wanted}: JAX has {jax.device_count()} of them.")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    arguments = parse(argv)
    ask_for_devices(arguments.devices)
    about = {
        "device": jax.devices()[0].device_kind,
        "devices": arguments.devices,
        "cpu_cores": num_cores(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "repeats": arguments.repeats,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = []
    try:
        for length in arguments.lengths:
            case = Case(length, max(1, arguments.tokens // length), arguments.devices)
            row, steps = measure(case, arguments.repeats, arguments.remat, arguments.optimizers)
            rows.append(row)
            if arguments.breakdown:
                from benchmarks import train_step_breakdown

                train_step_breakdown.print_breakdown(steps)
    except UserError as error:
        raise SystemExit(str(error)) from error
    print_table(rows)
    if arguments.output is not None:
        write_json(arguments.output / "train_step.json", rows, about)


if __name__ == "__main__":
    run_command(main)
