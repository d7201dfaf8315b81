"""Retrieval tasks: texts against their definition, scores against brute force, the command from end to end."""

import itertools
import json
import re

import decoding
import numpy as np
import pytest
import report_data
import tiny

from natsjax.data.recall import RecallTask
from natsjax.decode.decoder import DecodeSettings
from natsjax.decode.generation import generate
from natsjax.decode.scoring import Scored, ScoredChoices, score_choices
from natsjax.errors import UserError
from natsjax.policies.attention_score import H2O, SnapKV
from natsjax.policies.nats import Nats
from natsjax.report.intervals import paired_difference, wilson_interval
from natsjax.report.tasks import TASK_FIELDS, read_tasks
from natsjax.tasks import __main__ as command
from natsjax.tasks import evaluation
from natsjax.tasks.compose import Haystack, compose, length_of, make_examples, recall_examples
from natsjax.tasks.judge import judge
from natsjax.tasks.tasks import FAMILIES, default_tasks, parse_tasks

# --- puzzles: the answer is what a reader of the text finds, who knows nothing of how it was made ---


def read_pairs(puzzle):
    return [re.fullmatch(r"\n(.+): (.+)\n", fact).groups() for fact in puzzle.facts]


def read_mqar(puzzle):
    pairs = read_pairs(puzzle)
    return dict(pairs)[puzzle.question.strip("\n:")]  # of a key with several values a dict has the last


def read_needle(puzzle):
    told = dict(re.fullmatch(r"\n(The secret number of \w+ is) (\d{5})\.\n", fact).groups() for fact in puzzle.facts)
    return told[puzzle.question.strip()]


def read_phonebook(puzzle):
    (listed,) = puzzle.facts
    return dict(line.split(": ") for line in listed.strip().splitlines())[puzzle.question.strip("\n:")]


def read_tracking(puzzle):
    told = dict(
        re.fullmatch(r"\nThe number of (\w+) is (?:that of )?(\w+)\.\n", fact).groups() for fact in puzzle.facts
    )
    name = re.fullmatch(r"\nIn digits, the number of (\w+) is", puzzle.question)[1]
    hops = 0
    while name in told:
        name, hops = told[name], hops + 1
    assert hops == 3  # two references and the number
    return name


def read_copy(puzzle):
    words = puzzle.facts[0].removeprefix("\nRead: ").split()
    before = puzzle.question.removeprefix("\nAgain: ").split()
    (at,) = [place for place in range(len(words)) if words[place : place + 2] == before]
    return " ".join(words[at + 2 : at + 2 + 3])


READERS = {
    "needle": (read_needle, {}),
    "needle_multikey": (read_needle, {"keys": 5}),
    "mqar": (read_mqar, {"pairs": 6}),
    "mqar_overwritten": (read_mqar, {"pairs": 3, "updates": 4}),
    "phonebook": (read_phonebook, {"entries": 7}),
    "tracking": (read_tracking, {"chains": 3, "hops": 2}),
    "copy": (read_copy, {"words": 9, "copied": 3}),
}


def task_of(family, context_length=1024, **parameters):
    text = ",".join(f"{name}={value}" for name, value in parameters.items())
    (task,) = parse_tasks(f"{family}:{text}", context_length)
    return task


def test_every_family_is_read():
    assert set(READERS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_what_the_text_says(family):
    read, parameters = READERS[family]
    task = task_of(family, length=512, choices=6, **parameters)
    made = [task.puzzle(task.rng(3, number)) for number in range(40)]
    for puzzle in made:
        assert f" {read(puzzle)}" == puzzle.answer
        assert len({puzzle.answer, *puzzle.others}) == 6
        assert puzzle.facts[puzzle.asked].startswith("\n")
        assert puzzle.facts[puzzle.asked].endswith("\n")
    assert made == [task.puzzle(task.rng(3, number)) for number in range(40)]
    assert made != [task.puzzle(task.rng(4, number)) for number in range(40)]
    assert len({puzzle.answer for puzzle in made}) > 10


def test_wrong_answers_are_those_that_would_be_believed():
    task = task_of("mqar_overwritten", pairs=2, updates=3, choices=5)
    for number in range(20):
        puzzle = task.puzzle(task.rng(0, number))
        key = puzzle.question.strip("\n:")
        values = [value for name, value in read_pairs(puzzle) if name == key]
        assert len(set(values)) == 3
        assert puzzle.answer == f" {values[-1]}"
        assert puzzle.others[:2] == (f" {values[1]}", f" {values[0]}")
        assert puzzle.facts[puzzle.asked] == f"\n{key}: {values[-1]}\n"
    task = task_of("phonebook", entries=4, choices=4)
    puzzle = task.puzzle(task.rng(0, 0))
    assert all(other in puzzle.facts[0] for other in puzzle.others)


# --- examples ---


class Words:
    """A tokenizer whose tokens are words and spaces, and which joins a space to the word behind it."""

    bos_id, eos_id = 0, 1

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        parts = re.findall(r" ?\w+|\s|[^\w\s]", text)
        return np.array([self.ids.setdefault(part, 10_000 + len(self.ids)) for part in parts], np.int32)


def haystack(length=600, rows=3):
    """Contexts whose tokens are numbers in a row, one document each but for the last."""
    tokens = 2 + np.arange(rows * length).reshape(rows, length)
    tokens[:, 0] = Words.bos_id
    positions = np.tile(np.arange(length), (rows, 1))
    end = np.full((rows, length), length)
    end[-1] = np.where(np.arange(length) < length // 2, length // 2, 0)  # and padding
    positions[-1, length // 2 :] = 0
    return Haystack({"inputs": tokens, "positions": positions, "document_end": end}, Words())


def examples_of(task, num=20, seed=0, text=None):
    return make_examples(task, num, seed, Words(), text or haystack(), bos=True, most=task.parameters["length"] or 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_has_the_length_the_facts_and_held_out_text_in_a_row(family):
    _, parameters = READERS[family]
    task, tokenizer, text = task_of(family, length=400, **parameters), Words(), haystack()
    for number in range(12):
        rng = task.rng(1, number)
        puzzle = task.puzzle(rng)
        depth = number / 11 if FAMILIES[family].has_depth else None
        found = compose(puzzle, tokenizer, text, rng, length=400, depth=depth, begin=[0])
        assert length_of(found) == 400
        assert found.context[0] == 0
        header = tokenizer.encode(puzzle.header).tolist()
        assert found.context[1 : 1 + len(header)] == header
        body = found.context[1 + len(header) :]
        filler = [token for token in body if token < 10_000]
        assert filler == list(range(filler[0], filler[0] + len(filler)))
        told = [token for token in body if token >= 10_000]
        facts = [tokenizer.encode(fact).tolist() for fact in puzzle.facts]
        if depth is None:
            assert told == list(itertools.chain(*facts))
        else:
            assert sorted(told) == sorted(itertools.chain(*facts))
            asked = facts[puzzle.asked]
            (begin,) = [at for at in range(len(body)) if body[at : at + len(asked)] == asked]
            assert abs(begin - depth * (len(body) - len(asked))) <= 1
            assert found.depth == pytest.approx(begin / (len(body) - len(asked)))
        whole = [*found.question, *found.choices[0]]
        assert whole == tokenizer.encode(puzzle.question + puzzle.answer + puzzle.mark).tolist()
        assert len({tuple(choice) for choice in found.choices}) == 8
        assert {choice[0] for choice in found.choices} != {found.choices[0][0]} or family == "phonebook"


def test_seeds_and_depths():
    task = task_of("needle", length=300, depths=3)
    one = examples_of(task)
    assert one == examples_of(task)
    assert one[:5] == examples_of(task, num=5)
    other = examples_of(task, seed=1)
    assert all(a.context != b.context for a, b in zip(one, other, strict=True))
    assert [example.place for example in one[:4]] == [0, 1, 2, 0]
    for example in one:
        assert example.depth == pytest.approx(example.place / 2, abs=1 / 300)
    assert one[0].context != examples_of(task_of("needle", length=301, depths=3))[0].context


def test_without_filler_there_are_the_facts_alone():
    (example, *_) = examples_of(task_of("mqar", length=0, pairs=3))
    assert all(token >= 10_000 for token in example.context[1:])


def test_texts_that_do_not_fit_are_one_sentence():
    with pytest.raises(
        UserError, match=r"mqar:length=40,pairs=30: its facts, question and answer alone take .* than 40; "
    ):
        examples_of(task_of("mqar", length=40, pairs=30))
    with pytest.raises(UserError, match="more than the 512 that the model was trained to read"):
        examples_of(task_of("phonebook", entries=600))
    with pytest.raises(UserError, match="the held-out text has 147 tokens, and a task wants"):
        examples_of(task_of("needle", length=1000), text=haystack(length=60))


def test_long_texts_are_of_several_documents():
    """Where no document is as long as what is wanted, they are joined."""
    (example, *_) = examples_of(task_of("needle", length=130), text=haystack(length=60))
    filler = [token for token in example.context if 0 < token < 10_000]
    assert len(set(np.array(filler) // 60)) > 1


# --- what is asked for ---


def test_parameters_with_several_values_are_several_tasks():
    found = parse_tasks("mqar:pairs=8+16,length=256,needle:depths=3", 1024)
    assert [task.name for task in found] == [
        "mqar:length=256",
        "mqar:length=256,pairs=16",
        *(f"needle:length={length},depths=3" for length in (256, 512, 1024)),
    ]
    assert {task.family for task in default_tasks(512)} == set(FAMILIES)
    for task in default_tasks(512):
        assert parse_tasks(task.name, 512) == [task]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nedle", "there is no task 'nedle', but .*; did you mean needle."),
        ("", "there is no task ''"),
        ("pairs=8,mqar", "'pairs=8' is of no task; name the task before it"),
        ("mqar:pears=8", "mqar has no parameter 'pears', but .*; did you mean pairs"),
        ("mqar:pairs", "mqar has no parameter 'pairs'"),
        ("mqar:pairs=many", "mqar has pairs='many'; a whole number from 1 to 65 was expected"),
        ("mqar:pairs=0", "mqar has pairs='0'"),
        ("mqar:pairs=1,pairs=2", "mqar has pairs twice; join several values by +"),
        ("needle:length=1025", "longer than the 1024 tokens that the model was trained to read"),
        ("tracking:chains=9,hops=9", "they take 100 names, and there are 32"),
        ("copy:words=4,copied=3", "there are at most 2"),
    ],
)
def test_mistakes_in_tasks_are_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_tasks(text, 1024)
    assert str(error.value).startswith(f"--tasks={text!r}: ")


# --- synthetic recall ---


def test_recall_asks_for_the_last_key_of_a_row():
    task = RecallTask(context_length=64, num_pairs=5, num_keys=9, num_values=12, num_fillers=6)
    for example in recall_examples(task, 30):
        key, (value,) = example.question[0], example.choices[0]
        assert task.kind_of(key) == "key"
        places = [at for at, token in enumerate(example.context) if token == key]
        assert len(places) == 1
        assert example.context[places[0] + 1] == value
        wrong = [choice[0] for choice in example.choices[1:]]
        assert all(task.kind_of(token) == "value" for token in wrong)
        assert len({value, *wrong}) == 8


# --- judgement, with models that are planted ---


def planted(logprob, likeliest=lambda tokens, right: tokens == right):
    """A scorer that gives every choice ``logprob(tokens, right)`` on its last token."""

    def scorer(prompts, choices):
        return [
            ScoredChoices(
                [
                    Scored(
                        np.append(np.full(len(tokens) - 1, -50.0), logprob(tokens, of_row[0])),
                        np.full(len(tokens), likeliest(tokens, of_row[0])),
                    )
                    for tokens in of_row
                ],
                np.arange(1.0, len(prompt) + len(of_row[0])),
                len(prompt) / 4,
            )
            for prompt, of_row in zip(prompts, choices, strict=True)
        ]

    return scorer


@pytest.mark.parametrize("in_prompt", [False, True])
def test_a_model_that_knows_everything_or_nothing(in_prompt):
    examples = examples_of(task_of("mqar", length=200), num=300)

    def ask(*planting):
        return judge(planted(*planting), examples, batch_size=7, in_prompt=in_prompt)

    found = ask(lambda tokens, right: 0.0 if tokens == right else -1.0)
    assert (found.ranks == 1).all()
    assert found.exact.all()
    assert found.kv_fraction == pytest.approx(1)
    assert found.held_fraction == pytest.approx(0.25)
    guesses = np.random.default_rng(0)
    found = ask(lambda tokens, right: guesses.uniform(), lambda tokens, right: False)
    assert not found.exact.any()
    assert np.mean(found.ranks == 1) == pytest.approx(1 / 8, abs=0.06)  # 3 standard deviations
    np.testing.assert_allclose(np.bincount(found.ranks, minlength=9)[1:] / 300, 1 / 8, atol=0.07)
    assert (ask(lambda tokens, right: 0.0).ranks == 8).all()  # one that cannot tell them apart
    assert (ask(lambda tokens, right: np.nan).ranks == 8).all()


# --- scores through the buffer, against brute force ---

PROMPTS = decoding.prompts([19, 7, 12], seed=1)
CHOICES = [decoding.prompts([6, 3, 1], seed=seed) for seed in (2, 3, 4)]
POLICIES = {"nats": Nats(), "h2o": H2O(6, 3), "snapkv": SnapKV(6, 3)}


@pytest.fixture(scope="module")
def model():
    config = decoding.config(model={"num_layers": 2})
    return config, decoding.parameters_of(config)


@pytest.fixture(scope="module")
def scored(model):
    """Decoder and scores by policy."""
    found = {}
    for name, policy in POLICIES.items():
        decoder = decoding.decoder(*model, policy, DecodeSettings(chunk=32, segment=8, block=16))
        found[name] = decoder, score_choices(decoder, PROMPTS, CHOICES, evicts_in_prompt=True, batch=4)
    return found


def test_scores_are_those_of_the_whole_forward_pass(model, scored):
    rows = [prompt + choice for prompt, of_row in zip(PROMPTS, CHOICES, strict=True) for choice in of_row]
    logits = iter(decoding.masked_logits(*model, rows)[0].astype(np.float64))
    for prompt, of_row, found in zip(PROMPTS, CHOICES, scored["nats"][1], strict=True):
        for choice, one in zip(of_row, found.choices, strict=True):
            x = next(logits)[len(prompt) - 1 : len(prompt) + len(choice) - 1]
            logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
            np.testing.assert_allclose(one.logprobs, logprobs[np.arange(len(choice)), choice], atol=3e-5)
            np.testing.assert_array_equal(one.is_likeliest, logprobs.argmax(-1) == choice)


def test_live_keys_are_counted(scored):
    """Of policies that evict, what they may keep; a window with sinks is counted below."""
    for prompt, found in zip(PROMPTS, scored["h2o"][1], strict=True):
        assert found.held == 6  # keys of the prompt have been evicted, though it was read with more to come
        assert found.live.max() == min(len(found.live), 7)
        assert found.live[len(prompt) - 1] == 7
    for prompt, found in zip(PROMPTS, scored["snapkv"][1], strict=True):
        np.testing.assert_allclose(found.live[: len(prompt)], np.arange(len(prompt)) + 1)  # read whole, then cut down
        assert found.held == 6


def test_likeliest_answers_are_generated(scored):
    """An answer counts as generated if greedy generation gives it, token by token."""
    decoder, _ = scored["nats"]
    greedy = generate(decoder, PROMPTS, max_new_tokens=6).tokens
    wrong = [[*tokens[:-1], (tokens[-1] + 1) % tiny.VOCAB_SIZE] for tokens in greedy]
    found = score_choices(decoder, PROMPTS, [list(pair) for pair in zip(greedy, wrong, strict=True)], batch=4)
    for one in found:
        assert one.choices[0].is_likeliest.all()
        assert one.choices[1].is_likeliest.tolist() == [True] * 5 + [False]


# --- intervals ---


def test_intervals_are_those_of_newcombe():
    """Examples of his papers of 1998: of one fraction (table I, method 3), and of a paired difference."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    one = np.repeat([True, True, False, False], [36, 12, 2, 0])
    other = np.repeat([True, False, True, False], [36, 12, 2, 0])
    assert paired_difference(one, other) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert paired_difference(one, one)[0] == 0


@pytest.mark.parametrize(("both", "only"), [(0.85, 0.1), (0.5, 0.1), (0.1, 0.4)])
def test_paired_intervals_hold_the_difference(both, only):
    rng, true = np.random.default_rng(0), only - 0.05
    held = 0
    for _ in range(400):
        drawn = rng.choice(4, 100, p=[both, only, 0.05, 1 - both - only - 0.05])
        difference, low, high = paired_difference(drawn <= 1, (drawn == 0) | (drawn == 2))
        assert low <= difference <= high
        held += low <= true <= high
    assert held / 400 == pytest.approx(0.95, abs=0.035)


# --- from end to end ---

ASKED = "needle:length=150+158,depths=2,choices=3"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    model = {"num_layers": 1}
    return tiny.make_run(
        folder / "run", tiny.config(model=model, data=tiny.corpus(folder / "texts", context_length=160))
    )


@pytest.fixture(scope="module")
def asked(run):
    options = {"budgets": [0.4, 0.5], "policies": ["streaming_llm"], "num_examples": 6, "batch_size": 6}
    return evaluation.run(run.workdir.path, tasks=ASKED, progress=False, loaded=run, **options), options


def test_rows_have_every_field_and_their_pairs(asked, run):
    found, _ = asked
    assert {row["task"] for row in found.rows} == {f"needle:length={n},depths=2,choices=3" for n in (150, 158)}
    by_method = {}
    for row in found.rows:
        assert set(row) == set(TASK_FIELDS)
        by_method.setdefault(row["method"], []).append(row)
        assert row["ranked"] == np.mean(np.array(row["ranks"]) == 1)
        assert row["by_depth"]["examples"] == [3, 3]
        assert np.mean(row["by_depth"]["ranked"]) == pytest.approx(row["ranked"])
        assert row["mean_length"] == row["parameters"]["length"]
        assert row["chance"] == pytest.approx(1 / 3)
    assert set(by_method) == {"full", "streaming_llm"}
    for row in by_method["full"]:
        assert (row["kv_fraction"], row["held_fraction"]) == (1, 1)
        assert row["ranked_difference"] is None
    for row in by_method["streaming_llm"]:
        length, (sinks, window) = row["parameters"]["length"] - 1, row["setting"].values()
        counted = np.minimum(np.arange(length) + 1, sinks + window + 1).sum() / (length * (length + 1) / 2)
        assert row["kv_fraction"] == pytest.approx(counted)
        behind = len("\nThe secret number of Ada is") + len(" 12345.")  # and the difference of the name
        context = length + 1 - behind
        assert row["held_fraction"] == pytest.approx((sinks + window) / context, rel=0.05)
        assert row["kv_fraction"] == pytest.approx(row["budget"], rel=0.05)
        (full,) = [one for one in by_method["full"] if one["task"] == row["task"]]
        assert row["ranked_difference"] == pytest.approx(row["ranked"] - full["ranked"])
    assert read_tasks(run.workdir.report) == found.rows


def test_stored_rows_are_not_measured_again(asked, run, monkeypatch):
    found, options = asked
    measured = []
    original = evaluation._measure
    monkeypatch.setattr(evaluation, "_measure", lambda *args: measured.append(args) or original(*args))
    again = evaluation.run(run.workdir.path, tasks=ASKED, progress=False, loaded=run, **options)
    assert not measured
    assert again.rows == found.rows
    options = options | {"policies": [], "seed": 1}
    other = evaluation.run(run.workdir.path, tasks=ASKED.replace("+158", ""), progress=False, loaded=run, **options)
    assert len(measured) == len(other.rows) == 1
    stored = read_tasks(run.workdir.report)
    assert len(stored) == len(found.rows)  # it has taken the place of that of seed 0
    assert {row["seed"] for row in stored if row["method"] == "full"} == {0, 1}


def test_table_picture_and_page(asked, tmp_path):
    found, _ = asked
    table = found.summary()
    assert "by rank [95 %]" in table
    assert "StreamingLLM" in table
    assert [path.name for path in found.paths] == ["tasks.jsonl", "tasks.png"]
    assert found.paths[1].read_bytes().startswith(b"\x89PNG")
    page = report_data.write(tmp_path)[2]
    embedded = re.compile(r'<script type="application/json" id="report-data">(.*?)</script>', re.DOTALL)
    assert json.loads(embedded.search(page.read_text())[1])["tasks"] is None
    (tmp_path / "report/tasks.jsonl").write_bytes(found.paths[0].read_bytes())
    page = report_data.write(tmp_path)[2]
    tasks = json.loads(embedded.search(page.read_text())[1])["tasks"]
    assert len(tasks["rows"]) == len(found.rows)
    assert {column["name"] for column in tasks["columns"]} >= {"task", "kv_fraction", "held_fraction", "ranked"}
    streaming = [one for one in tasks["maps"] if "StreamingLLM" in one["title"]]
    assert len(streaming) == 2  # a map of each budget, though the windows of the lengths differ
    for one in streaming:
        assert one["lengths"] == [150, 158]
        assert one["depths"] == [0, 1]
        budget = 0.4 if "budget 40.0 %" in one["title"] else 0.5
        rows = [row for row in found.rows if (row["method"], row["budget"]) == ("streaming_llm", budget)]
        for number, row in enumerate(rows):
            assert [line[number] for line in one["ranked"]] == row["by_depth"]["ranked"]


def test_a_recall_run_is_asked_its_own_rows(tmp_path, capsys):
    made = tiny.make_run(tmp_path / "run", tiny.config(model={"num_layers": 1}))
    flags = [f"--workdir={made.workdir.path}", "--num_examples=4", "--policies=nats", "--no-progress"]
    command.main([*flags, "--show"])
    assert "⟨bos⟩" in capsys.readouterr().out
    command.main(flags)
    assert "recall" in capsys.readouterr().out
    rows = read_tasks(made.workdir.report)
    assert {row["method"] for row in rows} == {"nats", "full"}
    assert all((row["task"], row["by_depth"]) == ("recall", None) for row in rows)
    with pytest.raises(UserError, match="is a recall run, whose tokens stand for no text"):
        command.main([*flags, "--tasks=mqar"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tasks=needel"], "did you mean needle"),
        (["--budgets=a"], "these are no numbers"),
        (["--budgets=2"], "no fraction of the KV"),
        (["--policies=h20"], "did you mean h2o"),
        (["--num_examples=0"], "--num_examples=0: a whole number from 1"),
        (["--seed=-1"], "--seed=-1: a whole number from 0"),
        (["--question=never"], "is none of after, in_prompt"),
    ],
)
def test_mistakes_are_one_sentence(run, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        command.main([f"--workdir={run.workdir.path}", *flags])


def test_what_does_not_fit_by_default_is_left_out(run, capsys):
    command.main([f"--workdir={run.workdir.path}", "--show"])
    printed = capsys.readouterr().out
    assert "needle:length=160" in printed
    assert "phonebook" not in printed  # its 16 lines are more than 160 bytes


def test_damaged_rows_are_one_sentence(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"task": 1}\n')
    with pytest.raises(UserError, match=r"tasks.jsonl cannot be read \(a line lacks family"):
        read_tasks(tmp_path)
    (tmp_path / "tasks.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"tasks.jsonl cannot be read \(Expecting"):
        read_tasks(tmp_path)
