"""A run that begins with the parameters of another one: a dense model gets a scorer only where somebody asks for it."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny
from processes import run as run_process

from natsjax import evaluate, train
from natsjax.config import Config
from natsjax.data import RecallTask
from natsjax.errors import UserError
from natsjax.export import export
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.runs.load import load
from natsjax.train.step import Trainer

TASK = RecallTask(24, 2, 5, 5, 5)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.make_run(
        tmp_path_factory.mktemp("dense") / "run", tiny.config(model={"layer_types": "dense"}, train={"seed": 5})
    )


@pytest.fixture(scope="module")
def nats(tmp_path_factory):
    config = tiny.config(train={"seed": 5}, nats={"initial_roles": (0.5, 0.25, 0.25)})
    return tiny.make_run(tmp_path_factory.mktemp("nats") / "run", config)


def config_from(run, model=(), data=(), roles=(), **train):
    path = run if isinstance(run, pathlib.Path) else run.workdir.path
    return tiny.config(model=dict(model), data=dict(data), nats=dict(roles), train={"init_from": str(path)} | train)


def check(config, task=TASK):
    trainer = Trainer(config, task.vocab_size)
    return trainer, InitialParameters(config, trainer.model, task)


def by_name(parameters):
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_nats_run_begins_with_all_of_a_dense_one_but_the_scorer(dense, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate, "run", lambda *a, **k: None)
    export(dense.workdir.path, tmp_path / "exported")
    seen = []

    def first_state(self, state, batch):
        seen.append(jax.device_get(state))
        raise KeyboardInterrupt

    config = config_from(tmp_path / "exported", reinit_scorer=True, num_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compile", lambda self: None)
        patch.setattr(Trainer, "step", first_state)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "run")
    found, expected = by_name(seen[0].parameters), by_name(dense.parameters)
    fresh = by_name(Trainer(config, TASK.vocab_size).init().parameters)
    scorer = {name for name in found if "scorer" in name}
    assert len(scorer) == 2
    assert set(found) == set(expected) | scorer
    for name, value in found.items():
        np.testing.assert_array_equal(value, (fresh if name in scorer else expected)[name], err_msg=name)
    assert any((fresh[name] != expected[name]).any() for name in expected)
    assert int(seen[0].step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(seen[0].optimizer))
    said = capfd.readouterr().err
    assert f"parameters of {tmp_path / 'exported'} (dense, step 7), the scorer fresh\n" in said
    assert "starting from" not in said

    train.run(config, tmp_path / "run")  # nothing was saved: from the beginning again
    assert load(tmp_path / "run").step == 3
    (tmp_path / "exported").rename(tmp_path / "away")
    train.run(config_from(tmp_path / "exported", reinit_scorer=True, num_steps=5), tmp_path / "run")
    assert load(tmp_path / "run").step == 5
    assert "parameters of" not in capfd.readouterr().err.split("step 3")[-1]


def test_a_nats_run_gives_its_scorer_or_not(nats):
    trainer, initial = check(config_from(nats))
    fresh = trainer.init().parameters
    for name, value in by_name(initial.put_into(fresh)).items():
        np.testing.assert_array_equal(value, by_name(nats.parameters)[name], err_msg=name)
    _, initial = check(config_from(nats, reinit_scorer=True))
    found = initial.put_into(fresh)
    for name, value in by_name(found).items():
        np.testing.assert_array_equal(
            value, by_name(fresh if "scorer" in name else nats.parameters)[name], err_msg=name
        )


def test_what_a_dense_run_lacks_is_said_and_the_option_that_allows_it(dense):
    with pytest.raises(
        UserError,
        match=r"holds a dense model, which lacks blocks.attention.scorer.bias and blocks.attention.scorer.weight; "
        "train.reinit_scorer = True initializes them",
    ):
        check(config_from(dense))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"layer_types": "dense"},
            r"\(model.layer_types = \('nats',\) there and \('dense',\) here\): blocks.attention.scorer.bias is "
            r"there and not here",
        ),
        ({"mlp_dim": 32}, r"\(model.mlp_dim = 24 there and 32 here\): blocks.mlp.\S+ is .*24.* there and .*32.* here"),
        ({"qkv_bias": True}, r"qkv_bias = False there and True here.*key_bias is here and not there"),
        ({"num_layers": 3}, r"model.num_layers = 2 there and 3 here.*; \d+ more\.$"),
    ],
    ids=["dense", "mlp", "bias", "layers"],
)
def test_other_shapes_and_names_are_listed(nats, model, message):
    for reinit_scorer in {False, model.get("layer_types") != "dense"}:
        with pytest.raises(UserError, match=message):
            check(config_from(nats, model=model, reinit_scorer=reinit_scorer))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"roles": {"windows": (1, 4), "initial_roles": ()}},
            r"another scorer \(nats.windows = \(\) there and \(1, 4\) here\): blocks.attention.scorer.bias is "
            r"\(2, 2, 3\) there and \(2, 2, 4\) here; .*train.reinit_scorer = True initializes this run's",
        ),
        (
            {"model": {"layer_types": "head_roles"}},
            r"another scorer \(model.layer_types = .*\): blocks.attention.scorer.weight is there and not here; ",
        ),
    ],
    ids=["windows", "head_roles"],
)
def test_another_scorer_is_said_and_the_option_that_allows_it(nats, groups, message):
    with pytest.raises(UserError, match=message):
        check(config_from(nats, **groups))
    check(config_from(nats, **groups, reinit_scorer=True))


def test_a_scorer_of_another_kind_is_kept_with_a_warning(nats, capfd):
    said = "the scorer of .* was trained for nats layers and is kept for gated ones"
    check(config_from(nats, model={"layer_types": "gated"}))
    assert re.search(said, capfd.readouterr().err)
    check(config_from(nats, model={"layer_types": "gated"}, reinit_scorer=True))
    assert not re.search(said, capfd.readouterr().err)


def test_what_changes_no_shape_is_said(nats, capfd):
    check(config_from(nats, model={"rope_theta": 500.0}, data={"context_length": 48}))
    assert "starting from a model with model.rope_theta = 10000.0 there and 500.0 here" in capfd.readouterr().err


def test_other_tokens_are_refused(nats, tmp_path):
    recall = {"num_pairs": 2, "num_keys": 6, "num_values": 4, "num_fillers": 5}  # as many, but others
    config = config_from(nats, data={"recall": recall})
    with pytest.raises(
        UserError, match=r"other tokens .recall of 5 keys, 5 values .* than this run's data .recall of 6"
    ):
        check(config, RecallTask(24, 2, 6, 4, 5))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text("so many words, so little to say " * (number + 5))
    data = {"source": "corpus", "input": str(texts), "vocab_size": 262, "held_out_fraction": 0.3}
    bpe = tiny.make_run(tmp_path / "bpe", tiny.config(data=data))
    for file in texts.iterdir():
        file.write_text("zzz qqq xxx vvv " * 50)
    other = tiny.make_run(tmp_path / "other", tiny.config(data=data))
    assert bpe.tokenizer.vocab_size == other.tokenizer.vocab_size
    check(config_from(bpe, data=data), bpe.tokenizer)
    with pytest.raises(UserError, match=r"has other tokens \(bpe of 262, fingerprint \w+\) than"):
        check(config_from(bpe, data=data), other.tokenizer)
    with pytest.raises(UserError, match=r"than this run's data \(bpe of 262"):
        check(config_from(nats, data=data), other.tokenizer)


def test_where_there_is_nothing_to_begin_with(tmp_path, nats):
    with pytest.raises(UserError, match=r"train.init_from = .*nowhere: .*nowhere holds no run"):
        train.run(config_from(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text(json.dumps(tiny.config().to_dict()))
    with pytest.raises(UserError, match="begun holds no checkpoint"):
        check(config_from(tmp_path / "begun"))
    with pytest.raises(UserError, match=r"train.reinit_scorer = True: train.init_from is empty"):
        tiny.config(train={"reinit_scorer": True})
    with pytest.raises(UserError, match="dense has no scorer"):
        config_from(nats, model={"layer_types": "dense"}, reinit_scorer=True)
    values = config_from(nats).to_dict()
    assert Config.from_dict(values).train.init_from == str(nats.workdir.path)


def test_an_export_of_another_natsjax_is_refused(dense, tmp_path):
    export(dense.workdir.path, tmp_path / "exported")
    file = tmp_path / "exported/export.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    (tmp_path / "exported/config.json").write_text('{"of": "that version"}')
    with pytest.raises(
        UserError, match=r"train.init_from = .*exported: .* has format_version 2, and this natsjax reads version 1\.$"
    ):
        check(config_from(tmp_path / "exported", reinit_scorer=True))


ON_EIGHT_DEVICES = """
import json, sys
import jax
from natsjax.runs.checkpoint import Checkpoints
from natsjax.config import Config
from natsjax.data import RecallTask
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.train.step import Trainer
import pathlib

config, task = Config.from_dict(json.loads(sys.argv[1])), RecallTask(24, 2, 5, 5, 5)
trainer = Trainer(config, task.vocab_size)
state = trainer.init()
parameters = InitialParameters(config, trainer.model, task).put_into(state.parameters)
assert jax.tree.map(lambda x: x.sharding, parameters) == trainer.shardings.parameters
assert len({shard.device for shard in parameters["embedding"].addressable_shards}) == 8
assert parameters["embedding"].addressable_shards[0].data.size == parameters["embedding"].size // 8
checkpoints = Checkpoints(pathlib.Path(sys.argv[2]))
checkpoints.save(1, {"parameters": parameters})
checkpoints.close()
"""


def test_each_device_gets_its_part(dense, tmp_path):
    config = config_from(dense, reinit_scorer=True, batch_size=8).to_dict()
    config["mesh"] |= {"fsdp": 4, "tensor": 2}
    done = run_process("-c", ON_EIGHT_DEVICES, json.dumps(config), tmp_path, devices=8)
    assert done.returncode == 0, done.stderr
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dense.parameters)
    read = Checkpoints(tmp_path, read_only=True).restore({"parameters": abstract})
    for name, value in by_name(read["parameters"]).items():
        np.testing.assert_array_equal(value, by_name(dense.parameters)[name], err_msg=name)
