"""Tasks for lm-evaluation-harness from a run's own held-out text: nothing is downloaded.

``natsjax_rolling``
    bits per byte of passages (log-likelihood of whole texts, in windows).
``natsjax_cloze``
    the last word of a passage, as in LAMBADA (arXiv:1606.06031).
``natsjax_choice``
    the continuation of a passage among three from elsewhere, as in HellaSwag (arXiv:1905.07830).
``natsjax_needle``
    a number that a sentence somewhere in a passage gave to a name, generated, as in RULER's needle in a haystack
    (arXiv:2404.06654).
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from natsjax.data import Row, Tokenizer
from natsjax.data.packing import piece_spans
from natsjax.errors import UserError
from natsjax.runs.load import LoadedRun
from natsjax.runtime.files import make_folder, unwritable, write_text_file
from natsjax.tasks.puzzles import needle

NUM_CHOICES = 4
NUM_EXAMPLES = 100
_CONTINUATION = 0.2  # of a passage's words: what is chosen from
_FEWEST_WORDS = 20  # of a passage


def write_tasks(
    run: LoadedRun, output: str | os.PathLike[str], *, num_examples: int = NUM_EXAMPLES, seed: int = 0
) -> list[str]:
    """Writes a YAML file and a file of examples for each task; the harness reads them with ``--include_path``.

    Args:
      run: whose held-out text the passages are of; one is a context, or the part of it that is of one document.
      output: folder, made if needed.
      num_examples: of each task, at most.
      seed: of the draws.

    Returns:
      The names of the tasks.

    Raises:
      UserError: the run has no text, or too little, or the folder cannot be written.
    """
    if not isinstance(run.tokenizer, Tokenizer):
        raise UserError(f"{run.workdir.path} is a recall run, whose tokens stand for no text; name another.")
    passages = _passages(run.data.contexts("validation", 2 * num_examples), run.tokenizer)[:num_examples]
    if len(passages) < NUM_CHOICES:
        raise UserError(
            f"the held-out text of {run.workdir.path} has {len(passages)} passages of {_FEWEST_WORDS} words or more, "
            f"and the tasks need {NUM_CHOICES}; hold out more text."
        )
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(os.path.expanduser(output)).absolute()
    try:
        make_folder(folder)
        for name, (fields, examples) in _tasks(passages, rng).items():
            write_text_file(folder / f"{name}.jsonl", "".join(json.dumps(example) + "\n" for example in examples))
            files = {"test": str(folder / f"{name}.jsonl")}
            task = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files},
                "test_split": "test",
                "metadata": {"version": 1.0},
            }
            write_text_file(folder / f"{name}.yaml", json.dumps(task | fields, indent=2) + "\n")  # JSON is YAML
    except OSError as error:
        raise unwritable(f"--make_tasks={os.fspath(output)}", error) from error
    return list(TASKS)


def _passages(contexts: Row, tokenizer: Tokenizer) -> list[str]:
    """Returns the longest piece of each context as text, between its first and last space."""
    longest: dict[int, tuple[int, int]] = {}
    for context, start, stop in zip(*(values.tolist() for values in piece_spans(contexts)), strict=True):
        if context not in longest or stop - start > longest[context][1] - longest[context][0]:
            longest[context] = start, stop
    found = []
    for context, (start, stop) in sorted(longest.items()):
        text = tokenizer.decode(contexts["inputs"][context, start:stop].tolist())
        words = re.split(r"(\s+)", text)[2:-2]  # without what may be half a word; separators stay as they are
        if len(words) >= 2 * _FEWEST_WORDS:
            found.append("".join(words).strip())
    return found


def _tasks(
    passages: Sequence[str], rng: np.random.Generator
) -> Mapping[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Returns fields of the YAML file and examples of every task."""
    return {
        name: (fields, [make(passages, number, rng) for number in range(len(passages))])
        for name, (fields, make) in TASKS.items()
    }


def _rolling(passages: Sequence[str], number: int, rng: np.random.Generator) -> dict[str, Any]:
    del rng
    return {"text": passages[number]}


def _cloze(passages: Sequence[str], number: int, rng: np.random.Generator) -> dict[str, Any]:
    del rng
    context, word = passages[number].rsplit(maxsplit=1)
    return {"context": context, "word": f" {word}"}


def _choice(passages: Sequence[str], number: int, rng: np.random.Generator) -> dict[str, Any]:
    context, ending = _split(passages[number])
    others = rng.choice([other for other in range(len(passages)) if other != number], NUM_CHOICES - 1, replace=False)
    choices = [ending, *(_split(passages[other])[1] for other in others)]
    order = rng.permutation(NUM_CHOICES)
    return {
        "context": context,
        "choices": [choices[place] for place in order],
        "gold": int(np.flatnonzero(order == 0)[0]),
    }


def _split(passage: str) -> tuple[str, str]:
    """Divides a passage into its beginning and its ending, which begins with a space."""
    words = passage.split(" ")
    at = max(1, round((1 - _CONTINUATION) * len(words)))
    return " ".join(words[:at]), f" {' '.join(words[at:])}"


def _needle(passages: Sequence[str], number: int, rng: np.random.Generator) -> dict[str, Any]:
    words, puzzle = passages[number].split(" "), needle(rng, keys=1, choices=1)
    depth = float(rng.uniform())
    room = len(words) * 3 // 4
    at = round(depth * room)
    told = [*words[:at], puzzle.facts[0].strip(), *words[at:room]]
    return {"context": f"{' '.join(told)}\n{puzzle.question}", "answer": puzzle.answer.strip(), "depth": depth}


_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, tuple[dict[str, Any], Any]] = {
    "natsjax_rolling": (
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": name, "aggregation": aggregation, "higher_is_better": False}
                for name, aggregation in (
                    ("bits_per_byte", "bits_per_byte"),
                    ("byte_perplexity", "weighted_perplexity"),
                    ("word_perplexity", "weighted_perplexity"),
                )
            ],
        },
        _rolling,
    ),
    "natsjax_cloze": (
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{word}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                _ACCURACY,
            ],
        },
        _cloze,
    ),
    "natsjax_choice": (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "metric_list": [_ACCURACY, _ACCURACY | {"metric": "acc_norm"}],
        },
        _choice,
    ),
    "natsjax_needle": (
        {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "regexes_to_ignore": [r"\s"],
                }
            ],
        },
        _needle,
    ),
}
"""Fields of the YAML file and the maker of examples, by name."""
