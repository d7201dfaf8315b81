"""The first pass of ``prepare`` over the text: what is there, and which split each document goes to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from natsjax.data.hold_out import hash_id, hold_out_threshold
from natsjax.data.readers.corpus_reader import CorpusReader, Document
from natsjax.data.readers.input_report import Tallies
from natsjax.errors import UserError

TRAIN, VALIDATION, DROPPED = 0, 1, 2
_DIGEST_BYTES = 16
_MAX_GROUPS = 1024
_ARRAYS = ("counts", "hashes", "sizes", "digests")


@dataclass(frozen=True)
class Scan:
    """Contents of a run of sources; ``D`` documents that are not empty in ``S`` sources.

    Attributes:
      counts: int64 ``[S]``, documents in each source.
      hashes: uint64 ``[D]``, ``hash_id`` of each document.
      sizes: int64 ``[D]``, bytes of each in UTF-8.
      digests: uint64 ``[D, 2]``, a hash of each text; ``[0, 2]`` where nobody asked for it.
      left_out: what these sources hold beside documents with text in them.
      skipped: bad files by name, with what is wrong with them.
    """

    counts: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    left_out: Tallies
    skipped: dict[str, str]

    @classmethod
    def of(cls, reader: CorpusReader, sources: range, *, seed: int, with_digests: bool) -> Scan:
        """Reads some sources to their end; raises UserError as the reader does."""
        counts, hashes, sizes, digests = array("q"), array("Q"), array("q"), bytearray()
        reader.left_out = Tallies()
        for source in sources:
            before = len(hashes)
            for document in reader.documents_of(source):
                text = document.text.encode("utf-8")
                hashes.append(hash_id(document.id, seed))
                sizes.append(len(text))
                if with_digests:
                    digests += hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
            counts.append(len(hashes) - before)
        names = set(reader.source_names[sources.start : sources.stop])
        return cls(
            counts=np.frombuffer(counts, np.int64),
            hashes=np.frombuffer(hashes, np.uint64),
            sizes=np.frombuffer(sizes, np.int64),
            digests=np.frombuffer(digests, np.uint64).reshape(-1, 2),
            left_out=reader.left_out,
            skipped={name: reason for name, reason in reader.skipped.items() if name in names},
        )

    @classmethod
    def joined(cls, scans: Sequence[Scan]) -> Scan:
        """Joins the scans of consecutive runs of sources."""
        return cls(
            **{name: np.concatenate([getattr(scan, name) for scan in scans]) for name in _ARRAYS},
            left_out=Tallies.joined(scan.left_out for scan in scans),
            skipped={name: reason for scan in scans for name, reason in scan.skipped.items()},
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns arrays for a file; ``from_arrays`` reads them."""
        rest = json.dumps([self.left_out.to_json(), self.skipped]).encode()
        return {name: getattr(self, name) for name in _ARRAYS} | {"rest": np.frombuffer(rest, np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Scan:
        """Makes a scan from the arrays of ``to_arrays``."""
        left_out, skipped = json.loads(arrays["rest"].tobytes())
        named = {name: arrays[name] for name in _ARRAYS}
        return cls(**named, left_out=Tallies.from_json(left_out), skipped=skipped)

    def report(self, reader: CorpusReader) -> dict[str, Any]:
        """Reports what became of everything in the input (``readers.input_report``); UserError if there is no text."""
        if not len(self.hashes):
            raise reader.empty_error(self.left_out)
        tallies = Tallies.joined([reader.found, self.left_out])
        not_read = len(self.skipped) + self.left_out["no_text"].count
        return {"files": reader.num_sources - not_read, "documents": len(self.hashes)} | tallies.to_json()

    @property
    def is_one_text(self) -> bool:
        """True if there is one document only, or copies of one where digests were asked for."""
        same = len(self.digests) > 0 and bool((self.digests == self.digests[0]).all())
        return len(self.hashes) == 1 or same

    def with_end_held_out(self, reader: CorpusReader) -> Scan:
        """Returns this scan of one text as that of ``reader``, which gives every document as two (``held_out_end``).

        Raises:
          UserError: the document is too short, or changed.
        """
        counts = 2 * self.counts
        sizes = [len(document.text.encode("utf-8")) for document in documents_from(reader, counts, 0)]
        return dataclasses.replace(
            self,
            counts=counts,
            hashes=np.zeros(len(sizes), np.uint64),  # nothing is chosen by them
            sizes=np.array(sizes, np.int64),
            digests=np.zeros((len(sizes), 2), np.uint64),
        )


def source_groups(num_sources: int) -> list[range]:
    """Returns runs of sources to scan together: one source each, or more where there are very many."""
    size = -(-num_sources // _MAX_GROUPS)
    return [range(begin, min(begin + size, num_sources)) for begin in range(0, num_sources, size)]


def documents_from(reader: CorpusReader, counts: npt.NDArray[np.int64], begin: int) -> Iterator[Document]:
    """Yields the documents of an input from number ``begin`` on; sources without any are not opened.

    Raises UserError as the reader does, or for a source that holds more or fewer documents than when it was scanned
    (``counts``, int64 ``[num_sources]``).
    """
    ends = np.cumsum(counts)
    first = int(np.searchsorted(ends, begin, side="right"))
    skip = begin - int(ends[first] - counts[first]) if first < len(counts) else 0
    for source in range(first, len(counts)):
        if counts[source] == 0:
            continue
        found = skip
        for document in islice(reader.documents_of(source), skip, None):
            found += 1
            if found > counts[source]:
                break
            yield document
        if found != counts[source]:
            raise changed_error(reader, f"{reader.source_names[source]} held {counts[source]} documents before")
        skip = 0


def changed_error(reader: CorpusReader, how: str) -> UserError:
    """Builds the error for an input that was written to meanwhile."""
    return UserError(
        f"the input {reader.input} changed while it was read ({how}); run it again when nothing writes there."
    )


def divide(
    scans: dict[str, Scan], *, fraction: float, deduplicate: bool
) -> tuple[dict[str, npt.NDArray[np.int8]], int]:
    """Divides documents among the splits.

    Args:
      scans: of ``input``, and of ``validation_input`` where there is one, with digests if ``deduplicate``.
      fraction: of the documents to hold out of ``input`` where there is no ``validation_input``.
      deduplicate: True to leave out texts that came before, in ``input`` or in the same input.

    Returns:
      By input, int8 ``[num_documents]``: TRAIN, VALIDATION or DROPPED; and the number of duplicates.
    """
    if deduplicate:
        kept = _first_copies(scans)
    else:
        kept = {name: np.ones(len(scan.hashes), bool) for name, scan in scans.items()}
    num_duplicates = sum(int((~mask).sum()) for mask in kept.values())
    if "validation_input" in scans:
        held_out = {"input": np.zeros(len(kept["input"]), bool), "validation_input": kept["validation_input"]}
        if not kept["validation_input"].any():
            raise UserError(
                f"with deduplicate, validation_input has no document left: each of its "
                f"{len(kept['validation_input'])} documents is also in input; give other text to validate on."
            )
    else:
        hashes = scans["input"].hashes
        held_out = {"input": hashes < hold_out_threshold(hashes[kept["input"]], fraction)}
    splits = {
        name: np.where(mask, np.where(held_out[name], VALIDATION, TRAIN), DROPPED).astype(np.int8)
        for name, mask in kept.items()
    }
    return splits, num_duplicates


def _first_copies(scans: dict[str, Scan]) -> dict[str, npt.NDArray[np.bool_]]:
    """Finds the first document of every text, in the order of the inputs."""
    digests = np.concatenate([scan.digests for scan in scans.values()])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first comes first
    repeats = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    kept = np.ones(len(digests), bool)
    kept[order[1:][repeats]] = False
    ends = np.cumsum([len(scan.digests) for scan in scans.values()])[:-1]
    return dict(zip(scans, np.split(kept, ends), strict=True))
