"""Perplexity against KV budget: a run is measured under its role bias and under other policies, and a report written.

    python -m natsjax.evaluate --workdir=DIR [--budgets=0.05,0.1] [--baseline_workdir=DIR] [--prepared_dir=DIR]

Everything is teacher-forced on a fixed slice of held-out contexts: with masks, or, with ``--mode=decode``, as in
generation: chunk by chunk through a KV buffer that frees what a policy drops. What has to be set to meet a budget (the
role bias, the windows) is set on training-split contexts, so that the held-out text chooses nothing.
"""

import dataclasses
import datetime
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from natsjax import kv_fraction, report
from natsjax.config import Config
from natsjax.data import Row, piece_lengths
from natsjax.errors import UserError
from natsjax.evaluate import DEFAULT_CHUNK
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.dense_baseline import baseline_notes, is_dense, load_baseline, load_window
from natsjax.evaluate.masked import Measurement, Slices, measure
from natsjax.evaluate.rows import about_intervals, row_of, samples_of
from natsjax.evaluate.settings import TOLERANCE, Setting, settings_of
from natsjax.evaluate.slices import SliceSettings
from natsjax.policies.base import DecodingPolicy, StaticPolicy
from natsjax.policies.budgets import about_global_tokens, wanted_budgets
from natsjax.policies.nats import Nats, SampledNats
from natsjax.policies.registry import FULL, Mode, label_of
from natsjax.report.commands import evaluate_command
from natsjax.report.results import own_row
from natsjax.runs.data import RunData
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import versions
from natsjax.runtime import distributed
from natsjax.runtime.progress import bar
from natsjax.runtime.tables import percent as percent_text
from natsjax.runtime.tables import significant


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation, and the files that it wrote.

    Attributes:
      rows: one per measured setting (``report.ROW_FIELDS``).
      budget_check: the budget check (``report.BUDGET_CHECK_FIELDS``); None for a dense run.
      samples: held-out text with its roles under every role bias (``report.SAMPLE_FIELDS``); empty for a dense run.
      run_info: where the numbers come from (``report.RUN_FIELDS``).
      paths: files written: rows, picture, page, and everything again for ``natsjax.report`` to draw from.
      notes: sentences about what is missing or could not be met.
    """

    rows: list[dict[str, Any]]
    budget_check: dict[str, Any] | None
    samples: list[dict[str, Any]]
    run_info: dict[str, Any]
    paths: list[Path]
    notes: list[str]

    def summary(self) -> str:
        """Returns the table, the budget check, the notes and the files, as plain text for the terminal."""
        info = self.run_info
        parts = [report.format_table(self.rows, show_accuracy=info["show_accuracy"], layers=info["layers"])]
        if (budget_check := self.budget_check) is not None:
            percent = {name: f"{100 * budget_check[name]:.3g} %" for name in ("kv_budget", "argmax", "biased")}
            sampled = budget_check["sampled"]
            window = self.run_info.get("window")
            shortest = f", window {window[0]}," if isinstance(window, list) else ""
            drawn = "" if sampled is None else f", sampled as in training {100 * sampled:.3g} %"
            parts.append(
                f"KV budget {percent['kv_budget']}: {'met' if budget_check['met'] else 'missed'}, "
                f"{percent['biased']} at role bias {budget_check['role_bias']:.4g} "
                f"(±{100 * budget_check['tolerance']:g} % allowed).\n"
                f"Without a role bias the roles keep {percent['argmax']}{drawn}; "
                f"with every token SLIDING{shortest} they would keep {100 * budget_check['smallest_possible']:.3g} %."
            )
        row = own_row(self.rows, budget_check)
        if row is not None and row["by_slice"] is not None:
            label = label_of(row["method"], info["layers"])
            parts.append(f"Slices, {label}, {percent_text(row['kv_fraction'])} KV:\n{report.format_slices(row)}")
        if self.notes:
            parts.append("\n".join(f"note: {note}" for note in self.notes))
        parts.append("\n".join(f"wrote {path}" for path in self.paths))
        return "\n\n".join(parts)


def run(
    workdir: str | os.PathLike[str],
    *,
    budgets: Sequence[float] | None = None,
    baseline_workdir: str | os.PathLike[str] | None = None,
    prepared_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    loaded: LoadedRun | None = None,
    checkpoint: str | int = "newest",
    mode: Mode = "masked",
    chunk: int = DEFAULT_CHUNK,
    num_contexts: int | None = None,
    slices: SliceSettings | None = None,
    window_workdir: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluates a checkpoint of a run and writes ``report/`` in its workdir.

    A NAtS run is read under its role bias at every budget and at role bias 0. The other policies of
    ``natsjax.policies.registry`` run at the same budgets on its weights, and on those of its dense baseline when one is
    named. A dense run alone gets these others.

    Args:
      workdir: of the run, or an export.
      budgets: KV fractions; None: ``eval.budgets``, and where that is empty, a range around ``nats.kv_budget``.
      baseline_workdir: of a dense run on the same data, for a run that is not dense.
      prepared_dir: folder of the prepared corpus, of the dense baseline too; None: beside the run, or where the run had
        it.
      progress: show progress bars.
      loaded: the run, when it is in memory already.
      checkpoint: "newest", "best" or a step, as in ``natsjax.load``; of the dense baseline it is the newest.
      mode: "masked": whole contexts with masks. "decode": through a KV buffer, with policies that have no mask too;
        rows then have the slots that were allocated.
      chunk: tokens that are decoded at once, and the most that follow a prompt of SnapKV or Ada-SnapKV.
      num_contexts: the most held-out contexts; None: ``eval.num_contexts`` of the run's config.
      slices: slices of the held-out tokens to measure each setting on; None: none.
      window_workdir: of a run with trained windows on the same data, which slices are compared with.

    Raises:
      UserError: there is no run or no held-out text, a budget, a chunk or a number of contexts cannot be, the dense
        baseline, the run with windows or the slices do not fit, or the report cannot be written, which is tried first.

    Example:
      >>> evaluation = natsjax.evaluate.run("runs/quickstart")
      >>> print(natsjax.report.format_table(evaluation.rows))
    """
    if chunk < 1:
        raise UserError(f"--chunk={chunk}: a chunk has no such number of tokens; choose 1 or more.")
    if num_contexts is not None and num_contexts < 1:
        raise UserError(f"--num_contexts={num_contexts}: from no context nothing is measured; choose 1 or more.")
    progress = progress and distributed.is_main()
    this = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint) if loaded is None else loaded
    if num_contexts is not None:
        evaluated = dataclasses.replace(this.config.eval, num_contexts=num_contexts)
        this = dataclasses.replace(this, config=dataclasses.replace(this.config, eval=evaluated))
    if distributed.is_main():
        report.try_report(this.workdir)
    if window_workdir is not None and slices is None:
        raise UserError(f"--window_workdir={os.fspath(window_workdir)}: it is compared on slices; give --slices too.")
    baseline = None if baseline_workdir is None else load_baseline(this, baseline_workdir, prepared_dir=prepared_dir)
    window = None if window_workdir is None else load_window(this, window_workdir, prepared_dir=prepared_dir)
    held_out = this.data.contexts("validation", this.config.eval.num_contexts)
    calibration_contexts = this.data.contexts("train", this.config.eval.num_calibration_contexts)
    dense_run = this if is_dense(this) else baseline
    if slices is not None:
        slices.check(this, dense_run)
    wanted = wanted_budgets(this.config, budgets, this.data.piece_lengths)
    notes = [] if baseline is None else baseline_notes(this, baseline)
    if (below := about_global_tokens(this.config, wanted, this.data.piece_lengths)) is not None:
        notes.append(below)
    decoded = chunk if mode == "decode" else None
    settings = settings_of(this, baseline, calibration_contexts, wanted, notes, progress, decoded)

    found_slices = None if slices is None else slices.find(this, held_out, dense_run, progress=progress)
    measured = [_measure(setting, held_out, decoded, found_slices) for setting in bar(settings, "measuring", progress)]
    dense = next(
        (
            found
            for setting, found in zip(settings, measured, strict=True)
            if setting.run is baseline and setting.policy.method == FULL.name
        ),
        None,
    )
    windowed = None if window is None else _measure(Setting(window, "", FULL.make()), held_out, decoded, found_slices)
    rows = [
        row_of(setting, found, this.config, dense, windowed, found_slices)
        for setting, found in zip(settings, measured, strict=True)
    ]
    intervals, no_intervals = about_intervals(rows, this.config)
    if no_intervals is not None:
        notes.append(no_intervals)
    if slices is not None:
        notes.append(slices.about(this))
    if window is not None and windowed is not None:
        notes.append(_about_window(window, windowed))
    budget_check, samples = None, []
    if this.config.model.has_roles:
        budget_check = _budget_check(this, held_out, rows)
        role_biases = [row["setting"]["role_bias"] for row in rows if row["method"] == Nats.method]
        samples = samples_of(this, held_out, role_biases, progress)
    command = _command(
        workdir,
        checkpoint,
        budgets,
        baseline_workdir,
        prepared_dir,
        decoded,
        num_contexts,
        slices,
        window_workdir,
    )
    run_info = _run_info(this, command, measured[0], held_out, calibration_contexts, intervals, notes, decoded)
    paths = []
    if distributed.is_main():  # all of several processes measure, one writes
        paths = report.write_report(this.workdir, rows=rows, budget_check=budget_check, samples=samples, run=run_info)
    return Evaluation(rows, budget_check, samples, run_info, paths, notes)


def check(config: Config, data: RunData) -> None:
    """Refuses what an evaluation would refuse, before the training that comes first.

    Raises:
      UserError: there is no held-out text, or a budget of ``eval.budgets`` cannot be.
    """
    data.contexts("validation", config.eval.num_contexts)
    wanted_budgets(config, None, data.piece_lengths)


def _measure(setting: Setting, contexts: Row, chunk: int | None, slices: Slices | None) -> Measurement:
    """Measures with masks, or in chunks through a KV buffer."""
    if chunk is None:
        return measure(setting.run, contexts, typing.cast(StaticPolicy, setting.policy), slices=slices)
    policy = typing.cast(DecodingPolicy, setting.policy)
    return measure_decoding(setting.run, contexts, policy, chunk=setting.continued or chunk, slices=slices)


def _about_window(window: LoadedRun, found: Measurement) -> str:
    """Describes the run with trained windows, which has no row."""
    return (
        f"The trained window is {window.workdir.path} ({window.config.model.layer_pattern}, step {window.step}): "
        f"{percent_text(found.kv_fraction)} KV, perplexity {significant(found.perplexity, 4)}."
    )


def _window(config: Config) -> int | list[int] | None:
    if not config.model.has_roles:
        return None
    windows = config.nats.sliding_windows
    return list(windows) if len(windows) > 1 else windows[0]


def _budget_check(this: LoadedRun, held_out: Row, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the budget check of docs/method.md 4.4, on held-out text."""
    config, nats = this.config, this.config.nats
    by_role_bias = {row["setting"]["role_bias"]: row for row in rows if row["method"] == Nats.method}
    role_bias, biased = next(
        (role_bias, row) for role_bias, row in by_role_bias.items() if row["budget"] == nats.kv_budget
    )
    off = abs(biased["kv_fraction"] - nats.kv_budget)
    samples = config.model.role_layer_type == "nats"  # the rivals are trained without a draw of roles
    return {
        "kv_budget": nats.kv_budget,
        "sampled": measure(this, held_out, SampledNats(config.train.seed, this.step)).kv_fraction if samples else None,
        "argmax": by_role_bias[0.0]["kv_fraction"],
        "biased": biased["kv_fraction"],
        "role_bias": role_bias,
        "tolerance": TOLERANCE,
        "met": off <= TOLERANCE * nats.kv_budget,
        # Under the name that it had when it was taken for the smallest there is: stored reports have it.
        "smallest_possible": kv_fraction.all_sliding_model_kv_fraction(config, piece_lengths(held_out)),
    }


def _run_info(
    this: LoadedRun,
    command: str,
    any_found: Measurement,
    held_out: Row,
    calibration_contexts: Row,
    intervals: str,
    notes: Sequence[str],
    chunk: int | None,
) -> dict[str, Any]:
    """Returns ``report.RUN_FIELDS``: where the numbers come from."""
    config = this.config
    evaluation = (
        f"Teacher-forced prediction of {int(any_found.documents.tokens.sum())} held-out tokens in "
        f"{len(held_out['inputs'])} contexts from {len(any_found.documents.ids)} documents; {intervals}. Role biases "
        f"and windows were set on {len(calibration_contexts['inputs'])} contexts of the training split."
    )
    if chunk is not None:
        evaluation += f" Decoded in chunks of {chunk} tokens through a KV buffer."
    return {
        "name": this.workdir.path.resolve().name,
        "workdir": str(this.workdir.path),
        "command": command,
        "config": str(this.workdir.config_file),
        "settings": config.to_dict(),
        "layers": list(config.model.all_layer_types),
        "step": this.step,
        "num_parameters": sum(x.size for x in jax.tree.leaves(this.parameters)),
        "corpus": this.data.description,
        "context_length": config.data.context_length,
        "window": _window(config),
        "show_accuracy": this.data.vocabulary.token_bytes is None,  # without text, being right is what counts
        "evaluation": " ".join([evaluation, *notes]),
        "versions": versions(),
        "device": _device(this),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _device(this: LoadedRun) -> str:
    """Names the devices that it ran on."""
    devices = this.mesh.devices
    kind = devices.flat[0].device_kind
    return kind if devices.size == 1 else f"{devices.size} times {kind}"


def _command(
    workdir: str | os.PathLike[str],
    checkpoint: str | int,
    budgets: Sequence[float] | None,
    baseline_workdir: str | os.PathLike[str] | None,
    prepared_dir: str | os.PathLike[str] | None,
    chunk: int | None,
    num_contexts: int | None,
    slices: SliceSettings | None,
    window_workdir: str | os.PathLike[str] | None,
) -> str:
    """Returns the command that does the same."""
    flags = [] if checkpoint == "newest" else [f"--checkpoint={checkpoint}"]
    if budgets is not None:
        flags.append(f"--budgets={','.join(f'{budget:g}' for budget in budgets)}")
    if baseline_workdir is not None:
        flags.append(f"--baseline_workdir={os.fspath(baseline_workdir)}")
    if prepared_dir is not None:
        flags.append(f"--prepared_dir={os.fspath(prepared_dir)}")
    if num_contexts is not None:
        flags.append(f"--num_contexts={num_contexts}")
    if chunk is not None:
        flags += ["--mode=decode", f"--chunk={chunk}"]
    if slices is not None:
        flags += slices.flags
    if window_workdir is not None:
        flags.append(f"--window_workdir={os.fspath(window_workdir)}")
    return evaluate_command(workdir, *flags)
