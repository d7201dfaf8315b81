"""Fields of the config's dataclasses: limits, paths, and how a config is built from nested dicts and compared."""

import dataclasses
import difflib
import math
import os
import reprlib
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections

from natsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PathSyntax:
    """Syntax of a text field that names paths.

    Attributes:
      words: values that are no paths, besides the empty text.
      prefix: prefix of values that are no paths; empty: none.
      is_mixture: True for ``PATH=WEIGHT,PATH=WEIGHT``.
    """

    words: tuple[str, ...] = ()
    prefix: str = ""
    is_mixture: bool = False

    def changed(self, text: str, change: Callable[[str], str]) -> str:
        """Returns the text with each of its paths changed."""
        if not self.is_path(text):
            return text
        if not self.is_mixture:
            return change(text)
        parts = []
        for part in text.split(","):
            path, equals, weight = part.strip().rpartition("=")
            parts.append(f"{change(path)}={weight}" if equals and path else part)
        return ",".join(parts)

    def resolved(self, text: str) -> str:
        """Returns the text with each of its paths absolute, links followed (``named_path``)."""
        return self.changed(text, lambda path: str(named_path(path)))

    def is_path(self, text: str) -> bool:
        """Returns True if the text names a path."""
        return bool(text) and text not in self.words and not (self.prefix and text.startswith(self.prefix))

    def may_be_moved(self, old: str, new: str) -> bool:
        """Returns True if ``new`` may be ``old`` after a move; the caller must compare the contents."""
        if not self.is_path(old) or not self.is_path(new):
            return False
        if self.is_mixture:
            return self.changed(old, lambda _: "") == self.changed(new, lambda _: "")
        return Path(old).name == Path(new).name


MIXTURE = PathSyntax(is_mixture=True)
"""Syntax of ``data.mixture``; the weights stay as they are written."""


def real_path(path: str | os.PathLike[str]) -> Path:
    """Resolves a path: absolute, ``~`` and all links followed (the last one too), without ``.`` and ``..``.

    Raises:
      UserError: the path is relative to a folder that was removed, or has characters that no path can have.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)}: the current folder is no longer there; change to one that is.") from error
    except ValueError as error:
        raise UserError(f"{os.fspath(path)!r} is no path: {error}.") from error


def named_path(path: str | os.PathLike[str]) -> Path:
    """Resolves a path as ``real_path`` does, but keeps the name of a file that is a link, for its suffix.

    Download caches (Hugging Face's) hold such links, to files that are named by their checksums.
    """
    expanded = Path(os.path.expanduser(path))
    if os.path.islink(expanded) and not os.path.isdir(expanded):
        return real_path(expanded.parent) / expanded.name
    return real_path(expanded)


LARGEST_INT = 2**31 - 1
"""Maximum of an int field that gives none: steps and sizes are int32 on the devices."""

LARGEST_FLOAT = 3.4028234e38
"""Maximum of a float field that gives none: float32's."""

_MAX_LENGTH = 100  # characters of a value in a message


def config_field(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    resume: bool = False,
    path: PathSyntax | None = None,
) -> Any:
    """Declares a field of a config.

    Args:
      default: default value.
      doc: meaning, with the unit.
      minimum: smallest value allowed (for a tuple: of each element).
      maximum: largest value allowed; None: ``LARGEST_INT`` or ``LARGEST_FLOAT``.
      resume: True if the field may differ when a run is resumed.
      path: syntax of the paths that the field's text names; None: no paths.
    """
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "resume": resume, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def build(
    cls: type, values: Mapping[str, Any], path: str = "", *, renamed: Mapping[str, str] = types.MappingProxyType({})
) -> Any:
    """Builds a config dataclass from nested dicts (or a ``ConfigDict``); missing fields keep their defaults.

    Args:
      cls: dataclass to build.
      values: values by field name.
      path: prefix of field names in messages, with a dot at its end.
      renamed: new names of fields, with their groups, by the old ones.

    Raises:
      UserError: an unknown field (with its new or the nearest name), a wrong type, or a value out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    arguments = {}
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path.rstrip('.') or 'config'} = {format_value(values)}: a group of fields was expected.")
    for name, value in values.items():
        if name not in fields:
            check_not_renamed(f"{path}{name}", renamed)
            text = name if isinstance(name, str) and name.isidentifier() else format_value(name)
            raise UserError(f"unknown config field {path}{text[:_MAX_LENGTH]}{nearest(name, fields, path)}.")
        if dataclasses.is_dataclass(kinds[name]):
            arguments[name] = build(typing.cast(type, kinds[name]), value, f"{path}{name}.", renamed=renamed)
        else:
            arguments[name] = _checked(f"{path}{name}", value, kinds[name], fields[name].metadata)
    return cls(**arguments)


def check_not_renamed(path: str, renamed: Mapping[str, str]) -> None:
    """Raises UserError with the new name if ``path`` is the old name of a field."""
    if path in renamed:
        raise UserError(f"{path} was renamed to {renamed[path]}.")


def nearest(name: Any, known: typing.Iterable[str], path: str = "") -> str:
    """Returns ``"; did you mean X"`` with ``path`` before X, or, if no name is close, a list of the known ones."""
    known = list(known)
    close = closest(name, known)
    there = textwrap.shorten(", ".join(known), 200, placeholder=" …")
    return f"; known here: {there}" if close is None else f"; did you mean {path}{close}"


def did_you_mean(name: Any, known: typing.Iterable[str]) -> str:
    """Returns ``"; did you mean X"``, or ``""`` if no name is close, for a message that lists the known ones."""
    close = closest(name, known)
    return "" if close is None else f"; did you mean {close}"


def closest(name: Any, known: typing.Iterable[str]) -> str | None:
    """Returns the known name that is most similar to ``name`` or that it abbreviates; None if there is none."""
    if not isinstance(name, str) or not name:
        return None
    by_plain_name = {_plain(other): other for other in reversed(list(known))}
    plain = _plain(name[:_MAX_LENGTH])
    close = difflib.get_close_matches(plain, by_plain_name, n=1, cutoff=0.5)
    close = close or [other for other in reversed(by_plain_name) if other.startswith(plain)]
    return by_plain_name[close[0]] if close else None


def _plain(name: str) -> str:
    """Removes differences that are often confused."""
    return name.lower().replace("-", "_")


class _ShortRepr(reprlib.Repr):
    """Short Python notation of plain values; of any other object, whose own ``repr`` may be long, the type."""

    def repr_int(self, x: int, level: int) -> str:
        return f"{x}" if abs(x) < 10**24 else f"about {'-' if x < 0 else ''}2**{x.bit_length() - 1}"

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if type(x) in (bool, float, complex, bytes, type(None)) else f"a {type(x).__name__}"


def format_value(value: Any) -> str:
    """Formats a value for a message, in one short line."""
    short = _ShortRepr()
    short.maxstring = short.maxother = _MAX_LENGTH
    text = short.repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 1]}…"


def _checked(path: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """Returns ``value`` as the field's type, checked to be in range."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if type(value) not in map(type, choices) or value not in choices:
            expected = ", ".join(map(repr, choices))
            meant = did_you_mean(value, map(str, choices))
            raise UserError(f"{path} = {format_value(value)}: one of {expected} was expected{meant}.")
        return value
    if isinstance(kind, types.UnionType):  # a number, or a tuple of such numbers
        number, several = typing.get_args(kind)
        return _checked(path, value, several if isinstance(value, tuple | list) else number, limits)
    if typing.get_origin(kind) is tuple:
        element_kind = typing.get_args(kind)[0]
        of_words = typing.get_origin(element_kind) is Literal
        if of_words or element_kind is bool:  # "a,b" as on the command line, or as the element that its parser makes
            value = value.split(",") if isinstance(value, str) else value
            if isinstance(value, tuple | list):
                value = [word for e in value for word in (e.split(",") if isinstance(e, str) else [e])]
        if element_kind is bool and isinstance(value, list):
            value = [
                {"true": True, "false": False}.get(e.strip().lower(), e) if isinstance(e, str) else e for e in value
            ]
        if not isinstance(value, tuple | list):
            expected = "words" if of_words else "bools" if element_kind is bool else "numbers"
            raise UserError(f"{path} = {format_value(value)}: a tuple of {expected} was expected.")
        return tuple(_checked(path, element, element_kind, limits) for element in value)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise UserError(f"{path} = {format_value(value)} ({type(value).__name__}): {kind.__name__} was expected.")
    if kind is str and not _is_text(value, is_path=limits["path"] is not None):
        raise UserError(f"{path} = {format_value(value)}: it has characters that no text or file name can have.")
    if kind in (int, float):
        _check_range(path, value, kind, limits)
    return kind(value)


def _is_text(value: str, *, is_path: bool) -> bool:
    try:
        # A file name that is not UTF-8 has surrogates where Python read its bytes.
        return b"\0" not in value.encode("utf-8", "surrogateescape" if is_path else "strict")
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def check_file_name(path: str | os.PathLike[str]) -> None:
    """Checks the name of a folder of checkpoints or shards, whose libraries take only names in UTF-8.

    Raises:
      UserError: the name, or that of a folder above, is not UTF-8; or see ``real_path``.
    """
    real_path(path)
    try:
        os.path.abspath(path).encode("utf-8")
    except UnicodeEncodeError as error:  # Python keeps other bytes as halves of surrogate pairs
        raise UserError(
            f"{os.fspath(path)}: its full name is no UTF-8 to Python; rename it, or set PYTHONUTF8=1 if the name "
            "is UTF-8 and the locale is not."
        ) from error


def _check_range(path: str, value: int | float, kind: type, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} = {value}: a finite number was expected.")
    minimum, maximum = limits["minimum"], limits["maximum"]
    if minimum is not None and value < minimum:
        raise UserError(f"{path} = {format_value(value)}: it must be at least {minimum}.")
    if maximum is None:
        maximum = LARGEST_INT if kind is int else LARGEST_FLOAT
    if value > maximum:
        raise UserError(f"{path} = {format_value(value)}: it must be at most {maximum}.")


def resolve_paths(config: Any) -> Any:
    """Makes every path of a config absolute, with links followed, so that it means the same from every folder.

    Args:
      config: config or group; its relative paths are relative to the current folder.
    """
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = resolve_paths(value)
        elif (syntax := field.metadata["path"]) is not None:
            changes[field.name] = syntax.resolved(value)
    return dataclasses.replace(config, **changes)


def differences(old: Any, new: Any) -> tuple[list[str], list[str]]:
    """Compares two configs, for resuming.

    Returns:
      ``(allowed, forbidden)``: lines ``field: old -> new`` of fields that may and may not change on resume. A path may
      change if the file or folder may have been moved; two spellings of one path are no difference.
    """
    allowed: list[str] = []
    forbidden: list[str] = []

    def compare(a: Any, b: Any, path: str) -> None:
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if dataclasses.is_dataclass(x):
                compare(x, y, f"{path}{field.name}.")
            elif x != y:
                syntax, may = field.metadata["path"], field.metadata["resume"]
                if syntax is not None:
                    if syntax.resolved(x) == syntax.resolved(y):
                        continue
                    may = may or syntax.may_be_moved(x, y)
                lines = allowed if may else forbidden
                lines.append(f"{path}{field.name}: {x!r} -> {y!r}")

    compare(old, new, "")
    return allowed, forbidden
