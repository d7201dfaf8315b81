"""Texts of the tasks: facts, a question about one of them, its answer, and wrong answers.

A fact and its question are written alike, so that a model which has learned from plain text alone can answer: it has to
find the same words earlier, and to copy what stood behind them. ``natsjax.tasks.tasks`` lists the tasks with their
parameters, ``natsjax.tasks.compose`` puts facts into held-out text. Numpy only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

FIRST_NAMES = (  # noqa: SIM905 (so many strings are easier to read as one)
    "Ada Boris Clara Dmitri Edith Felix Greta Hugo Iris Jonas Klara Leon Maria Nathan Olga Peter Rosa Simon "
    "Thomas Ursula Victor Walter Xenia Yusuf Anna Bernard Celia Daniel Emma Frank Grace Henry"
).split()
"""People of needles, chains and phonebooks."""

LAST_NAMES = (  # noqa: SIM905 (so many strings are easier to read as one)
    "Adams Baker Carter Dixon Evans Fisher Gibson Harris Irving Jackson Keller Lawson Mason Newton Oliver "
    "Parker Quinn Reed Sawyer Turner Underwood Vaughan Walker Young Bennett Collins Dawson Ellis Foster "
    "Graham Hughes Jordan"
).split()
"""Family names of phonebooks."""

WORDS = (  # noqa: SIM905 (so many strings are easier to read as one)
    "apple river table stone garden window horse candle letter bridge silver forest basket mirror winter "
    "kitchen soldier market island button feather hammer blanket village captain needle orange pillow ribbon "
    "shadow temple valley wagon anchor barrel castle desert engine flower glove harbor iron jacket kettle "
    "lantern meadow nail ocean paper queen rabbit saddle tower uncle velvet whistle yard arrow bottle carpet "
    "dinner eagle finger goat hill insect jewel knife ladder mountain nest oven pencil quarter rope spider "
    "thunder umbrella vessel wheel yellow acorn bell crown drum ear fence grape hat ink jar king leaf moon "
    "nose oil pearl quilt ring ship tent urn vine wolf yarn ant boat coin door egg flag gate hen inn jug kite "
    "lamp mill net owl pot queue road sail tree uniform vase wall year zone"
).split()
"""Common words: the first half are keys of associative recall, the others its values; all are copied."""

NUM_KEYS = len(WORDS) // 2
"""Different keys of associative recall; there are as many values."""

_NUMBERS = 10_000, 100_000
"""Secret numbers have five digits."""


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A question about facts, as text; nothing is between them yet.

    Attributes:
      facts: in their order; each begins and ends a line.
      asked: index of the fact that the question is about; of several the last one.
      question: what is read behind everything.
      answer: what follows the question, with the space before it.
      mark: what ends the answer, as in the fact; may be empty.
      others: wrong answers, all different, without the right one; those that the facts have come first.
      header: stands before everything, as an example that is solved.
    """

    facts: tuple[str, ...]
    asked: int
    question: str
    answer: str
    mark: str
    others: tuple[str, ...]
    header: str = ""

    @property
    def choices(self) -> list[str]:
        """The right answer and the others, each with the mark."""
        return [text + self.mark for text in (self.answer, *self.others)]


def _wrong(told: Sequence[str], right: str, pool: Sequence[str], count: int, rng: np.random.Generator) -> tuple:
    """Chooses wrong answers: of those that were told, in order, and then of all others at random."""
    known = [text for text in dict.fromkeys(told) if text != right]
    rest = [text for text in pool if text != right and text not in known]
    more = rng.permutation(len(rest))[: max(0, count - len(known))]
    return tuple([*known, *(rest[place] for place in more)][:count])


def _numbers(count: int, rng: np.random.Generator) -> list[str]:
    """Draws different numbers of five digits."""
    return [str(number) for number in rng.choice(np.arange(*_NUMBERS), count, replace=False)]


def mqar(rng: np.random.Generator, *, pairs: int, choices: int) -> Puzzle:
    """Pairs of a key and a value, one of which is asked for (multi-query associative recall, arXiv:2312.04927).

    Args:
      rng: of the draws.
      pairs: of different keys; values may repeat.
      choices: answers to choose from, the right one among them.
    """
    return mqar_overwritten(rng, pairs=pairs, updates=1, choices=choices)


def mqar_overwritten(rng: np.random.Generator, *, pairs: int, updates: int, choices: int) -> Puzzle:
    """Gives every key ``updates`` different values, one after another; the last one counts.

    The rounds of different keys are mixed, and the outdated values of the asked key are the first wrong answers.

    Args:
      rng, pairs, choices: as in ``mqar``.
      updates: values of a key.
    """
    keys = [WORDS[place] for place in rng.choice(NUM_KEYS, pairs, replace=False)]
    values = [[WORDS[NUM_KEYS + place] for place in rng.choice(NUM_KEYS, updates, replace=False)] for _ in keys]
    turns = rng.permutation(np.repeat(np.arange(pairs), updates)).tolist()
    given = [0] * pairs
    facts, asked_key, asked = [], int(rng.integers(pairs)), 0
    for key in turns:
        facts.append(f"\n{keys[key]}: {values[key][given[key]]}\n")
        given[key] += 1
        asked = len(facts) - 1 if key == asked_key else asked
    *outdated, right = values[asked_key]
    told = [*outdated[::-1], *(values[key][-1] for key in rng.permutation(pairs))]
    wrong = _wrong(told, right, WORDS[NUM_KEYS:], choices - 1, rng)
    others = tuple(f" {value}" for value in wrong)
    return Puzzle(tuple(facts), asked, f"\n{keys[asked_key]}:", f" {right}", "\n", others)


def needle(rng: np.random.Generator, *, keys: int, choices: int) -> Puzzle:
    """Numbers that sentences give to names, of which one is asked for (RULER, arXiv:2404.06654).

    Args:
      rng: of the draws.
      keys: names; the first fact is the asked one.
      choices: as in ``mqar``.
    """
    names = rng.choice(FIRST_NAMES, keys, replace=False).tolist()
    numbers = _numbers(max(keys, choices), rng)
    facts = tuple(f"\nThe secret number of {name} is {number}.\n" for name, number in zip(names, numbers, strict=False))
    others = tuple(f" {number}" for number in numbers[1:choices])
    return Puzzle(facts, 0, f"\nThe secret number of {names[0]} is", f" {numbers[0]}", ".", others)


def phonebook(rng: np.random.Generator, *, entries: int, choices: int) -> Puzzle:
    """A list of names with telephone numbers, one of which is asked for (arXiv:2402.01032).

    Args:
      rng: of the draws.
      entries: of the list, which is one fact.
      choices: as in ``mqar``; the wrong ones are numbers of the list, as far as it has them.
    """
    places = rng.choice(len(FIRST_NAMES) * len(LAST_NAMES), entries, replace=False)
    names = [f"{FIRST_NAMES[place // len(LAST_NAMES)]} {LAST_NAMES[place % len(LAST_NAMES)]}" for place in places]
    drawn = rng.choice(10_000_000, max(entries, choices), replace=False)
    numbers = [f"{number // 10_000:03d}-{number % 10_000:04d}" for number in drawn]
    lines = [f"{name}: {number}\n" for name, number in zip(names, numbers, strict=False)]
    asked = int(rng.integers(entries))
    wrong = [numbers[place] for place in rng.permutation(entries) if place != asked]
    others = tuple(f" {number}" for number in [*wrong, *numbers[entries:]][: choices - 1])
    return Puzzle(("\n" + "".join(lines),), 0, f"\n{names[asked]}:", f" {numbers[asked]}", "\n", others)


def tracking(rng: np.random.Generator, *, chains: int, hops: int, choices: int) -> Puzzle:
    """Chains of names that refer to one another; the number at the beginning of one is asked for (RULER's tracking).

    Chains are mixed, each in its order, and an example of one is solved before them.

    Args:
      rng: of the draws.
      chains: of ``hops + 1`` names each.
      hops: references from the asked name to its number.
      choices: as in ``mqar``; the wrong ones are numbers of the other chains, as far as they reach.
    """
    length = hops + 1
    names = rng.choice(FIRST_NAMES, (chains + 1) * length, replace=False).reshape(chains + 1, length).tolist()
    numbers = _numbers(1 + max(chains, choices), rng)

    def sentences(chain: int) -> list[str]:
        first = f"\nThe number of {names[chain][0]} is {numbers[chain]}.\n"
        later = zip(names[chain][1:], names[chain], strict=False)
        return [first, *(f"\nThe number of {name} is that of {before}.\n" for name, before in later)]

    def question(chain: int) -> str:
        return f"\nIn digits, the number of {names[chain][-1]} is"

    example = "".join(sentences(chains)) + f"{question(chains)} {numbers[chains]}.\n"
    rest = [iter(sentences(chain)) for chain in range(chains)]
    turns = rng.permutation(np.repeat(np.arange(chains), length)).tolist()
    facts = tuple(next(rest[chain]) for chain in turns)
    asked = int(rng.integers(chains))
    last = len(turns) - 1 - turns[::-1].index(asked)
    wrong = [number for chain, number in enumerate(numbers) if chain not in (asked, chains)]
    others = tuple(f" {number}" for number in wrong[: choices - 1])
    return Puzzle(facts, last, question(asked), f" {numbers[asked]}", ".", others, header=example)


def copy(rng: np.random.Generator, *, words: int, copied: int, choices: int) -> Puzzle:
    """A list of different words that is begun again somewhere, to be continued.

    Args:
      rng: of the draws.
      words: of the list, which is one fact.
      copied: words to continue by.
      choices: as in ``mqar``; the wrong ones are words of the list in another order, or what other places go on with.
    """
    listed = [WORDS[place] for place in rng.choice(len(WORDS), words, replace=False)]
    at = int(rng.integers(2, words - copied + 1))
    right = " ".join(listed[at : at + copied])
    others: dict[str, None] = {}
    places = [place for place in rng.permutation(words - copied + 1).tolist() if place != at]
    for place in places[: choices - 1]:
        others[" ".join(listed[place : place + copied])] = None
    while len(others) < choices - 1:
        drawn = " ".join(WORDS[place] for place in rng.choice(len(WORDS), copied, replace=False))
        if drawn != right:
            others[drawn] = None
    wrong = tuple(f" {text}" for text in others)
    cue = " ".join(listed[at - 2 : at])
    return Puzzle((f"\nRead: {' '.join(listed)}\n",), 0, f"\nAgain: {cue}", f" {right}", "", wrong)
