"""Trains the arms of a study under the same conditions, and compares them document by document.

    python -m benchmarks.study --study=benchmarks/studies/recipe.py --workdir=studies/recipe

A study file has ``CONFIG``, a file of ``configs/``; ``COMMON``, fields of all arms; and ``ARMS``, fields of each arm by
its name. It may have ``SEEDS``, ``train.seed`` of an arm's runs (0), and ``REFERENCE``, the arm that the others are
compared with (the first). Every run is a workdir in ``--workdir``. The same command resumes a study, and several
processes share its runs, for example one on each core. A run is measured once, as it is served: an arm with roles under
the role bias that meets its budget on training text, any other with its layers as they are.

``results.jsonl`` gets a line for each run, with sums for every held-out document. The table has each arm's held-out
loss over its seeds, accuracy, KV fraction and time, and the ratio of its perplexity to the reference arm's with a 95 %
interval: runs of the same seed are compared on each document, and documents are resampled.

``--slices`` measures what has finished on slices of the held-out tokens too (``natsjax.evaluate.slices``), and prints a
table for each, with ratios to the reference arm and to the first dense arm, whose first seed chooses the tokens that a
long context helps. It can be asked of a study that was trained before.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import runpy
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import filelock
import numpy as np
from flax.traverse_util import flatten_dict

from natsjax import train
from natsjax.config import Config
from natsjax.config_fields import did_you_mean
from natsjax.data import piece_lengths
from natsjax.errors import UserError
from natsjax.evaluate import DEFAULT_RARE
from natsjax.evaluate.masked import Measurement, Slices, measure
from natsjax.evaluate.slices import KINDS, SliceSettings, mark
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats
from natsjax.policies.numbers import Calibration, selective
from natsjax.policies.role_bias import role_bias_for_budget
from natsjax.policies.selective import LeastMasked
from natsjax.report.intervals import paired_ratio
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime.files import write_text_file
from natsjax.runtime.flags import Parser, read_config_file, run_command
from natsjax.runtime.tables import text_table, with_interval

RESULTS_FILE = "results.jsonl"
RECORD_FILE = "study.json"
SLICES_FILE = "slices.json"
CPU_SECONDS_FILE = "cpu_seconds.txt"
"""In a run's folder: CPU seconds of all starts that have trained it so far."""
RESAMPLINGS = 10_000


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file, read.

    Attributes:
      config: file of the shared config.
      common: fields of all arms, by ``group.field``.
      arms: fields of each arm, by its name.
      seeds: ``train.seed`` of the runs of an arm.
      reference: arm that the others are compared with.
    """

    config: str
    common: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    reference: str

    def config_of(self, arm: str, seed: int) -> Config:
        """Returns the config of a run.

        Raises:
          UserError: a field of the arm does not exist or does not fit.
        """
        values = read_config_file(self.config)
        changed = {**self.common, **self.arms[arm], "train.seed": seed}
        known = dict(flatten_dict(values.to_dict(), sep="."))
        for name in changed:
            if name not in known:
                raise UserError(f"arm {arm}: unknown config field {name}{did_you_mean(name, list(known))}.")
        values.update_from_flattened_dict(changed)
        try:
            return Config.from_dict(values)
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from error


def read_study(path: pathlib.Path) -> Study:
    """Reads a study file.

    Raises:
      UserError: it is not there or lacks a name.
    """
    if not path.is_file():
        raise UserError(f"--study={path}: there is no such file.")
    names = runpy.run_path(str(path))
    missing = [name for name in ("CONFIG", "COMMON", "ARMS") if name not in names]
    if missing:
        raise UserError(f"--study={path}: it does not define {', '.join(missing)}.")
    arms = names["ARMS"]
    if not arms:
        raise UserError(f"--study={path}: ARMS is empty.")
    reference = names.get("REFERENCE", next(iter(arms)))
    if reference not in arms:
        raise UserError(f"--study={path}: REFERENCE = {reference!r} is none of {', '.join(arms)}.")
    return Study(names["CONFIG"], names["COMMON"], arms, names.get("SEEDS", (0,)), reference)


def served(run: LoadedRun, role_bias: float | None = None, slices: Slices | None = None) -> tuple[Measurement, float]:
    """Measures a run on held-out text as it is served; returns the measurement and the role bias.

    "selective" layers keep what ``nats.kv_budget`` leaves them.

    Args:
      run: the run.
      role_bias: that of an earlier measurement; None: the one that meets the budget.
      slices: of the held-out text, to measure it on.
    """
    config = run.config
    held_out = run.data.contexts("validation", config.eval.num_contexts)
    if not (config.model.has_roles or config.model.has_masks):
        return measure(run, held_out, FullAttention(), slices=slices), 0.0
    calibration = run.data.contexts("train", config.eval.num_calibration_contexts)
    if config.model.has_masks:
        numbers = selective(Calibration(config, piece_lengths(calibration)), config.nats.kv_budget)
        return measure(run, held_out, LeastMasked(*map(int, numbers.arguments)), slices=slices), 0.0
    if role_bias is None:
        role_bias = role_bias_for_budget(
            lambda bias: measure(run, calibration, Nats(bias)).kv_fraction, config.nats.kv_budget
        ).role_bias
    return measure(run, held_out, Nats(role_bias), slices=slices), role_bias


def run_one(arm: str, seed: int, config: Config, workdir: pathlib.Path) -> None:
    """Trains and measures a run, and writes its record."""
    with counted_cpu_seconds(workdir):
        run = train.fit(config, workdir)
    found, role_bias = served(run)
    metrics = read_metrics(Workdir(workdir).metrics_file)
    documents = found.documents
    controlled = {}
    if config.model.has_roles:
        last_tenth = [line for line in metrics if line["step"] > 0.9 * run.step]
        held_out = run.data.contexts("validation", config.eval.num_contexts)
        controlled = {
            "sampled_kv_fraction": statistics.fmean(line["kv_fraction"] for line in last_tenth),
            "argmax_kv_fraction": measure(run, held_out, Nats(0.0)).kv_fraction,
            "kv_penalty": last_tenth[-1]["kv_penalty"],
            "warnings": sorted({name for line in last_tenth for name in line["warnings"]}),
        }
    record = {
        "arm": arm,
        "seed": seed,
        "steps": run.step,
        "tokens": run.step * config.train.batch_size * config.data.context_length,
        "tokens_per_second": statistics.median(
            line["tokens_per_second"] for line in metrics if line.get("tokens_per_second")
        ),
        "cpu_seconds": read_cpu_seconds(workdir),
        "loss": found.cross_entropy,
        "accuracy": found.accuracy,
        "kv_fraction": found.kv_fraction,
        "role_bias": role_bias,
        **controlled,
        "documents": documents.ids.tolist(),
        "nll": documents.nll.tolist(),
        "predicted": documents.tokens.tolist(),
        "config": config.to_dict(),
    }
    write_text_file(workdir / RECORD_FILE, json.dumps(record) + "\n")


@contextlib.contextmanager
def counted_cpu_seconds(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the CPU seconds of its body to those of earlier starts of a run, also where the body is interrupted.

    A process that is killed (SIGKILL) adds nothing.
    """
    began = time.process_time()
    try:
        yield
    finally:
        if Workdir(workdir).config_file.exists():  # else it has not become a run
            total = read_cpu_seconds(workdir) + time.process_time() - began
            write_text_file(workdir / CPU_SECONDS_FILE, f"{total}\n")


def read_cpu_seconds(workdir: pathlib.Path) -> float:
    """Reads the CPU seconds of all starts of a run; 0 before the first has ended."""
    path = workdir / CPU_SECONDS_FILE
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


Record = Mapping[str, Any]
"""What ``run_one`` writes of a run."""


def paired_interval(records: Sequence[Record], others: Sequence[Record]) -> tuple[float, float, float]:
    """Compares two arms on the documents and seeds that both have.

    Returns:
      The ratio of perplexities, records over others, with the ends of its 95 % interval over documents (NaN where it is
      not known, as for arms without a common seed). Seeds are averaged; their spread is not in the interval.
    """
    pairs = [(a, b) for a in records for b in others if a["seed"] == b["seed"]]
    if not pairs:
        return math.nan, math.nan, math.nan
    for a, b in pairs:
        if a["documents"] != b["documents"] or a["predicted"] != b["predicted"]:
            raise UserError(f"{a['arm']} and {b['arm']} were measured on different text: they cannot be compared.")
    nll, other = (np.sum([pair[side]["nll"] for pair in pairs], axis=0) for side in (0, 1))
    predicted = np.sum([a["predicted"] for a, _ in pairs], axis=0)
    middle, low, high = map(float, paired_ratio(nll, other, predicted, num_samples=RESAMPLINGS, seed=0))
    return middle, low, high


def _by_arm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the records of each arm, the arm of the lowest loss first."""
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)
    return dict(sorted(by_arm.items(), key=lambda item: statistics.fmean(run["loss"] for run in item[1])))


def _ratio(by_arm: Mapping[str, Sequence[Record]], arm: str, reference: str) -> str:
    """Formats the ratio of an arm's perplexity to another's, with its interval."""
    middle, low, high = paired_interval(by_arm[arm], by_arm.get(reference, [])) if arm != reference else (math.nan,) * 3
    if math.isnan(middle):
        return "-"
    return with_interval(f"{middle:.4f}", *(None if math.isnan(end) else f"{end:.4f}" for end in (low, high)))


def table(records: Sequence[Record], reference: str) -> str:
    """Formats the table of arms, best first."""
    by_arm = _by_arm(records)
    titles = [
        "arm",
        "seeds",
        "held-out loss",
        "range",
        "perplexity",
        "accuracy",
        "KV",
        "tokens/s",
        "CPU minutes",
        f"to {reference}",
    ]
    rows = []
    for arm, runs in by_arm.items():
        losses = [run["loss"] for run in runs]
        mean = statistics.fmean(losses)
        rows.append(
            [
                arm,
                f"{len(runs)}",
                f"{mean:.4f}",
                f"{max(losses) - min(losses):.4f}" if len(runs) > 1 else "-",
                f"{np.exp(mean):.2f}",
                f"{100 * statistics.fmean(run.get('accuracy', math.nan) for run in runs):.2f} %",
                f"{100 * statistics.fmean(run['kv_fraction'] for run in runs):.1f} %",
                f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}",
                f"{statistics.fmean(run['cpu_seconds'] for run in runs) / 60:.1f}",
                _ratio(by_arm, arm, reference),
            ]
        )
    return text_table([titles, *rows])


def budget_table(records: Sequence[Record]) -> str:
    """Formats how each run with roles met its budget: KV fractions, and how far they are off it."""
    titles = ["arm", "seed", "budget", "sampled, last tenth", "argmax, held-out", "KV penalty at the end", "warnings"]
    rows = []
    for record in records:
        if "argmax_kv_fraction" not in record:
            continue
        nats = record["config"]["nats"]
        least = " (its lower bound)" if record["kv_penalty"] <= 1.001 * nats["min_kv_penalty"] else ""
        fractions = [record[f"{name}_kv_fraction"] for name in ("sampled", "argmax")]
        rows.append(
            [
                record["arm"],
                f"{record['seed']}",
                f"{nats['kv_budget']:.1%}",
                *(f"{fraction:.2%} ({fraction / nats['kv_budget'] - 1:+.1%})" for fraction in fractions),
                f"{record['kv_penalty']:.3g}{least}",
                ", ".join(record["warnings"]) or "-",
            ]
        )
    return text_table([titles, *rows])


def slice_tables(records: Sequence[Record], references: Sequence[str]) -> str:
    """Formats a table of arms for each slice, best first: runs without slices are left out.

    Args:
      records: of runs.
      references: arms that the others are compared with.
    """
    parts = []
    sliced = [record for record in records if "slices" in record]
    for name in dict.fromkeys(name for record in sliced for name in record["slices"]["names"]):
        found = [_of_slice(record, name) for record in sliced if name in record["slices"]["names"]]
        predicted = np.array(found[0]["predicted"])
        title = f"{name}: {int(predicted.sum()):,} tokens in {np.count_nonzero(predicted):,} documents"
        if not predicted.sum():
            parts.append(title)
            continue
        by_arm = _by_arm(found)
        lines = [["arm", "seeds", "perplexity", "KV", *(f"to {reference}" for reference in references)]]
        for arm, runs in by_arm.items():
            mean = statistics.fmean(run["loss"] for run in runs)
            kv = f"{100 * statistics.fmean(run['kv_fraction'] for run in runs):.1f} %"
            ratios = [_ratio(by_arm, arm, reference) for reference in references]
            lines.append([arm, f"{len(runs)}", f"{np.exp(mean):.4g}", kv, *ratios])
        parts.append(f"{title}\n{text_table(lines)}")
    return "\n\n".join(parts)


def _of_slice(record: Record, name: str) -> Record:
    """Returns the record as if the slice were all that was predicted."""
    slices = record["slices"]
    place = slices["names"].index(name)
    nll, predicted = slices["nll"][place], slices["predicted"][place]
    loss = sum(nll) / sum(predicted) if sum(predicted) else math.nan
    # With the mark, runs on other tokens are refused even where there are as many of them.
    documents = [slices["marks"][place], *record["documents"]]
    return {**record, "loss": loss, "nll": [0.0, *nll], "predicted": [0, *predicted], "documents": documents}


def dense_arm(study: Study) -> str | None:
    """Returns the first arm of dense layers alone; None where there is none."""
    seed = study.seeds[0]
    return next((arm for arm in study.arms if set(study.config_of(arm, seed).model.layer_types) == {"dense"}), None)


def measure_slices(study: Study, workdir: pathlib.Path, records: Sequence[Record], settings: SliceSettings) -> None:
    """Measures runs that have finished on slices, each once, and writes ``SLICES_FILE`` of each.

    Args:
      study: the study.
      workdir: folder of its runs.
      records: of the runs.
      settings: choice of slices.

    Raises:
      UserError: the slices do not fit, the dense run that chooses them has not finished, or a run is measured otherwise
        than when it was trained, as by another version of the model.
    """
    arm = dense_arm(study) if "long_context" in settings.kinds else None
    chosen_by = None if arm is None else f"{arm}_seed={study.seeds[0]}"
    wanted = {**dataclasses.asdict(settings), "kinds": list(settings.kinds), "chosen_by": chosen_by}
    missing = [record for record in records if record.get("slices", {}).get("settings") != wanted]
    if missing and chosen_by is not None and not (workdir / chosen_by / RECORD_FILE).exists():
        raise UserError(f"--slices=long_context: {workdir / chosen_by} chooses the tokens and has not finished.")
    dense = load(workdir / chosen_by) if missing and chosen_by is not None else None
    found: dict[tuple[Any, ...], Slices] = {}
    for record in missing:
        path = workdir / f"{record['arm']}_seed={record['seed']}"
        run = load(path)
        contexts = run.data.contexts("validation", run.config.eval.num_contexts)
        text = run.data.fingerprint, run.config.data.context_length, run.config.eval.num_contexts
        if text not in found:
            found[text] = settings.find(run, contexts, dense)
        sums = served(run, record["role_bias"], found[text])[0].slices
        assert sums is not None
        if not np.allclose(sums.nll[:, 0], record["nll"], rtol=1e-3):
            raise UserError(f"--slices: {path} has another loss than when it was trained; another natsjax trained it.")
        slices = {
            "settings": wanted,
            "names": list(found[text]),
            "marks": [mark(members) for members in found[text].values()],
            "nll": sums.nll.T.tolist(),
            "predicted": sums.tokens.T.astype(int).tolist(),
        }
        write_text_file(path / SLICES_FILE, json.dumps(slices) + "\n")


def read_record(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Reads the record of a run; None if it has not finished."""
    path, slices = workdir / RECORD_FILE, workdir / SLICES_FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record | ({"slices": json.loads(slices.read_text(encoding="utf-8"))} if slices.exists() else {})


def read_records(workdir: pathlib.Path, arms: Collection[str]) -> list[dict[str, Any]]:
    """Reads the records of the runs of these arms that have finished."""
    found = [read_record(path.parent) for path in sorted(workdir.glob(f"*/{RECORD_FILE}"))]
    return [record for record in found if record is not None and record["arm"] in arms]


def main() -> None:
    """Trains what is missing, writes the results and prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=pathlib.Path, required=True, help="study file")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="arms to train (all)")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], help="instead of the file's")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of what has finished")
    parser.add_argument("--budgets", action="store_true", help="print how the budgets were met, too")
    parser.add_argument(
        "--slices",
        type=lambda text: text.split(","),
        metavar="KIND,…",
        help=f"measure what has finished on slices of the tokens, too, and print their tables: {', '.join(KINDS)}",
    )
    parser.add_argument("--rare", type=int, default=DEFAULT_RARE, help="as of natsjax.evaluate (%(default)s)")
    parser.add_argument("--short_context", type=int, help="as of natsjax.evaluate")
    arguments = parser.parse_args()
    slices = (
        None if arguments.slices is None else SliceSettings(arguments.slices, arguments.rare, arguments.short_context)
    )
    study = read_study(arguments.study)
    arms = arguments.arms or list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        raise UserError(f"--arms={','.join(unknown)}: {arguments.study} has the arms {', '.join(study.arms)}.")
    runs = [(arm, seed) for seed in arguments.seeds or study.seeds for arm in arms]
    configs = {(arm, seed): study.config_of(arm, seed) for arm, seed in runs}  # all are checked before the first
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    for arm, seed in () if arguments.table else runs:
        workdir = arguments.workdir / f"{arm}_seed={seed}"
        try:
            with filelock.FileLock(arguments.workdir / f"{workdir.name}.lock", timeout=0):
                record = read_record(workdir)
                if record is not None and Config.from_stored(record["config"]) != configs[arm, seed]:
                    raise UserError(f"{workdir} has a run of another config; remove it, or give the arm another name.")
                if record is None:
                    run_one(arm, seed, configs[arm, seed], workdir)
        except filelock.Timeout:
            continue  # another process trains it
    records = read_records(arguments.workdir, study.arms)
    if slices is not None:
        measure_slices(study, arguments.workdir, records, slices)
        records = read_records(arguments.workdir, study.arms)
    write_text_file(arguments.workdir / RESULTS_FILE, "".join(json.dumps(record) + "\n" for record in records))
    print(table(records, study.reference))
    if arguments.budgets:
        print(f"\n{budget_table(records)}")
    if slices is not None:
        references = dict.fromkeys([study.reference, *filter(None, [dense_arm(study)])])
        print(f"\n{slice_tables(records, list(references))}")


if __name__ == "__main__":
    run_command(main)
