"""KV fractions from lengths and windows alone, and perplexity: the one place of each formula.

``docs/method.md`` 4 defines them. Host-side, numpy only.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from natsjax.config import ROLE_LAYER_TYPES, Config

START = 0.5
"""Fraction of the way from all tokens SLIDING to the budget, at which roles begin unless they are given."""

FEWEST = 0.005
"""The smallest fraction of a role at step 0, unless it is given."""


def window_pairs(piece_lengths: npt.ArrayLike, window: npt.ArrayLike) -> np.ndarray:
    """Counts the key-query pairs of a sliding window, over all document pieces.

    A query at position ``t`` reads ``min(t, window) + 1`` keys: its own and the ``window`` keys before it.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      window: int, any shape, tokens; a window as long as the longest piece is full attention.

    Returns:
      int64, in the shape of ``window``.
    """
    lengths = np.asarray(piece_lengths, np.int64)
    from_position = np.cumsum(_queries(lengths)[::-1])[::-1]  # [x]: queries at position x or later
    # A query reads one key for every x from 0 to the window that is not beyond its position.
    return np.cumsum(from_position)[np.minimum(window, len(from_position) - 1)]


def window_fraction(
    piece_lengths: npt.ArrayLike, window: npt.ArrayLike, *, num_sinks: int = 0, own_window: npt.ArrayLike | None = None
) -> np.ndarray:
    """Returns the KV fraction of a layer under a sliding window, with or without sinks.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      window: int, any shape, tokens.
      num_sinks: first tokens of each piece that live to its end.
      own_window: tokens that the layer reads at most, whatever lives; None: no limit. With a number for each KV head,
        int ``[k]``, the result is the mean over heads.

    Returns:
      float64, in the shape of ``window``.
    """
    longest = int(np.max(piece_lengths))
    own_windows = np.atleast_1d(longest if own_window is None else own_window)

    def pairs(tokens: npt.ArrayLike) -> np.ndarray:
        return window_pairs(piece_lengths, tokens)

    # Sinks and a window hold as many keys for a query as a window that is longer by the sinks. A window of the layer's
    # own takes the sinks behind it away again.
    read = [pairs(num_sinks + np.minimum(window, own)) - pairs(num_sinks + own) + pairs(own) for own in own_windows]
    return np.mean(read, axis=0) / pairs(longest)


def all_sliding_kv_fraction(piece_lengths: npt.ArrayLike, window: int) -> float:
    """Returns the KV fraction when every token is SLIDING but the first of each document, which is GLOBAL.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      window: ``nats.window``, tokens.
    """
    return float(window_fraction(piece_lengths, window, num_sinks=1))


def random_kv_fraction(piece_lengths: npt.ArrayLike, windows: Sequence[int], fractions: Sequence[float]) -> float:
    """Returns the expected KV fraction of roles that are drawn at random, the first of each document GLOBAL.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      windows: ``nats.sliding_windows``, tokens.
      fractions: of GLOBAL, LOCAL, and SLIDING for each window.
    """
    lengths = np.asarray(piece_lengths, np.int64)
    is_global, is_local, *is_sliding = fractions
    behind = np.arange(int(lengths.max()))  # queries behind a key's own, up to the end of the document
    # A LOCAL key is read by a later query if no token in between is GLOBAL.
    local = np.concatenate([[0], np.cumsum((1.0 - is_global) ** behind)])[:-1]
    lifetime = 1 + is_global * behind + is_local * local
    lifetime += sum(fraction * np.minimum(behind, x) for fraction, x in zip(is_sliding, windows, strict=True))
    pairs = np.concatenate([[0], np.cumsum(lifetime)])[lengths - 1] + lengths  # of a first token, which is GLOBAL
    return float(np.sum(pairs) / window_pairs(lengths, int(lengths.max())))


def roles_at_start(config: Config) -> tuple[float, ...]:
    """Returns the fractions of all roles that a run begins with: ``nats.initial_roles``, or found.

    In layers without LOCAL keys that role has the fraction 0, whether or not it was given one.

    Nearly all tokens begin as SLIDING with the longest window that the budget of step 0 has room for, so that a run
    begins as a plain window of about its KV; of every other role there are as many. Drawn at random in a document as
    long as the context, they keep ``START`` of the way from that window alone to the budget, which under a ramp is 1.
    There are at least ``FEWEST`` of each, for what is never drawn cannot be learned, and at most as many of each.
    """
    nats, lengths = config.nats, [config.data.context_length]
    if nats.initial_roles and config.model.learns_without_local:
        is_global, is_sliding = nats.initial_roles[0], nats.initial_roles[-1]
        return is_global / (is_global + is_sliding), 0.0, is_sliding / (is_global + is_sliding)
    if nats.initial_roles:
        return nats.initial_roles
    ramp = bool(nats.budget_ramp_start or nats.budget_ramp_steps)
    budget = 1.0 if ramp else nats.kv_budget
    windows = nats.sliding_windows

    def fractions(few: float, base: int) -> tuple[float, ...]:
        found = [few] * nats.num_roles
        if config.model.learns_without_local:
            found[1] = 0.0
        found[2 + base] = 0.0
        found[2 + base] = 1 - sum(found)
        return tuple(found)

    def cost(few: float, base: int) -> float:
        return _mean_over_layers(config, lengths, random_kv_fraction(lengths, windows, fractions(few, base)))

    # Under a ramp every window fits, but the run is to end at its own budget.
    base = max([x for x in range(len(windows)) if cost(FEWEST, x) <= nats.kv_budget], default=0)
    alone = _mean_over_layers(config, lengths, all_sliding_kv_fraction(lengths, windows[base]))
    target = alone + START * (budget - alone)
    few, many = FEWEST, 1 / sum(fraction > 0 for fraction in fractions(FEWEST, base))
    for _ in range(30 if target > alone else 0):
        middle = (few + many) / 2
        few, many = (middle, many) if cost(middle, base) < target else (few, middle)
    return fractions(few, base)


def least_kv_fraction(piece_lengths: npt.ArrayLike, window: int) -> float:
    """Returns the smallest KV fraction that any roles give: no model goes below it.

    Where the window is wide for the documents it is less than ``all_sliding_kv_fraction``, for a GLOBAL token ends the
    LOCAL keys before it sooner than the window does.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
      window: ``nats.window``, tokens.
    """
    lengths = np.asarray(piece_lengths, np.int64)
    longest = int(lengths.max())
    return float(np.sum(_least_pairs(longest, window)[lengths]) / window_pairs(lengths, longest))


def all_sliding_model_kv_fraction(config: Config, piece_lengths: npt.ArrayLike) -> float:
    """Returns a model's KV fraction when all tokens with learned roles are SLIDING but the first of each document.

    With several windows it is that of the shortest one.

    Args:
      config: of the run.
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
    """
    return _mean_over_layers(
        config, piece_lengths, all_sliding_kv_fraction(piece_lengths, config.nats.sliding_windows[0])
    )


def least_model_kv_fraction(config: Config, piece_lengths: npt.ArrayLike) -> float:
    """Returns the smallest KV fraction that any roles give a model.

    Args:
      config: of the run.
      piece_lengths: int ``[num_pieces]``, tokens in each document piece, at least one piece.
    """
    if config.model.learns_without_local:  # nothing is below the window
        return all_sliding_model_kv_fraction(config, piece_lengths)
    return _mean_over_layers(config, piece_lengths, least_kv_fraction(piece_lengths, config.nats.sliding_windows[0]))


def live_fraction(config: Config) -> float:
    """Returns the KV fraction that a run is planned for, in contexts of one document.

    It is the budget where there is a layer that learns to meet it.
    """
    if config.model.has_roles:
        return config.nats.kv_budget
    return _mean_over_layers(config, [config.data.context_length], math.nan)


def trained_fraction(config: Config, fraction: float) -> float:
    """Returns the fraction of the key-query pairs that a training step reads, in contexts of one document.

    A "gated" layer reads all of them, a "head_roles" one all of them and those of its window.

    Args:
      config: of the run.
      fraction: its KV fraction.
    """
    lengths = [config.data.context_length]
    match config.model.role_layer_type:
        case "gated":
            return _mean_over_layers(config, lengths, 1.0)
        case "head_roles":
            return _mean_over_layers(config, lengths, 1 + all_sliding_kv_fraction(lengths, config.nats.window))
    return fraction


def perplexity(cross_entropy: float) -> float:
    """Returns ``exp`` of nats per token, infinity where it overflows."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def sliding_windows(config: Config) -> np.ndarray:
    """Returns the number of later queries that read a key, by layer, KV head and SLIDING role.

    The keys of a "sliding" layer all have the first of these roles.

    Returns:
      int32 ``[l, k, r]``, or ``[l, 1, r]`` where all heads of every layer are alike.
    """
    model, windows = config.model, config.nats.sliding_windows
    heads = model.head_windows if "sliding" in model.layer_types else (0,)
    layers = [[(own, *windows[1:]) if x == "sliding" else windows for own in heads] for x in model.all_layer_types]
    return np.array(layers, np.int32)


def _mean_over_layers(config: Config, piece_lengths: npt.ArrayLike, nats: float) -> float:
    """Returns the mean of the layers' KV fractions; ``nats`` is that of layers with roles."""
    sliding = float(np.mean(window_fraction(piece_lengths, config.model.head_windows)))
    by_kind = dict.fromkeys(ROLE_LAYER_TYPES, nats) | {"dense": 1.0, "selective": 1.0, "sliding": sliding}
    return float(np.mean([by_kind[kind] for kind in config.model.layer_types]))


def _queries(lengths: np.ndarray) -> np.ndarray:
    """Counts the pieces that have a query at each position: int64 ``[longest]``."""
    return np.cumsum(np.bincount(lengths)[::-1])[::-1][1:]


def _least_pairs(longest: int, window: int) -> np.ndarray:
    """Counts the fewest pairs that any roles leave of a document, by its length: int64 ``[longest + 1]``.

    What a GLOBAL token and all tokens behind it cost depends on nothing but how many of them there are, its own among
    them. So it is found from the end: the next GLOBAL token is chosen, or none.
    """
    reach = window + 1
    # Of a key i steps before the end of the document, or before the next GLOBAL token and that one too, i queries
    # read it if it is LOCAL, and no more than the reach if it is SLIDING.
    behind = np.cumsum(np.minimum(np.arange(longest + 1), reach))
    least = np.zeros(longest + 1, np.int64)
    far, counted = np.iinfo(np.int64).max, 0
    for count in range(1, longest + 1):
        best = behind[count - 1]  # no other GLOBAL token
        # The next one within the reach; farther than twice the root, one in between would pay for itself.
        near = min(reach, 2 * math.isqrt(count) + 2, count - 1)
        if near > 0:
            best = min(best, np.min(behind[1 : near + 1] - 1 + least[count - near : count][::-1]))
        # The next one beyond the reach: every step more costs as much.
        while counted < count - reach:
            counted += 1
            far = min(far, least[counted] - reach * counted)
        if counted > 0:
            best = min(best, behind[reach] - 1 + reach * (count - reach) + far)
        least[count] = count + best
    return least
