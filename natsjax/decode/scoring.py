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

from natsjax.decode.buffer import occupancy
from natsjax.decode.decoder import Cache, Decoder
from natsjax.decode.generation import Prefill, last_of_chunk, prefill
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


class ScoredChoices(NamedTuple):
    """Several continuations of one prompt, scored, and the keys that were read.

    Attributes:
      choices: each continuation.
      live: float64 ``[t]``, keys that a query of a head read, mean over all layers and heads: of the prompt's queries,
        then of those of the first continuation, whose last token is not read.
      held: keys of a head that live when the prompt has been read, mean over all layers and heads.
    """

    choices: list[Scored]
    live: np.ndarray
    held: float


def score(decoder: Decoder, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
    """Scores one continuation of each prompt; all are read at once.

    Lengths are rounded up to powers of two, so that few shapes are compiled.

    Args:
      decoder: whose model and policy.
      prompts: token ids, at least one each.
      continuations: token ids of each, which may be none.
    """
    rows = _Rows(decoder, prompts, [[tokens] for tokens in continuations])
    cache, hidden = prefill(decoder, rows.prompts, rows.most - rows.longest, rows.most)
    return [scored for scored, _ in rows.read(_to_continue(decoder, cache, rows.most), hidden, 0)]


def score_choices(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    evicts_in_prompt: bool = False,
    batch: int = 0,
) -> list[ScoredChoices]:
    """Scores several continuations of each prompt, which is read once; all prompts are read at once.

    Args:
      decoder: whose model and policy.
      prompts: token ids, at least one each.
      choices: continuations of each prompt, at least one, token ids.
      evicts_in_prompt: True: a policy that evicts with every token does so in the prompt too, as evaluation through the
        buffer does (``natsjax.evaluate.decoded``); False: behind it, as ``generate`` does.
      batch: sequences that are compiled for, where there are fewer prompts.
    """
    rows = _Rows(decoder, prompts, choices, batch)
    live: list[np.ndarray] = []
    if evicts_in_prompt and decoder.evicts_in_loop:
        cache, hidden = _by_token(decoder, rows, live)
    else:
        reading = Prefill(decoder, rows.prompts, rows.most - rows.longest, rows.most)
        while not reading.is_done:
            live.append(_mean_live(decoder, reading.read(count_live=True).live))
        cache, hidden = _to_continue(decoder, reading.cache, rows.most), reading.hidden
    with jax.set_mesh(decoder.mesh):
        held = decoder.fetch(_held(cache.buffer, cache.num_tokens))
    found: list[list[Scored]] = []
    first: list[np.ndarray] = []
    for number in range(rows.num_choices):
        last = number == rows.num_choices - 1
        read = rows.read(cache if last else decoder.copied(cache), hidden, number, count_live=True)
        first = first or [of_first for _, of_first in read]
        found.append([scored for scored, _ in read])
    of_prompts = np.concatenate(live, axis=1)
    return [
        ScoredChoices(
            [found[number][row] for number in range(len(of_row))],
            np.append(of_prompts[row, : len(prompts[row])], first[row]),
            float(held[row]),
        )
        for row, of_row in enumerate(choices)
    ]


class _Rows:
    """Prompts and their continuations, padded to whole batches and to few lengths."""

    def __init__(self, decoder: Decoder, prompts, choices, batch: int = 0):
        assert len(prompts) == len(choices)
        assert all(map(len, prompts))
        assert all(map(len, choices))
        self.decoder, self.num_prompts = decoder, len(prompts)
        size = -(-max(len(prompts), batch) // decoder.shards) * decoder.shards
        padding = size - len(prompts)
        self.prompts = [*prompts, *[()] * padding]
        self.choices = [*choices, *[()] * padding]
        self.num_choices = max(map(len, choices))
        self.longest = max(map(len, prompts))
        self.width = _power_of_two(max(1, *(len(tokens) for of_row in choices for tokens in of_row)))
        self.most = _power_of_two(self.longest + self.width)

    def read(
        self, cache: Cache, hidden: jax.Array, number: int, *, count_live: bool = False
    ) -> list[tuple[Scored, np.ndarray]]:
        """Scores continuation ``number`` of every prompt, with the keys that its queries read where they are counted.

        Args:
          cache: of the prompts, with slots for the continuations; its buffer is used up.
          hidden: ``[b, d]``, which predicts the first token.
          number: of the continuation; rows that have fewer get an empty one.
          count_live: True to count keys.
        """
        decoder = self.decoder
        rows = [of_row[number] if number < len(of_row) else () for of_row in self.choices]
        lengths = np.array(list(map(len, rows)))
        targets = np.zeros((len(rows), self.width), np.int32)
        for row, tokens in enumerate(rows):
            targets[row, : len(tokens)] = tokens
        count = np.maximum(lengths - 1, 0)  # the last token predicts none
        if decoder.evicts_in_loop:
            live: jax.Array | None
            _, read, live = decoder.read_tokens(cache, targets, count)
        else:
            _, reads = decoder.read(cache, targets, count, evict=False, count_live=count_live)
            read, live = reads.hidden, reads.live
        with jax.set_mesh(decoder.mesh):
            placed = decoder.put(targets, "batch", "sequence")
            found = decoder.fetch(_losses(decoder.parameters, hidden, read, placed, structure=decoder.structure))
        keys = _mean_live(decoder, live) if count_live else np.zeros((len(rows), 0))
        return [
            (
                Scored(-np.asarray(found.nll[row, : lengths[row]]), np.asarray(found.correct[row, : lengths[row]])),
                keys[row, : count[row]],
            )
            for row in range(self.num_prompts)
        ]


def _to_continue(decoder: Decoder, cache: Cache, most: int) -> Cache:
    """Returns a cache as continuations are read into; the buffer of ``cache`` is used up."""
    return decoder.resized(cache, min(decoder.limit, most)) if decoder.evicts_in_loop else cache


def _by_token(decoder: Decoder, rows: _Rows, live: list[np.ndarray]) -> tuple[Cache, jax.Array]:
    """Reads prompts as they would be generated; adds the keys that were read to ``live``, ``[b, t]`` a chunk."""
    lengths = np.array(list(map(len, rows.prompts)))
    chunk = min(decoder.settings.chunk, _power_of_two(rows.longest))
    cache = decoder.start(len(lengths), min(decoder.limit, rows.most), rows.most)
    with jax.set_mesh(decoder.mesh):
        hidden = jnp.zeros((len(lengths), decoder.config.model.embed_dim), decoder.config.model.dtype)
        hidden = jax.device_put(hidden, decoder.sharding("batch", None))
    for begin in range(0, rows.longest, chunk):
        count = np.clip(lengths - begin, 0, chunk)
        tokens = np.zeros((len(lengths), chunk), np.int32)
        for row, prompt in enumerate(rows.prompts):
            tokens[row, : count[row]] = prompt[begin : begin + chunk]
        cache, read, keys = decoder.read_tokens(cache, tokens, count)
        live.append(_mean_live(decoder, keys))
        with jax.set_mesh(decoder.mesh):
            hidden = last_of_chunk(read, decoder.put_rows(count), hidden)
    return cache, hidden


def _mean_live(decoder: Decoder, live: jax.Array | None) -> np.ndarray:
    """Fetches the keys that queries read, mean over layers and heads: float64 ``[b, t]``."""
    return decoder.fetch(live).mean(axis=(0, 2), dtype=np.float64)


@jax.jit
def _held(buffer, num_tokens: jax.Array) -> jax.Array:
    """Counts live keys, mean over layers and heads: float32 ``[b]``."""
    return jnp.mean(occupancy(buffer, num_tokens).astype(jnp.float32), axis=(0, 2))


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
