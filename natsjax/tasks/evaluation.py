"""Retrieval tasks under every policy and budget: measured through the KV buffer, and stored in the run's report.

    python -m natsjax.tasks --workdir=DIR [--tasks=needle,mqar:pairs=8,length=256] [--budgets=0.05,0.1]

Settings are those of ``natsjax.evaluate --mode=decode``: role biases are found on training text; the numbers of other
policies are counted for texts as long as the task's. A row is stored as soon as it has been measured, and one that is
stored already is not measured again.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from natsjax import report
from natsjax.config_fields import did_you_mean, format_value
from natsjax.data import Tokenizer
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.errors import UserError
from natsjax.evaluate.dense_baseline import load_baseline
from natsjax.evaluate.settings import Setting, settings_of
from natsjax.interop.hf_tokenizer import puts_bos_first
from natsjax.policies.base import DecodingPolicy
from natsjax.policies.budgets import wanted_budgets
from natsjax.policies.registry import FULL, POLICIES
from natsjax.report.intervals import paired_difference, wilson_interval
from natsjax.report.results import EVALUATION_FILE
from natsjax.report.tasks import PICTURE_FILE, TASKS_FILE, picture, read_tasks, tasks_table, write_tasks
from natsjax.runs.load import LoadedRun, load
from natsjax.runtime import distributed
from natsjax.runtime.files import make_folder, try_files, unwritable, write_file
from natsjax.runtime.log import logger
from natsjax.tasks.compose import (
    DoesNotFitError,
    Example,
    Haystack,
    length_of,
    make_examples,
    recall_examples,
    recall_task,
)
from natsjax.tasks.judge import Judged, judge, scorer_of
from natsjax.tasks.tasks import FAMILIES, RECALL, Task, default_tasks, parse_tasks

NUM_EXAMPLES = 100
_MOST_EXAMPLES = 1_000_000
_HAYSTACK_CONTEXTS = 256
"""Held-out contexts that held-out text is taken from, at most."""
_NUM_BUDGETS = 3
"""Budgets of a run that was trained to none, where nobody asks for others: every one is a row of every task."""

Question = Literal["after", "in_prompt"]
"""Where the question is read: behind the prompt, when keys have been dropped, or as its end."""


@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
    """Results of tasks, and the files that were written.

    Attributes:
      rows: of the tasks and settings that were asked for (``natsjax.report.tasks.TASK_FIELDS``).
      layers: types of the run's layers.
      paths: files written.
      notes: sentences about what is missing or could not be met.
    """

    rows: list[dict[str, Any]]
    layers: tuple[str, ...]
    paths: list[Path]
    notes: list[str]

    def summary(self) -> str:
        """Returns the table, the notes and the files, as plain text for the terminal."""
        parts = [tasks_table(self.rows, self.layers)]
        if self.notes:
            parts.append("\n".join(f"note: {note}" for note in self.notes))
        parts.append("\n".join(f"wrote {path}" for path in self.paths))
        return "\n\n".join(parts)


def run(
    workdir: str | os.PathLike[str],
    *,
    tasks: str | None = None,
    budgets: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    num_examples: int = NUM_EXAMPLES,
    seed: int = 0,
    question: Question = "after",
    batch_size: int | None = None,
    baseline_workdir: str | os.PathLike[str] | None = None,
    prepared_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "newest",
    progress: bool = True,
    loaded: LoadedRun | None = None,
) -> TaskEvaluation:
    """Asks a run retrieval tasks, and stores the results in its ``report/``.

    Args:
      workdir: of the run, or an export.
      tasks: as in ``natsjax.tasks.tasks``; None: every one that fits.
      budgets: KV fractions; None: ``eval.budgets``, and where that is empty, ``nats.kv_budget``, or three of a range
        for a model without roles.
      policies: names in ``natsjax.policies.registry``; None: every one. Full attention is always asked.
      num_examples: of each task.
      seed: of the examples.
      question: see ``Question``.
      batch_size: examples that are read at a time; None: ``eval.batch_size``.
      baseline_workdir: as in ``natsjax.evaluate.run``; its weights are asked the same.
      prepared_dir, checkpoint: as in ``natsjax.load``.
      progress: show progress bars.
      loaded: the run, when it is in memory already.

    Raises:
      UserError: there is no run or no such task, a text does not fit, or a file cannot be read or written.

    Example:
      >>> found = natsjax.tasks.run("runs/quickstart", tasks="needle:length=256", budgets=[0.1])
      >>> print(found.summary())
    """
    _check_numbers(num_examples, seed, batch_size)
    _check_policies(policies)
    progress = progress and distributed.is_main()
    this = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint) if loaded is None else loaded
    stored = read_tasks(this.workdir.report)
    if distributed.is_main():
        _try_files(this)
    notes: list[str] = []
    asked = _examples(this, tasks, num_examples, seed, notes)
    baseline = None if baseline_workdir is None else load_baseline(this, baseline_workdir, prepared_dir=prepared_dir)
    wanted = _budgets(this, budgets)
    kept = [row for row in stored if row["step"] == this.step]
    if distributed.is_main() and len(kept) < len(stored):
        logger.info(f"{this.workdir.report / TASKS_FILE}: {len(stored) - len(kept)} rows of another step are dropped")
    calibration_contexts = this.data.contexts("train", this.config.eval.num_calibration_contexts)
    role_biases: dict[str, list[Setting]] = {}
    rows = []
    for task, examples in asked:
        settings = settings_of(
            this,
            baseline,
            calibration_contexts,
            wanted,
            notes,
            progress,
            chunk=max(map(_continued, examples)),
            policies=None if policies is None else {FULL.name, *policies},
            pieces=np.array([_num_read(example) for example in examples]),
            role_biases=role_biases,
        )
        full: dict[str, Judged] = {}
        for setting in sorted(settings, key=lambda setting: setting.policy.method != FULL.name):
            method = setting.policy.method
            row = _place(task, setting, len(examples), seed, question, this.step)
            known = next((old for old in kept if row.items() <= old.items()), None)
            if known is None:
                title = f"{task.name}, {POLICIES[method].label}" if progress else ""
                found = _measure(setting, examples, question, batch_size, title)
                row |= _results(found, full.get(setting.weights), examples, task)
                kept = [old for old in kept if not _same_place(old, row)] + [row]
                if distributed.is_main():
                    _store(this, kept)
                known = row
            else:
                found = _judged(known)
            if method == FULL.name:
                full[setting.weights] = found
            rows.append(known)
    rows = _in_order(rows)
    paths = _draw(this, kept) if distributed.is_main() else []
    return TaskEvaluation(rows, this.config.model.all_layer_types, paths, list(dict.fromkeys(notes)))


def show(
    workdir: str | os.PathLike[str],
    *,
    tasks: str | None = None,
    seed: int = 0,
    prepared_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "newest",
) -> str:
    """Returns the first example of each task as text, its choices with the right one first; measures nothing.

    Args:
      workdir, tasks, seed, prepared_dir, checkpoint: as in ``run``.

    Raises:
      UserError: as in ``run``.
    """
    _check_numbers(1, seed, None)
    this = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint)
    parts = []
    for task, (example, *_) in _examples(this, tasks, 1, seed, []):
        shown = [_text(this, tokens) for tokens in (example.context, example.question, *example.choices)]
        choices = "\n".join(f"{'right' if not number else 'wrong'}: {text!r}" for number, text in enumerate(shown[2:]))
        sizes = f"{len(example.context)} tokens, depth {example.depth:.3g}"
        parts.append(
            f"--- {task.name} ({sizes}) ---\n{shown[0]}\n--- question ---\n{shown[1]}\n--- choices ---\n{choices}"
        )
    return "\n\n".join(parts)


def _text(this: LoadedRun, tokens: Sequence[int]) -> str:
    vocabulary = this.tokenizer
    if isinstance(vocabulary, Tokenizer):
        return vocabulary.decode(tokens)
    return " ".join(vocabulary.token_text(token) for token in tokens)


# --- what is asked ---


def _check_numbers(num_examples: int, seed: int, batch_size: int | None) -> None:
    for name, value, least in (("num_examples", num_examples, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if value is not None and not least <= value <= _MOST_EXAMPLES:
            raise UserError(f"--{name}={value}: a whole number from {least} to {_MOST_EXAMPLES:,} was expected.")


def _check_policies(policies: Sequence[str] | None) -> None:
    for name in policies or ():
        if name not in POLICIES:
            known = ", ".join(POLICIES)
            meant = did_you_mean(name, POLICIES)
            raise UserError(f"--policies: there is no policy {format_value(name)}, but {known}{meant}.")


def _examples(
    this: LoadedRun, tasks: str | None, num: int, seed: int, notes: list[str]
) -> list[tuple[Task, list[Example]]]:
    """Makes the examples of every task that is asked for; without any, those that do not fit are left out."""
    tokenizer, most = this.tokenizer, this.config.data.context_length
    if not isinstance(tokenizer, Tokenizer):
        if tasks is not None and tasks != RECALL:
            raise UserError(
                f"--tasks={format_value(tasks)}: {this.workdir.path} is a recall run, whose tokens stand for no text; "
                f"the only task of such a run is {RECALL}."
            )
        return [(recall_task(), recall_examples(tokenizer, num))]
    asked = default_tasks(most) if tasks is None else parse_tasks(tasks, most)
    haystack = Haystack(this.data.contexts("validation", _HAYSTACK_CONTEXTS), tokenizer)
    bos = puts_bos_first(tokenizer, is_imported=this.config.data.source == "none")
    found = []
    for task in asked:
        try:
            found.append((task, make_examples(task, num, seed, tokenizer, haystack, bos=bos, most=most)))
        except DoesNotFitError as error:
            if tasks is not None:
                raise
            notes.append(f"{task.name} is left out: {error}")
    if not found:
        raise UserError(
            f"none of {', '.join(FAMILIES)} fits into the {most} tokens that the model was trained to read "
            "(data.context_length) with its default numbers; name one with smaller ones, as in --tasks=mqar:pairs=2."
        )
    return found


def _budgets(this: LoadedRun, asked: Sequence[float] | None) -> list[float]:
    config = this.config
    asked = asked or config.eval.budgets or ([config.nats.kv_budget] if config.model.has_roles else None)
    found = wanted_budgets(config, asked, this.data.piece_lengths)
    return found if asked else found[:_NUM_BUDGETS]


def _continued(example: Example) -> int:
    """Counts the tokens behind the context."""
    return length_of(example) - len(example.context)


def _num_read(example: Example) -> int:
    """Counts the tokens that are read where the right answer is: its last one is predicted, but not read."""
    return len(example.context) + len(example.question) + len(example.choices[0]) - 1


# --- a row ---


def _place(task: Task, setting: Setting, num_examples: int, seed: int, question: Question, step: int) -> dict[str, Any]:
    """Returns the fields that tell a row from all others."""
    return {
        "task": task.name,
        "family": task.family,
        "parameters": dict(task.parameters),
        "method": setting.policy.method,
        "setting": setting.numbers,
        "weights": setting.weights,
        "budget": setting.budget,
        "num_examples": num_examples,
        "question": question,
        "seed": seed,
        "step": step,
    }


def _same_place(old: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Checks if a row takes the place of an older one: of other examples, or of another form of the question."""
    return all(old[name] == row[name] for name in ("task", "method", "setting", "weights", "budget"))


def _measure(
    setting: Setting, examples: Sequence[Example], question: Question, batch_size: int | None, progress: str
) -> Judged:
    policy = typing.cast(DecodingPolicy, setting.policy)
    decoder = Decoder.of_run(setting.run, policy, DecodeSettings(block=64))
    size = min(batch_size or setting.run.config.eval.batch_size, len(examples))
    in_prompt = question == "in_prompt"
    found = judge(scorer_of(decoder, size), examples, batch_size=size, in_prompt=in_prompt, progress=progress)
    # A prompt that is cut down once is read with all of its keys, whatever is left of them.
    is_cut_once = policy.eviction is not None and not policy.every_token
    return found._replace(kv_fraction=found.held_fraction) if is_cut_once else found


def _results(found: Judged, full: Judged | None, examples: Sequence[Example], task: Task) -> dict[str, Any]:
    """Returns the measured fields of a row; ``full`` is full attention on the same weights, None on itself."""
    values: dict[str, Any] = {"kv_fraction": found.kv_fraction, "held_fraction": found.held_fraction}
    for name in ("ranked", "generated"):
        right = _right(found, name)
        low, high = wilson_interval(float(right.mean()), len(right))
        values |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
        difference: Sequence[float | None] = (None, None, None)
        if full is not None:
            difference = paired_difference(right, _right(full, name))
        values |= dict(zip((f"{name}_difference{end}" for end in ("", "_low", "_high")), difference, strict=True))
    return values | {
        "chance": float(np.mean([1 / len(example.choices) for example in examples])),
        "mean_length": float(np.mean([_num_read(example) + 1 for example in examples])),
        "ranks": found.ranks.tolist(),
        "exact": found.exact.tolist(),
        "depths": [round(example.depth, 4) for example in examples],
        "by_depth": _by_depth(found, examples, task),
    }


def _right(found: Judged, name: str) -> np.ndarray:
    return found.ranks == 1 if name == "ranked" else found.exact


def _judged(row: Mapping[str, Any]) -> Judged:
    """Returns the results that a stored row has."""
    ranks, exact = np.array(row["ranks"], np.int64), np.array(row["exact"], bool)
    return Judged(ranks, exact, row["kv_fraction"], row["held_fraction"])


def _by_depth(found: Judged, examples: Sequence[Example], task: Task) -> dict[str, list[Any]] | None:
    if task.family not in FAMILIES or not FAMILIES[task.family].has_depth:
        return None
    places = np.array([example.place for example in examples])
    depths = task.parameters["depths"]
    present = sorted(set(places.tolist()))
    by_depth: dict[str, list[Any]] = {
        "depth": [place / (depths - 1) if depths > 1 else 0.5 for place in present],
        "examples": [int((places == place).sum()) for place in present],
    }
    for name in ("ranked", "generated"):
        right = _right(found, name)
        by_depth[name] = [float(right[places == place].mean()) for place in present]
    return by_depth


def _in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows task by task, each in the registry's order of policies."""
    order = list(POLICIES)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), order.index(row["method"])))


# --- files ---


def _try_files(this: LoadedRun) -> None:
    try:
        try_files([this.workdir.report / name for name in (TASKS_FILE, PICTURE_FILE)])
    except OSError as error:
        raise unwritable(f"the report file {error.filename}", error) from error


def _store(this: LoadedRun, rows: Sequence[dict[str, Any]]) -> None:
    try:
        make_folder(this.workdir.report)
        write_tasks(this.workdir.report, _in_order(rows))
    except OSError as error:
        raise unwritable(this.workdir.report / TASKS_FILE, error) from error


def _draw(this: LoadedRun, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws the picture, and the page where the run has been evaluated; returns all files that were written."""
    folder = this.workdir.report
    if (folder / EVALUATION_FILE).exists():
        return [folder / TASKS_FILE, *report.rewrite(this.workdir.path)]
    maps = picture(_in_order(rows), this.config.model.all_layer_types)
    if maps is None:
        return [folder / TASKS_FILE]
    try:
        write_file(folder / PICTURE_FILE, maps)
    except OSError as error:
        raise unwritable(folder / PICTURE_FILE, error) from error
    return [folder / TASKS_FILE, folder / PICTURE_FILE]
