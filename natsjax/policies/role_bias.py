"""Role biases that meet a KV budget, by search: how many keys live under one is only known by measuring."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

_MAX_ROLE_BIAS = 32.0  # logits are of order 1 to 10: beyond it the role bias alone decides
_ROLE_BIAS_STEP = 1e-3  # role biases are multiples of it, so that one read from a table is the one that was measured
_CLOSE_ENOUGH = 0.01  # of the budget
_MAX_EVALUATIONS = 20  # for one budget


class RoleBiasMatch(NamedTuple):
    """The role bias closest to a budget, and the KV fraction that it gave."""

    role_bias: float
    kv_fraction: float


def role_bias_for_budget(
    kv_fraction_at: Callable[[float], float], budget: float, seen: dict[float, float] | None = None
) -> RoleBiasMatch:
    """Searches the role bias whose KV fraction is closest to a budget.

    The fraction is a step function of the role bias and need not rise with it, so nothing is assumed but that two role
    biases whose fractions are on both sides of the budget are worth looking between. At most 20 evaluations.

    Args:
      kv_fraction_at: KV fraction under a role bias.
      budget: KV fraction.
      seen: fractions by role bias that are known already; what is found is added, so that the next budget costs less.

    Returns:
      The best role bias of those that the search measured; the caller decides if its fraction is near enough.
    """
    seen = {} if seen is None else seen

    def best() -> RoleBiasMatch:
        # Of role biases that are as close, the one that meddles least.
        role_bias = min(seen, key=lambda role_bias: (abs(seen[role_bias] - budget), abs(role_bias)))
        return RoleBiasMatch(role_bias, seen[role_bias])

    for number in range(_MAX_EVALUATIONS):
        if seen and abs(best().kv_fraction - budget) <= _CLOSE_ENOUGH * budget:
            break
        role_bias = _next_role_bias(seen, budget, halve=number % 2 == 1)
        if role_bias is None:
            break
        seen[role_bias] = kv_fraction_at(role_bias)
    return best()


def _next_role_bias(seen: dict[float, float], budget: float, *, halve: bool) -> float | None:
    """Returns the role bias to measure next; None when nothing is left to measure."""
    if not seen:
        return 0.0
    role_biases = sorted(seen)
    around = [(a, b) for a, b in itertools.pairwise(role_biases) if (seen[a] - budget) * (seen[b] - budget) < 0]
    if not around:
        return _next_outside(seen, budget)
    around = [(a, b) for a, b in around if b - a > 1.5 * _ROLE_BIAS_STEP]
    if not around:
        return None  # a jump across the budget
    a, b = min(around, key=lambda pair: abs(seen[pair[0]] - seen[pair[1]]))
    part = 0.5
    if not halve and min(seen[a], seen[b]) > 0:  # fractions are about exponential in the role bias
        part = math.log(budget / seen[a]) / math.log(seen[b] / seen[a])
    role_bias = round((a + part * (b - a)) / _ROLE_BIAS_STEP) * _ROLE_BIAS_STEP
    return round(min(max(role_bias, a + _ROLE_BIAS_STEP), b - _ROLE_BIAS_STEP), 6)


def _next_outside(seen: dict[float, float], budget: float) -> float | None:
    """Returns a role bias beyond all that were measured: where the KV is expected to be nearer, then the other way."""
    upward = min(2 * max(seen), _MAX_ROLE_BIAS) if max(seen) > 0 else 1.0
    downward = max(2 * min(seen), -_MAX_ROLE_BIAS) if min(seen) < 0 else -1.0
    expected = (upward, downward) if budget > max(seen.values()) else (downward, upward)
    return next((role_bias for role_bias in expected if role_bias not in seen), None)
