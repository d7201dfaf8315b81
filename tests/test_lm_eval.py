"""lm-evaluation-harness asks a run: its numbers are those of the masked evaluation, its tasks need no network."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from natsjax.data.packing import piece_spans
from natsjax.errors import UserError
from natsjax.evaluate.masked import measure
from natsjax.policies.attention_score import H2O
from natsjax.policies.interval import SlidingWindow, StreamingLLM
from natsjax.policies.nats import Nats

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm_eval)")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from natsjax.lm_eval import __main__ as command  # noqa: E402
from natsjax.lm_eval.adapter import NatsjaxLM, find_policy  # noqa: E402

pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = tiny.write_texts(folder / "texts", count=40)
    data = {"source": "corpus", "input": str(texts), "tokenizer": "byte", "held_out_fraction": 0.2}
    data["context_length"] = 320  # each document is a little shorter
    return tiny.make_run(folder / "run", tiny.config(data=data))


@pytest.fixture(scope="module")
def model(run):
    return NatsjaxLM(run.workdir.path, batch_size=4, max_length=64, progress=False)


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
    flags = [f"--workdir={run.workdir.path}", f"--make_tasks={tmp_path / 'tasks'}", "--num_examples=5"]
    command.main([*flags, f"--output={tmp_path / 'results.json'}", "--policy=streaming_llm", "--kv_budget=0.3"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert set(results) == {"natsjax_rolling", "natsjax_cloze", "natsjax_choice", "natsjax_needle"}
    assert all(name in printed for name in results)
    # A model that knows nothing: bytes at random.
    assert results["natsjax_rolling"]["bits_per_byte,none"] == pytest.approx(math.log2(258), rel=0.1)
    examples = {
        name: [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        for name in results
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
def test_mistakes_are_one_sentence(run, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        command.main([f"--workdir={run.workdir.path}", *flags])
