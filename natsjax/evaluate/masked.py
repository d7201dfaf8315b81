"""Evaluation with masks: predictions and live keys of one teacher-forced pass over contexts under a policy.

The forward pass is compiled once per kind of role sampling (role bias, sampled roles, given intervals), for all numbers
of it.

Axis letters: ``n`` contexts, ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``l`` layer, ``d`` documents.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from natsjax.data import Row, Tokenizer, Vocabulary, piece_lengths
from natsjax.kv_fraction import perplexity
from natsjax.model import sharding
from natsjax.model.attention import RoleSampling
from natsjax.model.cross_entropy import token_losses
from natsjax.model.inputs import Batch
from natsjax.policies.base import StaticPolicy, unsuited
from natsjax.runs.load import LoadedRun

_MODEL_FIELDS = ("inputs", "targets", "positions", "document_end")

Slices = Mapping[str, np.ndarray]
"""Sets of predicted tokens by name, bool ``[n, t]`` each (``natsjax.evaluate.slices``)."""


@dataclasses.dataclass(frozen=True)
class DocumentSums:
    """Sums over the predicted tokens of each document; documents without predicted tokens are left out.

    Attributes:
      ids: int64 ``[d]``, the documents' indices in their split, ascending.
      nll: float64 ``[d]``, negative log-likelihood, nats.
      tokens: float64 ``[d]``, predicted tokens.
      correct: float64 ``[d]``, predicted tokens whose most likely token is right.
      text_nll: float64 ``[d]``, ``nll`` without that of EOS, which is no text; None for data without text.
      bytes: float64 ``[d]``, UTF-8 bytes of the predicted tokens; None for data without text.
    """

    ids: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    text_nll: np.ndarray | None
    bytes: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class PositionSums:
    """Sums over the predicted tokens of each document by position: the number of its tokens before the predicted one.

    Attributes:
      edges: int64 ``[p + 1]``, ascending from 1: bucket i holds ``edges[i] <= tokens < edges[i + 1]``.
      nll: float64 ``[d, p]``, negative log-likelihood, nats.
      tokens: float64 ``[d, p]``, predicted tokens.
      correct: float64 ``[d, p]``, predicted tokens whose most likely token is right.
    """

    edges: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class SliceSums:
    """Sums over the predicted tokens of each document by slice.

    Attributes:
      nll: float64 ``[d, z]``, negative log-likelihood, nats.
      tokens: float64 ``[d, z]``, predicted tokens.
    """

    nll: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Result of one pass; sums exclude padding.

    Attributes:
      documents: predictions by document.
      positions: the same, by document and position; documents in the same order.
      live_pairs: float64 ``[l, k]``, live key-query pairs.
      live_max: int64 ``[l, k]``, the most keys that one query can read.
      causal_pairs: pairs that full attention reads, per layer and KV head.
      num_queries: tokens.
      allocated: int64 ``[l]``, the most slots of a head that a KV buffer had; None for an evaluation with masks.
      slices: predictions by document and slice, in the order of the slices; None where none were asked for.
    """

    documents: DocumentSums
    positions: PositionSums
    live_pairs: np.ndarray
    live_max: np.ndarray
    causal_pairs: int
    num_queries: int
    allocated: np.ndarray | None = None
    slices: SliceSums | None = None

    @property
    def kv_fraction(self) -> float:
        """Live pairs over causal pairs, over layers and KV heads, in (0, 1]."""
        return float(self.live_pairs.mean() / self.causal_pairs)

    @property
    def live_mean(self) -> np.ndarray:
        """Mean number of keys that a query can read, float64 ``[l, k]``."""
        return self.live_pairs / self.num_queries

    @property
    def mean_context(self) -> float:
        """Mean number of keys that a query of full attention can read."""
        return self.causal_pairs / self.num_queries

    @property
    def cross_entropy(self) -> float:
        """Nats per predicted token."""
        return float(self.documents.nll.sum() / self.documents.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exp of the cross-entropy; infinite where that overflows."""
        return perplexity(self.cross_entropy)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of predicted text, as in lm-evaluation-harness; None for data without text.

        The end of a document is predicted too. It counts in the perplexity but not here, for it is no text.
        """
        sums = self.documents
        if sums.text_nll is None or sums.bytes is None or not sums.bytes.sum():
            return None
        return float(sums.text_nll.sum() / math.log(2) / sums.bytes.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of predicted tokens whose most likely token is right."""
        return float(self.documents.correct.sum() / self.documents.tokens.sum())


def measure(run: LoadedRun, contexts: Row, policy: StaticPolicy, *, slices: Slices | None = None) -> Measurement:
    """Predicts every token of the contexts with the keys that the policy leaves.

    Args:
      run: run with the model; ``eval.batch_size`` contexts are read at a time.
      contexts: arrays ``[n, t]`` (``natsjax.data.packing``), with at least one token to predict.
      policy: policy of the KV cache.
      slices: sets of predicted tokens that sums are wanted of.

    Raises:
      ValueError: the model's layers cannot follow the policy.
    """
    nll, correct, pairs, most = [], [], [], []
    for result in _forward_batches(run, contexts, policy):
        nll.append(np.asarray(result.nll, np.float64))
        correct.append(np.asarray(result.correct))
        pairs.append(np.asarray(result.live_pairs, np.float64).sum(axis=1))
        most.append(np.asarray(result.live_max, np.int64))
    count, valid = len(contexts["inputs"]), Batch.from_rows(contexts).is_token
    found = np.concatenate(nll)[:count], np.concatenate(correct)[:count]
    return Measurement(
        documents=sum_by_document(contexts, *found, run.data.vocabulary),
        positions=sum_by_position(contexts, *found),
        live_pairs=np.sum(pairs, axis=0),
        live_max=np.max(most, axis=0),
        causal_pairs=causal_pairs(contexts),
        num_queries=int(valid.sum()),
        slices=None if slices is None else sum_by_slice(contexts, found[0], slices),
    )


def token_nll(run: LoadedRun, contexts: Row, policy: StaticPolicy) -> np.ndarray:
    """Predicts every target of the contexts: negative log-likelihood, nats, float64 ``[n, t]``, arbitrary at padding.

    Args:
      run, contexts, policy: as in ``measure``.

    Raises:
      ValueError: the model's layers cannot follow the policy.
    """
    nll = [np.asarray(result.nll, np.float64) for result in _forward_batches(run, contexts, policy)]
    return np.concatenate(nll)[: len(contexts["inputs"])]


def causal_pairs(contexts: Row) -> int:
    """Counts the key-query pairs of full attention, per layer and KV head."""
    lengths = piece_lengths(contexts)
    return int(np.sum(lengths * (lengths + 1) // 2))


def chosen_roles(run: LoadedRun, contexts: Row, policy: StaticPolicy) -> np.ndarray:
    """Computes the role of every token under ``Nats`` or ``SampledNats``: int8 ``[n, l, k, t]``, arbitrary at padding.

    Raises:
      ValueError: the model's layers cannot follow the policy.
    """
    ids = [np.asarray(result.role_ids).swapaxes(0, 1) for result in _forward_batches(run, contexts, policy)]
    return np.concatenate(ids)[: len(contexts["inputs"])]


def live_keys(key_end: jax.Array) -> jax.Array:
    """Counts the keys that each query can read, in O(L): a running sum of keys that begin less keys that end.

    Args:
      key_end: int32 ``[…, s]``, exclusive; a key with ``key_end <= s`` is never read (padding).

    Returns:
      int32 ``[…, t]``.

    Example:
      >>> live_keys(jnp.array([9, 2, 4, 4]))  # sink, own query only, …
      [1, 2, 2, 3]
    """
    length = key_end.shape[-1]

    def count(end):
        is_read = end > jnp.arange(length, dtype=jnp.int32)
        # Keys that outlive the sequence, or are never read, end in a slot of their own behind it.
        end = jnp.where(is_read, jnp.minimum(end, length), length)
        ended = jnp.zeros(length + 1, jnp.int32).at[end].add(1)
        return jnp.cumsum(is_read.astype(jnp.int32) - ended[:-1])

    return jnp.vectorize(count, signature="(s)->(s)")(key_end)


class _BatchResult(NamedTuple):
    """Result of a batch's forward pass, on device.

    Attributes:
      nll: float32 ``[b, t]``, of each target, nats.
      correct: bool ``[b, t]``, the most likely token is the target.
      live_pairs: float32 ``[l, b, k]``.
      live_max: int32 ``[l, k]``.
      role_ids: int8 ``[l, b, k, s]``.
    """

    nll: jax.Array
    correct: jax.Array
    live_pairs: jax.Array
    live_max: jax.Array
    role_ids: jax.Array


@functools.partial(jax.jit, static_argnames="structure")
def _forward(parameters, batch: Batch, choice: RoleSampling, *, structure) -> _BatchResult:
    """Runs one batch, arrays ``[b, t]``. The result is replicated."""
    model = nnx.merge(structure, parameters)
    x, roles = model.hidden(batch, choice)
    softcap = model.config.model.final_logit_softcap
    predicted = token_losses(x, model.output_weight(), batch.targets, softcap=softcap)
    by_head = (None, "batch", "kv_heads", None)
    live = sharding.shard_map(live_keys, (by_head,), by_head)(roles.key_end)
    result = _BatchResult(
        nll=predicted.nll,
        correct=predicted.correct,
        # By context and in floats: a batch of long contexts has more pairs than an int32 counts.
        live_pairs=jnp.sum(live, axis=-1, dtype=jnp.float32),
        live_max=jnp.max(live, axis=(1, 3)),
        role_ids=roles.ids,
    )
    return sharding.replicate(result)


def _forward_batches(run: LoadedRun, contexts: Row, policy: StaticPolicy) -> Iterator[_BatchResult]:
    """Runs the contexts in batches of one shape; the last is filled with padding."""
    shards = math.prod(run.mesh.shape[axis] for axis in sharding.BATCH)
    size = -(-run.config.eval.batch_size // shards) * shards
    for number, begin in enumerate(range(0, len(contexts["inputs"]), size)):
        # Zeros are padding: document_end = 0.
        parts = {name: contexts[name][begin : begin + size] for name in _MODEL_FIELDS}
        rows = {name: np.pad(part, ((0, size - len(part)), (0, 0))) for name, part in parts.items()}
        batch = Batch.from_rows(sharding.put_batch(run.mesh, rows, size))
        with jax.set_mesh(run.mesh):
            if (why := unsuited(policy, run.config.model)) is not None:
                raise ValueError(f"{policy}: {why}.")
            choice = policy.choice(batch.positions, run.config)
            if choice.noise_key is not None:
                choice = choice._replace(noise_key=jax.random.fold_in(choice.noise_key, number))
            yield _forward(run.parameters, batch, choice, structure=run.structure)


def sum_by_document(contexts: Row, nll: np.ndarray, correct: np.ndarray, vocabulary: Vocabulary) -> DocumentSums:
    """Sums over the predicted tokens of each document; ``nll`` and ``correct`` are ``[n, t]``."""
    token_bytes = vocabulary.token_bytes
    # By the token and not by its bytes: a token for unknown text has none, and its errors must count.
    is_end = contexts["targets"] == vocabulary.eos_id if isinstance(vocabulary, Tokenizer) else False
    predicted = contexts["loss_weight"] > 0
    ids, document = np.unique(contexts["document_id"][predicted], return_inverse=True)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(document, weights=values[predicted], minlength=len(ids))

    return DocumentSums(
        ids=ids.astype(np.int64),
        nll=total(nll),
        tokens=total(predicted),
        correct=total(correct),
        text_nll=None if token_bytes is None else total(np.where(is_end, 0, nll)),
        bytes=None if token_bytes is None else total(token_bytes[contexts["targets"]]),
    )


def sum_by_position(contexts: Row, nll: np.ndarray, correct: np.ndarray) -> PositionSums:
    """Sums over predicted tokens by position, in buckets that grow by about √2; ``nll``, ``correct`` are ``[n, t]``."""
    predicted = contexts["loss_weight"] > 0
    ids, document = np.unique(contexts["document_id"][predicted], return_inverse=True)
    length = contexts["inputs"].shape[1]
    edges = np.unique(np.round(2 ** (np.arange(math.ceil(2 * math.log2(length + 1))) / 2)).astype(np.int64))
    edges = np.append(edges[edges < length], length + 1)
    bucket = np.searchsorted(edges, contexts["positions"][predicted] + 1, side="right") - 1
    shape = len(ids), len(edges) - 1

    def total(values: np.ndarray) -> np.ndarray:
        flat = np.ravel_multi_index((document, bucket), shape)
        return np.bincount(flat, weights=values[predicted], minlength=math.prod(shape)).reshape(shape)

    return PositionSums(edges=edges, nll=total(nll), tokens=total(predicted), correct=total(correct))


def sum_by_slice(contexts: Row, nll: np.ndarray, slices: Slices) -> SliceSums:
    """Sums over the predicted tokens of each document by slice; ``nll`` is ``[n, t]``."""
    predicted = contexts["loss_weight"] > 0
    ids, document = np.unique(contexts["document_id"][predicted], return_inverse=True)

    def total(values: np.ndarray) -> np.ndarray:
        sums = [
            np.bincount(document, weights=np.where(members, values, 0)[predicted], minlength=len(ids))
            for members in slices.values()
        ]
        return np.stack(sums, axis=1)

    return SliceSums(nll=total(nll), tokens=total(np.ones_like(nll)))
