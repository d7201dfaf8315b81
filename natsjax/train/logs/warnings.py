"""Training warnings: frequent faults of a run with learned roles, found in its logged metrics.

A condition must hold at several logged steps in a row before its warning begins, and be gone for as many before it
ends. Warnings about a layer and a head consider only layers of kind "nats".
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from natsjax.config import Config
from pallas_kernels.nats_attention.roles import GLOBAL, LOCAL

NUM_POINTS = 3
"""Logged steps in a row that begin and end a warning."""

_ALL = 0.99  # of the tokens whose role is not forced
_OFF_BUDGET = 0.1  # relative
_FEW_LOCALS = 0.01  # of the tokens: with fewer, how they end is not judged
_AT_BOUND = 1e-3  # relative


class TrainingWarning(NamedTuple):
    """Declaration of a warning.

    Attributes:
      seen: the condition, for ``docs/metrics.md``.
      advice: what to do, a sentence.
    """

    seen: str
    advice: str


WARNINGS = {
    "all-one-role": TrainingWarning(
        "at least 99 % of a head's tokens, the forced ones aside, have one role",
        "These heads no longer choose: raise nats.kv_budget or lower nats.max_kv_penalty, begin with a higher "
        "nats.temperature, or lower optimizer.scorer_learning_rate.",
    ),
    "no-global": TrainingWarning(
        "no token of a head is GLOBAL but the forced ones; with several windows, of any head: there a head may live in "
        "windows alone",
        "Nothing is remembered there beyond the forced first tokens: raise nats.kv_budget, or let the budget fall "
        "later and slower (nats.budget_ramp_start, nats.budget_ramp_steps).",
    ),
    "endless-local": TrainingWarning(
        "most of a head's LOCAL tokens are never ended within their document",
        "A LOCAL token that no GLOBAL one ends costs as much as a GLOBAL one: raise the fraction of GLOBAL in "
        "nats.initial_roles, or set nats.kv_penalty_gradient = exact.",
    ),
    "budget-not-reached": TrainingWarning(
        "after the ramp the KV fraction is more than 10 % off a controlled budget, and the KV penalty is at its upper "
        "bound or the last tenth of the run has begun; below the budget with the KV penalty at its lower bound the "
        "model wants no more, which is no fault",
        "Train longer, raise nats.kv_penalty_lr or nats.max_kv_penalty, or choose a nats.kv_budget nearer to this KV "
        "fraction.",
    ),
    "penalty-at-bound": TrainingWarning(
        "after the ramp a controlled KV penalty is at nats.max_kv_penalty",
        "The KV penalty is at its upper bound: raise nats.max_kv_penalty, or choose a larger nats.kv_budget.",
    ),
    "loss-spike-skipped": TrainingWarning(
        "updates were skipped (optimizer.spike_threshold)",
        "If it happens again, lower optimizer.peak_learning_rate, or raise optimizer.warmup_steps or "
        "optimizer.spike_threshold.",
    ),
}
"""Every warning by name."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Begin or end of a warning.

    Attributes:
      name: one of ``WARNINGS``.
      step: at which it was noticed.
      began: True at its begin, False at its end.
      text: a line for people.
    """

    name: str
    step: int
    began: bool
    text: str


@dataclasses.dataclass(frozen=True)
class _Finding:
    """Result of a rule at one logged step: ``where`` it holds, a bool array, and a description of such an array."""

    where: np.ndarray
    describe: Callable[[np.ndarray], str]


class ActiveWarnings:
    """Warnings that hold now, from the logged metrics alone.

    Args:
      config: of the run.

    Attributes:
      names: of the warnings that hold, in the order of ``WARNINGS``.

    Example:
      >>> active = ActiveWarnings(config)
      >>> for change in active.update(step, line):  # ``line`` as in metrics.jsonl
      ...     print(change.text)
    """

    def __init__(self, config: Config):
        self._config = config
        self._layers = np.array([kind == "nats" for kind in config.model.all_layer_types])
        self._points = {name: 1 if name == "loss-spike-skipped" else NUM_POINTS for name in WARNINGS}
        self._seen: dict[str, deque[np.ndarray]] = {name: deque(maxlen=NUM_POINTS) for name in WARNINGS}
        self._fractions: deque[float] = deque(maxlen=NUM_POINTS)
        self._skipped: float | None = None
        self._active: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the warnings that hold now."""
        return [name for name in WARNINGS if name in self._active]

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[Change]:
        """Applies the rules to a logged step.

        Args:
          step: its number, from 1.
          metrics: the line of ``metrics.jsonl``: floats and nested lists of floats.

        Returns:
          The warnings that begin or end with it.
        """
        self._fractions.append(float(metrics["kv_fraction"]))
        findings = {"loss-spike-skipped": self._spikes(metrics)}
        if self._config.model.has_roles:
            findings |= self._heads(metrics) | self._penalty(step, metrics)
        changes = []
        for name in WARNINGS:
            if name in findings:
                changes += self._debounced(name, step, findings[name])
        return changes

    def _debounced(self, name: str, step: int, finding: _Finding) -> list[Change]:
        """Turns findings of several steps into the begin or the end of a warning."""
        seen = self._seen[name]
        seen.append(finding.where)
        last = list(seen)[-self._points[name] :]
        held = np.logical_and.reduce(last) if len(last) == self._points[name] else np.zeros_like(finding.where)
        if held.any() and name not in self._active:
            self._active.add(name)
            return [Change(name, step, True, f"{name}: {finding.describe(held)}. {WARNINGS[name].advice}")]
        if name in self._active and len(seen) == NUM_POINTS and not any(where.any() for where in seen):
            self._active.remove(name)
            return [Change(name, step, False, f"{name}: it is over at step {step}")]
        return []

    def _heads(self, metrics: Mapping[str, Any]) -> dict[str, _Finding]:
        """Checks each layer and head."""
        fractions = np.asarray(metrics["role_fractions"])
        forced = float(metrics["forced_globals"])
        names = self._config.nats.role_names
        free = fractions - forced * (np.arange(len(names)) == GLOBAL)
        learned = self._layers[:, None]
        one_role = (free >= _ALL * (1 - forced)) & learned[..., None] & (forced < 1)
        no_global = (free[..., GLOBAL] <= 1e-6) & learned
        if (
            len(self._config.nats.sliding_windows) > 1
        ):  # a head of windows is one of the choices that they are there for
            no_global &= (no_global | ~learned).all()
        unended = np.asarray(metrics["unended_locals"]) > 0.5
        endless = unended & (fractions[..., LOCAL] > _FEW_LOCALS) & learned

        def roles(held: np.ndarray) -> str:
            found = [role for role in range(len(names)) if held[..., role].any()]
            parts = [f"all {names[role]} in {places(held[..., role])}" for role in found]
            return f"tokens are {' and '.join(parts)}"

        return {
            "all-one-role": _Finding(one_role, roles),
            "no-global": _Finding(no_global, lambda held: f"no token is GLOBAL but the forced ones in {places(held)}"),
            "endless-local": _Finding(
                endless, lambda held: f"most LOCAL tokens are never ended within their document in {places(held)}"
            ),
        }

    def _penalty(self, step: int, metrics: Mapping[str, Any]) -> dict[str, _Finding]:
        """Checks a controlled KV penalty, after the ramp of the budget."""
        nats, num_steps = self._config.nats, self._config.train.num_steps
        if nats.kv_penalty_mode != "controlled" or step <= nats.budget_ramp_start + nats.budget_ramp_steps:
            return {}
        penalty, fraction = float(metrics["kv_penalty"]), float(np.mean(self._fractions))
        at_upper = penalty >= nats.max_kv_penalty * (1 - _AT_BOUND)
        at_lower = penalty <= nats.min_kv_penalty * (1 + _AT_BOUND)
        off = abs(fraction - nats.kv_budget) > _OFF_BUDGET * nats.kv_budget
        wants_no_more = at_lower and fraction < nats.kv_budget
        late = at_upper or step > 0.9 * num_steps
        figures = f"{100 * fraction:.3g} %, and nats.kv_budget is {100 * nats.kv_budget:.3g} %"
        return {
            "budget-not-reached": _Finding(
                np.array(off and late and not wants_no_more), lambda _: f"the KV fraction is {figures}"
            ),
            "penalty-at-bound": _Finding(
                np.array(at_upper),
                lambda _: (
                    f"the KV penalty is at its upper bound nats.max_kv_penalty = {nats.max_kv_penalty:g} with a KV "
                    f"fraction of {figures}"
                ),
            ),
        }

    def _spikes(self, metrics: Mapping[str, Any]) -> _Finding:
        """Checks for skipped updates since the logged step before."""
        total = float(metrics["skipped_steps"])
        known = total - float(metrics["skipped"]) if self._skipped is None else self._skipped
        self._skipped = total
        new = int(total - known)
        many = f"the updates of {new} steps were" if new > 1 else "the update of a step was"
        return _Finding(
            np.array(new > 0), lambda _: f"{many} skipped as a loss spike, {int(total)} since the beginning"
        )


def places(held: np.ndarray) -> str:
    """Lists layers and heads in a compact form, numbered from 0.

    Args:
      held: bool ``[l, k]``, with at least one that is true.

    Example:
      >>> places(np.array([[True, True], [True, False], [True, False]]))
      'layer 0, layers 1-2 head 0'
    """
    by_heads: dict[tuple[int, ...], list[int]] = {}
    for layer, heads in enumerate(held):
        if heads.any():
            by_heads.setdefault(tuple(np.flatnonzero(heads).tolist()), []).append(layer)
    if list(by_heads) == [tuple(range(held.shape[1]))] and len(by_heads[tuple(range(held.shape[1]))]) == held.shape[0]:
        return "all layers and heads"
    parts = []
    for heads, layers in by_heads.items():
        where = "" if len(heads) == held.shape[1] else f" {_numbered('head', heads)}"
        parts.append(f"{_numbered('layer', layers)}{where}")
    return ", ".join(parts)


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    """Joins numbers as in ``layers 0-2+5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{noun}{'s' if len(numbers) > 1 else ''} {text}"
