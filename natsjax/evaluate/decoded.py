"""Evaluation through the KV buffer: the measurements of ``natsjax.evaluate.masked``, each document decoded.

A query reads the keys in the buffer and those of its own chunk. Keys that the policy drops are freed. So policies that
decide from attention weights can be measured, and the others must give the same numbers as their masks.

Every policy is measured as it is defined. Policies that fix lifetimes in advance read chunk by chunk. Those that evict
with every token, as H2O, read token by token. Those that cut a prompt down once, as SnapKV, read every chunk as the
continuation of a prompt that ends where the chunk begins: the prompt with full attention from its first token on, then
the keys kept of it and the chunk's own keys.

Axis letters: ``n`` contexts, ``t`` token, ``b`` document pieces of a batch, ``l`` layer, ``k`` KV head.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from natsjax.data import Row
from natsjax.data.packing import piece_spans
from natsjax.decode.decoder import NO_LIMIT, Cache, Decoder, DecodeSettings
from natsjax.evaluate import DEFAULT_CHUNK
from natsjax.evaluate.masked import Measurement, Slices, causal_pairs, sum_by_document, sum_by_position, sum_by_slice
from natsjax.model.cross_entropy import token_losses
from natsjax.model.inputs import Batch
from natsjax.policies.base import DecodingPolicy
from natsjax.runs.load import LoadedRun
from pallas_kernels.nats_attention import NO_END


def measure_decoding(
    run: LoadedRun,
    contexts: Row,
    policy: DecodingPolicy,
    *,
    chunk: int = DEFAULT_CHUNK,
    settings: DecodeSettings | None = None,
    slices: Slices | None = None,
) -> Measurement:
    """Predicts every token of the contexts with the keys that are still in the buffer.

    Each document piece of a context is a sequence of its own; ``eval.batch_size`` are read at a time, those of similar
    length together.

    Args:
      run: run with the model.
      contexts: arrays ``[n, t]`` (``natsjax.data.packing``), with at least one token to predict.
      policy: policy of the KV cache.
      chunk: tokens that are read at once, 1 or more. ``SnapKV`` and ``AdaSnapKV`` keep all keys of a chunk, so their
        queries read ``num_keys`` and up to ``chunk`` more. Results of other policies do not depend on it.
      settings: of decoding.
      slices: sets of predicted tokens that sums are wanted of.

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

            hidden, counts, capacities = reader.read(functools.partial(rows, "inputs"), first)
            found, live = _scored(decoder, hidden, counts, rows("targets", first, chunk))
            for row, (context, start, _) in enumerate(batch):
                here = slice(start + first, start + first + count[row])
                nll[context, here] = found.nll[row, : count[row]]
                correct[context, here] = found.correct[row, : count[row]]
            live = np.where(np.arange(chunk) < count[:, None, None], live, 0)
            pairs += live.sum(axis=(1, 3), dtype=np.float64)
            most = np.maximum(most, live.max(axis=(1, 3)))
            allocated = np.maximum(allocated, capacities)
    valid = Batch.from_rows(contexts).is_token
    return Measurement(
        documents=sum_by_document(contexts, nll, correct, run.data.vocabulary),
        positions=sum_by_position(contexts, nll, correct),
        live_pairs=pairs,
        live_max=most,
        causal_pairs=causal_pairs(contexts),
        num_queries=int(valid.sum()),
        allocated=allocated,
        slices=None if slices is None else sum_by_slice(contexts, nll, slices),
    )


def _pieces(contexts: Row) -> list[tuple[int, int, int]]:
    """Lists ``(context, start, stop)`` of every document piece, the longest first."""
    pieces = zip(*(values.tolist() for values in piece_spans(contexts)), strict=True)
    return sorted(pieces, key=lambda piece: piece[1] - piece[2])


def _rows(values: np.ndarray, batch: list[tuple[int, int, int]], first: int, count: np.ndarray, chunk: int):
    """Collects the pieces' tokens ``first … first + count - 1``: int32 ``[b, chunk]``."""
    rows = np.zeros((len(count), chunk), np.int32)
    for row, (context, start, _) in enumerate(batch):
        rows[row, : count[row]] = values[context, start + first : start + first + count[row]]
    return rows


Read = tuple[jax.Array, jax.Array | None, list[int]]
"""A chunk: ``hidden`` and ``live`` as in ``natsjax.decode.step.Reads``, and the slots of a head, by layer."""

Tokens = Callable[[int, int], np.ndarray]
"""``tokens(start, width)``: int32 ``[b, width]``, those from an index on."""


class _ByChunk:
    """Reader chunk by chunk, for policies that fix a lifetime when the key is written."""

    def __init__(self, decoder: Decoder, lengths: np.ndarray, chunk: int, longest: int):
        self.decoder, self.lengths, self.chunk, self.longest = decoder, lengths, chunk, longest
        self.cache = self.start()

    def start(self, slots: int = NO_LIMIT) -> Cache:
        """Makes a cache for all tokens, or for ``slots`` of them."""
        return self.decoder.start(len(self.lengths), min(self.longest, slots), self.longest)

    def read(self, tokens: Tokens, first: int) -> Read:
        """Reads the chunk that begins at ``first``; all before it have been read."""
        self.cache, read = self.decoder.read(
            self.cache, tokens(first, self.chunk), self.count(first, self.chunk), count_live=True
        )
        return read.hidden, read.live, self.cache.capacities

    def count(self, start: int, width: int) -> np.ndarray:
        """Counts the tokens of each piece among ``width`` from ``start`` on."""
        return np.clip(self.lengths - start, 0, width)


class _ByToken(_ByChunk):
    """Reader token by token that evicts after each, in one program for a chunk."""

    def start(self, slots: int = NO_LIMIT) -> Cache:
        """Makes a cache for the keys that may be live."""
        return super().start(min(slots, self.decoder.limit))

    def read(self, tokens: Tokens, first: int) -> Read:
        self.cache, hidden, live = self.decoder.read_tokens(
            self.cache, tokens(first, self.chunk), self.count(first, self.chunk)
        )
        return hidden, live, self.cache.capacities


class _AsContinuation(_ByChunk):
    """Reader of each chunk as the continuation of a prompt that was cut down once.

    ``cache`` holds all keys of the tokens before the observation window of the next prompt.
    """

    _at = 0  # tokens in the cache

    def read(self, tokens: Tokens, first: int) -> Read:
        decoder, observed = self.decoder, self.decoder.policy.observed
        self._advance(tokens, max(first - observed, 0))
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
        return read.hidden, read.live, cache.capacities

    def _advance(self, tokens: Tokens, end: int) -> None:
        """Reads up to the token ``end`` without recording attention weights."""
        nobody = np.full(len(self.lengths), NO_END)
        while self._at < end:
            count = self.count(self._at, min(end - self._at, self.chunk))
            self.cache, _ = self.decoder.read(
                self.cache, tokens(self._at, self.chunk), count, observed_from=nobody, evict=False
            )
            self._at = min(end, self._at + self.chunk)


def _reader(decoder: Decoder, lengths: np.ndarray, chunk: int, longest: int) -> _ByChunk:
    """Chooses the reader of the policy, for pieces of these lengths, of at most ``longest`` tokens."""
    if decoder.policy.eviction is None:
        return _ByChunk(decoder, lengths, chunk, longest)
    return (_ByToken if decoder.policy.every_token else _AsContinuation)(decoder, lengths, chunk, longest)


def _scored(decoder: Decoder, hidden: jax.Array, live: jax.Array | None, targets: np.ndarray):
    """Computes token losses, and the number of keys that each query reads, int ``[num_layers, b, k, chunk]``."""
    with jax.set_mesh(decoder.mesh):
        placed = decoder.put(targets, "batch", "sequence")
        found = _score(decoder.parameters, hidden, placed, structure=decoder.structure)
    return decoder.fetch((found, live))


@functools.partial(jax.jit, static_argnames="structure")
def _score(parameters, hidden, targets, *, structure):
    model = nnx.merge(structure, parameters)
    return token_losses(hidden, model.output_weight(), targets, softcap=model.config.model.final_logit_softcap)
