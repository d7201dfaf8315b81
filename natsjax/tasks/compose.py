"""Examples as token ids: puzzles put into held-out text, and rows of synthetic recall data.

Everything is divided by token, so that a text has exactly the asked length, and a fact is at exactly the asked depth.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from natsjax.data import RecallTask, Row, Tokenizer
from natsjax.data.packing import piece_spans
from natsjax.errors import UserError
from natsjax.tasks.puzzles import Puzzle
from natsjax.tasks.tasks import FAMILIES, RECALL, Task

_FEWEST_CHOICES = 8
"""Values to choose from in synthetic recall, where it has as many and fewer were told."""


class Example(NamedTuple):
    """A question with choices, as token ids.

    Attributes:
      context: what is read, and remembered.
      question: what is read behind it.
      choices: answers, the right one first.
      depth: place of the asked fact in the context: 0 where it begins it, 1 where it ends it.
      place: number of the depth that was asked for, from 0 on.
    """

    context: list[int]
    question: list[int]
    choices: list[list[int]]
    depth: float
    place: int = 0


class DoesNotFitError(UserError):
    """Facts that take more tokens than there are, or want more held-out text than there is."""


class Haystack:
    """Held-out text to hide facts in.

    Args:
      contexts: held-out contexts, arrays ``[n, t]`` (``natsjax.data.packing``).
      tokenizer: whose BOS and EOS are left out.
    """

    def __init__(self, contexts: Row, tokenizer: Tokenizer):
        self._pieces = []
        for context, start, stop in zip(*(values.tolist() for values in piece_spans(contexts)), strict=True):
            tokens = contexts["inputs"][context, start:stop]
            tokens = tokens[(tokens != tokenizer.bos_id) & (tokens != tokenizer.eos_id)]
            if len(tokens):
                self._pieces.append(tokens)
        self._joined = np.concatenate([np.zeros(0, np.int32), *self._pieces])

    def take(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Returns so many tokens in a row from a random place: of one document where one is as long, int32 ``[count]``.

        Raises:
          DoesNotFitError: there is not as much text.
        """
        if count > len(self._joined):
            raise DoesNotFitError(
                f"the held-out text has {len(self._joined):,} tokens, and a task wants {count:,} between its facts; "
                "choose a smaller length in --tasks, or hold out more text."
            )
        places = np.maximum(np.array([len(piece) - count + 1 for piece in self._pieces], np.int64), 0)
        if not places.any():
            begin = int(rng.integers(len(self._joined) - count + 1))
            return self._joined[begin : begin + count]
        begin = int(rng.integers(places.sum()))
        piece = int(np.searchsorted(np.cumsum(places), begin, side="right"))
        begin -= int(places[:piece].sum())
        return self._pieces[piece][begin : begin + count]


def make_examples(
    task: Task, num: int, seed: int, tokenizer: Tokenizer, haystack: Haystack, *, bos: bool, most: int
) -> list[Example]:
    """Returns the first examples of a task; one is a function of the task, the seed and its number.

    Args:
      task: with text.
      num: examples.
      seed: of the draws, 0 or more.
      tokenizer: of the run.
      haystack: held-out text of the run.
      bos: True where texts begin with BOS.
      most: tokens that the model reads at once.

    Raises:
      DoesNotFitError: the facts do not fit into the length, or there is too little held-out text.
    """
    found = []
    for number in range(num):
        rng = task.rng(seed, number)
        puzzle = task.puzzle(rng)
        place, depth = 0, None
        if FAMILIES[task.family].has_depth:
            depths = task.parameters["depths"]
            place = number % depths
            depth = place / (depths - 1) if depths > 1 else 0.5
        begin = [tokenizer.bos_id] if bos else []
        example = compose(puzzle, tokenizer, haystack, rng, length=task.parameters["length"], depth=depth, begin=begin)
        length, total = task.parameters["length"], length_of(example)
        if total > (length or most):
            room = f"{length}" if length else f"the {most} that the model was trained to read (data.context_length)"
            raise DoesNotFitError(
                f"--tasks: {task.name}: its facts, question and answer alone take {total} tokens of this run's "
                f"tokenizer, more than {room}; choose fewer facts{' or a larger length' if length else ''}."
            )
        found.append(example._replace(place=place))
    return found


def length_of(example: Example) -> int:
    """Counts the tokens of an example with its longest choice."""
    return len(example.context) + len(example.question) + max(map(len, example.choices))


def compose(
    puzzle: Puzzle,
    tokenizer: Tokenizer,
    haystack: Haystack,
    rng: np.random.Generator,
    *,
    length: int,
    depth: float | None,
    begin: Sequence[int],
) -> Example:
    """Puts the facts of a puzzle into held-out text.

    Args:
      puzzle: its facts stay in their order, unless there is a depth.
      tokenizer: of all texts.
      haystack: what is put between the facts.
      rng: of the places.
      length: tokens with question and answer; 0: nothing is put between the facts. Where the facts alone have more
        tokens, there is nothing between them either.
      depth: of the asked fact, from 0 to 1; the others are then at random places, in any order. None: all are at
        random places in their order.
      begin: tokens before everything.
    """
    question, choices = _split(tokenizer, puzzle)
    facts = [_encoded(tokenizer, fact) for fact in puzzle.facts]
    header = [*begin, *_encoded(tokenizer, puzzle.header)]
    used = len(header) + sum(map(len, facts)) + len(question) + max(map(len, choices))
    filler = haystack.take(length - used, rng).tolist() if length > used else []
    asked = puzzle.asked
    if depth is None:
        cuts = np.sort(rng.integers(len(filler) + 1, size=len(facts))).tolist()
    else:
        facts, asked, cuts = _at_depth(facts, asked, len(filler), depth, rng)
    body: list[int] = []
    begins, at = [], 0
    for fact, cut in zip(facts, cuts, strict=True):
        body += filler[at:cut]
        begins.append(len(body))
        body += fact
        at = cut
    body += filler[at:]
    free = len(body) - len(facts[asked])
    return Example([*header, *body], question, choices, begins[asked] / free if free else 0.0)


def _at_depth(
    facts: list[list[int]], asked: int, num_filler: int, depth: float, rng: np.random.Generator
) -> tuple[list[list[int]], int, list[int]]:
    """Orders facts so that the asked one begins at a depth of the text without it, to the token where filler allows it.

    Returns:
      The facts in their new order, the index of the asked one, and how many tokens of filler come before each.
    """
    others = [fact for number, fact in enumerate(facts) if number != asked]
    wanted = round(depth * (num_filler + sum(map(len, others))))
    before: list[list[int]] = []
    after: list[list[int]] = []
    for place in rng.permutation(len(others)):
        fact = others[place]
        left = wanted - sum(map(len, before))
        right = num_filler + sum(map(len, others)) - wanted - sum(map(len, after))
        comes_before = rng.uniform() < depth
        if len(fact) > (left if comes_before else right):  # what is left of that side holds no whole fact
            comes_before = left >= right if min(left, right) < len(fact) else not comes_before
        (before if comes_before else after).append(fact)
    cut = int(np.clip(wanted - sum(map(len, before)), 0, num_filler))
    cuts_before = np.sort(rng.integers(cut + 1, size=len(before))).tolist()
    cuts_after = np.sort(rng.integers(cut, num_filler + 1, size=len(after))).tolist()
    return [*before, facts[asked], *after], len(before), [*cuts_before, cut, *cuts_after]


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).tolist() if text else []


def _split(tokenizer: Tokenizer, puzzle: Puzzle) -> tuple[list[int], list[list[int]]]:
    """Encodes the question with each choice, and divides them where the first one's tokens cease to be the question's.

    A token may hold the end of the question and the beginning of an answer; it is then part of the choices.
    """
    question = _encoded(tokenizer, puzzle.question)
    whole = [_encoded(tokenizer, puzzle.question + choice) for choice in puzzle.choices]
    common = len(question)
    for tokens in whole:
        same = [a == b for a, b in zip(question[:common], tokens, strict=False)]
        common = same.index(False) if False in same else min(common, len(same))
    common = min(common, *(len(tokens) - 1 for tokens in whole))
    return question[:common], [tokens[common:] for tokens in whole]


def recall_examples(task: RecallTask, num: int) -> list[Example]:
    """Returns the first held-out rows of a recall run; the key that a row asks for last is the question.

    The choices are the values that were told, and further ones where these are few.
    """
    rows = task.rows(0, num, split="validation")
    is_key, is_value = (task.token_kind == kind for kind in ("key", "value"))
    found = []
    for tokens, weight in zip(rows["inputs"], rows["loss_weight"], strict=True):
        last = int(np.flatnonzero(weight)[-1])
        told = int(np.flatnonzero(tokens[:last] == tokens[last])[0])
        pairs = np.flatnonzero(is_key[tokens[:last]] & is_value[tokens[1 : last + 1]])
        values = dict.fromkeys([int(tokens[last + 1]), *tokens[pairs + 1].tolist()])
        others = [value for value in np.flatnonzero(is_value).tolist() if value not in values]
        choices = [[value] for value in [*values, *others[: max(0, _FEWEST_CHOICES - len(values))]]]
        found.append(Example(tokens[:last].tolist(), [int(tokens[last])], choices, told / (last - 2)))
    return found


def recall_task() -> Task:
    """Returns the task of ``recall_examples``."""
    return Task(RECALL, {})
