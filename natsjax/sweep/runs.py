"""The runs of a sweep: their names and configs, what is wrong with them, and what is known of each that has ended.

A run is an ordinary workdir, ``DIR/NAME``. When it has been trained and evaluated, ``sweep.json`` in it keeps what the
sweep draws, and the config that it was asked for with: so a finished run is known without reading a checkpoint, and a
later ``natsjax.evaluate`` of it changes nothing here. A run without that file, or with another config in it, is trained
on and evaluated.
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
from natsjax.report.results import to_json
from natsjax.runs.data import RunData, open_data
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.runs.paths import settle_paths
from natsjax.runs.workdir import Workdir
from natsjax.runtime.files import write_text_file

RECORD_FILE = "sweep.json"
_LARGEST_SEED = 2**31 - 1
# Fields that change how a run is trained, stored or shown, and no number of a finished one.
_FREE_FIELDS = (
    # Of these paths, what was moved: with other contents the sweep is refused.
    *("data.prepared_dir", "data.mixture", "data.input", "data.validation_input", "data.tokenizer"),
    *("train.init_from", "mesh.", "checkpoint.", "model.remat", "eval.batch_size"),
    *(
        "train.log_every",
        "train.progress",
        "train.hang_timeout_seconds",
        "train.profile",
        "train.wandb",
        "train.compilation_cache",
    ),
)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep asks for.

    Attributes:
      name: of its folder.
      workdir: where it lies.
      config: as it is trained.
      kv_budget: KV fraction that the KV penalty is controlled to; None: the KV penalty is fixed, or the run is dense.
      kv_penalty: fixed KV penalty, nats per token per unit of KV fraction; None: it is controlled, or the run is dense.
      seed: ``train.seed``.
    """

    name: str
    workdir: Path
    config: Config
    kv_budget: float | None
    kv_penalty: float | None
    seed: int

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense baseline."""
        return self.kv_budget is None and self.kv_penalty is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A run that has ended; a line of ``sweep.jsonl``.

    The numbers ``kv_fraction`` to ``accuracy_high`` are one row of the run's own evaluation on held-out text: with a
    budget, that of the role bias which meets the budget on training text; with a fixed KV penalty, that of role bias 0;
    of a dense baseline, full attention. They are None where the run failed.

    Attributes:
      name: of its folder.
      workdir: where it lies.
      attention: ``model.layer_pattern``.
      kv_budget: KV fraction that the KV penalty was controlled to; None: the KV penalty was fixed, or the run is dense.
      kv_penalty: fixed KV penalty, nats per token per unit of KV fraction; None: it was controlled, or the run is
        dense.
      seed: ``train.seed``.
      status: "finished", or "failed", which running the sweep again tries again.
      error: the sentence that it failed with.
      step: optimizer steps taken.
      seconds: that training and evaluation took; None where they took more than one start.
      show_accuracy: whether accuracy, and not perplexity, is what counts: a task without text.
      kv_fraction: KV fraction of the row, in (0, 1].
      perplexity: of the row; ``perplexity_low`` and ``perplexity_high`` bound the 95 % interval by document.
      bits_per_byte: of the row; None without text.
      accuracy: of the row, in [0, 1]; ``accuracy_low`` and ``accuracy_high`` bound the 95 % interval by document.
      role bias: of the row; None for a dense baseline.
      sampled: KV fraction with roles sampled as in training; None for a dense baseline, as are the next two.
      argmax: KV fraction without role bias.
      met: whether the role bias met the budget; None without a budget.
      best: the entry of ``front`` with the lowest perplexity, or the highest accuracy; None for a dense baseline.
      front: what the run's role biases measured, ascending: ``role_bias``, ``budget``, ``kv_fraction``, ``perplexity``,
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
    front: tuple[dict[str, Any], ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense baseline."""
        return self.kv_budget is None and self.kv_penalty is None

    def to_json(self) -> str:
        """One line of strict JSON; numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity"."""
        return to_json(dataclasses.asdict(self) | {"workdir": str(self.workdir)})


def plan_runs(
    config: Config,
    directory: Path,
    kv_budgets: Sequence[float] | None,
    kv_penalties: Sequence[float] | None,
    seeds: Sequence[int],
    dense: bool,
) -> list[PlannedRun]:
    """The runs of a sweep, seed by seed, so that every setting is there early.

    Args:
      config: what the runs have in common.
      directory: of the sweep.
      kv_budgets: KV fractions.
      kv_penalties: fixed KV penalties, nats per token per unit of KV fraction.
      seeds: of each setting.
      dense: add a dense baseline a seed.

    Raises:
      UserError: the lists or the config do not make a sweep.
    """
    if not config.model.has_roles:
        raise UserError(
            f"model.layer_types = {config.model.layer_pattern} has no roles to control; a sweep wants a config with "
            '"nats" layers (--dense adds the dense baselines).'
        )
    if (kv_budgets is None) == (kv_penalties is None):
        raise UserError(
            "a sweep goes over --kv_budgets=0.05,0.1,… or over --kv_penalties=0.1,1,…; give one of the two."
        )
    budgets = [] if kv_budgets is None else _checked("--kv_budgets", kv_budgets)
    prices = [] if kv_penalties is None else _checked("--kv_penalties", kv_penalties)
    for budget in budgets:
        if not 0 < budget <= 1:  # also when it is nan
            raise UserError(f"--kv_budgets: {budget:g} is not a fraction of the KV; it must lie above 0 and up to 1.")
    for price in prices:
        if not 0 <= price < math.inf:
            raise UserError(f"--kv_penalties: {price:g} is no KV penalty; it must be 0 or more, in nats per token.")
    for seed in _checked("--seeds", seeds):
        if not 0 <= seed <= _LARGEST_SEED or seed != int(seed):
            raise UserError(f"--seeds: {seed} is no seed; an integer from 0 to {_LARGEST_SEED} was expected.")
    settings = [("controlled", budget) for budget in budgets] + [("fixed", price) for price in prices]
    runs = []
    for seed in map(int, seeds):
        for kind, value in settings:
            runs.append(_planned(config, directory, kind, value, seed))
        if dense:
            runs.append(_planned_baseline(config, directory, seed))
    return runs


def _checked(flag: str, values: Sequence[Any]) -> Sequence[Any]:
    """The values of a list, which has some, and none twice."""
    values = list(values)
    if not values:
        raise UserError(f"{flag} is empty; numbers separated by commas were expected.")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{flag} names {value:g} more than once.")
    return values


def _planned(config: Config, directory: Path, kind: str, value: float, seed: int) -> PlannedRun:
    """A run with a budget ("controlled") or a KV penalty ("fixed")."""
    is_budget = kind == "controlled"
    field = "kv_budget" if is_budget else "kv_penalty"
    value = float(value)
    name = f"{field}={repr(value).removesuffix('.0')}_seed={seed}"  # no comma: lists of workdirs are divided by them
    changed = _changed(config, seed, nats={"kv_penalty_mode": kind, field: value})
    return PlannedRun(name, directory / name, changed, value if is_budget else None, None if is_budget else value, seed)


def _planned_baseline(config: Config, directory: Path, seed: int) -> PlannedRun:
    name = f"dense_seed={seed}"
    # A budget or a KV penalty plays no part in it, and must not make another run of it.
    plain = NatsConfig()
    names = ("price", "kv_budget", "kv_penalty", "min_kv_penalty", "max_kv_penalty")
    nats = {name: getattr(plain, name) for name in names}
    baseline = _changed(config, seed, nats=nats, model={"attention": "dense"}, train={"reinit_scorer": False})
    return PlannedRun(name, directory / name, baseline, None, None, seed)


def _changed(config: Config, seed: int, **groups: dict[str, Any]) -> Config:
    """The config with a seed and with fields changed, validated."""
    values = config.to_dict()
    for group, fields in groups.items():
        values[group] |= fields
    values["train"]["seed"] = seed
    return Config.from_dict(values)


# -------------------------------------------------------------------------------------------------------------- checks


def with_shared_corpus(runs: Sequence[PlannedRun], directory: Path, progress: bool) -> list[PlannedRun]:
    """The runs with one prepared corpus, ``DIR/corpus``, made or compared with what is asked for.

    Raises:
      UserError: the text cannot be prepared, or another corpus lies there.
    """
    data = runs[0].config.data
    if data.source != "corpus" or data.prepared_dir or data.mixture:
        return [dataclasses.replace(run, config=settle_paths(run.config, Workdir(run.workdir))) for run in runs]
    sweep = Workdir(directory)
    if not any(Workdir(run.workdir).has_checkpoint() for run in runs):
        # As a run's own corpus is: made, or compared. Once there is a run, it goes on with the corpus that it has.
        open_data(runs[0].config, sweep, progress=progress)
    shared = str(real_path(sweep.corpus))
    return [
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, prepared_dir=shared))
        )
        for run in runs
    ]


def check_existing(runs: Sequence[PlannedRun]) -> None:
    """Compares the runs with what lies in their folders.

    Raises:
      UserError: one differs in a field that may not change on resume, or the folder holds something else.
    """
    for run in runs:
        workdir = Workdir(run.workdir)
        workdir.refuse_export()
        workdir.compare_config(run.config)


def check_data(runs: Sequence[PlannedRun], progress: bool) -> None:
    """What training and evaluation would refuse, for all runs before the first.

    Raises:
      UserError: the first thing that does not fit.
    """
    opened: dict[int, RunData] = {}
    checked: set[tuple[str, ...]] = set()
    for run in runs:
        config, workdir = run.config, Workdir(run.workdir)
        if run.seed not in opened:
            opened = {run.seed: open_data(config, workdir, progress=progress)}  # runs come seed by seed
        data = opened[run.seed]
        workdir.compare_data(data.fingerprint)
        evaluate.check(config, data)
        if run.kv_budget is not None:
            wanted_budgets(config, [run.kv_budget], data.piece_lengths)
        if config.model.layer_types not in checked:  # what follows is the same for all budgets and seeds
            checked.add(config.model.layer_types)
            vocab_size = data.vocabulary.vocab_size
            sharding.check(config, vocab_size, sharding.make_mesh(config.mesh))
            if config.train.init_from and not workdir.has_checkpoint():
                InitialParameters(config, model_structure(config, vocab_size), data.vocabulary)


# ------------------------------------------------------------------------------------------------------- what is known


def finished(run: PlannedRun) -> SweepRun | None:
    """What is known of a run, if it has been trained and evaluated as it is asked for now; reads one small file."""
    record = read_record(run.workdir)
    if record is None:
        return None
    known, config = record
    changed, other = differences(config, Workdir(run.workdir).with_own_order(run.config))
    if known.status != "finished" or other or any(not line.startswith(_FREE_FIELDS) for line in changed):
        return None
    # Somebody may have trained it further; or removed the checkpoints, with the numbers known.
    steps = [int(path.name) for path in Workdir(run.workdir).checkpoints.glob("*") if path.name.isdigit()]
    return known if max(steps, default=known.step) == known.step else None


def read_record(workdir: Path) -> tuple[SweepRun, Config] | None:
    """How the run in a folder ended, and the config that it was trained and evaluated with; None: it does not say."""
    try:
        values = json.loads((workdir / RECORD_FILE).read_text(encoding="utf-8"))
        config = Config.from_stored(values["config"])
        fields = _restored(values["run"])
        return SweepRun(**fields | {"workdir": workdir, "front": tuple(fields["front"])}), config
    except (
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        UserError,
    ):  # not there, or of another natsjax: it is made anew
        return None


def write_record(run: SweepRun, config: Config) -> None:
    """Into the run's folder."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    values = {"run": json.loads(run.to_json()), "config": config.to_dict()}
    write_text_file(run.workdir / RECORD_FILE, json.dumps(values) + "\n")


def forget(run: PlannedRun) -> None:
    """Before it is trained: how it ended before is no longer so."""
    (run.workdir / RECORD_FILE).unlink(missing_ok=True)


def failed(run: PlannedRun, error: str) -> SweepRun:
    """A run that ended with a sentence."""
    return SweepRun(**_identity(run), status="failed", error=error)


def measured(run: PlannedRun, evaluation: Evaluation, seconds: float | None) -> SweepRun:
    """A run that was trained and evaluated.

    Args:
      run: as it was asked for.
      evaluation: of ``train.run``.
      seconds: that it took; None where there was more than one start.
    """
    show_accuracy = bool(evaluation.run_info["show_accuracy"])
    front = tuple(_pareto(evaluation.rows))
    budget_check = evaluation.budget_check or {}
    row = next(row for row in evaluation.rows if _is_chosen(run, row, budget_check))
    numbers = ("kv_fraction", "bits_per_byte", "perplexity", "perplexity_low", "perplexity_high")
    accuracies = ("accuracy", "accuracy_low", "accuracy_high")
    chosen: dict[str, Any] = {name: row.get(name) for name in numbers + accuracies}
    finite = [point for point in front if math.isfinite(point["perplexity"])]
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
        front=front,
    )


def _identity(run: PlannedRun) -> dict[str, Any]:
    same = {name: getattr(run, name) for name in ("name", "workdir", "kv_budget", "kv_penalty", "seed")}
    return same | {"attention": run.config.model.layer_pattern}


def _is_chosen(run: PlannedRun, row: dict[str, Any], budget_check: dict[str, Any]) -> bool:
    """Whether a row is what stands for the run."""
    if run.is_dense:
        return row["method"] == "full"
    role_bias = budget_check["role_bias"] if run.kv_budget is not None else 0.0
    return row["method"] == "nats" and row["setting"]["role_bias"] == role_bias


def _pareto(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in sorted((row for row in rows if row["method"] == "nats"), key=lambda row: row["setting"]["role_bias"]):
        same = {name: row[name] for name in ("budget", "kv_fraction", "perplexity", "accuracy")}
        yield {"role_bias": row["setting"]["role_bias"]} | same


def _restored(value: Any) -> Any:
    """With the numbers that ``to_json`` made strings of."""
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
