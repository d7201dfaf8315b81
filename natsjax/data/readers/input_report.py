"""Report on an input: what was read and what was skipped, with counts and names.

``prepare`` prints it after the scan and stores it in corpus.json under ``input_report``, by argument:

    {"input": {"files": 5, "documents": 13, "linked": {"count": 1, "names": ["more/"]}, "hidden": {…}, …}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from natsjax.errors import printable

_NAMES_KEPT = 20
_NAMES_SHOWN = 3

# Classes of what an input may have besides documents, in the order of the report, with their texts.
CLASSES = {
    "linked": "links followed",
    "linked_again": "links to what is read already, so not read again",
    "named_held_out": "named as text to hold out, but read with the rest; --validation_input holds text out",
    "empty": "documents without text",
    "no_documents": "files without a document",
    "no_text": "JSON files without such texts, not read",
    "other_suffix": "files of other kinds, not read",
    "hidden": "hidden, not read",
    "beside_dataset": "in the folders of saved datasets but no part of them, not read",
    "other_split": "other splits of saved datasets, not read",
    "prepared": "prepared corpora, not read",
    "special": "neither files nor folders, not read",
    "pointer": "pointers to files that are kept elsewhere, skipped",
    "unreadable": "files that cannot be read here, skipped",
    "damaged": "files damaged or not in UTF-8, skipped",
}
_READ = ("linked", "named_held_out")  # classes that are read


@dataclass
class Tally:
    """A count of one class, with the names of its first members, and counts by kind if the class has kinds."""

    count: int = 0
    names: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, kind: str | None = None) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.names) < _NAMES_KEPT:
            self.names.append(name)
        if kind is not None:
            self.kinds[kind] += 1

    def to_json(self) -> dict[str, Any]:
        """Returns the tally as plain JSON."""
        found = {"count": self.count, "names": self.names}
        return found | ({"kinds": dict(self.kinds.most_common())} if self.kinds else {})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Tally:
        """Builds a tally from the result of ``to_json``."""
        return cls(found["count"], list(found["names"]), Counter(found.get("kinds", {})))


class Tallies(dict[str, Tally]):
    """Tallies by class, created on first access."""

    def __missing__(self, name: str) -> Tally:
        if name not in CLASSES:
            raise KeyError(name)
        return self.setdefault(name, Tally())

    @classmethod
    def joined(cls, all_tallies: Iterable[Tallies]) -> Tallies:
        """Adds the tallies of consecutive parts."""
        joined = cls()
        for tallies in all_tallies:
            for name, tally in tallies.items():
                mine = joined[name]
                mine.count += tally.count
                mine.names = [*mine.names, *tally.names][:_NAMES_KEPT]
                mine.kinds += tally.kinds
        return joined

    def to_json(self) -> dict[str, Any]:
        """Returns the tallies as plain JSON, in the order of the report."""
        return {name: self[name].to_json() for name in CLASSES if name in self and self[name].count}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Tallies:
        """Builds tallies from the result of ``to_json``; other fields are ignored."""
        return cls({name: Tally.from_json(found[name]) for name in CLASSES if name in found})


def report_lines(input: str, report: Mapping[str, Any]) -> list[str]:
    """Formats a report: a line for what was read, and an indented one for each class."""
    lines = [f"Read {report['documents']:,} documents in {report['files']:,} files of {input}"]
    for name, tally in Tallies.from_json(report).items():
        lines.append(f"  {CLASSES[name]}: {_text(tally)}")
    if "held_out_end" in report:
        end = report["held_out_end"]
        lines.append(
            f"  {printable(end['document'])} is its only document: the last {end['held_out_bytes']:,} of "
            f"{end['bytes']:,} bytes are held out for validation"
        )
    return lines


def left_out(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describes what was skipped: counts by class, with the first names."""
    total = Tallies.joined(Tallies.from_json(report) for report in reports)
    return [
        f"{total[name].count:,} {CLASSES[name].removesuffix(', not read').removesuffix(', skipped')} "
        f"({_names(total[name])})"
        for name in CLASSES
        if name in total and total[name].count and name not in _READ
    ]


def _text(tally: Tally) -> str:
    kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in tally.kinds.most_common(_NAMES_KEPT))
    return f"{tally.count:,}{f' ({kinds})' if kinds else ''}: {_names(tally)}"


def _names(tally: Tally) -> str:
    names = ", ".join(printable(name) for name in tally.names[:_NAMES_SHOWN])
    return names + (", …" if tally.count > _NAMES_SHOWN else "")
