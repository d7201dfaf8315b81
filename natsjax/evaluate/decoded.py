"""The same measurement as ``natsjax.evaluate.masked``, as it is served: each document through a KV buffer.

Nothing is masked that is not gone: a query reads what the buffer holds and its own chunk, and what the policy drops is
freed. So policies that decide from the attention they observe can be measured, and the others must give the same
numbers as their masks.

Each is measured as it is defined, whatever is convenient to read at once. What fixes lifetimes in advance is read
chunk by chunk. H2O, which evicts with every token, is read token by token. SnapKV, which cuts a prompt down once, reads
every chunk as the continuation of a prompt that ends where the chunk begins: that prompt with full attention, from its
first token on, then what it keeps of it and the chunk's own keys.

Axis letters: ``n`` contexts, ``t`` token, ``b`` document pieces of a batch, ``l`` layer, ``k`` KV head.
"""

import functools
import typing
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from natsjax.data import Row
from natsjax.decode import loop
from natsjax.decode.decoder import NO_LIMIT, Cache, Decoder, DecodeSettings
from natsjax.decode.step import Chunk, DecodingPolicy
from natsjax.evaluate import DEFAULT_CHUNK
from natsjax.evaluate.masked import Measurement, sum_by_document, sum_by_position
from natsjax.model.cross_entropy import token_losses
from natsjax.policies.observing import AttentionScorePolicy
from natsjax.runs.load import LoadedRun
from pallas_kernels.nats_attention import NO_END


def measure_decoding(
    run: LoadedRun,
    contexts: Row,
    policy: DecodingPolicy,
    *,
    chunk: int = DEFAULT_CHUNK,
    settings: DecodeSettings | None = None,
) -> Measurement:
    """Predicts every token of the contexts with the keys that are still in the buffer.

    Each document piece of a context is a sequence of its own; ``eval.batch_size`` go through the model at a time, those
    of similar length together.

    Args:
      run: whose model.
      contexts: arrays ``[n, t]`` (``natsjax.data.packing``), with at least one token to predict.
      policy: how long keys live.
      chunk: tokens that are read at once, 1 or more. For ``SnapKV`` those that follow a prompt, whose keys it keeps
        all: its queries read ``num_keys`` and up to ``chunk`` more. For other policies nothing depends on it.
      settings: of decoding.

    Raises:
      UserError: see ``Decoder``.
    """
    decoder = Decoder.of_run(run, policy, settings or DecodeSettings(block=64))
    pieces = _pieces(contexts)
    longest = pieces[0][2] - pieces[0][1]  # of all, so that batches have one shape
    chunk = min(chunk, longest)
    size = -(-run.config.eval.batch_size // decoder.shards) * decoder.shards
    model = run.config.model
    nll = np.zeros(contexts["inputs"].shape)
    correct = np.zeros(contexts["inputs"].shape, bool)
    pairs = np.zeros((model.num_layers, model.num_kv_heads))
    most = np.zeros((model.num_layers, model.num_kv_heads), np.int64)
    allocated = np.zeros(model.num_layers, np.int64)
    for begin in range(0, len(pieces), size):
        batch = pieces[begin : begin + size]
        lengths = np.pad([stop - start for _, start, stop in batch], (0, size - len(batch)))
        reader = _reader(decoder, lengths, chunk, longest)
        for first in range(0, int(lengths.max()), chunk):
            count = np.clip(lengths - first, 0, chunk)

            def rows(name, start, width, batch=batch, lengths=lengths):
                return _rows(contexts[name], batch, start, np.clip(lengths - start, 0, width), width)

            read = reader.read(functools.partial(rows, "inputs"), first)
            found, live = _scored(decoder, read, rows("targets", first, chunk))
            for row, (context, start, _) in enumerate(batch):
                here = slice(start + first, start + first + count[row])
                nll[context, here] = found.nll[row, : count[row]]
                correct[context, here] = found.correct[row, : count[row]]
            live = np.where(np.arange(chunk) < count[:, None, None], live, 0)
            pairs += live.sum(axis=(1, 3), dtype=np.float64)
            most = np.maximum(most, live.max(axis=(1, 3)))
            allocated = np.maximum(allocated, read.capacities)
    valid = contexts["document_end"] > 0
    return Measurement(
        documents=sum_by_document(contexts, nll, correct, run.data.vocabulary),
        positions=sum_by_position(contexts, nll, correct),
        live_pairs=pairs,
        live_max=most,
        causal_pairs=int(np.sum(contexts["positions"] + 1, where=valid, dtype=np.int64)),
        num_queries=int(valid.sum()),
        allocated=allocated,
    )


def _pieces(contexts: Row) -> list[tuple[int, int, int]]:
    """``(context, start, stop)`` of every document piece, the longest first."""
    rows, starts = np.nonzero((contexts["positions"] == 0) & (contexts["document_end"] > 0))
    stops = contexts["document_end"][rows, starts]
    pieces = zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True)
    return sorted(pieces, key=lambda piece: piece[1] - piece[2])


def _rows(values: np.ndarray, batch: list[tuple[int, int, int]], first: int, count: np.ndarray, chunk: int):
    """The pieces' tokens ``first … first + count - 1``: int32 ``[b, chunk]``."""
    rows = np.zeros((len(count), chunk), np.int32)
    for row, (context, start, _) in enumerate(batch):
        rows[row, : count[row]] = values[context, start + first : start + first + count[row]]
    return rows


class _Read(NamedTuple):
    """What reading a chunk gave.

    Attributes:
      hidden: ``[b, t, d]``.
      live: int32 ``[num_layers, b, k, t]``, the keys that queries read.
      capacities: slots of a head, by layer.
    """

    hidden: jax.Array
    live: jax.Array | None
    capacities: list[int]


Tokens = Callable[[int, int], np.ndarray]
"""``tokens(start, width)``: int32 ``[b, width]``, those from an index on."""


class _ByChunk:
    """Reads chunk by chunk: what fixes lifetimes when a key is written."""

    def __init__(self, decoder: Decoder, lengths: np.ndarray, chunk: int, longest: int):
        self.decoder, self.lengths, self.chunk, self.longest = decoder, lengths, chunk, longest
        self.cache = self.start()

    def start(self, slots: int = NO_LIMIT) -> Cache:
        """Room for all tokens, or for so many of them."""
        return self.decoder.start(len(self.lengths), min(self.longest, slots), self.longest)

    def read(self, tokens: Tokens, first: int) -> _Read:
        """The chunk that begins at ``first``; all before it have been read."""
        self.cache, read = self.decoder.read(
            self.cache, tokens(first, self.chunk), self.count(first, self.chunk), count_live=True
        )
        return _Read(read.hidden, read.live, self.cache.capacities)

    def count(self, start: int, width: int) -> np.ndarray:
        """Tokens of each piece among ``width`` from ``start`` on."""
        return np.clip(self.lengths - start, 0, width)


class _ByToken(_ByChunk):
    """Reads token by token and evicts after each, in one program for a chunk."""

    def start(self, slots: int = NO_LIMIT) -> Cache:
        """Room for the keys that may be live."""
        return super().start(min(slots, self.decoder.limit))

    def read(self, tokens: Tokens, first: int) -> _Read:
        decoder, cache = self.decoder, self.cache
        with jax.set_mesh(decoder.mesh):
            rows = decoder.put_rows(self.count(first, self.chunk)), cache.num_tokens, 0 * cache.num_tokens
            chunk = Chunk(decoder.put(tokens(first, self.chunk), "batch", "sequence"), *rows)
            buffer, hidden, live = loop.read_tokens(
                decoder.parameters,
                cache.buffer,
                chunk,
                decoder.policy,
                decoder.eviction,
                jnp.int32(decoder.limit),
                structure=decoder.structure,
            )
            self.cache = cache._replace(buffer=buffer, num_tokens=chunk.next_index)
        return _Read(hidden, live, self.cache.capacities)


class _AsContinuation(_ByChunk):
    """Reads each chunk behind a prompt that ends where it begins, and that has been cut down once.

    ``cache`` holds all keys of the tokens before the observation window of the next prompt.
    """

    _at = 0  # tokens that the cache holds

    def read(self, tokens: Tokens, first: int) -> _Read:
        decoder, observed = self.decoder, typing.cast(AttentionScorePolicy, self.decoder.policy).observed
        self._go_on(tokens, max(first - observed, 0))
        prompt = decoder.copied(self.cache)
        if first:
            begin = np.full(len(self.lengths), self._at)
            count = self.count(self._at, first - self._at)
            width = min(observed, self.longest)
            prompt, _ = decoder.read(prompt, tokens(self._at, width), count, observed_from=begin, evict=False)
        most = min(decoder.limit + self.chunk, self.longest)
        prompt = decoder.resized(decoder.evict(prompt), most)
        cache, read = decoder.read(
            prompt, tokens(first, self.chunk), self.count(first, self.chunk), count_live=True, evict=False
        )
        return _Read(read.hidden, read.live, cache.capacities)

    def _go_on(self, tokens: Tokens, end: int) -> None:
        """Reads on, up to the token ``end``, and observes nothing."""
        nobody = np.full(len(self.lengths), NO_END)
        while self._at < end:
            count = self.count(self._at, min(end - self._at, self.chunk))
            self.cache, _ = self.decoder.read(
                self.cache, tokens(self._at, self.chunk), count, observed_from=nobody, evict=False
            )
            self._at = min(end, self._at + self.chunk)


def _reader(decoder: Decoder, lengths: np.ndarray, chunk: int, longest: int) -> _ByChunk:
    """The one that reads pieces of these lengths, of at most ``longest`` tokens, as the policy is defined."""
    if not isinstance(decoder.policy, AttentionScorePolicy):
        return _ByChunk(decoder, lengths, chunk, longest)
    return (_ByToken if decoder.policy.every_token else _AsContinuation)(decoder, lengths, chunk, longest)


def _scored(decoder: Decoder, read: _Read, targets: np.ndarray):
    """Token losses, and int ``[num_layers, b, k, chunk]``, the keys that queries read."""
    with jax.set_mesh(decoder.mesh):
        placed = decoder.put(targets, "batch", "sequence")
        found = _score(decoder.parameters, read.hidden, placed, structure=decoder.structure)
    return decoder.fetch((found, read.live))


@functools.partial(jax.jit, static_argnames="structure")
def _score(parameters, hidden, targets, *, structure):
    model = nnx.merge(structure, parameters)
    return token_losses(hidden, model.output_weight(), targets, softcap=model.config.model.final_logit_softcap)
