"""Selection of the documents that are held out for validation, by their ids."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import numpy.typing as npt

from natsjax.errors import UserError

_HASH_BYTES = 8
_NUM_HASHES = 1 << (8 * _HASH_BYTES)
_BOUNDARIES = (re.compile(r"\n(?:[ \t\r]*\n)+"), re.compile(r"\n"), re.compile(r"\s+"))


def hash_id(document_id: str, seed: int) -> int:
    """Hashes a document's id and a seed to a number in [0, 2**64)."""
    key = str(seed).encode()
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=_HASH_BYTES, key=key).digest()
    return int.from_bytes(digest, "big")


def hold_out_threshold(hashes: npt.NDArray[np.uint64], fraction: float) -> int:
    """Returns the threshold below which documents are held out: about that fraction, at least one and not all.

    The split does not depend on the order of files. Documents with equal ids are on the same side, and a document stays
    on its side when others are added (unless the corpus is so small that one side would be empty).

    Args:
      hashes: uint64 ``[num_documents]``, ``hash_id`` of every document.
      fraction: fraction to hold out, in (0, 1).

    Raises:
      UserError: fewer than two different ids.
    """
    lowest, highest = (int(hashes.min()), int(hashes.max())) if len(hashes) else (0, 0)
    if lowest == highest:
        raise UserError(
            f"the input has {len(hashes)} documents and fewer than two with different ids, so none can be held out "
            "for validation (the id is the field id, else the document's place); add documents, give others as "
            "validation_input, or rename the field if it is no id."
        )
    # In a small corpus the fraction may miss every document, or hit all of them.
    return min(max(round(fraction * _NUM_HASHES), lowest + 1), highest)


def end_held_out(document_id: str, text: str, fraction: float) -> list[tuple[str, str]]:
    """Splits the only document of an input in two: its beginning, and its end, about ``fraction`` of it.

    The cut is at the beginning of a paragraph near that place, or else of a line or a word, or at any character: the
    first of these within a quarter of the end's length. Both parts have text, and together they are the document.

    Returns:
      Id (with ``:beginning`` and ``:end`` appended) and text of both parts.

    Raises:
      UserError: the text is too short.
    """
    # Neither part may be white space only.
    first = len(text) - len(text.lstrip()) + 1
    last = len(text.rstrip()) - 1
    if last < first:
        raise UserError(
            f"{document_id} is the only document of the input and too short to hold out its end for validation; add "
            "documents, or give others as validation_input."
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
