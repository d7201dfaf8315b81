"""Settings to measure: the role biases and the numbers of other policies that meet each budget.

They are set on training-split text, so that the held-out text chooses nothing.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from natsjax.data import Row, piece_lengths
from natsjax.evaluate.masked import measure
from natsjax.policies.base import Policy
from natsjax.policies.numbers import Calibration, OutOfReachError, interval_fractions, layer_windows
from natsjax.policies.registry import NATS, POLICIES, PolicyEntry, label_of
from natsjax.policies.role_bias import role_bias_for_budget
from natsjax.runs.load import LoadedRun
from natsjax.runtime.progress import bar

TOLERANCE = 0.1
"""Fraction of a budget that the biased KV fraction may be off for the budget check to be met (docs/method.md 4.4)."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row to measure: a policy on some weights, for a budget or for none.

    Attributes:
      run: whose model.
      weights: their name in a report.
      policy: how long keys live.
      budget: KV fraction that it meets.
      continued: the most tokens that follow a prompt, for a policy that cuts prompts down; None: any.
    """

    run: LoadedRun
    weights: str
    policy: Policy
    budget: float | None = None
    continued: int | None = None

    @property
    def numbers(self) -> dict[str, int | float]:
        """The policy's numbers, for a report."""
        return self.policy.setting | ({} if self.continued is None else {"continued": self.continued})


def settings_of(
    this: LoadedRun,
    baseline: LoadedRun | None,
    calibration_contexts: Row,
    budgets: Sequence[float],
    notes: list[str],
    progress: bool,
    chunk: int | None = None,
    *,
    policies: Collection[str] | None = None,
    pieces: np.ndarray | None = None,
    role_biases: dict[str, list[Setting]] | None = None,
) -> list[Setting]:
    """Returns what to measure: every policy of the registry, on the run's weights and on the dense baseline's.

    Args:
      this: the run.
      baseline: its dense baseline.
      calibration_contexts: of the training split.
      budgets: KV fractions.
      notes: gets a sentence about each policy that cannot meet a budget.
      progress: show progress bars.
      chunk: tokens that are decoded at once, which measures policies without a mask too; None: masks.
      policies: names of those to measure, without notes about others; None: all.
      pieces: int ``[num_pieces]``, lengths of the texts that the numbers of other policies are counted for; None: those
        of the calibration contexts.
      role_biases: settings of earlier calls with the same contexts and budgets, by weights, which are not searched
        again; what is found is added.
    """
    pieces = piece_lengths(calibration_contexts) if pieces is None else pieces
    role_biases = {} if role_biases is None else role_biases
    mode = "masked" if chunk is None else "decode"
    entries = [entry for entry in POLICIES.values() if mode in entry.modes]
    entries = [entry for entry in entries if policies is None or entry.name in policies]
    settings = []
    for run, weights in (
        (this, f"this run ({this.config.model.layer_pattern}, step {this.step})"),
        *([] if baseline is None else [(baseline, f"dense baseline {baseline.workdir.path} (step {baseline.step})")]),
    ):
        calibration = Calibration(this.config, pieces, layer_windows(run.config.model), chunk)
        within = _within_layers(calibration, budgets, notes)
        for entry in entries:
            if (why := entry.unsuited(run.config.model)) is not None:
                if not entry.is_trained_in:
                    notes.append(f"{entry.label} is left out: {why}.")
            elif entry.reads_roles:
                if weights not in role_biases:
                    role_biases[weights] = _role_biases(
                        run, weights, entry, calibration_contexts, budgets, notes, progress
                    )
                settings += role_biases[weights]
            elif entry.for_budget is None:
                settings.append(Setting(run, weights, entry.make()))
            else:
                settings += _at_budgets(run, weights, entry, calibration, within, notes)
    notes[:] = dict.fromkeys(notes)  # a note about both weights is printed once
    return settings


def _role_biases(
    run: LoadedRun,
    weights: str,
    entry: PolicyEntry,
    contexts: Row,
    budgets: Sequence[float],
    notes: list[str],
    progress: bool,
) -> list[Setting]:
    """Returns the role bias for each budget, and role bias 0, ascending; budgets that share one share an entry."""
    seen: dict[float, float] = {}
    found = {}
    for budget in bar(budgets, "setting the role bias", progress):
        found[budget] = role_bias_for_budget(
            lambda role_bias: measure(run, contexts, entry.make(role_bias)).kv_fraction, budget, seen
        )
        if abs(found[budget].kv_fraction - budget) > TOLERANCE * budget:
            notes.append(
                f"No role bias gives a KV fraction of {budget:.4g} on training-split text; the closest is "
                f"{found[budget].kv_fraction:.4g}, at role bias {found[budget].role_bias:.4g}."
            )
    # A role bias at which several budgets ended is listed under the run's own budget, or else under the closest: the
    # last one wins.
    order = sorted(found, key=lambda b: (b == run.config.nats.kv_budget, -abs(found[b].kv_fraction - b)))
    role_biases: dict[float, float | None] = {0.0: None} | {found[budget].role_bias: budget for budget in order}
    return [Setting(run, weights, entry.make(bias), role_biases[bias]) for bias in sorted(role_biases)]


def _within_layers(calibration: Calibration, budgets: Sequence[float], notes: list[str]) -> Sequence[float]:
    """Returns the budgets that are not above what the windows of the model's own layers leave."""
    most = float(interval_fractions(calibration.piece_lengths, 0, calibration.layers)[-1])
    if all(budget <= most for budget in budgets):
        return budgets
    own = label_of(NATS.name, calibration.config.model.layer_types)
    notes.append(
        f"At KV budgets above {most:.4g} nothing but {own} is measured: the windows of the model's own layers leave no "
        "more."
    )
    return [budget for budget in budgets if budget <= most]


def _at_budgets(
    run: LoadedRun,
    weights: str,
    entry: PolicyEntry,
    calibration: Calibration,
    budgets: Sequence[float],
    notes: list[str],
) -> list[Setting]:
    """Returns a policy at each budget that it can meet."""
    settings = []
    for budget in budgets:
        try:
            numbers = entry.numbers_for(calibration, budget)
        except OutOfReachError as error:
            notes.append(f"At the KV budget {budget:.4g}, {entry.label} is left out: {error}.")
        else:
            settings.append(Setting(run, weights, entry.make(*numbers.arguments), budget, numbers.continued))
    return settings
