"""Slices of the held-out tokens: those where memory matters, which the mean over all tokens hides.

Two kinds, each a partition of the predicted tokens into named sets:

* "bigrams": a token *completes* the bigram of its input and itself. Where the document piece has had that bigram
  before, attention can read what came next then; a model without memory must know it from training, and a rare bigram
  it does not know. By the distance of its last occurrence.
* "long_context": the tokens that the dense baseline predicts far better with all that it can read than with a short
  context: the key tokens of LongPPL.

Sources: "bigrams" are the associative-recall hits of Zoology (arXiv:2312.04927), by distance; LongPPL is
arXiv:2410.23771.

Axis letters: ``n`` contexts, ``t`` token.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from natsjax.data import Row
from natsjax.data.packing import piece_spans
from natsjax.errors import UserError
from natsjax.evaluate import DEFAULT_RARE
from natsjax.evaluate.masked import Slices, token_nll
from natsjax.policies.interval import FullAttention
from natsjax.runs.load import LoadedRun
from natsjax.runtime.progress import bar

KINDS = ("bigrams", "long_context")
"""Kinds of slices."""

ALL = "all tokens"
LONG_CONTEXT = "long context helps"

LEAST_GAIN = 2.0
"""Nats that a long context gains at least: alpha of LongPPL."""

LEAST_LOG_PROBABILITY = -2.0
"""Log-probability that the token has at least with the long context, nats: beta of LongPPL."""

_NEAR = 32  # tokens: the first bucket of distances
_CHUNK = 1 << 20  # training tokens that are counted at once


@dataclasses.dataclass(frozen=True)
class SliceSettings:
    """Choice of slices.

    Attributes:
      kinds: of ``KINDS``.
      rare: most occurrences in the training text of a rare bigram, 0 or more.
      short_context: fewest tokens of the short context, 1 or more; None: an eighth of the context length, as the paper
        has it (4096 of 32768).

    Raises:
      UserError: a kind is unknown, or a number is out of range.
    """

    kinds: Sequence[str] = KINDS
    rare: int = DEFAULT_RARE
    short_context: int | None = None

    def __post_init__(self) -> None:
        if not self.kinds or (unknown := [kind for kind in self.kinds if kind not in KINDS]):
            named = unknown[0] if self.kinds else ""
            raise UserError(f"--slices={named}: there are no such slices; choose {' or '.join(KINDS)}, or both.")
        if self.rare < 0:
            raise UserError(f"--rare={self.rare}: nothing occurs as often as that; choose 0 or more.")
        if self.short_context is not None and self.short_context < 1:
            raise UserError(f"--short_context={self.short_context}: a context has no such length; choose 1 or more.")

    def check(self, run: LoadedRun, dense: LoadedRun | None) -> None:
        """Refuses what ``find`` would refuse, before anything is measured.

        Args:
          run: on whose held-out text.
          dense: its dense baseline, or the run itself.

        Raises:
          UserError: there is no dense baseline, no training text, or the short context is no shorter than the contexts.
        """
        if "long_context" in self.kinds and dense is None:
            raise UserError(
                "--slices=long_context: these are tokens that a dense baseline gains on, and none is here; name one as "
                "--baseline_workdir, or ask for --slices=bigrams alone."
            )
        if "bigrams" in self.kinds and run.data.training_documents is None:
            raise UserError(
                f"--slices=bigrams: {run.data.description} has no training documents whose bigrams could be counted; "
                "leave bigrams out."
            )
        length, short = run.config.data.context_length, self._short_of(run)
        if "long_context" in self.kinds and short + _stride(short) > length:
            raise UserError(
                f"--short_context={short}: it is hardly shorter than data.context_length = {length}, and both would be "
                f"the same; choose {max(1, length // 2)} or less."
            )

    def find(self, run: LoadedRun, contexts: Row, dense: LoadedRun | None, *, progress: bool = False) -> Slices:
        """Finds the slices of held-out contexts.

        Args:
          run: a run on the data.
          contexts: arrays ``[n, t]`` (``natsjax.data.packing``).
          dense: the dense baseline, whose gain selects tokens.
          progress: show a progress bar.

        Raises:
          UserError: see ``check``.
        """
        self.check(run, dense)
        found = {ALL: contexts["loss_weight"] > 0}
        if "bigrams" in self.kinds:
            found |= bigram_slices(contexts, _training_documents(run, progress), self.rare)
        if "long_context" in self.kinds:
            assert dense is not None
            found |= long_context_slices(dense, contexts, self._short_of(run))
        return found

    @property
    def flags(self) -> list[str]:
        """The flags of ``python -m natsjax.evaluate`` that choose the same."""
        short = [] if self.short_context is None else [f"--short_context={self.short_context}"]
        return [f"--slices={','.join(self.kinds)}", f"--rare={self.rare}", *short]

    def about(self, run: LoadedRun) -> str:
        """Describes the slices in a sentence or two."""
        sentences = []
        if "bigrams" in self.kinds:
            sentences.append(
                f"A bigram is rare that occurs at most {self.rare} times in the training split; it is seen again where "
                "the same document piece had it before."
            )
        if "long_context" in self.kinds:
            short = self._short_of(run)
            sentences.append(
                f"A long context helps where the dense baseline's log-probability gains more than {LEAST_GAIN:g} nats "
                f"over a context of {short} to {short + _stride(short) - 1} tokens, and is above "
                f"{LEAST_LOG_PROBABILITY:g}."
            )
        return " ".join(sentences)

    def _short_of(self, run: LoadedRun) -> int:
        return max(1, run.config.data.context_length // 8) if self.short_context is None else self.short_context


def _training_documents(run: LoadedRun, progress: bool) -> Iterator[np.ndarray]:
    """Yields the token ids of each training document, one after the other."""
    assert run.data.training_documents is not None
    for documents in run.data.training_documents():
        for index in bar(range(len(documents)), "counting the bigrams of training documents", progress):
            yield documents[index]


def mark(members: np.ndarray) -> str:
    """Hashes a slice, bool ``[n, t]``: evaluations on the same contexts compare one only where the marks are equal."""
    return hashlib.sha256(np.packbits(members).tobytes()).hexdigest()[:16]


def bigram_slices(contexts: Row, training_documents: Iterable[np.ndarray], rare: int) -> Slices:
    """Divides the predicted tokens by whether their bigram is rare and was seen before in the document piece.

    Args:
      contexts: arrays ``[n, t]``.
      training_documents: token ids of each training document, int.
      rare: most occurrences in them of a rare bigram.

    Returns:
      Rare bigrams that were seen before, all of them and by the distance of the last occurrence; other bigrams that
      were seen before; and bigrams that were not. The first is the union of the buckets, and the others with it are a
      partition of the predicted tokens.
    """
    predicted = contexts["loss_weight"] > 0
    distance = np.where(predicted, bigram_distance(contexts), 0)
    is_seen = distance > 0
    bigrams = _bigrams(contexts["inputs"], contexts["targets"])
    known, place = np.unique(bigrams[is_seen], return_inverse=True)
    is_rare = np.zeros_like(is_seen)
    is_rare[is_seen] = (count_bigrams(known, training_documents) <= rare)[place]
    found = {"rare bigram seen again": is_rare}
    for low, high in _distances(contexts["inputs"].shape[1]):
        members = is_rare & (low <= distance) & (distance <= high)
        found[f"rare bigram seen again, {low} to {high} back"] = members
    return found | {
        "other bigram seen again": is_seen & ~is_rare,
        "bigram not seen before": predicted & ~is_seen,
    }


def bigram_distance(contexts: Row) -> np.ndarray:
    """Computes how far back in its document piece each token's bigram has last begun.

    Args:
      contexts: arrays ``[n, t]``.

    Returns:
      int64 ``[n, t]``: from the input at ``i`` to the last equal input before it that was followed by the same target;
      0 where the piece has none, and at padding.
    """
    distance = np.zeros(contexts["inputs"].shape, np.int64)
    bigrams = _bigrams(contexts["inputs"], contexts["targets"])
    for row, start, stop in zip(*piece_spans(contexts), strict=True):
        piece = bigrams[row, start:stop]
        order = np.argsort(piece, kind="stable")  # equal ones together, each group in the order of the text
        is_again = piece[order][1:] == piece[order][:-1]
        distance[row, start + order[1:][is_again]] = np.diff(order)[is_again]
    # The target of a piece's last token is not of its document.
    return np.where(contexts["loss_weight"] > 0, distance, 0)


def count_bigrams(bigrams: np.ndarray, documents: Iterable[np.ndarray]) -> np.ndarray:
    """Counts the occurrences of bigrams in documents, which are read one after the other.

    Args:
      bigrams: int64 ``[m]``, ascending and each once, as ``_bigrams`` numbers them; memory grows with these alone.
      documents: token ids of each, int.

    Returns:
      int64 ``[m]``.
    """
    counts = np.zeros(len(bigrams), np.int64)
    if not len(bigrams):
        return counts
    for tokens in _chunks(documents):
        found = _bigrams(tokens[:-1], tokens[1:])
        place = np.minimum(np.searchsorted(bigrams, found), len(bigrams) - 1)
        counts += np.bincount(place[bigrams[place] == found], minlength=len(bigrams))
    return counts


def _chunks(documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields parts of documents of up to ``_CHUNK`` tokens; each but the first of a document repeats one token.

    Short documents are joined, with a token between them that is in no bigram: -1.
    """
    kept: list[np.ndarray] = []
    size = 0
    for document in documents:
        for begin in range(0, max(len(document) - 1, 0), _CHUNK):
            part = document[begin : begin + _CHUNK + 1]
            kept += [part, np.array([-1], part.dtype)]
            size += len(part)
            if size >= _CHUNK:
                yield np.concatenate(kept)
                kept, size = [], 0
    if kept:
        yield np.concatenate(kept)


def _bigrams(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Numbers bigrams, int64; those with a token -1 have numbers that no other has."""
    return (first.astype(np.int64) << 32) + second.astype(np.int64)


def _distances(length: int) -> list[tuple[int, int]]:
    """Lists the buckets of distances below a context length: 1 to 32, 33 to 64, 65 to 128, …; ends are included."""
    found, low, high = [], 1, _NEAR
    while low < length:
        found.append((low, min(high, length - 1)))
        low, high = high + 1, 2 * high
    return found


def long_context_slices(dense: LoadedRun, contexts: Row, short: int) -> Slices:
    """Divides the predicted tokens by whether the dense baseline gains from its long context.

    Args:
      dense: the dense baseline.
      contexts: arrays ``[n, t]``.
      short: fewest tokens of the short context.
    """
    predicted = contexts["loss_weight"] > 0
    policy = FullAttention()
    nll = token_nll(dense, contexts, policy)
    helps = predicted & gains(nll, short_context_nll(contexts, nll, short, lambda rows: token_nll(dense, rows, policy)))
    return {LONG_CONTEXT: helps, "long context helps little": predicted & ~helps}


def gains(long_nll: np.ndarray, short_nll: np.ndarray) -> np.ndarray:
    """Selects tokens that a long context helps: log-probability up by more than 2 nats, to more than -2.

    Args:
      long_nll, short_nll: negative log-likelihood with the long and the short context, nats, any shape.

    Source: the long-short difference and the long-context likelihood of arXiv:2410.23771, with the thresholds of its
    official code, https://github.com/PKU-ML/LongPPL.
    """
    return (short_nll - long_nll > LEAST_GAIN) & (-long_nll > LEAST_LOG_PROBABILITY)


def short_context_nll(
    contexts: Row, long_nll: np.ndarray, short: int, predict: Callable[[Row], np.ndarray]
) -> np.ndarray:
    """Predicts every token from a short context: the text before it, cut off.

    The text is cut and nothing is masked: under a mask the later layers would still see further back, and weights that
    have always read the first token fail without it (StreamingLLM), which would count as a gain of the long context.
    Each cut begins a document piece of its own, as every context edge does in training.

    Args:
      contexts: arrays ``[n, t]``.
      long_nll: float64 ``[n, t]``, with the long context, nats; tokens that have no more to read than a short context
        keep it.
      short: fewest tokens of a short context. Cuts are a quarter of it apart, as in the paper's code, so a prediction
        reads up to a quarter more.
      predict: function from contexts ``[m, t]`` to their ``nll``, float64 ``[m, t]``.

    Returns:
      float64 ``[n, t]``, nats.
    """
    found, length = long_nll.copy(), contexts["inputs"].shape[1]
    segments = [
        (row, begin, min(begin + short + _stride(short) - 1, stop))
        for row, start, stop in zip(*(values.tolist() for values in piece_spans(contexts)), strict=True)
        for begin in range(start + _stride(short), stop - short + 1, _stride(short))
    ]
    if not segments:
        return found
    per_row = length // (short + _stride(short) - 1)
    rows = [segments[first : first + per_row] for first in range(0, len(segments), per_row)]
    cut = {name: np.zeros((len(rows), length), np.int32) for name in ("inputs", "targets", "positions", "document_end")}
    places = []
    for number, parts in enumerate(rows):
        at = 0
        for row, begin, stop in parts:
            here = slice(at, at + stop - begin)
            for name in ("inputs", "targets"):
                cut[name][number, here] = contexts[name][row, begin:stop]
            cut["positions"][number, here] = np.arange(stop - begin)
            cut["document_end"][number, here] = here.stop
            places.append((row, slice(begin + short - 1, stop), number, slice(at + short - 1, here.stop)))
            at = here.stop
    nll = predict(cut)
    for row, there, number, here in places:
        found[row, there] = nll[number, here]
    return found


def _stride(short: int) -> int:
    """Returns the tokens from one cut to the next."""
    return max(1, short // 4)
