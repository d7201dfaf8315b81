"""lm-evaluation-harness asks a run: its numbers are those of the masked evaluation, its tasks need no network."""

import dataclasses
import functools
import json
import math

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from natsjax.data.packing import piece_spans
from natsjax.errors import UserError
from natsjax.evaluate.masked import measure
from natsjax.export.hf import export_hf
from natsjax.import_model import import_model
from natsjax.policies.attention_score import H2O
from natsjax.policies.interval import SlidingWindow, StreamingLLM
from natsjax.policies.nats import Nats

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm_eval)")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from natsjax.lm_eval import __main__ as command  # noqa: E402
from natsjax.lm_eval.adapter import NatsjaxLM, find_policy  # noqa: E402
from natsjax.lm_eval.offline_tasks import TASKS, write_tasks  # noqa: E402

pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = tiny.write_texts(folder / "texts", count=40)
    data = {"source": "corpus", "input": str(texts), "tokenizer": "byte", "held_out_fraction": 0.2}
    data["context_length"] = 160  # each document is nearly twice as long
    return tiny.make_run(folder / "run", tiny.config(data=data))


@pytest.fixture(scope="module")
def model(run):
    return NatsjaxLM(run.workdir.path, batch_size=4, max_length=64, progress=False)


@pytest.fixture(scope="module")
def tasks(run, tmp_path_factory):
    """A folder with the offline tasks."""
    write_tasks(run, folder := tmp_path_factory.mktemp("tasks"), num_examples=4)
    return folder


def ask(kind, *arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


def test_it_is_registered():
    assert get_model("natsjax") is NatsjaxLM


def test_log_likelihoods_are_those_of_the_masked_evaluation(run):
    contexts = run.data.contexts("validation", 3)
    requests = []
    for row, start, stop in zip(*map(np.ndarray.tolist, piece_spans(contexts)), strict=True):
        predicted = contexts["targets"][row, start:stop][contexts["loss_weight"][row, start:stop] > 0].tolist()
        first = contexts["inputs"][row, start : start + 1].tolist()
        known = len(predicted) // 2  # the first half as the continuation of one token, the other of them all
        requests += [(None, first, predicted[:known]), (None, first + predicted[:known], predicted[known:])]
    requests = [request for request in requests if request[2]]
    found = NatsjaxLM(run.workdir.path, progress=False)._loglikelihood_tokens(requests)
    expected = measure(run, contexts, Nats()).documents
    assert sum(len(request[2]) for request in requests) == expected.tokens.sum()
    assert -sum(logprob for logprob, _ in found) == pytest.approx(expected.nll.sum(), rel=1e-5)


def test_contexts_lose_their_beginning_and_never_what_is_scored(model):
    text = "abcdefghij" * 10
    cut = model.tok_encode(text)[-(64 - 2) :]  # 63 tokens and the last one of the continuation
    (long,) = model.loglikelihood(ask("loglikelihood", (text, "xyz")), disable_tqdm=True)
    (same,) = model._loglikelihood_tokens([(None, cut, model.tok_encode("xyz", add_special_tokens=False))])
    assert long == pytest.approx(same)
    with pytest.raises(UserError, match="65 tokens, and the model reads 1 to 64"):
        model.loglikelihood(ask("loglikelihood", ("a", "b" * 65)), disable_tqdm=True)
    (empty,) = model.loglikelihood(ask("loglikelihood", ("", "xyz")), disable_tqdm=True)
    (begun,) = model._loglikelihood_tokens([(None, [model.prefix_token_id], model.tok_encode("xyz", False))])
    assert empty == pytest.approx(begun)


def test_rolling_sums_are_those_of_windows(model):
    text = "the quick brown fox " * 8  # 160 bytes
    (rolling,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = [model.prefix_token_id, *model.tok_encode(text, add_special_tokens=False)]
    # Windows of 64 predicted tokens, and the last one as long, of which the end counts.
    windows = [(ids[:1], ids[1:65]), (ids[64:65], ids[65:129]), (ids[97 - 1 : 129], ids[129:161])]
    by_hand = model._loglikelihood_tokens([(None, *window) for window in windows])
    assert rolling == pytest.approx(sum(logprob for logprob, _ in by_hand), rel=1e-6)


def test_generation_ends_at_stop_texts(model):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False}
    (free,) = model.generate_until(ask("generate_until", ("hello", options)), disable_tqdm=True)
    assert free
    middle = free[len(free) // 2]
    stopped = options | {"until": ["\x00never", middle]}
    found = model.generate_until(
        ask("generate_until", ("hello", stopped), ("hello", options), ("hello", stopped)), disable_tqdm=True
    )
    cut = free[: free.index(middle)]
    assert found == [cut, free, cut]
    with pytest.raises(UserError, match="num_beams are not known to natsjax"):
        model.generate_until(ask("generate_until", ("hello", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(UserError, match="max_gen_toks = 64"):
        model.generate_until(ask("generate_until", ("hello", {"max_gen_toks": 64})), disable_tqdm=True)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A dense model of random numbers as an export of natsjax, and as lm-eval's own ``hf`` reads it."""
    hf_models.modules()
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("dense")
    model = dataclasses.replace(run.config.model, layer_types=("dense",), tie_embeddings=False)
    tiny.write_random_export(folder / "run", dataclasses.replace(run.config, model=model), run.tokenizer)
    export_hf(folder / "run", folder / "hf")
    # With its cache, continuations of several lengths of which the ends of two are one text are scored wrongly.
    options = {"device": "cpu", "dtype": "float32", "batch_size": 4, "logits_cache": False}
    return folder, HFLM(pretrained=str(folder / "hf"), **options)


def test_its_numbers_on_tasks_are_those_of_hf(exported, tasks, monkeypatch):
    folder, theirs = exported
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    # Where the tokenizer puts BOS before a text, hf predicts BOS from BOS too, and has as much more to read.
    for names, bos in ((["natsjax_rolling"], False), (sorted(TASKS.keys() - {"natsjax_rolling"}), None)):
        monkeypatch.setattr(theirs, "add_bos_token", bos)
        ours = NatsjaxLM(folder / "run", batch_size=4, add_bos_token=bos, progress=False)
        for name, model in (("ours", ours), ("theirs", theirs)):
            made = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)
            found.setdefault(name, []).append(made)
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert ours["results"].keys() == theirs["results"].keys()
        for task, metrics in theirs["results"].items():
            for metric, number in metrics.items():
                wanted = pytest.approx(number, rel=1e-4) if isinstance(number, float) else number
                assert ours["results"][task][metric] == wanted, (task, metric)
            for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                assert one["arguments"] == other["arguments"]
                for here, there in zip(one["resps"], other["resps"], strict=True):
                    assert_same_answers(here, there)


def assert_same_answers(ours, theirs):
    """Texts are equal, and log-likelihoods are to 1e-4."""
    for here, there in zip(ours, theirs, strict=True):
        if isinstance(there, tuple | list):
            assert_same_answers(here, there)
        else:
            assert here == (pytest.approx(there, rel=1e-4) if isinstance(there, float) else there)


def test_its_answers_are_those_of_hf(exported):
    folder, theirs = exported
    ours = NatsjaxLM(folder / "run", batch_size=4, progress=False)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (
        theirs.max_length,
        theirs.prefix_token_id,
        theirs.eot_token_id,
    )
    pairs = [("", "xyz"), ("a b ", "cd"), ("köln " * 60, "the house"), ("a", "b" * 160), ("a", " ")]
    requests = ask("loglikelihood", *pairs)
    assert_same_answers(*(model.loglikelihood(requests, disable_tqdm=True) for model in (ours, theirs)))
    (free,) = theirs.generate_until(ask("generate_until", ("hello", {"until": [], "max_gen_toks": 20})), True)
    assert len(free) > 10
    options = [{"max_gen_toks": 20}, {"until": free[9], "max_gen_toks": 20}, {"until": ["\x00", free[5:7]]}]
    asked = [(text, fields) for text in ("hello", "köln " * 60) for fields in options[:2]]
    requests = ask("generate_until", *asked, ("hello", options[2] | {"max_new_tokens": 12}))
    answers = [model.generate_until(requests, disable_tqdm=True) for model in (ours, theirs)]
    assert answers[0] == answers[1]
    assert answers[0][1] == free[: free.index(free[9])]


def test_imported_models_are_asked_as_their_tokenizers_would(exported, run, tmp_path):
    """No BOS before a text where the publisher's tokenizer puts none, as transformers has none."""
    _, transformers = hf_models.modules()
    hf_models.save(hf_models.make("llama"), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert NatsjaxLM(tmp_path / "run").tok_encode("köln was") == theirs.encode("köln was")
    settings = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    begin = {"id": "<|begin|>", "ids": [256], "tokens": ["<|begin|>"]}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": begin},
    }
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(settings))
    import_model(tmp_path / "hf", tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert NatsjaxLM(tmp_path / "run").tok_encode("köln was") == theirs.encode("köln was")
    assert theirs.encode("köln was")[0] == 256
    assert NatsjaxLM(tmp_path / "run", add_bos_token=False).tok_encode("a") == theirs.encode("a")[1:]
    assert NatsjaxLM(exported[0] / "run").tok_encode("a")[0] == run.tokenizer.bos_id


def test_policies_and_budgets(run):
    def found(text, **numbers):
        return find_policy(run, text, length=64, **({"role_bias": None, "kv_budget": None} | numbers))

    assert found(None) is None
    assert found("streaming_llm:2:5") == StreamingLLM(2, 5)
    assert found(None, role_bias=-1.0) == Nats(-1.0)
    window = found("sliding_window", kv_budget=0.25)
    assert isinstance(window, SlidingWindow)
    assert (window.window + 1) / 32.5 == pytest.approx(0.28, abs=0.04)  # keys over the mean context
    assert isinstance(found("h2o", kv_budget=0.25), H2O)
    parameters = jax.tree.map(jnp.copy, run.parameters)
    tiny.spread_scorer(parameters, 1, 1.0)
    spread = dataclasses.replace(run, parameters=parameters)
    biased = find_policy(spread, None, role_bias=None, kv_budget=0.3, length=64)
    contexts = run.data.contexts("train", run.config.eval.num_calibration_contexts)
    assert measure(spread, contexts, biased).kv_fraction == pytest.approx(0.3, rel=0.1)
    for text, numbers, sentence in (
        ("h20:4", {}, "did you mean h2o"),
        ("h2o:4", {"kv_budget": 0.2}, "with kv_budget its name is enough"),
        ("full", {"kv_budget": 0.2}, "it keeps every key"),
        (None, {"kv_budget": 0.3}, "no role bias gives this KV fraction on training text"),  # its scorer knows nothing
        (None, {"kv_budget": 1.2}, "no fraction of the KV"),
        (None, {"kv_budget": 0.2, "role_bias": 1.0}, "choose one"),
        ("sliding_window", {"kv_budget": 0.001}, "has no numbers for it"),
    ):
        with pytest.raises(UserError, match=sentence):
            found(text, **numbers)


def test_offline_tasks(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    asked = ["natsjax_choice", "natsjax_rolling"]  # of the others, test_its_numbers_on_tasks_are_those_of_hf
    flags = [f"--workdir={run.workdir.path}", f"--make_tasks={tmp_path / 'tasks'}", "--num_examples=5"]
    flags += [f"--tasks={','.join(asked)}", f"--output={tmp_path / 'results.json'}"]
    command.main([*flags, "--policy=streaming_llm", "--kv_budget=0.3"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert sorted(results) == asked
    assert all(name in printed for name in results)
    # A model that knows nothing: bytes at random.
    assert results["natsjax_rolling"]["bits_per_byte,none"] == pytest.approx(math.log2(258), rel=0.1)
    examples = {
        name: [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        for name in TASKS
    }
    passages = [example["text"] for example in examples["natsjax_rolling"]]
    for passage, cloze, choice, needle in zip(
        passages, examples["natsjax_cloze"], examples["natsjax_choice"], examples["natsjax_needle"], strict=True
    ):
        assert cloze["context"] + cloze["word"] == passage
        assert choice["context"] + choice["choices"][choice["gold"]] == passage
        assert len(set(choice["choices"])) == 4
        question = needle["context"].rsplit("\n\n", 1)[1]
        assert needle["context"].count(f"{question} {needle['answer']}.") == 1
    golds = [example["gold"] for example in examples["natsjax_choice"]]
    assert len(set(golds)) > 1
    assert len({example["answer"] for example in examples["natsjax_needle"]}) == len(passages) == 5
    assert np.ptp([example["depth"] for example in examples["natsjax_needle"]]) > 0.2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "there is no task"),
        (["--tasks=natsjax_nothing"], "the harness has no task natsjax_nothing"),
        (["--tasks=arc_easy", "--policy=h20"], "did you mean h2o"),
        (["--tasks=arc_easy", "--batch_size=0"], "batch_size = 0"),
    ],
)
def test_mistakes_are_one_sentence(run, flags, sentence, monkeypatch):
    # The harness's own tasks are thousands of files.
    none = functools.partial(TaskManager, include_path=None, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: none())
    with pytest.raises(UserError, match=sentence):
        command.main([f"--workdir={run.workdir.path}", *flags])
