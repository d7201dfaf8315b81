"""Answers of a decoder to examples, judged: the rank of the right choice, greedy generation, and live keys."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from natsjax.decode.decoder import Decoder
from natsjax.decode.scoring import ScoredChoices, score_choices
from natsjax.runtime.progress import bar
from natsjax.tasks.compose import Example, length_of

Scorer = Callable[[Sequence[Sequence[int]], Sequence[Sequence[Sequence[int]]]], list[ScoredChoices]]
"""``scorer(prompts, choices)``: the continuations of several prompts, scored."""


class Judged(NamedTuple):
    """Results of a task.

    Attributes:
      ranks: int ``[n]``, rank of the right answer among the choices by log-likelihood, 1 is the best; of equal ones the
        worst.
      exact: bool ``[n]``, True where each token of the right answer is the likeliest one, so that greedy generation
        gives it.
      kv_fraction: keys that queries read over those of full attention, mean over layers and heads.
      held_fraction: keys that live behind the prompt, over its tokens.
    """

    ranks: np.ndarray
    exact: np.ndarray
    kv_fraction: float
    held_fraction: float


def scorer_of(decoder: Decoder, batch: int) -> Scorer:
    """Returns the scorer that reads through the KV buffer, as evaluation with ``--mode=decode`` does."""

    def scorer(prompts, choices):
        return score_choices(decoder, prompts, choices, evicts_in_prompt=True, batch=batch)

    return scorer


def judge(
    scorer: Scorer, examples: Sequence[Example], *, batch_size: int, in_prompt: bool, progress: str = ""
) -> Judged:
    """Asks all examples.

    Args:
      scorer: of continuations.
      examples: at least one.
      batch_size: examples that are read at a time, those of similar length together.
      in_prompt: True: the question is read with the context, before keys are dropped that are dropped once; False:
        behind it.
      progress: title of a progress bar; "": there is none.
    """
    ranks, exact = np.zeros(len(examples), np.int64), np.zeros(len(examples), bool)
    live, causal, held = (np.zeros(len(examples)) for _ in range(3))
    order = sorted(range(len(examples)), key=lambda number: -length_of(examples[number]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    for numbers in bar(batches, progress, bool(progress)):
        prompts, rest = [], []
        for number in numbers:
            example = examples[number]
            prompts.append([*example.context, *example.question] if in_prompt else example.context)
            asked = [] if in_prompt else example.question
            rest.append([[*asked, *choice] for choice in example.choices])
        for number, prompt, found in zip(numbers, prompts, scorer(prompts, rest), strict=True):
            ranks[number], exact[number] = _judged(examples[number], found)
            queries = len(found.live)
            live[number], causal[number] = found.live.sum(), queries * (queries + 1) / 2
            held[number] = found.held / len(prompt)
    return Judged(ranks, exact, float(live.sum() / causal.sum()), float(held.mean()))


def _judged(example: Example, found: ScoredChoices) -> tuple[int, bool]:
    """Returns the rank of the first choice, and whether each of its tokens is the likeliest."""
    pairs = list(zip(example.choices, found.choices, strict=True))
    right, *others = (float(scored.logprobs[-len(tokens) :].sum(dtype=np.float64)) for tokens, scored in pairs)
    tokens, scored = pairs[0]
    # "not less" also holds of NaN: a model whose logits are none gives no right answer.
    return 1 + sum(not other < right for other in others), bool(scored.is_likeliest[-len(tokens) :].all())
