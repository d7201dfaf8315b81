"""Walk through an input folder: links are followed, every file is read once, and what is not read is tallied."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from natsjax.data.corpus import CORPUS_FILE, TOKENIZER_FOLDER
from natsjax.data.readers import arrow_files
from natsjax.data.readers.file_marks import DVC_SUFFIX, link_pointer
from natsjax.data.readers.input_report import Tallies
from natsjax.data.readers.json_files import JSON_LINES_SUFFIXES, JSON_SUFFIXES, JsonFile, JsonLines
from natsjax.data.readers.sources import (
    UNREADABLE,
    BadFileError,
    BrokenSource,
    FileSource,
    Source,
    bad_file,
    cannot_read,
    pointer_error,
    reason,
    utf8_name,
)
from natsjax.data.readers.text_files import COMPRESSION_SUFFIXES, TEXT_SUFFIXES, TextFile

SUFFIXES = (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, *JSON_SUFFIXES, arrow_files.PARQUET_SUFFIX)
SUFFIXES_IN_WORDS = (
    f"{', '.join(suffix for suffix in SUFFIXES[:-1] if not suffix.endswith(COMPRESSION_SUFFIXES))} "
    f"(also with {', '.join(COMPRESSION_SUFFIXES)} after it) or {SUFFIXES[-1]}"
)

# Files of `prepare` beside a folder that it works in: in an input they come and go.
_OWN = re.compile(r"^\.(.+\.)?(lock|partial|tried|replaced)$")
# Beside a file or folder of this name, the names below are those of text that is not meant for training.
_TRAIN = re.compile(r"^train(ing)?(?![a-z])", re.IGNORECASE)
_HELD_OUT = re.compile(r"^(val(id(ation)?)?|dev|test|eval(uation)?|held[-_]?out)(?![a-z])", re.IGNORECASE)
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_-]{0,9}$")


def is_readable_name(name: str) -> bool:
    """Returns True for the name of a file that can be read."""
    return name.lower().endswith(SUFFIXES)


def file_source(path: Path, name: str, text_field: str, *, optional: bool) -> FileSource:
    """Builds the source of a file with one of ``SUFFIXES``; an ``optional`` ``.json`` file may lack the text field."""
    lower = path.name.lower()
    if lower.endswith(TEXT_SUFFIXES):
        return TextFile(path, name)
    if lower.endswith(JSON_LINES_SUFFIXES):
        return JsonLines(path, name, text_field)
    if lower.endswith(JSON_SUFFIXES):
        return JsonFile(path, name, text_field, optional=optional)
    return arrow_files.ParquetFile(path, name, text_field)


def dataset(folder: Path, split: str | None, *, name: str, text_field: str, tallies: Tallies) -> list[Source]:
    """Returns the shards of a saved dataset; what is not read is added to ``tallies``.

    Args:
      folder: folder that ``save_to_disk`` wrote.
      split: split to read; None: the dataset has no splits.
      name: the folder's path below the input, or empty.
      text_field: column of the text.
      tallies: tallies of the input.
    """
    shown = utf8_name(name or folder.name)
    try:
        if split is not None:
            for other in arrow_files.other_splits(folder, split):
                tallies["other_split"].add(f"{shown}:{other}")
            folder, name = folder / split, f"{name}/{split}" if name else split
        shards = arrow_files.dataset_sources(folder, name, text_field)
        for other in arrow_files.beside_shards(folder, shards):
            tallies["beside_dataset"].add(utf8_name(f"{name}/{other}" if name else other))
    except BadFileError as error:
        return [BrokenSource(shown, error)]
    except OSError as error:
        return [BrokenSource(shown, cannot_read(folder, error))]
    return list(shards)


def is_prepared(folder: Path) -> bool:
    """Returns True for a folder that ``prepare`` wrote."""
    return (folder / CORPUS_FILE).is_file() and (folder / TOKENIZER_FOLDER).is_dir()


def lost_link(path: Path, why: str) -> BadFileError:
    """Builds the error for a broken link; ``why`` is the system's reason."""
    target = os.readlink(path)
    if (found := link_pointer(target)) is not None:
        return pointer_error(path, *found)
    what = f"is a link to {target}, which cannot be reached: {why}"
    return bad_file(path, what, kind=UNREADABLE, advice="put back what it links to")


def sources_below(root: Path, text_field: str) -> tuple[list[Source], Tallies]:
    """Returns all sources below a folder, in the order of the paths, and tallies of the rest.

    Links are followed, as ``find -L`` does, but nothing is read twice: of several paths to a file or folder the one
    without links is taken, else the first. So no text gets into both splits by two paths.
    """
    walk = _Walk(text_field)
    walk.run(root)
    return [source for _, group in sorted(walk.groups, key=lambda item: item[0]) for source in group], walk.tallies


class _Walk:
    def __init__(self, text_field: str):
        self._text_field = text_field
        self.groups: list[tuple[str, list[Source]]] = []  # with the name that they are sorted by
        self.tallies = Tallies()
        self._folders: set[str] = set()  # real paths that were visited
        self._files: set[str] = set()  # real paths that are read
        self._folder_links: list[tuple[str, str]] = []  # path and name
        self._file_links: list[tuple[str, str]] = []
        self._others: list[tuple[str, str]] = []  # name and real path of files with other suffixes

    def run(self, root: Path) -> None:
        self._visit(str(root), "", os.path.realpath(root))
        while self._folder_links:
            links, self._folder_links = sorted(self._folder_links), []
            for path, name in links:
                real = os.path.realpath(path)
                if real in self._folders:
                    self._tally("linked_again", name + "/")
                else:
                    self._tally("linked", name + "/")
                    self._visit(path, name, real)
        for path, name in sorted(self._file_links):
            real = os.path.realpath(path)
            self._tally("linked_again" if real in self._files else "linked", name)
            if real not in self._files:
                self._add(path, name, real)
        for name, real in self._others:
            if real not in self._files:  # else it was read by a link with a suffix, as in caches of Hugging Face's hub
                self._other(name)

    def _visit(self, top: str, top_name: str, top_real: str) -> None:
        """Visits everything below a folder without following links, which are recorded."""
        folders = [(top, top_name, top_real)]
        while folders:
            folder, name, real = folders.pop()
            if real in self._folders:
                self._tally("linked_again", name + "/")
                continue
            self._folders.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
                if self._is_one_thing(Path(folder), name, {entry.name for entry in entries}):
                    continue
            except OSError as error:
                self._broken(name or os.path.basename(folder), cannot_read(Path(folder), error))
                continue
            has_train = any(_TRAIN.match(entry.name) for entry in entries)
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                if _OWN.search(entry.name):
                    continue
                is_folder = os.path.isdir(entry.path)
                if has_train and _HELD_OUT.match(entry.name) and (is_folder or is_readable_name(entry.name)):
                    self._tally("named_held_out", below + "/" * is_folder)
                if entry.name.startswith("."):
                    self._tally("hidden", below + "/" * entry.is_dir(follow_symlinks=False))
                elif entry.is_symlink():
                    self._link(entry.path, below)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, below, f"{real}/{entry.name}"))
                elif entry.is_file(follow_symlinks=False):
                    self._file(entry.path, below, f"{real}/{entry.name}")
                else:
                    self._tally("special", below)

    def _is_one_thing(self, folder: Path, name: str, entries: set[str]) -> bool:
        """Handles a folder that is one unit (a corpus, a dataset); returns False for others."""
        if CORPUS_FILE in entries and is_prepared(folder):
            self._tally("prepared", (name or folder.name) + "/")
            return True
        split = arrow_files.DEFAULT_SPLIT if arrow_files.is_dataset_dict(folder) else None
        if split is None and not arrow_files.is_dataset(folder):
            return False
        shards = dataset(folder, split, name=name, text_field=self._text_field, tallies=self.tallies)
        self.groups.append((name or ".", shards))
        return True

    def _link(self, path: str, name: str) -> None:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if not is_readable_name(name) and _SUFFIX.search(name.lower()):
                self._other(name)
            else:  # it may be a link to a folder
                self._broken(name, lost_link(Path(path), error.strerror or reason(error)))
            return
        if stat.S_ISDIR(mode):
            self._folder_links.append((path, name))
        elif not stat.S_ISREG(mode):
            self._tally("special", name)
        elif is_readable_name(name):
            self._file_links.append((path, name))
        else:
            self._file(path, name, "")

    def _file(self, path: str, name: str, real: str) -> None:
        if is_readable_name(name):
            self._add(path, name, real)
        elif name.lower().endswith(DVC_SUFFIX) and not os.path.lexists(path[: -len(DVC_SUFFIX)]):
            self._broken(name, pointer_error(Path(path), "DVC", "fetch the file itself with `dvc pull`"))
        else:
            self._others.append((name, real))

    def _add(self, path: str, name: str, real: str) -> None:
        self._files.add(real)
        self.groups.append((name, [file_source(Path(path), name, self._text_field, optional=True)]))

    def _other(self, name: str) -> None:
        stem, suffix = os.path.splitext(name.lower())
        if suffix in COMPRESSION_SUFFIXES:
            suffix = os.path.splitext(stem)[1] + suffix
        self._tally("other_suffix", name, suffix or "without a suffix")

    def _broken(self, name: str, error: BadFileError) -> None:
        self.groups.append((name, [BrokenSource(utf8_name(name), error)]))

    def _tally(self, what: str, name: str, kind: str | None = None) -> None:
        self.tallies[what].add(utf8_name(name), None if kind is None else utf8_name(kind))
