"""Which documents are held out for validation: decided by their ids alone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from natsjax.errors import UserError

_HASH_BYTES = 8
_BOUNDARIES = (re.compile(r"\n(?:[ \t\r]*\n)+"), re.compile(r"\n"), re.compile(r"\s+"))
_NUM_HASHES = 1 << (8 * _HASH_BYTES)


@dataclass(frozen=True)
class HoldOut:
    """A seeded split by document id.

    The order of files plays no part, documents with equal ids fall on the same side, and a document stays on
    its side when others are added (but for corpora so small that one side would be empty).

    Attributes:
      seed: which split.
      threshold: documents whose hash lies below it are held out.
    """

    seed: int
    threshold: int

    @classmethod
    def choose(cls, hashes: npt.NDArray[np.uint64], *, fraction: float, seed: int) -> HoldOut:
        """Hold out about `fraction` of the documents, and at least one, and never all.

        Args:
          hashes: uint64 `[num_documents]`, `hash_id` of every document.
          fraction: share to hold out, in (0, 1).
          seed: the one that the hashes were made with.

        Raises:
          UserError: fewer than two different ids.
        """
        lowest, highest = (int(hashes.min()), int(hashes.max())) if len(hashes) else (0, 0)
        if lowest == highest:
            raise UserError(
                f"the input holds {len(hashes)} documents and fewer than two documents with different ids, so none can "
                "be held out for validation (an id is what the field id says, else a document's place); add documents, "
                "name others with validation_input, or give that field another name if it is no id."
            )
        # In a small corpus the fraction may miss every document, or hit all of them.
        threshold = min(max(round(fraction * _NUM_HASHES), lowest + 1), highest)
        return cls(seed, threshold)

    def __contains__(self, document_id: str) -> bool:
        return hash_id(document_id, self.seed) < self.threshold


def hash_id(document_id: str, seed: int) -> int:
    """A number in [0, 2**64) that looks random, from a document's id and a seed."""
    key = str(seed).encode()
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=_HASH_BYTES, key=key).digest()
    return int.from_bytes(digest, "big")


def end_held_out(document_id: str, text: str, fraction: float) -> list[tuple[str, str]]:
    """A document as two, for want of others to hold out: its beginning, and about `fraction` of it, its end.

    The cut is where a paragraph begins near that place, or else a line, a word, or a character: the first of these that
    is found within a quarter of the end's length. Both parts have text in them, and together they are the document.

    Args:
      document_id: its id; the parts have `:beginning` and `:end` behind it.
      text: of the document, with some text in it.
      fraction: share of the characters, in (0, 1).

    Returns:
      Id and text of the beginning and the end.

    Raises:
      UserError: the text is too short.
    """
    # Where a part would be white space alone, no cut will do.
    first = len(text) - len(text.lstrip()) + 1
    last = len(text.rstrip()) - 1
    if last < first:
        raise UserError(
            f"{document_id} is the only document of the input and too short to hold its end out for validation, and "
            "fewer than two documents cannot be divided otherwise; add documents, or name others with validation_input."
        )
    wanted = min(max(round(len(text) * (1 - fraction)), first), last)
    reach = max(1, round(len(text) * fraction / 4))
    low, high = max(first, wanted - reach), min(last, wanted + reach)
    cut = wanted
    for pattern in _BOUNDARIES:
        places = [match.end() for match in pattern.finditer(text, max(0, low - 2), min(len(text), high + 2))]
        if places := [place for place in places if low <= place <= high]:
            cut = min(places, key=lambda place: abs(place - wanted))
            break
    return [(f"{document_id}:beginning", text[:cut]), (f"{document_id}:end", text[cut:])]
