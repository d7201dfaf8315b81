"""What settings are: fields of frozen dataclasses that know their limits, read from nested dicts and compared."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from natsjax.errors import UserError


def setting(default: Any, doc: str, *, minimum: float | None = None, maximum: float | None = None, resume=False) -> Any:
    """A config field.

    Args:
      default: its default.
      doc: what it means, with its unit.
      minimum: the smallest value allowed (of each element, in a tuple).
      maximum: the largest value allowed.
      resume: whether it may differ when a run is resumed.
    """
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """A dataclass of settings from nested dicts (or a ``ConfigDict``); fields that are left out keep their defaults.

    Args:
      cls: the dataclass.
      values: by field name.
      path: what stands before the field names in messages, with a dot at its end.

    Raises:
      UserError: an unknown field (with the nearest name), a wrong type, or a value out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    arguments = {}
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        where = f"config field {path.rstrip('.')}" if path else "the config"
        raise UserError(f"{where} is {values!r}; a group of fields was expected.")
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"unknown config field {path}{name}{nearest(name, fields, path)}.")
        if dataclasses.is_dataclass(types[name]):
            arguments[name] = build(typing.cast(type, types[name]), value, f"{path}{name}.")
        else:
            arguments[name] = _checked(f"{path}{name}", value, types[name], fields[name].metadata)
    return cls(**arguments)


def nearest(name: str, known: typing.Iterable[str], path: str = "") -> str:
    """``"; did you mean X?"`` without the question mark, or what there is; ``path`` is put before X."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {path}{close[0]}" if close else f"; known here: {', '.join(known)}"


def _checked(path: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """``value`` as the field's type, in range."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"config field {path} is {value!r}; one of {', '.join(map(repr, choices))} was expected.")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"config field {path} is {value!r}; a tuple of numbers was expected.")
        return tuple(_checked(path, element, typing.get_args(kind)[0], limits) for element in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config field {path} is {value!r} ({type(value).__name__}); {kind.__name__} was expected.")
    if kind is float and not math.isfinite(value):
        raise UserError(f"config field {path} is {value}; a finite number was expected.")
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise UserError(f"config field {path} is {value}; it must be at least {limits['minimum']:g}.")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise UserError(f"config field {path} is {value}; it must be at most {limits['maximum']:g}.")
    return value


def differences(old: Any, new: Any) -> tuple[list[str], list[str]]:
    """How two configs differ, for resuming.

    Returns:
      ``(allowed, forbidden)``: lines ``field: old -> new`` of fields that may and may not change on resume.
    """
    allowed: list[str] = []
    forbidden: list[str] = []

    def compare(a: Any, b: Any, path: str) -> None:
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if dataclasses.is_dataclass(x):
                compare(x, y, f"{path}{field.name}.")
            elif x != y:
                lines = allowed if field.metadata["resume"] else forbidden
                lines.append(f"{path}{field.name}: {x!r} -> {y!r}")

    compare(old, new, "")
    return allowed, forbidden
