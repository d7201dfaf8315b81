"""The training stream and the evaluation slice of a prepared corpus, through Grain.

The stream is infinite: epoch after epoch, each with its documents in another random order, laid end to end
and cut into contexts: the `j`-th cut covers tokens `j·t … (j+1)·t-1`. The contexts that begin in an epoch are then
read in a random order of their own, so that the rows of a batch come from many documents and not from one after the
other. What is at a place of the stream does not depend on what was read before: step `n` of a run sees the same batch
in every run and after every resume.
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

from natsjax.data.corpus import Corpus
from natsjax.data.packing import NUM_FRAME_TOKENS, Layout, Piece, Row, context_order, epoch_order, pack, stack
from natsjax.errors import UserError

Shuffle = Literal["contexts", "documents"]
"""What is put into a random order in each epoch: documents and then contexts, or documents alone."""

_CACHED_BYTES = 1 << 28  # of documents: with contexts in a random order, each is read once for every context in it
_CACHED_EPOCHS = 3  # a context may touch two, and prefetching threads run ahead


class TokenisedDocuments(Protocol):
    """Documents by index; `natsjax.data.corpus.Documents` is one."""

    lengths: npt.NDArray[np.int64]

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of one document, int32 `[lengths[index]]`, without BOS and EOS."""
        ...


class RowSource(Protocol):
    """An infinite sequence of contexts with random access: what a training stream is made of."""

    def rows(self, begin: int, count: int) -> Row:
        """Contexts `begin … begin+count-1` as one batch, arrays `[count, t]`."""
        ...


class _FramedDocuments:
    """Documents with BOS and EOS around them, uint16 or int32; the ones used last are kept."""

    def __init__(self, documents: TokenisedDocuments, bos_id: int, eos_id: int):
        self._documents = documents
        self._bos = np.array([bos_id], np.int32)
        self._eos = np.array([eos_id], np.int32)
        self._cache = LRUCache(self._read, max_size=_CACHED_BYTES, size=_num_bytes)

    def __call__(self, index: int) -> npt.NDArray[np.integer]:
        return self._cache[index]

    def _read(self, index: int) -> npt.NDArray[np.integer]:
        tokens = np.concatenate([self._bos, self._documents[index], self._eos])
        return tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens  # twice as many in the cache


def _num_bytes(tokens: npt.NDArray) -> int:  # a function, for a lambda cannot be pickled
    return tokens.nbytes


class PackedSource:
    """The infinite stream of contexts over documents; threads may share it, and it can be pickled.

    Args:
      documents: what to read.
      context_length: tokens in a context, `t`.
      bos_id: id put before every document.
      eos_id: id put after every document.
      seed: which random orders; not negative.
      shuffle: "contexts", or "documents": contexts then follow one another as they were cut.

    Raises:
      UserError: `context_length`, `seed` or `shuffle` is out of range, or there is no document.

    Example:
      >>> source = PackedSource.from_corpus(Corpus.load("data/sotu"), context_length=256, seed=0)
      >>> source[1_000_000]["inputs"].shape
      (256,)
    """

    def __init__(
        self,
        documents: TokenisedDocuments,
        *,
        context_length: int,
        bos_id: int,
        eos_id: int,
        seed: int,
        shuffle: Shuffle = "contexts",
    ):
        _check_context_length(context_length)
        _check_seed(seed)
        _check_shuffle(shuffle)
        self._lengths = documents.lengths
        if len(self._lengths) == 0:
            raise UserError("the split to train on has no documents; prepare a corpus with at least one.")
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
        """The stream of a split of a prepared corpus.

        Raises:
          UserError: see the class and `Corpus.documents`.
        """
        return cls(
            corpus.documents(split),
            context_length=context_length,
            bos_id=corpus.tokenizer.bos_id,
            eos_id=corpus.tokenizer.eos_id,
            seed=seed,
            shuffle=shuffle,
        )

    def __getitem__(self, index: int) -> Row:
        """Context `index` of the stream, arrays `[t]` (see `natsjax.data.packing`)."""
        if index < 0:
            raise IndexError(f"context {index}: the stream begins at 0 and has no end to count from")
        begin = self._cut(index) * self.context_length
        return pack(self._pieces(begin, begin + self.context_length + 1), self._framed, self.context_length)

    def piece_lengths(self) -> npt.NDArray[np.int64]:
        """Lengths of all document pieces that the first epoch is cut into, int64 `[num_pieces]`."""
        order = epoch_order(len(self._lengths), seed=self.seed, epoch=0)
        ends = np.cumsum(self._lengths[order] + NUM_FRAME_TOKENS)
        edges = np.arange(0, self.epoch_tokens, self.context_length)
        return np.diff(np.union1d(edges, ends).astype(np.int64)).astype(np.int64)

    def rows(self, begin: int, count: int) -> Row:
        """Contexts `begin … begin+count-1`, arrays `[count, t]`."""
        return stack([self[index] for index in range(begin, begin + count)])

    def _cut(self, index: int) -> int:
        """Which cut of the laid out documents is context `index`."""
        if self.shuffle == "documents":
            return index
        epoch = index * self.context_length // self.epoch_tokens
        begin = self._first_cut(epoch)
        return begin + self._orders[epoch][index - begin]

    def _first_cut(self, epoch: int) -> int:
        """The first cut that begins in an epoch."""
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
    """Batch `step` of a source, or this process's rows of it, for Grain."""

    def __init__(self, source: RowSource, batch_size: int, num_steps: int | None, rows: slice | None):
        self._source = source
        self._batch_size = batch_size
        self._first, stop, _ = (rows or slice(None)).indices(batch_size)
        self._count = stop - self._first
        self._num_steps = sys.maxsize if num_steps is None else num_steps  # `len` allows no more

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Row:
        return self._source.rows(step * self._batch_size + self._first, self._count)


def train_dataset(
    source: RowSource, *, batch_size: int, num_steps: int | None = None, rows: slice | None = None
) -> grain.MapDataset:
    """The batches of a run: `ds[step]` is the global batch of that step, whatever was read before.

    Processes that share a batch read their own rows of it: the sequence of global batches does not depend on how many
    they are.

    Args:
      source: `PackedSource`, or a synthetic task.
      batch_size: rows in a global batch, `b`.
      num_steps: length of the dataset; endless if None. (Grain wraps an index beyond the end.)
      rows: which rows of each global batch to read; None: all of them.

    Returns:
      A Grain dataset of rows `step·b … step·b+b-1` of the source, arrays `[b, t]` (or `[r, t]`, the `rows` of them).

    Raises:
      UserError: `batch_size` or `num_steps` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    if num_steps is not None and num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; it must be at least 1, or None for an endless stream.")
    return grain.MapDataset.source(_GlobalBatches(source, batch_size, num_steps, rows))


def iterate(
    dataset: grain.MapDataset, start_step: int = 0, *, num_threads: int = 2, num_prefetched: int = 4
) -> grain.DatasetIterator:
    """Batches from `start_step` on, made ahead of time by threads.

    Args:
      dataset: from `train_dataset`.
      start_step: the first step to give; a resumed run passes the step that it stopped at.
      num_threads: threads that make batches; 0 makes them when asked.
      num_prefetched: batches to keep ready.

    Returns:
      An iterator; `close()` stops its threads.

    Raises:
      UserError: `start_step` lies outside the dataset.
    """
    if not 0 <= start_step <= len(dataset):
        raise UserError(f"start_step is {start_step}; the run has steps 0 … {len(dataset)}.")
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetched)
    iterator = iter(dataset.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def evaluation_contexts(corpus: Corpus, split: str, *, context_length: int, max_contexts: int) -> Row:
    """A fixed slice of a split: each document once, in stored order, cut into contexts.

    Where there are more than `max_contexts`, that many are taken at evenly spaced places, always the same
    ones.

    Args:
      corpus: a prepared corpus.
      split: `"validation"` or `"train"`.
      context_length: tokens in a context, `t`.
      max_contexts: how many contexts at most.

    Returns:
      Arrays `[num_contexts, t]` (see `natsjax.data.packing`); the split's last context is padded.

    Raises:
      UserError: the split has no token to predict, or an argument is out of range.
    """
    _check_context_length(context_length)
    if max_contexts < 1:
        raise UserError(f"max_contexts is {max_contexts}; it must be at least 1.")
    documents = corpus.documents(split)
    layout = Layout(documents.lengths, np.arange(len(documents)))
    total = -(-len(layout) // context_length)
    count = min(total, max_contexts)
    framed = _FramedDocuments(documents, corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
    rows = []
    for number in range(count):
        # Centres of `count` equal parts: neither the beginning nor the end of the split is favoured.
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
        raise UserError(f"context_length is {context_length}; it must be at least 1.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative.")


def _check_shuffle(shuffle: str) -> None:
    if shuffle not in get_args(Shuffle):
        raise UserError(f"shuffle is {shuffle!r}; one of {', '.join(map(repr, get_args(Shuffle)))} was expected.")


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Keeps the values used last, up to a total size; the newest one stays even if it alone exceeds that.

    `functools.lru_cache` bounds the number of entries, not their size, and cannot be pickled.

    Args:
      make: gives the value of a key that is not there; runs outside the lock, so that threads can read in
        parallel.
      max_size: bound on the sum of sizes.
      size: size of a value; 1 for each by default.
    """

    def __init__(self, make: Callable[[K], V], *, max_size: int, size: Callable[[V], int] | None = None):
        self._make = make
        self._max_size = max_size
        self._size_of = size or _one
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
                self._size += self._size_of(value)
                while self._size > self._max_size and len(self._values) > 1:
                    self._size -= self._size_of(self._values.popitem(last=False)[1])
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_make", "_max_size", "_size_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()


def _one(_: object) -> int:  # a function, for a lambda cannot be pickled
    return 1
