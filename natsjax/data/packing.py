"""Concatenation of documents and their division into contexts: pure functions of arrays.

A *framed* document is BOS + its tokens + EOS. A *piece* is the part of a framed document in one context. A piece that
begins or ends at the edge of a context counts as a document of its own there: positions start at 0 again.

A context, or *row*, is a dict of arrays over its ``t`` tokens, and a batch the same with a leading axis ``b``:

| field | dtype | |
|---|---|---|
| ``inputs`` | int32 | token ids; 0 where padded |
| ``targets`` | int32 | next token in the stream; 0 where there is none |
| ``loss_weight`` | float32 | 1 where the target is in the same document, else 0 (EOS as input, padding) |
| ``positions`` | int32 | distance to the start of the piece; 0 where padded |
| ``document_end`` | int32 | index in the context where the piece ends, exclusive; 0 where padded |
| ``document_id`` | int32 | index of the document in its split; -1 where padded |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grain
import numpy as np
import numpy.typing as npt

Row = dict[str, np.ndarray]
"""One context, arrays ``[t]``; or a batch of them, arrays ``[b, t]``."""

NUM_FRAME_TOKENS = 2  # BOS and EOS around every document


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin … end-1`` of a framed document (0 is its BOS)."""

    document: int
    begin: int
    end: int


class Layout:
    """The places of the documents of one pass in the stream.

    Args:
      lengths: int64 ``[num_documents]``, tokens in each document, without BOS and EOS.
      order: int ``[num_documents]``, indices of the documents in their order in the stream.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], order: npt.NDArray[np.integer]):
        self._order = order
        self._offsets = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths[order] + NUM_FRAME_TOKENS, out=self._offsets[1:])

    def __len__(self) -> int:
        """Returns the number of tokens of the pass."""
        return int(self._offsets[-1])

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """Returns the pieces at ``begin … end-1``, clipped to the pass. O(log n + number of pieces)."""
        pieces = []
        end = min(end, len(self))
        place = int(np.searchsorted(self._offsets, begin, side="right")) - 1
        while begin < end:
            start, stop = int(self._offsets[place]), int(self._offsets[place + 1])
            pieces.append(Piece(int(self._order[place]), begin - start, min(stop, end) - start))
            begin = stop
            place += 1
        return pieces


def epoch_order(num_documents: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Returns the random order of documents in an epoch, int64 ``[num_documents]``, a function of seed and epoch.

    NumPy keeps the raw output of its bit generators and of ``SeedSequence`` stable, but not that of
    ``Generator.permutation`` (NEP 19). Sorting raw numbers keeps old runs resumable under any NumPy.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(num_documents), kind="stable")


def context_order(num_contexts: int, *, seed: int, epoch: int) -> grain.MapDataset:
    """Returns a random order of the contexts of an epoch, with random access in constant memory.

    Element ``i`` of the dataset is the number of the ``i``-th context; a function of seed and epoch.
    """
    # Grain takes 32 bits; the third number makes them differ from those of `epoch_order`.
    bits = int(np.random.SeedSequence([seed, epoch, 1]).generate_state(1, np.uint32)[0])
    return grain.MapDataset.range(num_contexts).shuffle(seed=bits)


def pack(pieces: Sequence[Piece], framed: Callable[[int], npt.NDArray[np.integer]], context_length: int) -> Row:
    """Assembles a context from its pieces.

    Args:
      pieces: pieces of the context and of the one token after it; fewer tokens are padded.
      framed: function from a document's index to BOS + tokens + EOS, integers.
      context_length: ``t``.
    """
    length = context_length + 1
    tokens = np.zeros(length, np.int32)
    piece_number = np.full(length, -1, np.int32)
    positions = np.zeros(length, np.int32)
    document_end = np.zeros(length, np.int32)
    document_id = np.full(length, -1, np.int32)
    at = 0
    for number, piece in enumerate(pieces):
        here = slice(at, at + piece.end - piece.begin)
        tokens[here] = framed(piece.document)[piece.begin : piece.end]
        piece_number[here] = number
        positions[here] = np.arange(here.stop - at)
        document_end[here] = min(here.stop, context_length)
        document_id[here] = piece.document
        at = here.stop
    same_document = (piece_number[1:] == piece_number[:-1]) & (piece_number[:-1] >= 0)
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:].copy(),  # not a view: changing it must not change the inputs
        "loss_weight": same_document.astype(np.float32),
        "positions": positions[:-1],
        "document_end": document_end[:-1],
        "document_id": document_id[:-1],
    }


def stack(rows: Sequence[Row]) -> Row:
    """Stacks rows ``[t]`` to a batch ``[b, t]``."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def piece_lengths(contexts: Row) -> npt.NDArray[np.int64]:
    """Returns the lengths of all document pieces, int64 ``[num_pieces]``, row by row, without padding.

    Args:
      contexts: arrays with ``positions`` and ``document_end``, ``[t]`` or ``[b, t]``.

    Example:
      >>> piece_lengths({"positions": np.array([0, 1, 0, 0]), "document_end": np.array([2, 2, 3, 0])})
      array([2, 1])
    """
    _, starts, stops = piece_spans(contexts)
    return stops - starts


def piece_spans(contexts: Row) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the place of every document piece, row by row, of the arrays that ``piece_lengths`` takes.

    Returns:
      ``(row, start, stop)``, int64 ``[num_pieces]`` each: the context, the first token, and the end, exclusive.
    """
    positions, document_end = np.atleast_2d(contexts["positions"], contexts["document_end"])
    rows, starts = np.nonzero((positions == 0) & (document_end > 0))
    return rows, starts, document_end[rows, starts].astype(np.int64)
