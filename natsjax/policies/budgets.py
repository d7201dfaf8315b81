"""Which budgets to measure, and the setting of each policy that meets a budget: a role bias by search, a window by
counting.

A KV budget is a KV fraction (docs/method.md 4): live key-query pairs over causal ones, mean over all layers. A "sliding"
layer never reads more than its own window, whatever the policy: where functions here take ``layers``, that is the
window of each layer of the pattern (``layer_windows``), None for a layer that has none.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from natsjax.config import Config, ModelConfig
from natsjax.errors import UserError
from natsjax.kv_fraction import smallest_model_kv_fraction
from natsjax.policies.interval import RANDOM_DRAWS

NUM_BUDGETS = 6
"""How many budgets are measured at least, unless somebody asks for others."""

_NATS_FACTORS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)  # of kv_budget
_SPARE_FACTORS = (0.7, 0.9, 1.4, 0.5, 2.5, 0.4, 3.2)  # where the window, or 1, rules some of them out
_DENSE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)

_MAX_ROLE_BIAS = 32.0  # logits are of order 1 to 10: beyond it the role bias alone decides
_ROLE_BIAS_STEP = (
    1e-3  # role biases are multiples of it, so that a role bias read from a table is the role bias that was measured
)
_CLOSE_ENOUGH = 0.01  # of the budget
_MAX_EVALUATIONS = 20  # for one budget


class RoleBiasMatch(NamedTuple):
    """The role bias closest to a budget, and the KV fraction that it gave."""

    role_bias: float
    kv_fraction: float


Layers = Sequence[int | None]
UNLIMITED: Layers = (None,)
"""Layers that read whatever the policy leaves."""


def layer_windows(model: ModelConfig) -> Layers:
    """The windows of the layers' own, by place in the pattern."""
    return [model.sliding_window if kind == "sliding" else None for kind in model.layer_types]


def nats_budgets(kv_budget: float, smallest: float) -> list[float]:
    """Budgets around ``kv_budget``, ascending: 0.6 to 2 times it, as far as they lie between ``smallest`` and 1.

    ``kv_budget`` itself is always among them.

    Args:
      kv_budget: the budget that the model was trained to.
      smallest: the smallest KV fraction possible.
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
    """Budgets for a model that was trained to none, ascending, from ``smallest`` to ``largest``."""
    return [budget for budget in _DENSE_BUDGETS if smallest <= budget <= largest]


def check_budgets(budgets: Sequence[float], smallest: float, why: str) -> list[float]:
    """The budgets that somebody asked for, ascending and without repetition.

    Args:
      budgets: KV fractions.
      smallest: the smallest KV fraction possible.
      why: what makes it the smallest, for the message.

    Raises:
      UserError: one is not in (0, 1], or below the smallest.
    """
    for budget in budgets:
        if not 0 < budget <= 1:  # also when it is nan
            raise UserError(f"the KV budget {budget:g} is not a fraction of the KV; it must lie above 0 and up to 1.")
        if budget < smallest:
            raise UserError(
                f"the KV budget {budget:g} cannot be reached: {why} the smallest possible is {smallest:.4f}."
            )
    return sorted(set(budgets))


def interval_fractions(piece_lengths: np.ndarray, num_sinks: int, layers: Layers = UNLIMITED) -> np.ndarray:
    """KV fraction of sinks and a sliding window, for every window.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      num_sinks: first tokens of each piece that live to its end.
      layers: windows of the layers' own.

    Returns:
      float64 ``[longest]``, by window 0, 1, …; it never falls, and the last one is full attention's: 1 without windows
      of the layers' own.
    """
    lengths = np.asarray(piece_lengths, np.int64)
    longest = int(lengths.max())
    counts = np.bincount(lengths, minlength=longest + 1)
    # A key r - 1 tokens before its document's end can be read by r queries. Each piece with room for it has one such
    # key behind its sinks for every r up to length - num_sinks.
    longer = np.append(np.cumsum(counts[::-1])[::-1], 0)  # [r]: pieces of at least r tokens
    with_r_queries = np.zeros(longest + 2, np.int64)
    behind_sinks = longer[num_sinks + 1 : longest + 1]
    with_r_queries[1 : 1 + len(behind_sinks)] = behind_sinks
    # Window w gives min(w + 1, r) of them: one for every u <= w + 1 with r >= u.
    gained = np.cumsum(with_r_queries[::-1])[::-1][1 : longest + 1]
    others = np.cumsum(gained)  # pairs of the keys behind the sinks, by window
    by_layer = []
    for own in layers:
        last = longest - 1 if own is None else min(own, longest - 1)
        sinks = sum(np.sum(np.clip(lengths - s, 0, last + 1)) for s in range(min(num_sinks, longest)))
        by_layer.append(sinks + others[np.minimum(np.arange(longest), last)])
    return np.mean(by_layer, axis=0) / np.sum(lengths * (lengths + 1) // 2)


def wanted_budgets(config: Config, asked: Sequence[float] | None, pieces: np.ndarray) -> list[float]:
    """KV fractions to measure, ascending; for a NAtS run ``nats.kv_budget`` is among them.

    Args:
      config: of the run; ``eval.budgets`` are asked for where ``asked`` is None, and where that is empty, a range.
      asked: KV fractions that somebody asked for.
      pieces: int ``[num_pieces]``, tokens in each document piece, at least one piece.

    Raises:
      UserError: somebody asked for one that cannot be.
    """
    asked = config.eval.budgets if asked is None else asked
    if config.model.has_roles:
        smallest = smallest_model_kv_fraction(config, pieces)
        why = f"with nats.window = {config.nats.window} and data.context_length = {config.data.context_length}"
        if len(config.model.layer_types) > 1:
            why = f"with model.layer_types = {config.model.layer_pattern}, {why.removeprefix('with ')}"
        if asked:
            return sorted({config.nats.kv_budget, *check_budgets(asked, smallest, why)})
        return nats_budgets(config.nats.kv_budget, smallest)
    fractions = interval_fractions(pieces, 0, layer_windows(config.model))
    smallest = float(fractions[0])
    if asked:
        return check_budgets(asked, smallest, f"with data.context_length = {config.data.context_length}")
    return dense_budgets(smallest, float(fractions[-1]))


def window_for_budget(
    piece_lengths: np.ndarray, budget: float, *, num_sinks: int = 0, layers: Layers = UNLIMITED
) -> int | None:
    """The window whose KV fraction is closest to a budget; exact, no model pass.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      budget: KV fraction.
      num_sinks: first tokens of each document that are kept besides.
      layers: windows of the layers' own.

    Returns:
      Tokens; the smaller one of two that are as close. None when window 0 already exceeds the budget (the sinks, and
      each query's own key), or when the layers' own windows leave less.
    """
    fractions = interval_fractions(piece_lengths, num_sinks, layers)
    if not fractions[0] <= budget <= fractions[-1]:
        return None
    return int(np.argmin(np.abs(fractions - budget)))


def fraction_for_budget(
    piece_lengths: np.ndarray,
    budget: float,
    window: int,
    layers: Layers = UNLIMITED,
    draws: np.ndarray | None = None,
) -> tuple[float | None, int]:
    """The share of keys that ``RandomKeys`` keeps to meet a budget, and its window.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      budget: KV fraction.
      window: tokens, wherever the budget has room for it; else 0.
      layers: windows of the layers' own.
      draws: int ``[k, longest]``, ``RandomKeys.draws`` of the heads at each position of the longest piece: the share
        then is the one whose KV fraction with these draws is closest. None: a share that meets the budget on average
        over all draws; those of a short piece and a few heads can be some percent of the KV off.

    Returns:
      ``(share, window)``; the share is None where the first keys and each query's own take more, or the layers' own
      windows leave less.
    """
    fractions = interval_fractions(piece_lengths, 1, layers)
    window = min(window, len(fractions) - 1)
    window = window if fractions[window] < budget else 0
    rest = fractions[-1] - fractions[window]
    if not fractions[window] <= budget <= fractions[-1] or rest == 0:
        return None, window
    share = float((budget - fractions[window]) / rest)
    return share if draws is None else _fraction_of_samples(piece_lengths, budget, window, layers, draws), window


def _fraction_of_samples(lengths: np.ndarray, budget: float, window: int, layers: Layers, draws: np.ndarray) -> float:
    """The share that keeps the draws below it, as many as come closest to the budget."""
    lengths = np.asarray(lengths, np.int64)
    longest = draws.shape[1]
    longer = np.cumsum(np.bincount(lengths, minlength=longest + 1)[::-1])[::-1]  # [r]: pieces of at least r tokens
    queries = np.append(np.cumsum(longer[:0:-1])[::-1], 0)  # [s]: that can read the key at s, over all pieces

    def read_within(window):  # a key of its window: those but the ones behind it
        index = np.arange(longest)
        return queries[index] - queries[np.minimum(index + window + 1, longest)]

    own = [longest if limit is None else limit for limit in layers]
    kept = np.mean([read_within(limit) for limit in own], axis=0)
    other = np.mean([read_within(min(limit, window)) for limit in own], axis=0)
    gained = np.broadcast_to(kept - other, draws.shape).copy()
    gained[:, 0] = 0  # the first key is kept anyway
    order = np.argsort(draws, axis=None, kind="stable")
    pairs = len(draws) * (other.sum() + kept[0] - other[0]) + np.append(0, np.cumsum(gained.reshape(-1)[order]))
    fractions = pairs / len(draws) / np.sum(lengths * (lengths + 1) // 2)
    number = int(np.argmin(np.abs(fractions - budget)))
    return float(np.append(draws.reshape(-1)[order], RANDOM_DRAWS)[number]) / RANDOM_DRAWS


def keys_for_budget(piece_lengths: np.ndarray, budget: float, chunk: int, layers: Layers = UNLIMITED) -> int | None:
    """How many keys of a head a policy that observes may keep to meet a budget.

    A query reads what was kept of the tokens before its chunk, and the chunk's keys up to its own. In a layer with a
    window of its own it is taken to read as many of these as the window holds: what runs out of a chunk's kept keys
    counts as if others had been kept, so a little less can come of it.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      budget: KV fraction.
      chunk: tokens of which all keys are kept: 1 where a policy evicts after every token, else what follows a prompt.
      layers: windows of the layers' own.

    Returns:
      The number whose KV fraction is closest; None where the chunks alone take more, or the layers' own windows leave
      less.
    """
    lengths = np.asarray(piece_lengths, np.int64)
    longest = int(lengths.max())
    index = np.arange(longest)
    begin = index // chunk * chunk  # of the chunk that a query lies in
    queries = len(lengths) - np.searchsorted(np.sort(lengths), index, side="right")  # pieces that have one at the index
    pairs = np.zeros(longest + 1)
    for own in layers:
        window = longest if own is None else own
        pairs += np.sum(queries * np.minimum(index - begin, window)) + np.sum(queries)  # the chunk's keys
        earlier = np.minimum(begin, np.maximum(window - (index - begin), 0))  # that the window holds
        # A number of kept keys gives min(number, earlier) of them: one for every u <= number with earlier >= u.
        with_earlier = np.bincount(earlier, weights=queries, minlength=longest + 1)
        pairs[1:] += np.cumsum(np.cumsum(with_earlier[::-1])[::-1][1:])
    fractions = pairs / len(layers) / np.sum(lengths * (lengths + 1) // 2)
    return int(np.argmin(np.abs(fractions - budget))) if fractions[0] <= budget <= fractions[-1] else None


def role_bias_for_budget(
    kv_fraction_at: Callable[[float], float], budget: float, seen: dict[float, float] | None = None
) -> RoleBiasMatch:
    """The role bias whose KV fraction is closest to a budget, among those that the search looks at.

    The fraction is a step function of the role bias and need not rise with it, so nothing is assumed but that two role
    biases whose fractions lie on both sides of the budget are worth looking between. At most 20 evaluations.

    Args:
      kv_fraction_at: KV fraction under a role bias.
      budget: KV fraction.
      seen: fractions by role bias that are known already; what is found is added, so that the next budget costs less.

    Returns:
      The best role bias; whether its fraction is near enough is for the caller to say.
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
    """Where to look next; None when there is nothing left to look at."""
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
    share = 0.5
    if not halve and min(seen[a], seen[b]) > 0:  # fractions are about exponential in the role bias
        share = math.log(budget / seen[a]) / math.log(seen[b] / seen[a])
    role_bias = round((a + share * (b - a)) / _ROLE_BIAS_STEP) * _ROLE_BIAS_STEP
    return round(min(max(role_bias, a + _ROLE_BIAS_STEP), b - _ROLE_BIAS_STEP), 6)


def _next_outside(seen: dict[float, float], budget: float) -> float | None:
    """Farther out than anything seen: first where more (or less) KV is to be expected, then on the other side."""
    upward = min(2 * max(seen), _MAX_ROLE_BIAS) if max(seen) > 0 else 1.0
    downward = max(2 * min(seen), -_MAX_ROLE_BIAS) if min(seen) < 0 else -1.0
    expected = (upward, downward) if budget > max(seen.values()) else (downward, upward)
    return next((role_bias for role_bias in expected if role_bias not in seen), None)
