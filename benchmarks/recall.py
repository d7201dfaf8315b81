"""Does the search keep the pairs and not the filler? Recall over several seeds, against full attention and windows.

    python -m benchmarks.recall --output=docs [--seeds=0,1,2] [--workdir=runs/recall]

Trains ``configs/recall.py`` with learned roles and as its dense baseline for every seed (what is there already is not
trained again), prints Markdown tables of what it measured, and draws ``recall_curve.png`` and ``recall_kept.png``.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from natsjax import evaluate, train
from natsjax.config import Config
from natsjax.evaluate.masked import chosen_roles
from natsjax.policies.nats import Nats
from natsjax.runs.load import LoadedRun, load
from natsjax.runtime.files import make_folder, try_files, unwritable
from natsjax.runtime.flags import Parser, read_config_file, run_command

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "recall.py"
ROLE_COLORS = ("#d55e00", "#56b4e9", *(f"#{x}{x}{x}" for x in ("ee", "dd", "cc", "bb", "aa", "99", "88", "77")))
"""As in report.html: GLOBAL stands out, SLIDING recedes."""
NUM_ROWS_SHOWN = 3
SECONDS_FILE = "training_seconds"


def trained(workdir: pathlib.Path, *, seed: int, attention: str) -> float:
    """Trains a run if it is not there yet; returns the seconds that training and evaluation took, all in all."""
    values = read_config_file(CONFIG)
    values.train.seed = seed
    values.model.layer_types = attention
    taken = workdir / SECONDS_FILE
    if not taken.exists():
        began = time.monotonic()
        train.run(Config.from_dict(values), workdir)
        taken.write_text(f"{time.monotonic() - began:.0f}\n", encoding="utf-8")
    return float(taken.read_text(encoding="utf-8"))


def kept_by_kind(run: LoadedRun, role_bias: float) -> np.ndarray:
    """Returns the fraction of each kind of token that is GLOBAL: float64 ``[l, k, kind]``, kinds as in ``KINDS``."""
    contexts = run.data.contexts("validation", run.config.eval.num_contexts)
    roles = chosen_roles(run, contexts, Nats(role_bias))
    kinds = run.data.vocabulary.token_kind[contexts["inputs"]]  # type: ignore[attr-defined]  (recall has it)
    half = contexts["inputs"].shape[1] // 2
    place = np.where(np.arange(kinds.shape[1]) < half, "pair", "asked")
    fractions = []
    for kind, where in KINDS:
        chosen = (kinds == kind) & (place == where) if where else kinds == kind
        is_global = (roles == 0) & chosen[:, None, None, :]
        fractions.append(is_global.sum((0, 3)) / chosen.sum())
    return np.stack(fractions, -1)


KINDS = (("key", "pair"), ("value", "pair"), ("key", "asked"), ("value", "asked"), ("filler", ""))


def draw_curve(path: pathlib.Path, rows_by_seed: dict[int, list[dict[str, Any]]]) -> None:
    """Draws accuracy against KV fraction, a line per seed and method."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {
        ("nats", "nats"): ("NAtS", "#d55e00", "o"),
        ("sliding_window", "dense"): ("sliding window, dense baseline", "#0072b2", "s"),
        ("streaming_llm", "dense"): ("StreamingLLM, dense baseline", "#009e73", "^"),
        ("full", "dense"): ("full attention, dense baseline", "#333333", "D"),
    }
    for (method, weights), (label, color, marker) in styles.items():
        for number, rows in enumerate(rows_by_seed.values()):
            chosen = [row for row in rows if row["method"] == method and is_baseline(row) == (weights == "dense")]
            chosen.sort(key=lambda row: row["kv_fraction"])
            axes.plot(
                [100 * row["kv_fraction"] for row in chosen],
                [100 * row["accuracy"] for row in chosen],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1,
                label=None if number else label,
            )
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 20, 50, 100], [f"{tick} %" for tick in (5, 10, 20, 50, 100)])
    axes.minorticks_off()
    axes.set_xlabel("KV fraction (mean live keys per query / mean context)")
    axes.set_ylabel("accuracy on held-out sequences (%)")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def percent(value: float) -> str:
    """Formats a fraction in percent."""
    return f"{100 * value:.2f} %"


def is_baseline(row: dict[str, Any]) -> bool:
    """Returns True if a row was measured on the dense baseline's weights."""
    return row["weights"].startswith("dense baseline")


def draw_kept(path: pathlib.Path, run: LoadedRun, role_bias: float) -> None:
    """Draws the roles of a few held-out sequences in every layer and head, with the tokens of the pairs."""
    contexts = run.data.contexts("validation", NUM_ROWS_SHOWN)
    roles = chosen_roles(run, contexts, Nats(role_bias))
    num_layers, num_heads, length = roles.shape[1:]
    figure = Figure(figsize=(14, 1.1 + 1.35 * NUM_ROWS_SHOWN), layout="constrained")
    colors = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in ROLE_COLORS])
    for number, axes in enumerate(np.atleast_1d(figure.subplots(NUM_ROWS_SHOWN, 1))):
        axes.imshow(colors[roles[number].reshape(-1, length)], aspect="auto", interpolation="nearest")
        axes.set_yticks(
            range(num_layers * num_heads), [f"layer {i} head {j}" for i in range(num_layers) for j in range(num_heads)]
        )
        axes.set_yticks(np.arange(-0.5, num_layers * num_heads), minor=True)
        axes.grid(which="minor", axis="y", color="white", linewidth=2)
        axes.tick_params(length=0, which="both", labelsize=7)
        tokens = contexts["inputs"][number]
        named = [s for s in range(length) if run.data.vocabulary.token_kind[tokens[s]] in ("key", "value")]  # type: ignore[attr-defined]
        axes.set_xticks(named, [run.data.vocabulary.token_text(int(tokens[s])) for s in named], rotation=90, fontsize=6)
    names = [name.lower() for name in run.config.nats.role_names]
    legend = [axes.scatter([], [], marker="s", color=color) for color in ROLE_COLORS[: len(names)]]
    figure.legend(legend, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Trains, measures, draws, prints."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the pictures")
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="train.seed of each repetition")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/recall"), help="folder of the runs")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    pictures = [arguments.output / name for name in ("recall_curve.png", "recall_kept.png")]
    try:
        try_files(pictures)  # before the training
        make_folder(arguments.output)
    except OSError as error:
        parser.error(str(unwritable(f"--output={arguments.output}", error)))
    rows_by_seed, lines, fractions = {}, [], []
    for seed in seeds:
        folders = {kind: arguments.workdir / f"{kind}_{seed}" for kind in ("nats", "dense")}
        seconds = {kind: trained(folder, seed=seed, attention=kind) for kind, folder in folders.items()}
        result = evaluate.run(folders["nats"], baseline_workdir=folders["dense"], progress=False)
        rows_by_seed[seed] = result.rows
        own = next(row for row in result.rows if row["setting"].get("role_bias") == 0)
        budget = result.budget_check["kv_budget"] if result.budget_check else own["kv_fraction"]
        full = next(row for row in result.rows if row["method"] == "full" and is_baseline(row))
        window = next(
            row
            for row in result.rows
            if row["method"] == "sliding_window" and is_baseline(row) and row["budget"] == budget
        )
        cells = [
            str(seed),
            percent(full["accuracy"]),
            percent(own["accuracy"]),
            percent(own["kv_fraction"]),
            f"{percent(window['accuracy'])} at {percent(window['kv_fraction'])} KV",
            f"{seconds['dense']:.0f} s, {seconds['nats']:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        fractions.append(kept_by_kind(load(folders["nats"]), 0.0))
    draw_curve(pictures[0], rows_by_seed)
    draw_kept(pictures[1], load(arguments.workdir / f"nats_{seeds[0]}"), 0.0)
    titles = (
        "seed",
        "full attention (dense baseline)",
        "NAtS, argmax",
        "its KV",
        "sliding window (dense baseline)",
        "time with evaluation",
    )
    print("| " + " | ".join(titles) + " |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\nAccuracy of NAtS under the role bias, by budget (median of seeds, least):\n")
    print_budgets(rows_by_seed)
    print("\nShare of tokens that are GLOBAL, by layer and head:\n")
    print("| seed | layer | head | keys of pairs | values of pairs | asked keys | answered values | filler |")
    print("|---|---|---|---|---|---|---|---|")
    for seed, kept in zip(seeds, fractions, strict=True):
        for layer, head in np.ndindex(kept.shape[:2]):
            cells = " | ".join(f"{100 * x:.1f} %" for x in kept[layer, head])
            print(f"| {seed} | {layer} | {head} | {cells} |")


def print_budgets(rows_by_seed: dict[int, list[dict[str, Any]]]) -> None:
    """Prints a Markdown table of NAtS accuracy by budget over seeds."""
    budgets = sorted({row["budget"] for rows in rows_by_seed.values() for row in rows if row["budget"]})
    print("| budget | " + " | ".join(f"{100 * budget:g} %" for budget in budgets) + " |")
    print("|---" * (len(budgets) + 1) + "|")
    for label, summary in (("median", statistics.median), ("least", min)):
        cells = []
        for budget in budgets:
            found = [
                row["accuracy"]
                for rows in rows_by_seed.values()
                for row in rows
                if row["method"] == "nats" and row["budget"] == budget
            ]
            cells.append(f"{100 * summary(found):.2f} %" if found else "-")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
