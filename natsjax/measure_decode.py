"""The same measurement as ``natsjax.measure``, as it is served: each document chunk by chunk through a KV buffer.

Nothing is masked that is not gone: a query reads what the buffer holds and its own chunk, and what the policy drops is
freed. So policies that decide from the attention they observe can be measured, and the others must give the same
numbers as their masks.

Axis letters: ``n`` contexts, ``t`` token, ``b`` document pieces of a batch, ``l`` layer, ``k`` KV head.
"""

import functools

import jax
import numpy as np
from flax import nnx

from natsjax.data import Row
from natsjax.decode_step import DecodingPolicy
from natsjax.decoder import Cache, Decoder, DecodeSettings
from natsjax.loading import LoadedRun
from natsjax.measure import Measurement, sum_by_document, sum_by_position
from natsjax.policies import ObservingPolicy
from natsjax.vocabulary_loss import token_losses
from pallas_kernels.nats_attention import NO_END

DEFAULT_CHUNK = 16
"""Tokens that are read at once: what a policy drops is freed behind each chunk."""


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
    of similar length together. Where a policy observes, it evicts behind every chunk, and a chunk's own keys
    are all read within it: its live keys are those it keeps and up to ``chunk`` more.

    Args:
      run: whose model.
      contexts: arrays ``[n, t]`` (``natsjax.data.packing``), with at least one token to predict.
      policy: how long keys live.
      chunk: tokens that are read at once, 1 or more; 1 is decoding token by token.
      settings: of decoding.

    Raises:
      UserError: see ``Decoder``.
    """
    decoder = Decoder.of_run(run, policy, settings or DecodeSettings(block=64))
    pieces = _pieces(contexts)
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
        cache = decoder.start(size, -(-int(lengths.max()) // chunk) * chunk)
        for first in range(0, int(lengths.max()), chunk):
            count = np.clip(lengths - first, 0, chunk)
            inputs, targets = (_rows(contexts[name], batch, first, count, chunk) for name in ("inputs", "targets"))
            cache, found, live = _read(decoder, cache, inputs, targets, count, first)
            for row, (context, start, _) in enumerate(batch):
                here = slice(start + first, start + first + count[row])
                nll[context, here] = found.nll[row, : count[row]]
                correct[context, here] = found.correct[row, : count[row]]
            live = np.where(np.arange(chunk) < count[:, None, None], live, 0)
            pairs += live.sum(axis=(1, 3), dtype=np.float64)
            most = np.maximum(most, live.max(axis=(1, 3)))
            allocated = np.maximum(allocated, cache.capacities)
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


def _read(decoder: Decoder, cache: Cache, inputs, targets, count, first: int):
    """The cache after a chunk, its token losses, and int ``[num_layers, b, k, chunk]``, the keys that queries read."""
    observed_from = None
    if isinstance(decoder.policy, ObservingPolicy) and decoder.policy.observed < NO_END:
        # The chunk's last queries alone decide.
        cache, observed_from = decoder.forget(cache), np.maximum(first + count - decoder.policy.observed, 0)
    cache, read = decoder.read(cache, inputs, count, observed_from=observed_from, count_live=True)
    with jax.set_mesh(decoder.mesh):
        placed = decoder.put(targets, "batch", "sequence")
        found = _score(decoder.parameters, read.hidden, placed, structure=decoder.structure)
    return cache, *decoder.fetch((found, read.live))


@functools.partial(jax.jit, static_argnames="structure")
def _score(parameters, hidden, targets, *, structure):
    model = nnx.merge(structure, parameters)
    return token_losses(hidden, model.output_weight(), targets, softcap=model.config.model.final_logit_softcap)
