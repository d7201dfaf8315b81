"""What an evaluation measures: the dials and the numbers of other policies that meet each budget.

They are set on training-split text, so that the held-out text chooses nothing.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from natsjax import watchdog
from natsjax.config import Config
from natsjax.data import Row, piece_lengths
from natsjax.decode_step import DecodingPolicy
from natsjax.loading import LoadedRun
from natsjax.matching import (
    Layers,
    dial_for_budget,
    interval_fractions,
    keys_for_budget,
    layer_windows,
    share_for_budget,
    window_for_budget,
)
from natsjax.measure import measure
from natsjax.policies import (
    H2O,
    FullAttention,
    Nats,
    Policy,
    RandomKeys,
    SlidingWindow,
    SnapKV,
    StaticPolicy,
    StreamingLLM,
)

TOLERANCE = 0.1
"""Share of a budget that the dialled KV fraction may be off for the contract to be met (METHOD.md 4)."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row to be: a policy on some weights, for a budget or for none."""

    run: LoadedRun
    weights: str
    policy: Policy
    budget: float | None = None


def bar(items: Sequence[Any], title: str, progress: bool) -> Iterator[Any]:
    """The items, with a progress bar on standard error, or, where that is no terminal, a plain line."""
    noted = watchdog.noting(items)
    if progress and not sys.stderr.isatty():
        print(f"{title}: {len(items)}", file=sys.stderr, flush=True)
        return iter(noted)
    return iter(tqdm(noted, desc=title, total=len(items), disable=not progress, file=sys.stderr, leave=False))


def settings_of(
    this: LoadedRun,
    twin: LoadedRun | None,
    dial_contexts: Row,
    budgets: Sequence[float],
    notes: list[str],
    progress: bool,
    chunk: int | None = None,
) -> list[Setting]:
    """What to measure.

    Args:
      this: the run.
      twin: its dense twin.
      dial_contexts: of the training split.
      budgets: KV fractions.
      notes: gets what cannot be.
      progress: show progress bars.
      chunk: tokens that are decoded at once; then policies are there too that have no mask. None: masks.
    """
    model = this.config.model
    pieces = piece_lengths(dial_contexts)

    def fixed(layers: Layers) -> list[tuple[Any, float | None]]:
        found: list[tuple[Any, float | None]] = [*_interval_policies(this.config, layers, pieces, budgets, notes)]
        if chunk is not None:
            found += _decoded_policies(this.config, layers, pieces, budgets, chunk, notes)
        return found

    policies = fixed(layer_windows(model))
    if model.has_roles:
        policies = [*_dials(this, dial_contexts, budgets, notes, progress), *policies]
    weights = f"this run ({model.attention}, step {this.step})"
    settings = [Setting(this, weights, policy, budget) for policy, budget in policies]
    if twin is not None:
        weights = f"dense twin {twin.workdir.path} (step {twin.step})"
        settings += [
            Setting(twin, weights, policy, budget) for policy, budget in fixed(layer_windows(twin.config.model))
        ]
    notes[:] = dict.fromkeys(notes)  # what holds for both weights is said once
    return settings


def _dials(
    this: LoadedRun, contexts: Row, budgets: Sequence[float], notes: list[str], progress: bool
) -> list[tuple[StaticPolicy, float | None]]:
    """The dial for each budget, and dial 0, ascending; budgets that share a dial share an entry."""
    seen: dict[float, float] = {}
    found = {}
    for budget in bar(budgets, "setting the dial", progress):
        found[budget] = dial_for_budget(lambda dial: measure(this, contexts, Nats(dial)).kv_fraction, budget, seen)
        if abs(found[budget].kv_fraction - budget) > TOLERANCE * budget:
            notes.append(
                f"No dial gives a KV fraction of {budget:.4g} on training-split text; the closest is "
                f"{found[budget].kv_fraction:.4g}, at dial {found[budget].dial:.4g}."
            )
    # A dial that several budgets ended at is listed under the contract's, or else the closest: the last one wins.
    order = sorted(found, key=lambda b: (b == this.config.nats.kv_budget, -abs(found[b].kv_fraction - b)))
    dials: dict[float, float | None] = {0.0: None} | {found[budget].dial: budget for budget in order}
    return [(Nats(dial), dials[dial]) for dial in sorted(dials)]


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
) -> list[tuple[DecodingPolicy, float | None]]:
    """Random keys, and the policies that observe, at each budget that they can meet."""
    policies: list[tuple[DecodingPolicy, float | None]] = []
    for budget in budgets:
        share, window = share_for_budget(pieces, budget, config.nats.window, layers)
        if share is not None:
            policies.append((RandomKeys(share, window, config.train.seed), budget))
    for name, smallest, made in (("H2O", 2, _h2o), ("SnapKV", 2, _snapkv)):
        for budget in budgets:
            num_keys = keys_for_budget(pieces, budget, chunk, layers)
            if num_keys is None or num_keys < smallest:
                notes.append(f"{name} is left out at the KV budget {budget:.4g}: chunks of {chunk} tokens take more.")
            else:
                policies.append((made(num_keys), budget))
    return policies


def _h2o(num_keys: int) -> H2O:
    return H2O(num_keys, num_keys // 2)


def _snapkv(num_keys: int) -> SnapKV:
    return SnapKV(num_keys, min(32, num_keys // 2))
