"""What an evaluation measures: the role biases and the numbers of other policies that meet each budget.

They are set on training-split text, so that the held-out text chooses nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.data import Row, piece_lengths
from natsjax.decode.step import DecodingPolicy
from natsjax.evaluate.masked import measure
from natsjax.policies.base import Policy, StaticPolicy
from natsjax.policies.budgets import (
    Layers,
    fraction_for_budget,
    interval_fractions,
    keys_for_budget,
    layer_windows,
    role_bias_for_budget,
    window_for_budget,
)
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.nats import Nats
from natsjax.policies.observing import H2O, SnapKV
from natsjax.runs.load import LoadedRun
from natsjax.runtime.progress import bar

TOLERANCE = 0.1
"""Share of a budget that the biased KV fraction may be off for the budget check to be met (docs/method.md 4)."""


_FEWEST_KEYS = 2
"""Of a head, for a policy that keeps some for being recent and some for being read."""

_MOST_CONTINUED = 0.5
"""Tokens behind a prompt of SnapKV, as a share of the keys that a query reads: all of them are kept, and more of them
would leave it nothing to choose. On average they take half as many keys."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row to be: a policy on some weights, for a budget or for none.

    Attributes:
      run: whose model.
      weights: what a report calls it.
      policy: who reads what.
      budget: that it meets.
      continued: tokens that follow a prompt, for a policy that cuts prompts down (``measure_decode``); None: any.
    """

    run: LoadedRun
    weights: str
    policy: Policy
    budget: float | None = None
    continued: int | None = None

    @property
    def numbers(self) -> dict[str, int | float]:
        """For a report."""
        return self.policy.setting | ({} if self.continued is None else {"continued": self.continued})


def settings_of(
    this: LoadedRun,
    baseline: LoadedRun | None,
    calibration_contexts: Row,
    budgets: Sequence[float],
    notes: list[str],
    progress: bool,
    chunk: int | None = None,
) -> list[Setting]:
    """What to measure.

    Args:
      this: the run.
      dense baseline: its dense baseline.
      calibration_contexts: of the training split.
      budgets: KV fractions.
      notes: gets what cannot be.
      progress: show progress bars.
      chunk: tokens that are decoded at once; then policies are there too that have no mask. None: masks.
    """
    model = this.config.model
    pieces = piece_lengths(calibration_contexts)

    def fixed(layers: Layers) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [*_interval_policies(this.config, layers, pieces, budgets, notes)]
        if chunk is not None:
            found += _decoded_policies(this.config, layers, pieces, budgets, chunk, notes)
        return found

    policies = fixed(layer_windows(model))
    if model.has_roles:
        policies = [*_role_biases(this, calibration_contexts, budgets, notes, progress), *policies]
    weights = f"this run ({model.layer_pattern}, step {this.step})"
    settings = [Setting(this, weights, *found) for found in policies]
    if baseline is not None:
        weights = f"dense baseline {baseline.workdir.path} (step {baseline.step})"
        settings += [Setting(baseline, weights, *found) for found in fixed(layer_windows(baseline.config.model))]
    notes[:] = dict.fromkeys(notes)  # what holds for both weights is said once
    return settings


def _role_biases(
    this: LoadedRun, contexts: Row, budgets: Sequence[float], notes: list[str], progress: bool
) -> list[tuple[StaticPolicy, float | None]]:
    """The role bias for each budget, and role bias 0, ascending; budgets that share a role bias share an entry."""
    seen: dict[float, float] = {}
    found = {}
    for budget in bar(budgets, "setting the role bias", progress):
        found[budget] = role_bias_for_budget(
            lambda role_bias: measure(this, contexts, Nats(role_bias)).kv_fraction, budget, seen
        )
        if abs(found[budget].kv_fraction - budget) > TOLERANCE * budget:
            notes.append(
                f"No role bias gives a KV fraction of {budget:.4g} on training-split text; the closest is "
                f"{found[budget].kv_fraction:.4g}, at role bias {found[budget].role_bias:.4g}."
            )
    # A role bias that several budgets ended at is listed under the budget check's, or else the closest: the last one
    # wins.
    order = sorted(found, key=lambda b: (b == this.config.nats.kv_budget, -abs(found[b].kv_fraction - b)))
    role_biases: dict[float, float | None] = {0.0: None} | {found[budget].role_bias: budget for budget in order}
    return [(Nats(role_bias), role_biases[role_bias]) for role_bias in sorted(role_biases)]


def _interval_policies(
    config: Config, layers: Layers, pieces: np.ndarray, budgets: Sequence[float], notes: list[str]
) -> list[tuple[StaticPolicy, float | None]]:
    """Full attention, and the fixed policies at each budget that they can meet."""
    policies: list[tuple[StaticPolicy, float | None]] = [(FullAttention(), None)]
    most = float(interval_fractions(pieces, 0, layers)[-1])
    if any(budget > most for budget in budgets):
        notes.append(
            f"At KV budgets above {most:.4g} only NAtS is measured: the windows of the model's own layers leave "
            "no more."
        )
        budgets = [budget for budget in budgets if budget <= most]
    for budget in budgets:
        window = window_for_budget(pieces, budget, layers=layers)
        if window is None:
            notes.append(f"No sliding window is as small as the KV budget {budget:.4g}.")
        else:
            policies.append((SlidingWindow(window), budget))
    num_sinks = config.eval.num_sinks
    for budget in budgets:
        window = window_for_budget(pieces, budget, num_sinks=num_sinks, layers=layers)
        if window is None:
            notes.append(
                f"StreamingLLM is left out at the KV budget {budget:.4g}: its {num_sinks} sinks and each query's own "
                "key take more."
            )
        else:
            policies.append((StreamingLLM(num_sinks, window), budget))
    return policies


def _decoded_policies(
    config: Config, layers: Layers, pieces: np.ndarray, budgets: Sequence[float], chunk: int, notes: list[str]
) -> list[tuple[DecodingPolicy, float | None, int | None]]:
    """Random keys, and the policies that observe, at each budget that they can meet: policy, budget, ``continued``."""
    policies: list[tuple[DecodingPolicy, float | None, int | None]] = []
    seed, window = config.train.seed, config.nats.window
    positions = jnp.arange(pieces.max(), dtype=jnp.int32)[None]
    draws = np.asarray(RandomKeys(0.0, seed=seed).draws(positions, config.model.num_kv_heads))[0]
    for budget in budgets:
        share, window_within = fraction_for_budget(pieces, budget, window, layers, draws)
        if share is not None:
            policies.append((RandomKeys(share, window_within, seed), budget, None))
    mean_context = np.sum(pieces * (pieces + 1) / 2) / np.sum(pieces)
    for budget in budgets:
        num_keys = keys_for_budget(pieces, budget, 1, layers)
        if num_keys is None or num_keys < _FEWEST_KEYS:
            notes.append(f"H2O is left out at the KV budget {budget:.4g}: each query's own key takes more.")
        else:
            policies.append((H2O(num_keys, num_keys // 2), budget, None))
    for budget in budgets:
        continued = int(np.clip(_MOST_CONTINUED * budget * mean_context, 1, chunk))
        num_keys = keys_for_budget(pieces, budget, continued, layers)
        if num_keys is None or num_keys < _FEWEST_KEYS:
            notes.append(f"SnapKV is left out at the KV budget {budget:.4g}: what follows its prompts takes more.")
        else:
            policies.append((SnapKV(num_keys, min(32, num_keys // 2)), budget, continued))
    return policies
