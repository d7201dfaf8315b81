"""Numbers of each policy that meet a KV budget, by counting live pairs: exact, without a pass of the model.

What functions here take:

* ``piece_lengths``: int ``[num_pieces]``, tokens in each document piece, at least one piece.
* ``budget``: KV fraction.
* ``layers``: the window of each layer of the pattern (``layer_windows``), or those of its KV heads; None for a layer
  that has none. A "sliding" layer never reads more than its own window, whatever the policy.

``sliding_window``, ``streaming_llm``, ``random_keys``, ``head_keys``, ``prompt_keys`` and ``selective`` are what
``natsjax.policies.registry`` points to. Numpy only: what needs jax is imported where it is used.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from natsjax import kv_fraction
from natsjax.config import Config, ModelConfig

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


# --- what the registry points to ---


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


_OWN_KEY = "each query's own key"


def sliding_window(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the window.

    Raises:
      OutOfReachError: no window is as small.
    """
    return PolicyNumbers((window_for_budget(calibration.piece_lengths, budget, layers=calibration.layers),))


def streaming_llm(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns ``eval.num_sinks`` and the window.

    Raises:
      OutOfReachError: the sinks take more.
    """
    num_sinks, pieces = calibration.config.eval.num_sinks, calibration.piece_lengths
    window = window_for_budget(pieces, budget, num_sinks=num_sinks, layers=calibration.layers)
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
    return PolicyNumbers((fraction, window, seed))


def head_keys(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the number of keys that a head keeps after every token.

    Raises:
      OutOfReachError: fewer than two are left.
    """
    return PolicyNumbers((_several_keys(calibration, budget, 1),))


def prompt_keys(calibration: Calibration, budget: float) -> PolicyNumbers:
    """Returns the number of keys that a head keeps of a prompt, the observation window, and how many tokens follow.

    Raises:
      OutOfReachError: fewer than two keys are left.
    """
    pieces = calibration.piece_lengths
    mean_context = np.sum(pieces * (pieces + 1) / 2) / np.sum(pieces)
    continued = int(np.clip(_MOST_CONTINUED * budget * mean_context, 1, calibration.chunk))
    num_keys = _several_keys(calibration, budget, continued)
    return PolicyNumbers((num_keys, min(32, num_keys // 2)), continued)


def _several_keys(calibration: Calibration, budget: float, chunk: int) -> int:
    """Returns ``keys_for_budget`` where these are several."""
    num_keys = keys_for_budget(calibration.piece_lengths, budget, chunk, calibration.layers)
    if num_keys < _FEWEST_KEYS:
        raise OutOfReachError(_of_chunk(chunk))
    return num_keys


def _of_chunk(chunk: int) -> str:
    """Returns the reason why a head keeps no key beside those of the chunk."""
    return f"{_OWN_KEY} takes more" if chunk == 1 else "what follows its prompts takes more"


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
    by_layer = [
        kept if kind == "selective" else 1.0 if own is None else kv_fraction.window_fraction(pieces, own)
        for kind, own in windows
    ]
    fractions = np.mean(np.broadcast_arrays(*by_layer), axis=0)
    number = numbers[_closest(fractions, budget, "one key, each query's own and the other layers take more")]
    return PolicyNumbers((int(number),))


# --- counting ---


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


def _check_reach(fractions: np.ndarray, budget: float, more: str) -> None:
    """Checks that a budget is between the first and the last of the fractions, which ascend.

    Args:
      fractions: float64 ``[n]``, of a policy by its number.
      budget: KV fraction.
      more: the reason why the first one is no smaller.

    Raises:
      OutOfReachError: it is not.
    """
    if budget < fractions[0]:
        raise OutOfReachError(more)
    if budget > fractions[-1]:
        raise OutOfReachError("the windows of the model's own layers leave less")


def _closest(fractions: np.ndarray, budget: float, more: str) -> int:
    """Returns the index of the fraction closest to a budget, the first of those that are as close; see above."""
    _check_reach(fractions, budget, more)
    return int(np.argmin(np.abs(fractions - budget)))


def window_for_budget(
    piece_lengths: np.ndarray, budget: float, *, num_sinks: int = 0, layers: Layers = UNLIMITED
) -> int:
    """Returns the window, in tokens, whose KV fraction beside the sinks is closest to a budget.

    Raises:
      OutOfReachError: window 0 already exceeds the budget, or the layers' own windows leave less.
    """
    more = f"its {num_sinks} sinks and {_OWN_KEY} take more" if num_sinks else f"{_OWN_KEY} takes more"
    return _closest(interval_fractions(piece_lengths, num_sinks, layers), budget, more)


def fraction_for_budget(
    piece_lengths: np.ndarray,
    budget: float,
    window: int,
    layers: Layers = UNLIMITED,
    draws: np.ndarray | None = None,
) -> tuple[float, int]:
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
      ``(fraction, window)``.

    Raises:
      OutOfReachError: the first keys and each query's own take more, or the layers' own windows leave less.
    """
    fractions = interval_fractions(piece_lengths, 1, layers)
    window = min(window, len(fractions) - 1)
    window = window if fractions[window] < budget else 0
    _check_reach(fractions, budget, f"the first keys and {_OWN_KEY} take more")
    if draws is not None:
        return _fraction_of_samples(piece_lengths, budget, window, layers, draws), window
    rest = fractions[-1] - fractions[window]
    return float((budget - fractions[window]) / rest) if rest else 0.0, window


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


def keys_for_budget(piece_lengths: np.ndarray, budget: float, chunk: int, layers: Layers = UNLIMITED) -> int:
    """Returns the number of keys of a head that a policy with a fixed number may keep to meet a budget.

    A query reads what was kept of the tokens before its chunk, and the chunk's keys up to its own. In a layer with a
    window of its own it is taken to read as many of these as the window holds: what runs out of a chunk's kept keys
    counts as if others had been kept, so a little less can come of it.

    Args:
      piece_lengths: see the module.
      budget: KV fraction.
      chunk: tokens of which all keys are kept: 1 where a policy evicts after every token, else what follows a prompt.
      layers: see the module.

    Raises:
      OutOfReachError: the chunks alone take more, or the layers' own windows leave less.
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
    return _closest(fractions, budget, _of_chunk(chunk))


def _own_windows(layers: Layers, longest: int) -> list[np.ndarray]:
    """Returns the windows of each layer's KV heads, int ``[k]`` or ``[1]`` for all; ``longest`` where it has none."""
    return [np.atleast_1d(longest if own is None else own) for own in layers]
