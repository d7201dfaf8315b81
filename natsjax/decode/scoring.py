"""Log-probabilities of given continuations, under the keys that a policy leaves.

A prompt is read as ``natsjax.decode.generation.generate`` reads it, and its continuation as if it had been generated:
what ``generate`` draws has the log-probabilities that are computed here.

Axis letters: ``b`` batch, ``t`` token, ``d`` width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from natsjax.decode.decoder import Decoder
from natsjax.decode.generation import prefill
from natsjax.model.cross_entropy import TokenLosses, token_losses
from natsjax.model.sharding import reshard


class Scored(NamedTuple):
    """A continuation, scored.

    Attributes:
      logprobs: float32 ``[t]``, of each of its tokens, nats, at temperature 1.
      is_likeliest: bool ``[t]``, True where no token is likelier.
    """

    logprobs: np.ndarray
    is_likeliest: np.ndarray


def score(decoder: Decoder, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
    """Scores one continuation of each prompt; all are read at once.

    Lengths are rounded up to powers of two, so that few shapes are compiled.

    Args:
      decoder: whose model and policy.
      prompts: token ids, at least one each.
      continuations: token ids of each, which may be none.
    """
    assert len(prompts) == len(continuations)
    assert all(map(len, prompts))
    padding = -len(prompts) % decoder.shards
    rows = [*map(list, continuations), *[[]] * padding]
    lengths = np.array(list(map(len, rows)))
    width = _power_of_two(max(1, int(lengths.max())))
    longest = max(map(len, prompts))
    most = _power_of_two(longest + width)
    cache, hidden = prefill(decoder, [*prompts, *[()] * padding], most - longest, most)
    targets = np.zeros((len(rows), width), np.int32)
    for row, tokens in enumerate(rows):
        targets[row, : len(tokens)] = tokens
    count = np.maximum(lengths - 1, 0)  # the last token predicts none
    if decoder.evicts_in_loop:
        cache = decoder.resized(cache, min(decoder.limit, most))
        _, read, _ = decoder.read_tokens(cache, targets, count)
    else:
        _, reads = decoder.read(cache, targets, count, evict=False)
        read = reads.hidden
    with jax.set_mesh(decoder.mesh):
        found = decoder.fetch(
            _losses(
                decoder.parameters,
                hidden,
                read,
                decoder.put(targets, "batch", "sequence"),
                structure=decoder.structure,
            )
        )
    return [
        Scored(-np.asarray(found.nll[row, : lengths[row]]), np.asarray(found.correct[row, : lengths[row]]))
        for row in range(len(prompts))
    ]


@functools.partial(jax.jit, static_argnames="structure")
def _losses(parameters, first: jax.Array, later: jax.Array, targets: jax.Array, *, structure) -> TokenLosses:
    """Computes the losses of targets ``[b, t]`` from ``[b, d]``, which predicts the first, and ``[b, t, d]``."""
    model = nnx.merge(structure, parameters)
    axes = ("batch", "sequence", None)
    hidden = jnp.concatenate([reshard(first[:, None], *axes), reshard(later[:, :-1], *axes)], axis=1)
    return token_losses(hidden, model.output_weight(), targets, softcap=model.config.model.final_logit_softcap)


def _power_of_two(number: int) -> int:
    """Rounds up."""
    return 1 << (number - 1).bit_length()
