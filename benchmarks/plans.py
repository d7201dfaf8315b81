"""What the large configs take on the hardware that they name: the table of docs/scaling.md.

    python -m benchmarks.plans --output=docs                       with libtpu: pip install 'natsjax[tpu]'
    python -m benchmarks.plans --output=docs --hardware=h100-8     with XLA's compiler for CUDA, jax >= 0.11

Compiles every step, of NAtS and of its dense twin, by ``natsjax.planning``; a minute or two each on two CPU cores. The
numbers go to plans.json; rows that are there and were not asked for again stay, and the table shows all of them.
"""

import argparse
import json
import pathlib
import sys

import jax

from natsjax import hardware
from natsjax.command_line import read_config_file, run_command
from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.hardware import GIB
from natsjax.plan import as_json, summary
from natsjax.planning import plan_step
from natsjax.workdir import write_atomically

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ("nats_350m", "nats_1b", "nats_7b")
HARDWARE = ("v5e-16", "v5p-128", "v6e-256", "h100-8")
LARGER = [("nats_7b", "v6e-256", "v5p:8x8x8")]
"""``(config, word, topology)`` beyond these."""


def cases(configs: list[str], chosen: list[str]) -> list[tuple[str, str, str]]:
    """``(config, word, topology)``."""
    every = [(config, name, name) for config in CONFIGS for name in HARDWARE] + LARGER
    return [case for case in every if case[0] in configs and case[2] in chosen]


def measure(config: str, word: str, topology: str, attention: str) -> dict:
    """The row of a case."""
    values = read_config_file(ROOT / f"configs/{config}.py:{word}")
    values.model.attention = attention
    made = plan_step(Config.from_dict(values), hardware.topology(topology))
    print(f"\n## {config}:{word} on {topology}, {attention}\n{summary(made)}", flush=True)
    return {"config": config, "word": word, "asked": topology} | as_json(made)


def key(row: dict) -> tuple[str, str, str]:
    """What makes a row one of its own."""
    return row["config"], row["asked"], row["attention"]


def table(rows: list[dict]) -> str:
    """Markdown: NAtS rows, with the dense twin's memory beside them."""
    lines = [
        "| config | hardware, mesh | micro-batches | GiB a device: parameters + optimizer, activations, temporaries | "
        "all, of what there is | dense twin | seconds a step at least: products, memory, interconnect | "
        "at most tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_key = {key(row): row for row in rows}
    order = [(config, topology) for config, _, topology in cases(list(CONFIGS), [*HARDWARE, "v5p:8x8x8"])]
    for config, topology in order:
        row, dense = by_key.get((config, topology, "nats")), by_key.get((config, topology, "dense"))
        if row is None:
            continue
        memory = row["memory"]
        kept = memory["parameters"] + memory["optimizer"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        total = f"{memory['total'] / GIB:.2f} of {row['memory_available'] / GIB:.2f}"
        twin = "" if dense is None else f"{dense['memory']['total'] / GIB:.2f}"
        parts = " ".join(f"{x / GIB:.2f}" for x in (kept, memory["activations"], memory["temporaries"]))
        line = f"| {config} | {row['topology']}: {mesh} | {row['num_microbatches']} | {parts} | "
        line += total if row["fits"] else f"{total}: does not fit"
        roofline = row["roofline"]
        if roofline is None:
            lines.append(f"{line} | {twin} | | |")
            continue
        seconds = [roofline[name] for name in ("compute", "memory", "interconnect")]
        tokens = row["batch_size"] * row["context_length"] / max([*seconds, roofline["network"]])
        lines.append(f"{line} | {twin} | {', '.join(f'{x:.3f}' for x in seconds)} | {tokens:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles, prints, writes.

    Raises:
      UserError: a name that is not known, or a compiler that is not there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    tpus = [name for name in HARDWARE if not name.startswith("h100")] + [topology for _, _, topology in LARGER]
    parser.add_argument("--configs", type=names, default=list(CONFIGS), help=", ".join(CONFIGS))
    parser.add_argument("--hardware", type=names, default=tpus, help=", ".join([*tpus, "h100-8"]))
    parser.add_argument("--attention", type=names, default=["nats", "dense"], help="nats, dense")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder of plans.json")
    flags = parser.parse_args()
    todo = cases(flags.configs, flags.hardware)
    if not todo:
        raise UserError(f"nothing to plan for --configs={flags.configs} and --hardware={flags.hardware}.")
    if flags.output is not None and not flags.output.is_dir():
        raise UserError(f"--output={flags.output}: there is no such folder.")
    jax.config.update("jax_platforms", "cpu")
    path = None if flags.output is None else flags.output / "plans.json"
    rows = json.loads(path.read_text()) if path is not None and path.exists() else []
    for config, word, topology in todo:
        for attention in flags.attention:
            row = measure(config, word, topology, attention)
            rows = [other for other in rows if key(other) != key(row)] + [row]
            if path is not None:
                write_atomically(path, json.dumps(sorted(rows, key=key), indent=1) + "\n")
    print(f"\njax {jax.__version__}, Python {sys.version.split()[0]}\n\n{table(rows)}")


if __name__ == "__main__":
    run_command(main)
