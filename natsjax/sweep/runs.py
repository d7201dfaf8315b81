"""The runs of a sweep: names, configs, checks, and the records of those that have ended.

A run is an ordinary workdir, ``DIR/NAME``. After its training and evaluation, ``sweep.json`` in it records its results
and its config. So a finished run is recognized without reading a checkpoint, and a later ``natsjax.evaluate`` does not
change the sweep. A run without that file, or with another config in it, is trained further and evaluated.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from natsjax import evaluate
from natsjax.config import Config, NatsConfig
from natsjax.config_fields import differences, real_path
from natsjax.errors import UserError
from natsjax.evaluate import Evaluation
from natsjax.model import sharding
from natsjax.model.transformer import model_structure
from natsjax.policies.budgets import wanted_budgets
from natsjax.policies.registry import FULL, NATS
from natsjax.report.results import is_biased, restored, to_json
from natsjax.runs.data import RunData, open_data
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.runs.paths import settle_paths
from natsjax.runs.workdir import Workdir
from natsjax.runtime.files import write_text_file
from natsjax.train.logs.trackers import SERVICES

RECORD_FILE = "sweep.json"
_LARGEST_SEED = 2**31 - 1
_RENAMED = {"kv_price": "kv_penalty", "dial": "role_bias", "front": "curve"}  # fields of records by natsjax 0.1
# Fields that change how a run is trained, stored or logged, but no result of a finished one.
_FREE_FIELDS = (
    # These paths may change after a move; other contents are refused.
    *("data.prepared_dir", "data.mixture", "data.input", "data.validation_input", "data.tokenizer"),
    *("train.init_from", "mesh.", "checkpoint.", "model.remat", "eval.batch_size"),
    *(
        "train.log_every",
        "train.progress",
        "train.hang_timeout_seconds",
        "train.profile",
        *(f"train.{service.name}" for service in SERVICES),
        "train.compilation_cache",
    ),
)


class SweptSetting:
    """A budget, a fixed KV penalty, or, with neither, the dense baseline: what a sweep varies beside the seed.

    Attributes:
      kv_budget: KV budget; None for a fixed KV penalty or a dense baseline.
      kv_penalty: fixed KV penalty, in nats per token for a KV fraction of 1; None for a budget or a dense baseline.
    """

    kv_budget: float | None
    kv_penalty: float | None

    @property
    def is_dense(self) -> bool:
        """True for a dense baseline."""
        return self.kv_budget is None and self.kv_penalty is None

    @property
    def setting_text(self) -> str:
        """The setting, for tables."""
        if self.is_dense:
            return "dense baseline"
        return f"KV budget {self.kv_budget:g}" if self.kv_budget is not None else f"KV penalty {self.kv_penalty:g}"


@dataclasses.dataclass(frozen=True)
class PlannedRun(SweptSetting):
    """A run to train.

    Attributes:
      name: name of its folder.
      workdir: its folder.
      config: its config.
      kv_budget, kv_penalty: its setting.
      seed: ``train.seed``.
    """

    name: str
    workdir: Path
    config: Config
    kv_budget: float | None
    kv_penalty: float | None
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRun(SweptSetting):
    """A run that has ended; a line of ``sweep.jsonl``.

    ``kv_fraction`` to ``accuracy_high`` are one row of the run's own evaluation on held-out text: for a budget that of
    the role bias that meets the budget on training text, for a fixed KV penalty that of role bias 0, for a dense
    baseline that of full attention. They are None for a run that failed.

    Attributes:
      name: name of its folder.
      workdir: its folder.
      attention: ``model.layer_pattern``.
      kv_budget, kv_penalty: its setting.
      seed: ``train.seed``.
      status: "finished", or "failed"; the next sweep tries a failed run again.
      error: message of the error.
      step: optimizer steps taken.
      seconds: time of training and evaluation; None if the run was resumed.
      show_accuracy: True for a task without text, which is judged by accuracy instead of perplexity.
      kv_fraction: KV fraction of the row, in (0, 1].
      perplexity: perplexity of the row; ``perplexity_low`` and ``perplexity_high`` are its 95 % interval by document.
      bits_per_byte: bits per byte of the row; None without text.
      accuracy: accuracy of the row, in [0, 1]; ``accuracy_low`` and ``accuracy_high`` are its 95 % interval.
      role_bias: role bias of the row; None for a dense baseline.
      sampled: KV fraction with roles sampled as in training; None for a dense baseline, as the next two.
      argmax: KV fraction of argmax roles at role bias 0.
      met: True if the role bias meets the budget; None without a budget.
      best: entry of ``curve`` with the lowest perplexity, or the highest accuracy; None for a dense baseline.
      curve: results of the run's role biases, ascending: ``role_bias``, ``budget``, ``kv_fraction``, ``perplexity``,
        ``accuracy`` of each; empty for a dense baseline.
    """

    name: str
    workdir: Path
    attention: str
    kv_budget: float | None
    kv_penalty: float | None
    seed: int
    status: Literal["finished", "failed"]
    error: str | None = None
    step: int | None = None
    seconds: float | None = None
    show_accuracy: bool = False
    kv_fraction: float | None = None
    perplexity: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    role_bias: float | None = None
    sampled: float | None = None
    argmax: float | None = None
    met: bool | None = None
    best: dict[str, Any] | None = None
    curve: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> str:
        """Returns a line of strict JSON; non-finite numbers are the strings "NaN", "Infinity" and "-Infinity"."""
        return to_json(dataclasses.asdict(self) | {"workdir": str(self.workdir)})


def plan_runs(
    config: Config,
    directory: Path,
    kv_budgets: Sequence[float] | None,
    kv_penalties: Sequence[float] | None,
    seeds: Sequence[int],
    dense: bool,
) -> list[PlannedRun]:
    """Lists the runs of a sweep, seed by seed, so that every budget has a run early.

    Args:
      config: config of all runs.
      directory: folder of the sweep.
      kv_budgets: KV budgets.
      kv_penalties: fixed KV penalties, in nats per token for a KV fraction of 1.
      seeds: seeds of the runs.
      dense: True to add a dense baseline for each seed.

    Raises:
      UserError: a mistake in the lists or the config.
    """
    if config.model.has_masks:
        raise UserError(
            f'model.layer_types = {config.model.layer_pattern}: "selective" layers train without a budget, so there is '
            "nothing to sweep over; train one run, and natsjax.evaluate --budgets=… measures it at all of them."
        )
    if not config.model.has_roles:
        raise UserError(
            f"model.layer_types = {config.model.layer_pattern}: no layer learns roles; give a config with "
            "layers that do, as nats (--dense adds the dense baselines)."
        )
    if (kv_budgets is None) == (kv_penalties is None):
        raise UserError(
            "a sweep goes over --kv_budgets=0.05,0.1,… or over --kv_penalties=0.1,1,…; give one of the two."
        )
    budgets = [] if kv_budgets is None else _checked("--kv_budgets", kv_budgets)
    penalties = [] if kv_penalties is None else _checked("--kv_penalties", kv_penalties)
    for budget in budgets:
        if not 0 < budget <= 1:  # also when it is nan
            raise UserError(f"--kv_budgets: {budget:g} is not a KV fraction; it must be above 0 and at most 1.")
    for penalty in penalties:
        if not 0 <= penalty < math.inf:
            raise UserError(f"--kv_penalties: {penalty:g} is no KV penalty; it must be 0 or more, in nats per token.")
    for seed in _checked("--seeds", seeds):
        if not 0 <= seed <= _LARGEST_SEED or seed != int(seed):
            raise UserError(f"--seeds: {seed} is no seed; an integer from 0 to {_LARGEST_SEED} was expected.")
    settings = [("controlled", budget) for budget in budgets] + [("fixed", penalty) for penalty in penalties]
    runs = []
    for seed in map(int, seeds):
        for kind, value in settings:
            runs.append(_planned(config, directory, kind, value, seed))
        if dense:
            runs.append(_planned_baseline(config, directory, seed))
    return runs


def _checked(flag: str, values: Sequence[Any]) -> Sequence[Any]:
    """Checks that a list has values, and none twice."""
    values = list(values)
    if not values:
        raise UserError(f"{flag} is empty; give numbers separated by commas.")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{flag} names {value:g} more than once; give it once.")
    return values


def _planned(config: Config, directory: Path, kind: str, value: float, seed: int) -> PlannedRun:
    """Builds a run with a budget ("controlled") or a KV penalty ("fixed")."""
    is_budget = kind == "controlled"
    field = "kv_budget" if is_budget else "kv_penalty"
    value = float(value)
    name = f"{field}={repr(value).removesuffix('.0')}_seed={seed}"  # no comma, which separates workdirs in flags
    old_name = name.replace("kv_penalty", "kv_price")  # of a sweep by natsjax 0.1
    name = old_name if (directory / old_name).exists() else name
    changed = _changed(config, seed, nats={"kv_penalty_mode": kind, field: value})
    return PlannedRun(name, directory / name, changed, value if is_budget else None, None if is_budget else value, seed)


def _planned_baseline(config: Config, directory: Path, seed: int) -> PlannedRun:
    name = f"dense_seed={seed}"
    # A budget or a KV penalty has no effect on it, and must not make it another run.
    plain = NatsConfig()
    names = ("kv_penalty_mode", "kv_budget", "kv_penalty", "min_kv_penalty", "max_kv_penalty")
    nats = {name: getattr(plain, name) for name in names}
    baseline = _changed(config, seed, nats=nats, model={"layer_types": ("dense",)}, train={"reinit_scorer": False})
    return PlannedRun(name, directory / name, baseline, None, None, seed)


def _changed(config: Config, seed: int, **groups: dict[str, Any]) -> Config:
    """Returns the config with another seed and other fields, validated."""
    values = config.to_dict()
    for group, fields in groups.items():
        values[group] |= fields
    values["train"]["seed"] = seed
    return Config.from_dict(values)


# -------------------------------------------------------------------------------------------------------------- checks


def with_shared_corpus(runs: Sequence[PlannedRun], directory: Path, progress: bool) -> list[PlannedRun]:
    """Prepares the corpus of all runs, ``DIR/corpus``, or checks it, and returns the runs with it.

    Raises:
      UserError: the text cannot be prepared, or there is another corpus.
    """
    data = runs[0].config.data
    if data.source != "corpus" or data.prepared_dir or data.mixture:
        return [dataclasses.replace(run, config=settle_paths(run.config, Workdir(run.workdir))) for run in runs]
    sweep = Workdir(directory)
    if not any(Workdir(run.workdir).has_checkpoint() for run in runs):
        # As for a single run: prepared, or checked. Once there is a run, it keeps the corpus that it has.
        open_data(runs[0].config, sweep, progress=progress)
    shared = str(real_path(sweep.corpus))
    return [
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, prepared_dir=shared))
        )
        for run in runs
    ]


def check_existing(runs: Sequence[PlannedRun]) -> None:
    """Compares the runs with the contents of their folders.

    Raises:
      UserError: a field differs that may not change on resume, or a folder has something else.
    """
    for run in runs:
        workdir = Workdir(run.workdir)
        workdir.refuse_export()
        workdir.compare_config(run.config)


def check_data(runs: Sequence[PlannedRun], progress: bool) -> None:
    """Checks all runs, before the first one, for mistakes that training or evaluation would find.

    Raises:
      UserError: the first mistake.
    """
    opened: dict[int, RunData] = {}
    checked: set[tuple[str, ...]] = set()
    for run in runs:
        config, workdir = run.config, Workdir(run.workdir)
        if run.seed not in opened:
            opened = {run.seed: open_data(config, workdir, progress=progress)}  # runs are ordered by seed
        data = opened[run.seed]
        workdir.compare_data(data.fingerprint)
        evaluate.check(config, data)
        if run.kv_budget is not None:
            wanted_budgets(config, [run.kv_budget], data.piece_lengths)
        if config.model.layer_types not in checked:  # the rest is the same for all budgets and seeds
            checked.add(config.model.layer_types)
            vocab_size = data.vocabulary.vocab_size
            sharding.check(config, vocab_size, sharding.make_mesh(config.mesh))
            if config.train.init_from and not workdir.has_checkpoint():
                InitialParameters(config, model_structure(config, vocab_size), data.vocabulary)


# ------------------------------------------------------------------------------------------------------------- records


def finished(run: PlannedRun) -> SweepRun | None:
    """Returns the record of a run that has been trained and evaluated with this config; reads one small file."""
    record = read_record(run.workdir)
    if record is None:
        return None
    known, config = record
    changed, other = differences(config, Workdir(run.workdir).with_own_defaults(run.config))
    if known.status != "finished" or other or any(not line.startswith(_FREE_FIELDS) for line in changed):
        return None
    # It may have been trained further; or its checkpoints were removed, which does not change the results.
    steps = [int(path.name) for path in Workdir(run.workdir).checkpoints.glob("*") if path.name.isdigit()]
    return known if max(steps, default=known.step) == known.step else None


def read_record(workdir: Path) -> tuple[SweepRun, Config] | None:
    """Reads the record and the config of the run in a folder; None if there is none."""
    try:
        values = json.loads((workdir / RECORD_FILE).read_text(encoding="utf-8"))
        config = Config.from_stored(values["config"])
        fields = restored(values["run"], _RENAMED)
        return SweepRun(**fields | {"workdir": workdir, "curve": tuple(fields["curve"])}), config
    except (OSError, ValueError, RecursionError, KeyError, TypeError, UserError):  # missing, or damaged
        return None


def write_record(run: SweepRun, config: Config) -> None:
    """Writes the record into the run's folder."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    values = {"run": json.loads(run.to_json()), "config": config.to_dict()}
    write_text_file(run.workdir / RECORD_FILE, json.dumps(values) + "\n")


def forget(run: PlannedRun) -> None:
    """Deletes the record of a run that is about to be trained."""
    (run.workdir / RECORD_FILE).unlink(missing_ok=True)


def failed(run: PlannedRun, error: str) -> SweepRun:
    """Builds the record of a run that failed."""
    return SweepRun(**_identity(run), status="failed", error=error)


def measured(run: PlannedRun, evaluation: Evaluation, seconds: float | None) -> SweepRun:
    """Builds the record of a run that was trained and evaluated.

    Args:
      run: the run.
      evaluation: result of ``train.run``.
      seconds: its time; None if it was resumed.
    """
    show_accuracy = bool(evaluation.run_info["show_accuracy"])
    curve = tuple(_curve(evaluation.rows))
    budget_check = evaluation.budget_check or {}
    row = next(row for row in evaluation.rows if _is_chosen(run, row, budget_check))
    numbers = ("kv_fraction", "bits_per_byte", "perplexity", "perplexity_low", "perplexity_high")
    accuracies = ("accuracy", "accuracy_low", "accuracy_high")
    chosen: dict[str, Any] = {name: row.get(name) for name in numbers + accuracies}
    finite = [point for point in curve if math.isfinite(point["perplexity"])]
    best = min(finite, key=lambda point: -point["accuracy"] if show_accuracy else point["perplexity"], default=None)
    return SweepRun(
        **_identity(run),
        **chosen,
        status="finished",
        step=int(evaluation.run_info["step"]),
        seconds=seconds,
        show_accuracy=show_accuracy,
        role_bias=None if run.is_dense else row["setting"]["role_bias"],
        sampled=budget_check.get("sampled"),
        argmax=budget_check.get("argmax"),
        met=budget_check["met"] if run.kv_budget is not None else None,
        best=best,
        curve=curve,
    )


def _identity(run: PlannedRun) -> dict[str, Any]:
    same = {name: getattr(run, name) for name in ("name", "workdir", "kv_budget", "kv_penalty", "seed")}
    return same | {"attention": run.config.model.layer_pattern}


def _is_chosen(run: PlannedRun, row: dict[str, Any], budget_check: dict[str, Any]) -> bool:
    """Returns True for the row that represents the run."""
    if run.is_dense:
        return row["method"] == FULL.name
    return is_biased(row, budget_check if run.kv_budget is not None else {"role_bias": 0.0})


def _curve(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in sorted((row for row in rows if row["method"] == NATS.name), key=lambda row: row["setting"]["role_bias"]):
        same = {name: row[name] for name in ("budget", "kv_fraction", "perplexity", "accuracy")}
        yield {"role_bias": row["setting"]["role_bias"]} | same
