"""The whole evaluation on tiny untrained models: rows, budget check, samples, files, and what it refuses."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny

from natsjax import evaluate, report
from natsjax.config import Config, NatsConfig
from natsjax.data import RecallTask, piece_lengths
from natsjax.errors import UserError
from natsjax.evaluate import __main__ as evaluate_command
from natsjax.evaluate import dense_baseline
from natsjax.evaluate import rows as eval_results
from natsjax.evaluate.masked import chosen_roles
from natsjax.kv_fraction import all_sliding_kv_fraction
from natsjax.policies.nats import Nats
from natsjax.policies.numbers import interval_fractions
from natsjax.runs.data import open_data
from natsjax.runs.load import LoadedRun
from natsjax.runs.workdir import Workdir
from natsjax.runtime.progress import bar
from natsjax.train.step import Trainer

CONTEXT = 32
WINDOW = 1


@functools.cache
def trained(attention):
    """``(config, structure, parameters)`` of an untrained recall model whose roles depend on the token."""
    config = Config.from_dict(
        {
            "model": {"layer_types": attention, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2}
            | {"head_dim": 4, "mlp_dim": 16},
            "nats": {"window": WINDOW, "kv_budget": 0.3},
            "data": {"source": "recall", "context_length": CONTEXT, "recall": {"num_pairs": 2}},
            "eval": {"num_contexts": 10, "num_calibration_contexts": 8, "batch_size": 8, "num_sinks": 2}
            | {"num_sample_tokens": 20, "bootstrap_samples": 50},
        }
    )
    task = RecallTask(CONTEXT, **dataclasses.asdict(config.data.recall))
    trainer = Trainer(config, task.vocab_size)
    parameters = trainer.init().parameters
    return config, trainer, tiny.spread_scorer(parameters) if attention == "nats" else parameters


def make_run(path, attention="nats", **changes):
    """A run in memory; ``changes`` replace fields of ``eval``, or of the config where they name a group of it."""
    config, trainer, parameters = trained(attention)
    groups = {name: value for name, value in changes.items() if hasattr(config, name)}
    numbers = {name: value for name, value in changes.items() if name not in groups}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **numbers), **groups)
    workdir = Workdir(path)
    data = open_data(config, workdir, progress=False)
    return LoadedRun(workdir, config, trainer.structure, parameters, 7, data, trainer.mesh)


@pytest.fixture(scope="module")
def nats_evaluation(tmp_path_factory):
    """A NAtS run beside its dense baseline."""
    path = tmp_path_factory.mktemp("nats run")
    dense = make_run(tmp_path_factory.mktemp("dense"), "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_baseline, "load", lambda workdir, prepared_dir: dense)
        return evaluate.run(path, loaded=make_run(path), baseline_workdir=dense.workdir.path, progress=False)


def rows_of(evaluation, method, weights="this run"):
    return [row for row in evaluation.rows if row["method"] == method and row["weights"].startswith(weights)]


def test_four_files_are_written_and_every_row_names_its_weights(nats_evaluation):
    rows = nats_evaluation.paths[0]
    names = [path.name for path in nats_evaluation.paths]
    assert names == ["results.jsonl", "pareto.png", "report.html", "evaluation.json"]
    assert all(path.parent.name == "report" and path.stat().st_size > 0 for path in nats_evaluation.paths)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == len(nats_evaluation.rows)
    assert {row["weights"].split(" ")[0] for row in written} == {"this", "dense"}
    for row in written:
        assert set(report.ROW_FIELDS) <= set(row)
        assert "step 7" in row["weights"]
        assert row["weights"] == "this run (nats, step 7)" or row["weights"].startswith("dense baseline /")


def test_the_role_bias_is_set_at_six_budgets_and_to_zero(nats_evaluation):
    rows = rows_of(nats_evaluation, "nats")
    assert sum(row["budget"] is not None for row in rows) >= 6
    role_biases = [row["setting"]["role_bias"] for row in rows]
    assert 0.0 in role_biases
    assert role_biases == sorted(set(role_biases))
    for row in rows:
        assert row["budget"] is None or row["kv_fraction"] == pytest.approx(row["budget"], rel=0.25)


def test_the_fixed_policies_run_at_the_same_budgets_on_both_weights(nats_evaluation):
    pieces = np.full(8, CONTEXT)
    for method, sinks in (("sliding_window", 0), ("streaming_llm", 2)):
        ours, theirs = rows_of(nats_evaluation, method), rows_of(nats_evaluation, method, "dense baseline")
        assert [row["setting"] for row in ours] == [row["setting"] for row in theirs]
        budgets = [row["budget"] for row in ours]
        assert set(budgets) == {row["budget"] for row in rows_of(nats_evaluation, "nats")} - {None}
        for row in ours:
            fraction = interval_fractions(pieces, sinks)[row["setting"]["window"]]
            assert row["kv_fraction"] == pytest.approx(fraction)
    for weights in ("this run", "dense baseline"):
        (full,) = rows_of(nats_evaluation, "full", weights)
        assert full["kv_fraction"] == 1
        assert full["kv_live_mean"] == full["mean_context"] == (CONTEXT + 1) / 2
        assert full["kv_live_max"] == CONTEXT


def test_every_recall_row_is_a_document(nats_evaluation):
    for row in nats_evaluation.rows:
        assert (row["num_documents"], row["num_tokens"]) == (10, 20)
        assert row["bits_per_byte"] is row["bits_per_byte_low"] is row["bits_per_byte_high"] is None
        assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]
    assert nats_evaluation.run_info["show_accuracy"]


def test_the_budget_check_repeats_the_biased_and_the_argmax_row(nats_evaluation):
    budget_check = nats_evaluation.budget_check
    assert set(budget_check) == set(report.BUDGET_CHECK_FIELDS)
    by_role_bias = {row["setting"]["role_bias"]: row for row in rows_of(nats_evaluation, "nats")}
    assert by_role_bias[budget_check["role_bias"]]["budget"] == budget_check["kv_budget"] == 0.3
    assert by_role_bias[budget_check["role_bias"]]["kv_fraction"] == budget_check["biased"]
    assert by_role_bias[0.0]["kv_fraction"] == budget_check["argmax"]
    assert budget_check["met"] == (abs(budget_check["biased"] - 0.3) <= 0.03)
    assert 0 < budget_check["sampled"] < 1
    assert budget_check["smallest_possible"] == all_sliding_kv_fraction(np.full(10, CONTEXT), WINDOW)


def test_budgets_that_share_a_role_bias_are_one_row_of_the_closest(tmp_path):
    run = make_run(tmp_path)
    both = dataclasses.replace(run.config.nats, biased_roles="global_local")  # LOCAL tokens stay: none is reached
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, nats=both))
    found = evaluate.run(tmp_path, loaded=run, budgets=[0.8, 0.9, 1.0], progress=False)
    assert [row["budget"] for row in rows_of(found, "nats")][-1] == 0.8
    assert len([note for note in found.notes if "at role bias" in note]) == 3


def test_samples_show_held_out_tokens_with_their_roles(nats_evaluation):
    assert len(nats_evaluation.samples) == 3
    for sample in nats_evaluation.samples:
        assert len(sample["tokens"]) == 20
        assert sample["tokens"][0] == "⟨bos⟩"
        assert np.shape(sample["roles"]) == (len(sample["role_biases"]), 2, 2)
        assert all(
            len(head) == 20 and head[0] == "0" for role_bias in sample["roles"] for layer in role_bias for head in layer
        )
        assert sample["document_starts"] == [0]
        assert sample["windows"] == [[WINDOW], [WINDOW]]


def test_samples_have_the_roles_that_the_model_chose_under_every_measured_role_bias(nats_evaluation, tmp_path):
    run = make_run(tmp_path)
    held_out = run.data.contexts("validation", 10)
    role_biases = [row["setting"]["role_bias"] for row in rows_of(nats_evaluation, "nats")]
    ids = {role_bias: chosen_roles(run, held_out, Nats(role_bias)) for role_bias in role_biases}
    for sample in nats_evaluation.samples:
        number = int(sample["title"].split()[2]) - 1
        assert sample["role_biases"] == role_biases
        for role_bias, layers in zip(role_biases, sample["roles"], strict=True):
            assert layers == [["".join(map(str, head[:20])) for head in layer] for layer in ids[role_bias][number]]
    kept = [
        sum(head.count("0") for layer in role_bias for head in layer)
        for role_bias in nats_evaluation.samples[0]["roles"]
    ]
    assert kept[0] < kept[-1]


def test_samples_of_a_model_with_many_heads_are_fewer_and_shorter(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    held_out = run.data.contexts("validation", 10)

    def sizes(most):
        monkeypatch.setattr(eval_results, "_MAX_ROLES", most)
        samples = eval_results.samples_of(run, held_out, [0.0, 1.0], False)
        assert sum(
            len(head) for s in samples for role_bias in s["roles"] for layer in role_bias for head in layer
        ) <= max(most, 8)
        return [len(sample["tokens"]) for sample in samples]

    # A token has a role for each of two role biases, layers and heads.
    assert [sizes(most) for most in (480, 479, 320, 319, 160, 80, 1)] == [
        [20] * 3,
        [20] * 2,
        [20] * 2,
        [20],
        [20],
        [10],
        [1],
    ]


def test_rows_by_position_add_up_to_the_whole(nats_evaluation):
    for row in nats_evaluation.rows:
        found = row["by_position"]
        assert set(found) == set(report.POSITION_FIELDS)
        assert (found["edges"][0], found["edges"][-1]) == (1, CONTEXT + 1)
        assert sum(found["tokens"]) == row["num_tokens"]
        pairs = [(n, p) for n, p in zip(found["tokens"], found["perplexity"], strict=True) if n]
        mean = sum(n * np.log(p) for n, p in pairs) / row["num_tokens"]
        assert np.exp(mean) == pytest.approx(row["perplexity"], rel=1e-3)
        right = sum(n * (a or 0) for n, a in zip(found["tokens"], found["accuracy"], strict=True))
        assert right == pytest.approx(row["accuracy"] * row["num_tokens"], rel=1e-3)
        for total, *ends in zip(
            *(found[name] for name in ("tokens", "perplexity_low", "perplexity", "perplexity_high")), strict=True
        ):
            low, mean, high = ends
            assert (mean is None) == (total == 0)
            # Ten documents have two predictions each: no position has ten of them.
            assert low is high is None


def test_the_report_is_drawn_again_from_what_was_stored(nats_evaluation):
    _, picture, page, _ = nats_evaluation.paths
    before = page.read_bytes()
    workdir = Workdir(page.parents[1])
    workdir.record(trained("nats")[0], "a" * 64)
    page.unlink()
    assert report.rewrite(workdir.path) == [picture, page]
    assert page.read_bytes() == before


def test_the_summary_has_table_budget_check_and_files(nats_evaluation):
    text = nats_evaluation.summary()
    assert "NAtS" in text
    assert "KV budget 30 %: " in text
    assert "with every token SLIDING they would keep 17.6 %." in text
    assert all(f"wrote {path}" in text for path in nats_evaluation.paths)


def test_a_dense_run_alone_has_no_budget_check(tmp_path):
    found = evaluate.run(tmp_path, loaded=make_run(tmp_path, "dense"), progress=False)
    assert found.budget_check is None
    assert found.samples == []
    assert {row["method"] for row in found.rows} == {"full", "sliding_window", "streaming_llm"}
    assert {row["weights"] for row in found.rows} == {"this run (dense, step 7)"}
    smallest = interval_fractions(np.full(8, CONTEXT), 0)[0]
    assert all(row["budget"] > smallest for row in found.rows if row["method"] == "sliding_window")


def test_budgets_that_sinks_alone_exceed_are_noted(tmp_path):
    run = make_run(tmp_path, "dense", num_sinks=8, budgets=(0.1, 0.6))
    found = evaluate.run(tmp_path, loaded=run, progress=False)
    assert [row["budget"] for row in rows_of(found, "sliding_window")] == [0.1, 0.6]
    assert [row["budget"] for row in rows_of(found, "streaming_llm")] == [0.6]
    assert any("8 sinks" in note and "0.1" in note for note in found.notes)
    assert found.notes[0] in found.run_info["evaluation"]


def test_roles_that_do_not_depend_on_the_token_leave_budgets_unmet_and_say_so(tmp_path):
    run = make_run(tmp_path)
    flat = jax.tree.map(lambda x: x, run.parameters)
    scorer = flat["blocks"]["attention"]["scorer"]
    scorer["weight"] = np.zeros_like(scorer["weight"])
    found = evaluate.run(tmp_path, loaded=dataclasses.replace(run, parameters=flat), progress=False)
    assert not found.budget_check["met"]
    assert any("No role bias gives a KV fraction of 0.4" in note for note in found.notes)
    assert "missed" in found.summary()


def test_asked_budgets_are_measured_besides_the_trained_one(tmp_path):
    run = make_run(tmp_path)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, nats=NatsConfig(window=4, kv_budget=0.33)))
    found = evaluate.run(tmp_path, loaded=run, budgets=[0.7], progress=False)
    assert [row["budget"] for row in rows_of(found, "sliding_window")] == [0.33, 0.7]
    assert "--budgets=0.7" in found.run_info["command"]
    assert found.notes[0].startswith("KV budget 33 %: with every token SLIDING the KV fraction is 33.52 %; below that")


@pytest.mark.parametrize(
    ("attention", "budget", "message"),
    [
        ("nats", 1.2, r"KV budget = 1\.2: it is no fraction of the KV; choose one above 0 and up to 1"),
        ("nats", 0.1, r"nats\.window = 1 and data\.context_length = 32, no KV fraction is below 0\.17"),
        ("dense", 0.01, r"data\.context_length = 32 and each query's own key, no KV fraction is below 0\.06"),
    ],
)
def test_budgets_that_cannot_be_are_refused(tmp_path, attention, budget, message):
    with pytest.raises(UserError, match=message):
        evaluate.run(tmp_path, loaded=make_run(tmp_path, attention), budgets=[budget], progress=False)
    assert not (tmp_path / "report").exists()


def test_a_baseline_must_be_dense_and_on_the_same_data(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    dense = make_run(tmp_path, "dense")
    cases = {
        "model.layer_types = nats, not dense; name one": run,
        "its data.context_length is 64 instead of 32; name a run": make_run(
            tmp_path, "dense", data=dataclasses.replace(dense.config.data, context_length=64)
        ),
        "its data fingerprint is ": make_run(tmp_path, "dense", train=dataclasses.replace(dense.config.train, seed=3)),
    }
    for message, other in cases.items():
        monkeypatch.setattr(dense_baseline, "load", lambda workdir, prepared_dir, other=other: other)
        with pytest.raises(UserError, match=message):
            evaluate.run(tmp_path, loaded=run, baseline_workdir="runs/x", progress=False)
    with pytest.raises(UserError, match="is itself a dense run; leave the flag out"):
        evaluate.run(tmp_path, loaded=dense, baseline_workdir="runs/x", progress=False)
    model = dataclasses.replace(run.config.model, layer_types=("dense", "sliding"))
    fixed = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    monkeypatch.setattr(dense_baseline, "load", lambda workdir, prepared_dir: fixed)
    with pytest.raises(UserError, match=r"has model\.layer_types = dense,sliding, not dense; name one"):
        evaluate.run(tmp_path, loaded=run, baseline_workdir="runs/x", progress=False)


def test_a_baseline_of_another_shape_or_step_is_noted(tmp_path):
    dense = make_run(tmp_path, "dense")
    model = dataclasses.replace(dense.config.model, mlp_dim=8)
    other = dataclasses.replace(dense, step=9, config=dataclasses.replace(dense.config, model=model))
    assert dense_baseline.baseline_notes(make_run(tmp_path), dense) == []
    notes = dense_baseline.baseline_notes(make_run(tmp_path), other)
    assert notes == [
        "The dense baseline's step is 9, this run's 7.",
        "The dense baseline's model.mlp_dim is 8, this run's 16.",
    ]


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate_command.main([f"--workdir={tmp_path}"])


def test_budgets_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="these are no numbers; separate them by commas"):
        evaluate_command.main([f"--workdir={tmp_path}", "--budgets=0.1;0.2"])


def test_the_number_of_contexts_is_chosen_without_the_config(tmp_path):
    """So an export, which has no command line of its own, is measured on as much text as there is time for."""
    run = make_run(tmp_path)
    found = evaluate.run(tmp_path, loaded=run, budgets=[0.5], progress=False, num_contexts=4)
    held_out = run.data.contexts("validation", 4)
    tokens = int((held_out["loss_weight"] > 0).sum())
    assert f"{tokens} held-out tokens in 4 contexts" in found.run_info["evaluation"]
    assert "--num_contexts=4" in found.run_info["command"]
    with pytest.raises(UserError, match="num_contexts=0: from no context nothing is measured; choose 1 or more"):
        evaluate.run(tmp_path, loaded=run, num_contexts=0)


def test_held_out_text_chooses_nothing(tmp_path):
    """The role bias is set on training contexts: other held-out contexts leave it where it was."""
    run = make_run(tmp_path)
    data = dataclasses.replace(run.data, contexts=lambda split, count: run.data.contexts(split, min(count, 8)))
    role_biases = [
        evaluate.run(tmp_path, loaded=dataclasses.replace(run, data=d), budgets=[0.5], progress=False).budget_check[
            "role_bias"
        ]
        for d in (run.data, data)
    ]
    assert role_biases[0] == role_biases[1]
    assert len(piece_lengths(data.contexts("validation", 64))) == 8


def test_progress_is_plain_where_there_is_no_terminal(capsys):
    assert list(bar([3, 4], "measuring", True)) == [3, 4]
    assert list(bar([5], "measuring", False)) == [5]
    assert capsys.readouterr().err == "measuring: 2\n"
