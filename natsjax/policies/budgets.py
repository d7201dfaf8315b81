"""Budgets that are measured, and the numbers of each policy that meet one: by counting, a role bias by search.

A KV budget is a KV fraction (docs/method.md 4): live key-query pairs over causal ones, mean over all layers. What
functions here take:

* ``pieces``, ``piece_lengths``: int ``[num_pieces]``, tokens in each document piece, at least one piece.
* ``layers``: the window of each layer of the pattern (``layer_windows``), or those of its KV heads; None for a layer
  that has none. A "sliding" layer never reads more than its own window, whatever the policy.
* ``name``: what a message calls a budget.

``sliding_window``, ``streaming_llm``, ``random_keys``, ``head_keys``, ``prompt_keys`` and ``selective`` are what
``natsjax.policies.registry`` points to. Numpy only: what needs jax is imported where it is used.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from natsjax import kv_fraction
from natsjax.config import Config, ModelConfig
from natsjax.config_fields import format_value
from natsjax.errors import UserError

NUM_BUDGETS = 6
"""Fewest budgets that are measured, unless others are asked for."""

_NATS_FACTORS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)  # of kv_budget
_SPARE_FACTORS = (0.7, 0.9, 1.4, 0.5, 2.5, 0.4, 3.2)  # where the window, or 1, rules some of them out
_DENSE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)

_MAX_ROLE_BIAS = 32.0  # logits are of order 1 to 10: beyond it the role bias alone decides
_ROLE_BIAS_STEP = 1e-3  # role biases are multiples of it, so that one read from a table is the one that was measured
_CLOSE_ENOUGH = 0.01  # of the budget
_MAX_EVALUATIONS = 20  # for one budget

_FEWEST_KEYS = 2
"""Fewest keys of a head, for a policy that keeps some for being recent and some for being read."""

_MOST_CONTINUED = 0.5
"""Tokens behind a prompt that is cut down once, as a fraction of the keys that a query reads: all of them are kept, and
more of them would leave it nothing to choose. On average they take half as many keys."""

Layers = Sequence[int | tuple[int, ...] | None]
UNLIMITED: Layers = (None,)
"""Layers that read whatever the policy leaves."""


def layer_windows(model: ModelConfig) -> Layers:
    """Returns the windows of the layers' own, by place in the pattern."""
    return [model.sliding_window if kind == "sliding" else None for kind in model.layer_types]


# --- which budgets ---


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


# --- numbers of a policy, by counting ---


def interval_fractions(piece_lengths: np.ndarray, num_sinks: int, layers: Layers = UNLIMITED) -> np.ndarray:
    """Returns the KV fraction of a sliding window behind ``num_sinks`` tokens of each piece that live to its end.

    Returns:
      float64 ``[longest]``, by window 0, 1, …; it never falls, and the last one is full attention's: 1 without windows
      of the layers' own.
    """
    windows = np.arange(np.max(piece_lengths))
    by_layer = [
        kv_fraction.window_fraction(piece_lengths, windows, num_sinks=num_sinks, own_window=own) for own in layers
    ]
    return np.mean(by_layer, axis=0)


def window_for_budget(
    piece_lengths: np.ndarray, budget: float, *, num_sinks: int = 0, layers: Layers = UNLIMITED
) -> int | None:
    """Returns the window whose KV fraction beside the sinks is closest to a budget; exact, no model pass.

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
    """Returns the fraction of keys that ``RandomKeys`` keeps to meet a budget, and its window.

    Args:
      piece_lengths: see the module.
      budget: KV fraction.
      window: tokens, where the budget leaves as much; else 0.
      layers: see the module.
      draws: int ``[k, longest]``, ``RandomKeys.draws`` of the heads at each position of the longest piece: the result
        is then the fraction whose KV fraction with these draws is closest. None: the fraction that meets the budget on
        average over all draws; those of a short piece and a few heads can be some percent of the KV off.

    Returns:
      ``(fraction, window)``; the fraction is None where the first keys and each query's own take more, or the layers'
      own windows leave less.
    """
    fractions = interval_fractions(piece_lengths, 1, layers)
    window = min(window, len(fractions) - 1)
    window = window if fractions[window] < budget else 0
    rest = fractions[-1] - fractions[window]
    if not fractions[window] <= budget <= fractions[-1] or rest == 0:
        return None, window
    if draws is not None:
        return _fraction_of_samples(piece_lengths, budget, window, layers, draws), window
    return float((budget - fractions[window]) / rest), window


def _fraction_of_samples(lengths: np.ndarray, budget: float, window: int, layers: Layers, draws: np.ndarray) -> float:
    """Returns the fraction that keeps the draws below it, as many as come closest to the budget."""
    from natsjax.policies.interval import RANDOM_DRAWS

    lengths = np.asarray(lengths, np.int64)
    longest = draws.shape[1]
    longer = np.cumsum(np.bincount(lengths, minlength=longest + 1)[::-1])[::-1]  # [r]: pieces of at least r tokens
    queries = np.append(np.cumsum(longer[:0:-1])[::-1], 0)  # [s]: that can read the key at s, over all pieces

    def read_within(window):  # a key of its window: those but the ones behind it
        index = np.arange(longest)
        return queries[index] - queries[np.minimum(index + window + 1, longest)]

    heads = len(draws)
    own = [np.broadcast_to(limits, heads) for limits in _own_windows(layers, longest)]  # [l][k]
    kept, other = (
        np.mean([[read_within(min(limit, most)) for limit in of_layer] for of_layer in own], axis=0)  # [k, s]
        for most in (longest, window)
    )
    gained = kept - other
    first = gained[:, 0].sum()
    gained[:, 0] = 0  # the first key is kept anyway
    order = np.argsort(draws, axis=None, kind="stable")
    pairs = other.sum() + first + np.append(0, np.cumsum(gained.reshape(-1)[order]))
    fractions = pairs / heads / np.sum(lengths * (lengths + 1) // 2)
    number = int(np.argmin(np.abs(fractions - budget)))
    return float(np.append(draws.reshape(-1)[order], RANDOM_DRAWS)[number]) / RANDOM_DRAWS


def keys_for_budget(piece_lengths: np.ndarray, budget: float, chunk: int, layers: Layers = UNLIMITED) -> int | None:
    """Returns the number of keys of a head that a policy with a fixed number may keep to meet a budget.

    A query reads what was kept of the tokens before its chunk, and the chunk's keys up to its own. In a layer with a
    window of its own it is taken to read as many of these as the window holds: what runs out of a chunk's kept keys
    counts as if others had been kept, so a little less can come of it.

    Args:
      piece_lengths: see the module.
      budget: KV fraction.
      chunk: tokens of which all keys are kept: 1 where a policy evicts after every token, else what follows a prompt.
      layers: see the module.

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
    for of_layer in _own_windows(layers, longest):
        for window in of_layer:
            read = np.minimum(index - begin, window) + 1  # the chunk's keys
            earlier = np.minimum(begin, np.maximum(window - (index - begin), 0))  # that the window holds
            # A number of kept keys gives min(number, earlier) of them: one for every u <= number with earlier >= u.
            with_earlier = np.bincount(earlier, weights=queries, minlength=longest + 1)
            kept = np.append(0, np.cumsum(np.cumsum(with_earlier[::-1])[::-1][1:]))
            pairs += (np.sum(queries * read) + kept) / len(of_layer)
    fractions = pairs / len(layers) / np.sum(lengths * (lengths + 1) // 2)
    return int(np.argmin(np.abs(fractions - budget))) if fractions[0] <= budget <= fractions[-1] else None


def _own_windows(layers: Layers, longest: int) -> list[np.ndarray]:
    """Returns the windows of each layer's KV heads, int ``[k]`` or ``[1]`` for all; ``longest`` where it has none."""
    return [np.atleast_1d(longest if own is None else own) for own in layers]


# --- numbers of a policy, as the registry gets them ---


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text and the layers that a policy's numbers are found for.

    Attributes:
      config: of the run; ``eval.num_sinks``, ``nats.window(s)`` and ``train.seed`` are numbers of policies too.
      piece_lengths, layers: see the module.
      chunk: tokens that are decoded at once; None: with masks.
    """

    config: Config
    piece_lengths: np.ndarray
    layers: Layers = UNLIMITED
    chunk: int | None = None


class PolicyNumbers(NamedTuple):
    """Numbers of a policy.

    Attributes:
      arguments: of ``PolicyEntry.make``, in its order.
      continued: the most tokens that may follow a prompt, for a policy that cuts prompts down; None: any.
    """

    arguments: tuple[int | float, ...]
    continued: int | None = None


class OutOfReachError(Exception):
    """A policy has no numbers for a budget; the text is the reason, without a period."""


_OWN_KEY = "each query's own key takes more"


def sliding_window(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the window.

    Raises:
      OutOfReachError: no window is as small.
    """
    window = window_for_budget(calibration.piece_lengths, budget, layers=calibration.layers)
    if window is None:
        raise OutOfReachError(_OWN_KEY)
    return PolicyNumbers((window,))


def streaming_llm(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns ``eval.num_sinks`` and the window.

    Raises:
      OutOfReachError: the sinks take more.
    """
    num_sinks = calibration.config.eval.num_sinks
    window = window_for_budget(calibration.piece_lengths, budget, num_sinks=num_sinks, layers=calibration.layers)
    if window is None:
        raise OutOfReachError(f"its {num_sinks} sinks and each query's own key take more")
    return PolicyNumbers((num_sinks, window))


def random_keys(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the fraction of keys, the shortest window of SLIDING keys where there is that much, and ``train.seed``.

    Raises:
      OutOfReachError: the first keys take more.
    """
    import jax.numpy as jnp

    from natsjax.policies.interval import RandomKeys

    config, pieces = calibration.config, calibration.piece_lengths
    seed = config.train.seed
    positions = jnp.arange(np.max(pieces), dtype=jnp.int32)[None]
    draws = np.asarray(RandomKeys(0.0, seed=seed).samples(positions, config.model.num_kv_heads))[0]
    fraction, window = fraction_for_budget(pieces, budget, config.nats.sliding_windows[0], calibration.layers, draws)
    if fraction is None:
        raise OutOfReachError("the first keys and each query's own key take more")
    return PolicyNumbers((fraction, window, seed))


def head_keys(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the number of keys that a head keeps after every token.

    Raises:
      OutOfReachError: fewer than two are left.
    """
    num_keys = keys_for_budget(calibration.piece_lengths, budget, 1, calibration.layers)
    if num_keys is None or num_keys < _FEWEST_KEYS:
        raise OutOfReachError(_OWN_KEY)
    return PolicyNumbers((num_keys,))


def prompt_keys(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the number of keys that a head keeps of a prompt, the observation window, and how many tokens follow.

    Raises:
      OutOfReachError: fewer than two keys are left.
    """
    pieces = calibration.piece_lengths
    mean_context = np.sum(pieces * (pieces + 1) / 2) / np.sum(pieces)
    continued = int(np.clip(_MOST_CONTINUED * budget * mean_context, 1, calibration.chunk))
    num_keys = keys_for_budget(pieces, budget, continued, calibration.layers)
    if num_keys is None or num_keys < _FEWEST_KEYS:
        raise OutOfReachError("what follows its prompts takes more")
    return PolicyNumbers((num_keys, min(32, num_keys // 2)), continued)


def selective(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the number of keys that the "selective" layers keep.

    Raises:
      OutOfReachError: the other layers and each query's own key take more, or the others' windows leave less.
    """
    pieces, model = calibration.piece_lengths, calibration.config.model
    # A query finds as many keys as in a window of that many tokens, whichever they are.
    numbers = np.arange(1, max(2, np.max(pieces)))
    kept = kv_fraction.window_fraction(pieces, numbers)
    windows = zip(model.layer_types, layer_windows(model), strict=True)
    layers = [
        kept if kind == "selective" else 1.0 if own is None else kv_fraction.window_fraction(pieces, own)
        for kind, own in windows
    ]
    fractions = np.mean(np.stack([np.broadcast_to(layer, kept.shape) for layer in layers]), axis=0)
    if budget < fractions[0]:
        raise OutOfReachError("one key, each query's own and the other layers take more")
    if budget > fractions[-1]:
        raise OutOfReachError("the windows of the other layers leave less")
    return PolicyNumbers((int(numbers[np.argmin(np.abs(fractions - budget))]),))


# --- role biases, by search ---


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
