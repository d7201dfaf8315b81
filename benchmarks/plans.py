"""Plans of the large configs on the hardware that they name: the table of docs/scaling.md.

    python -m benchmarks.plans --output=docs                       with libtpu: pip install 'natsjax[tpu]'
    python -m benchmarks.plans --output=docs --hardware=h100-8     with XLA's compiler for CUDA, jax >= 0.11

Compiles every step, of NAtS and of its dense baseline, by ``plan.train_step``; a minute or two each on two CPU cores.
The numbers go to plans.json; existing rows that are not planned again stay, and the table has all of them.
"""

import argparse
import json
import pathlib

from natsjax.config import Config
from natsjax.config_fields import did_you_mean
from natsjax.errors import UserError
from natsjax.plan.summary import as_json, summary
from natsjax.plan.train_step import CompilerCrashed, plan_apart
from natsjax.runtime.chips import GIB
from natsjax.runtime.files import check_files, write_text_file
from natsjax.runtime.flags import Parser, read_config_file, run_command

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ("nats_350m", "nats_1b", "nats_7b")
HARDWARE = ("v5e-16", "v5p-128", "v6e-256", "h100-8")
LARGER = [("nats_7b", "v6e-256", "v5p:8x8x8")]
"""``(config, word, topology)`` beyond these."""


def cases(configs: list[str], chosen: list[str]) -> list[tuple[str, str, str]]:
    """Lists ``(config, word, topology)``."""
    every = [(config, name, name) for config in CONFIGS for name in HARDWARE] + LARGER
    return [case for case in every if case[0] in configs and case[2] in chosen]


def config_of(config: str, word: str, attention: str) -> Config:
    """Reads the config of a case."""
    values = read_config_file(ROOT / f"configs/{config}.py:{word}")
    values.model.layer_types = attention
    return Config.from_dict(values)


def measure(config: str, word: str, topology: str, attention: str) -> dict:
    """Plans a case and returns its row.

    Raises:
      UserError: a compiler that is not there, or that crashed.
    """
    made = plan_apart(config_of(config, word, attention), topology)
    print(f"\n## {config}:{word} on {topology}, {attention}\n{summary(made)}", flush=True)
    return {"config": config, "word": word, "asked": topology} | as_json(made)


def key(row: dict) -> tuple[str, str, str]:
    """Returns what identifies a row."""
    return row["config"], row["asked"], row["attention"]


def is_current(row: dict) -> bool:
    """Returns True if a row was made with the present config."""
    train = config_of(row["config"], row["word"], row["attention"]).train
    return (row["gradient_accumulation_steps"], row["batch_size"]) == (
        train.gradient_accumulation_steps,
        train.batch_size,
    )


def table(rows: list[dict]) -> str:
    """Formats a Markdown table of NAtS rows, with the memory of the dense baseline if it was planned."""
    lines = [
        "| config | hardware, mesh | micro-batches | parameters + optimizer, activations, temporaries | "
        "all, of what there is | dense baseline | products, memory, interconnect | tokens/s at most | jax |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_key = {key(row): row for row in rows}
    for config, _, topology in cases(list(CONFIGS), [*HARDWARE, *(topology for _, _, topology in LARGER)]):
        row, dense = (by_key.get((config, topology, attention)) for attention in ("nats", "dense"))
        if row is None:
            continue
        memory, roofline = row["memory"], row["roofline"]
        parts = (memory["parameters"] + memory["optimizer"], memory["activations"], memory["temporaries"])
        alike = dense is not None and all(dense[name] == row[name] for name in ("mesh", "gradient_accumulation_steps"))
        seconds = [] if roofline is None else [roofline[name] for name in ("compute", "memory", "interconnect")]
        tokens = row["batch_size"] * row["context_length"]
        cells = [
            config,
            f"{row['topology']}: {', '.join(f'{axis} {size}' for axis, size in row['mesh'].items())}",
            row["gradient_accumulation_steps"],
            ", ".join(f"{x / GIB:.2f}" for x in parts),
            f"{memory['total'] / GIB:.2f} of {row['memory_available'] / GIB:.2f}"
            + ("" if row["fits"] else ": does not fit"),
            f"{dense['memory']['total'] / GIB:.2f}" if dense is not None and alike else "",
            ", ".join(f"{x:.3f}" for x in seconds),
            "" if roofline is None else f"{tokens / max([*seconds, roofline['network']]):,.0f}",
            row["jax"] + ("" if is_current(row) else ", an older config"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles, prints, writes.

    Raises:
      UserError: a name that is not known, or a compiler that is not there.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    tpus = [name for name in HARDWARE if not name.startswith("h100")] + [topology for _, _, topology in LARGER]
    parser.add_argument("--configs", type=names, default=list(CONFIGS), help=", ".join(CONFIGS))
    parser.add_argument("--hardware", type=names, default=tpus, help=", ".join([*tpus, "h100-8"]))
    parser.add_argument("--attention", type=names, default=["nats", "dense"], help="nats, dense")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder of plans.json")
    flags = parser.parse_args()
    for name, known in (("configs", CONFIGS), ("hardware", (*tpus, "h100-8")), ("attention", ("nats", "dense"))):
        unknown = [value for value in getattr(flags, name) if value not in known]
        if unknown:
            meant = did_you_mean(unknown[0], known)
            raise UserError(f"--{name}={','.join(unknown)}: {', '.join(known)} were expected{meant}.")
    todo = cases(flags.configs, flags.hardware)
    if flags.output is not None and not flags.output.is_dir():
        raise UserError(f"--output={flags.output}: there is no such folder.")
    path = None if flags.output is None else flags.output / "plans.json"
    if path is not None:
        check_files(f"--output={flags.output}", [path])
    rows = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else []
    for config, word, topology in todo:
        for attention in flags.attention:
            try:
                row = measure(config, word, topology, attention)
            except CompilerCrashed as crash:
                print(f"\n## {config}:{word} on {topology}, {attention}\n{crash}", flush=True)
                continue
            rows = [other for other in rows if key(other) != key(row)] + [row]
            if path is not None:
                write_text_file(path, json.dumps(sorted(rows, key=key), indent=1) + "\n")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    run_command(main)
