"""KV fractions from lengths and windows alone, and perplexity: the one place of each formula.

``docs/method.md`` defines them. Host-side, numpy only.
"""

import math

import numpy as np

from natsjax.config import Config


def smallest_kv_fraction(piece_lengths: np.ndarray, window: int) -> float:
    """The KV fraction when every token is SLIDING but the first of each document, which is GLOBAL.

    Args:
      piece_lengths: int ``[num_pieces]``, tokens in each document piece.
      window: tokens.
    """
    length = np.asarray(piece_lengths, np.float64)
    reach = np.minimum(length, window + 1)
    # Keys 1 … L-1 live for window + 1 queries, the last ones until the end of the document; key 0 lives for L.
    sliding = np.where(length > window + 1, (length - 1 - window) * (window + 1), 0) + np.where(
        length > window + 1, window * (window + 1) / 2, reach * (reach - 1) / 2
    )
    return float(np.sum(length + sliding) / np.sum(length * (length + 1) / 2))


def smallest_model_kv_fraction(config: Config, piece_lengths: np.ndarray) -> float:
    """The smallest KV fraction of a model, the mean over its layers: only "nats" layers have a choice.

    Args:
      config: of the run.
      piece_lengths: int ``[num_pieces]``, tokens in each document piece.
    """
    length = np.asarray(piece_lengths, np.float64)
    reach = np.minimum(length, config.model.sliding_window + 1)
    sliding = np.sum((length - reach) * reach + reach * (reach + 1) / 2) / np.sum(length * (length + 1) / 2)
    by_kind = {
        "nats": smallest_kv_fraction(piece_lengths, config.nats.window),
        "dense": 1.0,
        "sliding": float(sliding),
    }
    return float(np.mean([by_kind[kind] for kind in config.model.layer_types]))


def perplexity(cross_entropy: float) -> float:
    """``exp`` of nats per token, infinite where it overflows."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def sliding_windows(config: Config) -> np.ndarray:
    """How many later queries read a SLIDING key, by layer: int32 ``[l]``."""
    model = config.model
    return np.array(
        [model.sliding_window if kind == "sliding" else config.nats.window for kind in model.all_layer_types], np.int32
    )


def live_fraction(config: Config) -> float:
    """Live key-query pairs over causal ones, mean over layers, in contexts of one document: the budget where there is
    a layer that learns to meet it.
    """
    if config.model.has_roles:
        return config.nats.kv_budget
    length = config.data.context_length
    read = min(config.model.sliding_window + 1, length)
    sliding = (length - read) * read + read * (read + 1) / 2
    share = {"dense": 1.0, "sliding": sliding / (length * (length + 1) / 2)}
    return float(np.mean([share[kind] for kind in config.model.layer_types]))
