"""The tasks by name, with their parameters, and the tasks that ``--tasks`` asks for.

``--tasks=mqar:pairs=8+16,length=256,needle`` asks for three: a parameter with several values makes a task of each, and
a word with "=" belongs to the task before it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from natsjax.config_fields import did_you_mean, format_value
from natsjax.errors import UserError
from natsjax.tasks import puzzles
from natsjax.tasks.puzzles import Puzzle


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A whole number that a task depends on.

    Attributes:
      default: its value; None: ``default_lengths`` of the task's family.
      least: the smallest one.
      most: the largest one; None: no limit of its own.
      doc: its meaning, a noun phrase.
    """

    default: int | None
    least: int
    most: int | None
    doc: str


_CHOICES = Parameter(8, 2, 64, "answers to choose from; the wrong ones are of the text as far as it has them")


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
      name: for ``--tasks``.
      doc: what it asks, a noun phrase.
      parameters: by name.
      make: draws a puzzle from a generator of random numbers and the parameters that it names.
      names: parameters that ``make`` takes.
      default_lengths: lengths from the run's ``data.context_length``; 0: no held-out text between the facts.
      check: returns what is wrong with parameters together, a clause; None where nothing is.
    """

    name: str
    doc: str
    parameters: Mapping[str, Parameter]
    make: Callable[..., Puzzle]
    names: tuple[str, ...]
    default_lengths: Callable[[int], tuple[int, ...]]
    check: Callable[[Mapping[str, int]], str | None] = lambda _: None

    @property
    def has_depth(self) -> bool:
        """True where the asked fact is put at given depths."""
        return "depths" in self.parameters


def _family(
    name: str,
    doc: str,
    make: Callable[..., Puzzle],
    *,
    depths: bool = False,
    lengths: Callable[[int], tuple[int, ...]] = lambda context_length: (context_length,),
    check: Callable[[Mapping[str, int]], str | None] = lambda _: None,
    **parameters: Parameter,
) -> Family:
    own = parameters | {"choices": _CHOICES}
    least = 1 if depths else 0
    common = {"length": Parameter(None, least, None, "tokens of text, question and answer together")}
    if least == 0:
        common["length"] = dataclasses.replace(
            common["length"], doc=f"{common['length'].doc}; 0: nothing but the facts"
        )
    if depths:
        common["depths"] = Parameter(5, 1, 64, "depths from 0 (beginning) to 1 (end), equally spaced, in turn")
    return Family(name, doc, common | own, make, tuple(own), lengths, check)


def _check_names(values: Mapping[str, int]) -> str | None:
    names = (values["chains"] + 1) * (values["hops"] + 1)
    most = len(puzzles.FIRST_NAMES)
    return None if names <= most else f"they take {names} names, and there are {most}"


def _check_copied(values: Mapping[str, int]) -> str | None:
    most = values["words"] - 2
    return None if values["copied"] <= most else f"behind the two words that are asked with there are at most {most}"


def _fractions(context_length: int) -> tuple[int, ...]:
    return tuple(max(1, context_length // part) for part in (4, 2, 1))


_PAIRS = Parameter(8, 1, puzzles.NUM_KEYS, "pairs of a key and a value")
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family(
            "needle",
            "the number that a sentence in held-out text gave to a name",
            puzzles.needle,
            depths=True,
            lengths=_fractions,
            keys=Parameter(1, 1, len(puzzles.FIRST_NAMES), "sentences with different names, one of which is asked for"),
        ),
        _family(
            "needle_multikey",
            "the same among sentences about other names",
            puzzles.needle,
            depths=True,
            lengths=_fractions,
            keys=Parameter(4, 1, len(puzzles.FIRST_NAMES), "sentences with different names, one of which is asked for"),
        ),
        _family("mqar", "the value of a key", puzzles.mqar, pairs=_PAIRS),
        _family(
            "mqar_overwritten",
            "the latest value of a key",
            puzzles.mqar_overwritten,
            pairs=dataclasses.replace(_PAIRS, default=4, doc="keys"),
            updates=Parameter(3, 1, puzzles.NUM_KEYS, "values of each key, one after another"),
        ),
        _family(
            "phonebook",
            "a telephone number from a list of names",
            puzzles.phonebook,
            lengths=lambda _: (0,),
            entries=Parameter(16, 1, len(puzzles.FIRST_NAMES) * len(puzzles.LAST_NAMES), "names in the list"),
        ),
        _family(
            "tracking",
            "the number at the beginning of a chain of references",
            puzzles.tracking,
            check=_check_names,
            chains=Parameter(2, 1, len(puzzles.FIRST_NAMES) // 2 - 1, "chains"),
            hops=Parameter(1, 0, len(puzzles.FIRST_NAMES) // 2 - 1, "references from the asked name to the number"),
        ),
        _family(
            "copy",
            "how a list of words goes on",
            puzzles.copy,
            lengths=lambda _: (0,),
            check=_check_copied,
            words=Parameter(24, 3, len(puzzles.WORDS), "words of the list"),
            copied=Parameter(2, 1, len(puzzles.WORDS), "words of the answer"),
        ),
    )
}
"""By name, in the order of reports."""

RECALL = "recall"
"""The only task of a run on synthetic recall data: the last asked key of its own held-out rows."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with the values of its parameters.

    Attributes:
      family: its name in ``FAMILIES``, or ``RECALL``.
      parameters: by name, all of them.
    """

    family: str
    parameters: Mapping[str, int]

    @property
    def name(self) -> str:
        """The task as ``--tasks`` names it: the length, and what is not the default."""
        if self.family not in FAMILIES:
            return self.family
        known = FAMILIES[self.family].parameters
        shown = [f"{name}={value}" for name, value in self.parameters.items() if value != known[name].default]
        return f"{self.family}:{','.join(shown)}"

    def puzzle(self, rng: np.random.Generator) -> Puzzle:
        """Draws a puzzle."""
        family = FAMILIES[self.family]
        return family.make(rng, **{name: self.parameters[name] for name in family.names})

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """Returns the generator of random numbers of an example, a function of the task, the seed and its number."""
        return np.random.default_rng([seed, number, *self.name.encode()])


def default_tasks(context_length: int) -> list[Task]:
    """Returns every task with its default parameters."""
    return [task for name in FAMILIES for task in _expanded(name, {}, context_length)]


def parse_tasks(text: str, context_length: int) -> list[Task]:
    """Reads what ``--tasks`` asks for, in order and without repetition.

    Args:
      text: as in the module's docstring.
      context_length: tokens that the model reads at once.

    Raises:
      UserError: a task, a parameter or a value is none, or a text is longer than the model reads.
    """
    asked: list[tuple[str, dict[str, list[int]]]] = []
    for word in text.split(","):
        if "=" not in word.partition(":")[0]:
            name, _, word = word.partition(":")
            _check_name(text, name)
            asked.append((name, {}))
            if not word:
                continue
        elif not asked:
            raise _mistake(text, f"the parameter {format_value(word)} is of no task; name the task before it")
        name, values = asked[-1]
        key, separator, numbers = word.partition("=")
        known = FAMILIES[name].parameters
        if not separator or key not in known:
            meant = did_you_mean(key, known)
            raise _mistake(text, f"{name} has no parameter {format_value(key)}, but {', '.join(known)}{meant}")
        if key in values:
            raise _mistake(text, f"{name} has {key} twice; join several values by +, as in {key}=8+16")
        values[key] = [_number(text, name, key, known[key], number) for number in numbers.split("+")]
    tasks = [task for name, values in asked for task in _expanded(name, values, context_length)]
    for task in tasks:
        if (why := FAMILIES[task.family].check(task.parameters)) is not None:
            raise _mistake(text, f"{task.name}: {why}; choose smaller numbers")
        if task.parameters["length"] > context_length:
            raise _mistake(
                text,
                f"{task.name} is longer than the {context_length} tokens that the model was trained to read "
                "(data.context_length), and nothing holds more; choose a smaller length",
            )
    return list({task.name: task for task in tasks}.values())


def _check_name(text: str, name: str) -> None:
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise _mistake(text, f"there is no task {format_value(name)}, but {known}{did_you_mean(name, FAMILIES)}")


def _number(text: str, name: str, key: str, parameter: Parameter, number: str) -> int:
    most = "" if parameter.most is None else f" to {parameter.most}"
    expected = f"a whole number from {parameter.least}{most} was expected"
    try:
        value = int(number)
    except ValueError:
        value = -1
    if value < parameter.least or (parameter.most is not None and value > parameter.most):
        raise _mistake(text, f"{name} has {key}={format_value(number)}; {expected}")
    return value


def _mistake(text: str, what: str) -> UserError:
    return UserError(f"--tasks={format_value(text)}: {what}.")


def _expanded(name: str, values: Mapping[str, list[int]], context_length: int) -> list[Task]:
    """Returns a task of every combination of values, with defaults where there are none."""
    family, lists = FAMILIES[name], dict[str, Any]()
    for key, parameter in family.parameters.items():
        default = family.default_lengths(context_length) if parameter.default is None else (parameter.default,)
        lists[key] = values.get(key, default)
    return [Task(name, dict(zip(lists, chosen, strict=True))) for chosen in itertools.product(*lists.values())]
