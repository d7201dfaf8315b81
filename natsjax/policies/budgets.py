"""KV budgets that are measured: those that somebody asked for, or a range.

A KV budget is a KV fraction (docs/method.md 4): live key-query pairs over causal ones, mean over all layers. What
functions here take:

* ``pieces``: int ``[num_pieces]``, tokens in each document piece, at least one piece.
* ``name``: what a message calls a budget.

Numpy only.
"""

import math
from collections.abc import Sequence

import numpy as np

from natsjax import kv_fraction
from natsjax.config import Config
from natsjax.config_fields import format_value
from natsjax.errors import UserError
from natsjax.policies.numbers import interval_fractions, layer_windows

NUM_BUDGETS = 6
"""Fewest budgets that are measured, unless others are asked for."""

_NATS_FACTORS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)  # of kv_budget
_SPARE_FACTORS = (0.7, 0.9, 1.4, 0.5, 2.5, 0.4, 3.2)  # where the window, or 1, rules some of them out
_DENSE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def nats_budgets(kv_budget: float, smallest: float) -> list[float]:
    """Returns budgets around ``kv_budget``, ascending: 0.6 to 2 times it, where they are between ``smallest`` and 1.

    ``kv_budget`` itself is always among them.

    Args:
      kv_budget: the budget that the model was trained to.
      smallest: the smallest KV fraction worth asking for.
    """
    chosen = {kv_budget}
    for number, factor in enumerate(_NATS_FACTORS + _SPARE_FACTORS):
        if number >= len(_NATS_FACTORS) and len(chosen) >= NUM_BUDGETS:
            break
        # A decimal with few digits is easier to read in a table than the product of two.
        budget = float(f"{factor * kv_budget:.4g}")
        if smallest <= budget <= 1 and factor != 1:
            chosen.add(budget)
    return sorted(chosen)


def dense_budgets(smallest: float, largest: float = 1.0) -> list[float]:
    """Returns budgets for a model that was trained to none, ascending, from ``smallest`` to ``largest``."""
    return [budget for budget in _DENSE_BUDGETS if smallest <= budget <= largest]


def check_budgets(budgets: Sequence[float], least: float, why: str, name: str = "KV budget") -> list[float]:
    """Returns the budgets that somebody asked for, ascending and without repetition.

    Args:
      budgets: KV fractions.
      least: no KV fraction is below it.
      why: its reason, for the message.
      name: see the module.

    Raises:
      UserError: one is not in (0, 1], or below the least.
    """
    for budget in budgets:
        if not 0 < budget <= 1:  # also when it is nan
            raise UserError(f"{name} = {budget:g}: it is no fraction of the KV; choose one above 0 and up to 1.")
        if budget < least:
            rounded = math.ceil(1e4 * least) / 1e4  # up, so that the figure is a budget that can be asked for
            raise UserError(f"{name} = {budget:g}: {why}, no KV fraction is below {rounded:.4f}; choose that or more.")
    return sorted(set(budgets))


def check_role_budgets(
    config: Config, budgets: Sequence[float], pieces: np.ndarray, name: str = "KV budget"
) -> list[float]:
    """Returns budgets of a model with roles, ascending and without repetition.

    Raises:
      UserError: one is not in (0, 1], or below what any roles can keep.
    """
    all_sliding = kv_fraction.all_sliding_model_kv_fraction(config, pieces)
    if all(all_sliding <= budget <= 1 for budget in budgets):
        return sorted(set(budgets))
    nats = config.nats
    window = f"nats.windows = {format_value(nats.windows)}" if nats.windows else f"nats.window = {nats.window}"
    why = f"with {window} and data.context_length = {config.data.context_length}"
    if len(config.model.layer_types) > 1:
        why = f"with model.layer_types = {config.model.layer_pattern}, {why.removeprefix('with ')}"
    return check_budgets(budgets, kv_fraction.least_model_kv_fraction(config, pieces), why, name)


def about_global_tokens(config: Config, budgets: Sequence[float], pieces: np.ndarray) -> str | None:
    """Returns a sentence about budgets that SLIDING tokens alone exceed; None where there are none."""
    if not config.model.has_roles:
        return None
    all_sliding = kv_fraction.all_sliding_model_kv_fraction(config, pieces)
    below = ", ".join(f"{100 * budget:.4g} %" for budget in budgets if budget < all_sliding)
    if not below:
        return None
    shortest = f", window {config.nats.windows[0]}," if config.nats.windows else ""
    return (
        f"KV budget {below}: with every token SLIDING{shortest} the KV fraction is {100 * all_sliding:.4g} %; below "
        "that the model must learn GLOBAL tokens, which end LOCAL keys."
    )


def wanted_budgets(config: Config, asked: Sequence[float] | None, pieces: np.ndarray) -> list[float]:
    """Returns the KV fractions to measure, ascending; for a NAtS run ``nats.kv_budget`` is among them.

    Args:
      config: of the run; ``eval.budgets`` are asked for where ``asked`` is None, and where that is empty, a range.
      asked: KV fractions that somebody asked for.
      pieces: see the module.

    Raises:
      UserError: somebody asked for one that cannot be.
    """
    asked = config.eval.budgets if asked is None else asked
    if config.model.has_roles:
        budget = config.nats.kv_budget
        if asked:
            return sorted({budget, *check_role_budgets(config, asked, pieces)})
        # A range of budgets that no more than the role bias is needed for, unless the run itself went below it.
        smallest = kv_fraction.all_sliding_model_kv_fraction(config, pieces)
        if budget < smallest:
            smallest = kv_fraction.least_model_kv_fraction(config, pieces)
        return nats_budgets(budget, smallest)
    fractions = interval_fractions(pieces, 0, layer_windows(config.model))
    if asked:
        why = f"with data.context_length = {config.data.context_length} and each query's own key"
        return check_budgets(asked, float(fractions[0]), why)
    return dense_budgets(float(fractions[0]), float(fractions[-1]))
