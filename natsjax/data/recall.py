"""Multi-query associative recall with filler, a task that needs the right tokens in the KV cache.

    ⟨bos⟩ f3 f1 k7 v2 f5 f0 k1 v9 f2 …  |  … f4 k1 v9 f1 f6 k7 v2 …
    pairs in the first half                asked keys, each followed by its value, which is predicted

After Arora et al. 2023, "Zoology" (https://arxiv.org/abs/2312.04927), with filler between the pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from natsjax.data.packing import Row
from natsjax.errors import UserError

SPLITS = ("train", "validation")
KINDS = ("bos", "key", "value", "filler")

_WORDS_PER_COUNT = 4  # a step of Philox's counter gives four 64-bit words


@dataclass(frozen=True)
class RecallTask:
    """An endless set of rows, each a pure function of (seed, split, index).

    A row has exactly ``context_length`` tokens: BOS; in the first half ``num_pairs`` adjacent (key, value) pairs
    with distinct keys, at random places that do not overlap; in the second half the asked keys in random
    order at random places, each followed by its value; everything else is random filler. Values are sampled with
    replacement. Only the values after asked keys are predicted: ``loss_weight`` is 1 at the asked keys and 0
    elsewhere. A row is one document, so ``positions`` never restart.

    The interface is that of ``PackedSource`` (``rows``, indexing) and of ``Vocabulary``.

    Attributes:
      context_length: tokens in a row, at least 16.
      num_pairs: pairs in the first half.
      num_keys: distinct keys, at least ``num_pairs``.
      num_values: distinct values.
      num_fillers: distinct filler tokens.
      num_queries: asked keys, at most ``num_pairs``; 0: all.
      seed: seed of the rows, not negative.

    Raises:
      UserError: a field is out of range, or the pairs do not fit into half the context.

    Example:
      >>> task = RecallTask(context_length=128, num_pairs=4, num_keys=16, num_values=16, num_fillers=16)
      >>> task.rows(0, 128)["inputs"].shape
      (128, 128)
    """

    context_length: int
    num_pairs: int
    num_keys: int
    num_values: int
    num_fillers: int
    num_queries: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_keys", "num_values", "num_fillers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: it must be at least 1.")
        if self.context_length < 16:
            raise UserError(f"context_length = {self.context_length}: recall needs at least 16 tokens.")
        if self.num_keys < self.num_pairs:
            raise UserError(
                f"num_keys = {self.num_keys}: fewer than num_pairs = {self.num_pairs}, but the keys of a row are "
                "distinct; give more keys or fewer pairs."
            )
        if not 0 <= self.num_queries <= self.num_pairs:
            raise UserError(
                f"num_queries = {self.num_queries}: it must be between 0 (all) and num_pairs = {self.num_pairs}."
            )
        if self.seed < 0:
            raise UserError(f"seed = {self.seed}: it must not be negative.")
        capacity = (self._half - 1) // 2
        if self.num_pairs > capacity:
            raise UserError(
                f"num_pairs = {self.num_pairs}: half of context_length = {self.context_length} has space for "
                f"{capacity} pairs; use fewer pairs or a longer context."
            )

    @property
    def bos_id(self) -> int:
        """Id of BOS."""
        return 0

    @property
    def vocab_size(self) -> int:
        """Number of ids: BOS, keys, values and fillers, in this order."""
        return len(self.token_kind)

    @property
    def token_bytes(self) -> None:
        """None: these tokens stand for no text."""
        return None

    @functools.cached_property
    def token_kind(self) -> npt.NDArray[np.str_]:
        """Kind of each id, ``[vocab_size]``: ``"bos"``, ``"key"``, ``"value"`` or ``"filler"``."""
        return np.repeat(KINDS, [1, self.num_keys, self.num_values, self.num_fillers])

    def kind_of(self, token_id: int) -> str:
        """Returns ``"bos"``, ``"key"``, ``"value"`` or ``"filler"``."""
        return str(self.token_kind[token_id])

    def token_text(self, token_id: int) -> str:
        """Returns ``⟨bos⟩``, or the kind's initial and a number: ``k3``, ``v0``, ``f7``."""
        kind = self.kind_of(token_id)
        return "⟨bos⟩" if kind == "bos" else f"{kind[0]}{token_id - self._first_id(kind)}"

    def __getitem__(self, index: int) -> Row:
        """Returns training row ``index``, arrays ``[t]``."""
        return {name: values[0] for name, values in self.rows(index, 1).items()}

    def evaluation_contexts(self, num: int) -> Row:
        """Returns the first ``num`` validation rows, arrays ``[num, t]``."""
        return self.rows(0, num, split="validation")

    def rows(self, begin: int, count: int, *, split: str = "train") -> Row:
        """Returns rows ``begin … begin+count-1`` of a split, arrays ``[count, t]`` (see ``natsjax.data.packing``).

        Raises:
          IndexError: ``begin`` is negative.
          UserError: there is no such split.
        """
        if begin < 0:
            raise IndexError(f"row {begin}: rows are counted from 0 and have no end")
        if split not in SPLITS:
            raise UserError(f"the recall task has no split {split!r}; it has {', '.join(SPLITS)}.")
        tokens, asked_places = self._tokens(self._random_words(begin, count, split))
        loss_weight = np.zeros(tokens.shape, np.float32)
        np.put_along_axis(loss_weight, asked_places, 1, axis=1)
        targets = np.zeros_like(tokens)
        targets[:, :-1] = tokens[:, 1:]
        index = np.arange(begin, begin + count) % (1 << 31)  # an int32 label; wraps around after 2**31 rows
        return {
            "inputs": tokens,
            "targets": targets,
            "loss_weight": loss_weight,
            "positions": np.tile(np.arange(self.context_length, dtype=np.int32), (count, 1)),
            "document_end": np.full(tokens.shape, self.context_length, np.int32),
            "document_id": np.repeat(index.astype(np.int32)[:, None], self.context_length, axis=1),
        }

    @property
    def _half(self) -> int:
        """Index at which the second half begins."""
        return self.context_length // 2

    @property
    def _num_asked(self) -> int:
        return self.num_queries or self.num_pairs

    def _first_id(self, kind: str) -> int:
        return int(np.argmax(self.token_kind == kind))

    def _random_words(self, begin: int, count: int, split: str) -> dict[str, npt.NDArray[np.uint64]]:
        """Returns independent 64-bit numbers for every purpose, uint64 ``[count, n]`` each.

        Every row has a fixed range of a counter-based generator, so any row can be computed alone, and many at once.
        Raw words and stable sorts give the same rows under every version of NumPy, which ``Generator`` does not
        guarantee.
        """
        sizes = {
            "pair_places": self._half - 1 - self.num_pairs,
            "query_places": self.context_length - self._half - self._num_asked,
            "keys": self.num_keys,
            "values": self.num_pairs,
            "asked": self.num_pairs,
            "fillers": self.context_length,
        }
        counts_per_row = -(-sum(sizes.values()) // _WORDS_PER_COUNT)
        bits = np.random.Philox(np.random.SeedSequence([self.seed, SPLITS.index(split)]))
        bits.advance(begin * counts_per_row)
        words = bits.random_raw(count * counts_per_row * _WORDS_PER_COUNT).reshape(count, -1)
        parts = np.split(words, np.cumsum(list(sizes.values())), axis=1)
        return dict(zip(sizes, parts, strict=False))  # the last part is unused: counts are rounded up

    def _tokens(self, words: dict[str, npt.NDArray[np.uint64]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Returns token ids, int32 ``[count, t]``, and the places of the asked keys, int64 ``[count, num_queries]``."""
        keys = self._first_id("key") + _sample(words["keys"], self.num_pairs)
        values = self._first_id("value") + _below(words["values"], self.num_values)
        asked = _sample(words["asked"], self._num_asked)
        pair_places = 1 + _pair_places(words["pair_places"], self.num_pairs)
        asked_places = self._half + _pair_places(words["query_places"], self._num_asked)

        tokens = (self._first_id("filler") + _below(words["fillers"], self.num_fillers)).astype(np.int32)
        tokens[:, 0] = self.bos_id
        np.put_along_axis(tokens, pair_places, keys, axis=1)
        np.put_along_axis(tokens, pair_places + 1, values, axis=1)
        np.put_along_axis(tokens, asked_places, np.take_along_axis(keys, asked, axis=1), axis=1)
        np.put_along_axis(tokens, asked_places + 1, np.take_along_axis(values, asked, axis=1), axis=1)
        return tokens, asked_places


def _below(words: npt.NDArray[np.uint64], bound: int) -> npt.NDArray[np.int64]:
    """Returns uniform integers in [0, bound), with the shape of ``words``; the bias is below bound / 2**64."""
    return (words % np.uint64(bound)).astype(np.int64)


def _sample(words: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.int64]:
    """Samples ``size`` different indices into each row of ``words [b, n]``, in random order, int64 ``[b, size]``."""
    return np.argsort(words, axis=1, kind="stable")[:, :size]


def _pair_places(words: npt.NDArray[np.uint64], num_pairs: int) -> npt.NDArray[np.int64]:
    """Samples places of pairs that do not overlap, ascending, int64 ``[b, num_pairs]``, all equally likely.

    ``words``, uint64 ``[b, length - num_pairs]``, has a random number for each cell if a pair is one cell.
    """
    cells = np.sort(_sample(words, num_pairs), axis=1)
    return cells + np.arange(num_pairs)  # each pair before it takes one more place than its cell
