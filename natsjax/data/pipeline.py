"""The training stream and the evaluation contexts of a prepared corpus, through Grain.

The stream is infinite. In each epoch the documents are shuffled, concatenated and cut into contexts: the ``j``-th cut
has the tokens ``j·t … (j+1)·t-1``. The contexts that begin in an epoch are then shuffled too, so that the rows of a
batch come from many documents. The content of the stream at a place does not depend on what was read before: step ``n``
of a run has the same batch in every run and after every resume.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import grain
import numpy as np
import numpy.typing as npt

from natsjax.data.corpus import Corpus, Documents
from natsjax.data.packing import NUM_FRAME_TOKENS, Layout, Piece, Row, context_order, epoch_order, pack, stack
from natsjax.errors import UserError

Shuffle = Literal["contexts", "documents"]
"""Unit that each epoch shuffles: documents and then contexts, or documents alone."""

_CACHED_BYTES = 1 << 28  # of documents: with shuffled contexts, a document is read once for each of its contexts
_CACHED_EPOCHS = 3  # a context may be in two, and prefetching threads run ahead


class RowSource(Protocol):
    """An infinite sequence of contexts with random access, from which batches are read."""

    def rows(self, begin: int, count: int) -> Row:
        """Returns contexts ``begin … begin+count-1`` as one batch, arrays ``[count, t]``."""
        ...


class _FramedDocuments:
    """Documents with BOS and EOS, uint16 or int32, in a cache."""

    def __init__(self, documents: Documents, bos_id: int, eos_id: int):
        self._documents = documents
        self._bos = np.array([bos_id], np.int32)
        self._eos = np.array([eos_id], np.int32)
        self._cache = LRUCache(self._read, max_size=_CACHED_BYTES, size=_num_bytes)

    def __call__(self, index: int) -> npt.NDArray[np.integer]:
        return self._cache[index]

    def _read(self, index: int) -> npt.NDArray[np.integer]:
        tokens = np.concatenate([self._bos, self._documents[index], self._eos])
        return tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens  # so that the cache has twice as many


def _num_bytes(tokens: npt.NDArray) -> int:  # a function, for a lambda cannot be pickled
    return tokens.nbytes


class PackedSource:
    """The infinite stream of contexts over documents; threads may share it, and it can be pickled.

    Args:
      documents: documents to read.
      context_length: tokens in a context, ``t``.
      bos_id: id before every document.
      eos_id: id after every document.
      seed: seed of the random orders, not negative.
      shuffle: "contexts", or "documents" to read contexts in the order in which they were cut.

    Raises:
      UserError: ``context_length``, ``seed`` or ``shuffle`` is out of range, or there is no document.

    Example:
      >>> source = PackedSource.from_corpus(Corpus.load("data/sotu"), context_length=256, seed=0)
      >>> source[1_000_000]["inputs"].shape
      (256,)
    """

    def __init__(
        self,
        documents: Documents,
        *,
        context_length: int,
        bos_id: int,
        eos_id: int,
        seed: int,
        shuffle: Shuffle = "contexts",
    ):
        _check_context_length(context_length)
        if seed < 0:
            raise UserError(f"seed = {seed}: it must not be negative.")
        if shuffle not in get_args(Shuffle):
            raise UserError(f"shuffle = {shuffle!r}: one of {', '.join(map(repr, get_args(Shuffle)))} was expected.")
        self._lengths = documents.lengths
        if len(self._lengths) == 0:
            raise UserError("the training split has no documents; prepare a corpus with at least one.")
        self.context_length = context_length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch_tokens = int(self._lengths.sum()) + NUM_FRAME_TOKENS * len(self._lengths)
        self._framed = _FramedDocuments(documents, bos_id, eos_id)
        self._layouts = LRUCache(self._layout, max_size=_CACHED_EPOCHS)
        self._orders = LRUCache(self._order, max_size=_CACHED_EPOCHS)

    @classmethod
    def from_corpus(
        cls, corpus: Corpus, *, context_length: int, seed: int, split: str = "train", shuffle: Shuffle = "contexts"
    ) -> PackedSource:
        """Builds the stream of a split of a prepared corpus."""
        return cls(
            corpus.documents(split),
            context_length=context_length,
            bos_id=corpus.tokenizer.bos_id,
            eos_id=corpus.tokenizer.eos_id,
            seed=seed,
            shuffle=shuffle,
        )

    def __getitem__(self, index: int) -> Row:
        """Returns context ``index`` of the stream, arrays ``[t]`` (see ``natsjax.data.packing``)."""
        if index < 0:
            raise IndexError(f"context {index}: the stream begins at 0 and has no end")
        begin = self._cut(index) * self.context_length
        return pack(self._pieces(begin, begin + self.context_length + 1), self._framed, self.context_length)

    def piece_lengths(self) -> npt.NDArray[np.int64]:
        """Returns the lengths of all document pieces of the first epoch, int64 ``[num_pieces]``."""
        order = epoch_order(len(self._lengths), seed=self.seed, epoch=0)
        ends = np.cumsum(self._lengths[order] + NUM_FRAME_TOKENS)
        edges = np.arange(0, self.epoch_tokens, self.context_length)
        return np.diff(np.union1d(edges, ends).astype(np.int64)).astype(np.int64)

    def rows(self, begin: int, count: int) -> Row:
        """Returns contexts ``begin … begin+count-1``, arrays ``[count, t]``."""
        return stack([self[index] for index in range(begin, begin + count)])

    def _cut(self, index: int) -> int:
        """Returns the number of the cut that is context ``index``."""
        if self.shuffle == "documents":
            return index
        epoch = index * self.context_length // self.epoch_tokens
        begin = self._first_cut(epoch)
        return begin + self._orders[epoch][index - begin]

    def _first_cut(self, epoch: int) -> int:
        """Returns the first cut that begins in an epoch."""
        return -(-epoch * self.epoch_tokens // self.context_length)

    def _order(self, epoch: int) -> grain.MapDataset:
        return context_order(self._first_cut(epoch + 1) - self._first_cut(epoch), seed=self.seed, epoch=epoch)

    def _layout(self, epoch: int) -> Layout:
        return Layout(self._lengths, epoch_order(len(self._lengths), seed=self.seed, epoch=epoch))

    def _pieces(self, begin: int, end: int) -> list[Piece]:
        pieces: list[Piece] = []
        while begin < end:
            epoch, within = divmod(begin, self.epoch_tokens)
            pieces += self._layouts[epoch].pieces(within, within + end - begin)
            begin = (epoch + 1) * self.epoch_tokens
        return pieces


class _GlobalBatches:
    """Batches of a source by step, or this process's rows of them, for Grain."""

    def __init__(self, source: RowSource, batch_size: int, num_steps: int | None, rows: slice | None):
        self._source = source
        self._batch_size = batch_size
        self._first, stop, _ = (rows or slice(None)).indices(batch_size)
        self._count = stop - self._first
        self._num_steps = sys.maxsize if num_steps is None else num_steps  # the largest that `len` allows

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Row:
        return self._source.rows(step * self._batch_size + self._first, self._count)


def train_dataset(
    source: RowSource, *, batch_size: int, num_steps: int | None = None, rows: slice | None = None
) -> grain.MapDataset:
    """Returns the batches of a run: ``ds[step]`` is the global batch of that step, whatever was read before.

    Processes that share a batch read their own rows of it. The sequence of global batches does not depend on the number
    of processes.

    Args:
      source: a ``PackedSource`` or a synthetic task.
      batch_size: rows in a global batch, ``b``.
      num_steps: length of the dataset; endless if None. (Grain wraps an index beyond the end.)
      rows: rows of each global batch to read; None: all.

    Returns:
      A Grain dataset of rows ``step·b … step·b+b-1`` of the source, or ``rows`` of them, arrays ``[b, t]``.

    Raises:
      UserError: ``batch_size`` or ``num_steps`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: it must be at least 1.")
    if num_steps is not None and num_steps < 1:
        raise UserError(f"num_steps = {num_steps}: it must be at least 1, or None for an endless stream.")
    return grain.MapDataset.source(_GlobalBatches(source, batch_size, num_steps, rows))


def iterate(
    dataset: grain.MapDataset, start_step: int = 0, *, num_threads: int = 2, num_prefetched: int = 4
) -> grain.DatasetIterator:
    """Iterates over batches from ``start_step`` on, which threads prepare in advance.

    Args:
      dataset: from ``train_dataset``.
      start_step: first step to return; for a resumed run the step at which it stopped.
      num_threads: threads that prepare batches; 0: none, each batch is prepared when it is read.
      num_prefetched: batches to prepare in advance.

    Returns:
      An iterator; ``close()`` stops its threads.

    Raises:
      UserError: ``start_step`` is outside the dataset.
    """
    if not 0 <= start_step <= len(dataset):
        raise UserError(f"start_step = {start_step}: the run has steps 0 … {len(dataset)}.")
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetched)
    iterator = iter(dataset.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def evaluation_contexts(corpus: Corpus, split: str, *, context_length: int, max_contexts: int) -> Row:
    """Returns fixed contexts of a split: each document once, in stored order, cut into contexts.

    Of more than ``max_contexts``, evenly spaced ones are returned, always the same. The split's last context is padded.

    Returns:
      Arrays ``[num_contexts, t]`` (see ``natsjax.data.packing``).

    Raises:
      UserError: the split has no token to predict, or an argument is out of range.
    """
    _check_context_length(context_length)
    if max_contexts < 1:
        raise UserError(f"max_contexts = {max_contexts}: it must be at least 1.")
    documents = corpus.documents(split)
    layout = Layout(documents.lengths, np.arange(len(documents)))
    total = -(-len(layout) // context_length)
    count = min(total, max_contexts)
    framed = _FramedDocuments(documents, corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
    rows = []
    for number in range(count):
        # Centers of `count` equal parts, so that neither end of the split is favored.
        begin = (2 * number + 1) * total // (2 * count) * context_length
        rows.append(pack(layout.pieces(begin, begin + context_length + 1), framed, context_length))
    if not rows or not any(row["loss_weight"].any() for row in rows):
        raise UserError(
            f"the split {split!r} of {corpus.folder} has no text to evaluate on; prepare the corpus with "
            "held-out documents that are not empty."
        )
    return stack(rows)


def _check_context_length(context_length: int) -> None:
    if context_length < 1:
        raise UserError(f"context_length = {context_length}: it must be at least 1.")


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """A cache of the values used last, up to a total size; the newest value stays even if it alone exceeds that.

    ``functools.lru_cache`` bounds the number of entries, not their size, and cannot be pickled.

    Args:
      make: function from a missing key to its value; called without the lock, so that threads can read in parallel.
      max_size: bound on the sum of sizes.
      size: function from a value to its size; None: each has size 1.
    """

    def __init__(self, make: Callable[[K], V], *, max_size: int, size: Callable[[V], int] | None = None):
        self._make = make
        self._max_size = max_size
        self._size_of = size
        self._clear()

    def _clear(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __getitem__(self, key: K) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._make(key)
        with self._lock:
            if key not in self._values:  # another thread may have been faster
                self._values[key] = value
                self._size += self._measured(value)
                while self._size > self._max_size and len(self._values) > 1:
                    self._size -= self._measured(self._values.popitem(last=False)[1])
        return value

    def _measured(self, value: V) -> int:
        return 1 if self._size_of is None else self._size_of(value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_make", "_max_size", "_size_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()
