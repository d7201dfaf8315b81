"""A policy is a file and an entry: evaluation, generation and reports see a toy one; and every entry is whole."""

import ast
import importlib
import json
import re
import sys

import numpy as np
import pytest
import tiny
from processes import ROOT

from natsjax import evaluate, policies, report
from natsjax.config import ROLE_LAYER_TYPES
from natsjax.errors import UserError
from natsjax.evaluate import __main__ as evaluate_command
from natsjax.generate import __main__ as generate_command
from natsjax.generate.flags import parse_policy
from natsjax.policies import numbers, registry
from natsjax.policies.registry import POLICIES, Number, PolicyEntry
from natsjax.report import picture
from natsjax.report.styles import shared_label

FILE = '''
from typing import ClassVar

import jax.numpy as jnp

from natsjax.policies.base import check_count, policy
from natsjax.policies.numbers import OutOfReachError, PolicyNumbers
from natsjax.policies.interval import IntervalPolicy
from pallas_kernels.nats_attention import NO_END


@policy
class EveryNth(IntervalPolicy):
    """Every nth key of a document lives to its end, the others for their own query alone."""

    method: ClassVar[str] = "every_nth"
    n: int
    offset: int = 0

    def __post_init__(self):
        check_count("n", self.n, 1)

    @property
    def setting(self):
        return {"n": self.n}

    def key_end(self, positions, num_kv_heads):
        is_kept = positions % self.n == self.offset
        return jnp.where(is_kept, NO_END, positions + 1)[:, None, :]


def numbers_for(calibration, budget):
    if budget < 0.2:
        raise OutOfReachError("the toy is too large")
    return PolicyNumbers((round(1 / budget),))
'''
ENTRY = PolicyEntry(
    name="every_nth",
    policy="toy_policy:EveryNth",
    label="every n-th key",
    summary="every Nth key of a document",
    color="#123456",
    dark_color="#abcdef",
    marker="v",
    numbers=(Number("N"), Number("OFFSET", required=False)),
    for_budget="toy_policy:numbers_for",
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The file and the entry; of the others, full attention stays, so that little is measured."""
    (tmp_path / "toy_policy.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(POLICIES)
    POLICIES.clear()
    POLICIES.update({"full": before["full"], "every_nth": ENTRY})
    yield
    POLICIES.clear()
    POLICIES.update(before)
    sys.modules.pop("toy_policy", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny.config(model={"layer_types": "dense", "num_layers": 1}, eval={"num_contexts": 2})
    return tiny.make_run(tmp_path_factory.mktemp("toy") / "run", config)


def test_a_toy_policy_is_evaluated_with_masks_and_by_decoding_and_reported(toy, run, monkeypatch):
    figures = []
    as_png = picture.as_png
    monkeypatch.setattr(picture, "as_png", lambda figure: figures.append(figure) or as_png(figure))
    positions = np.arange(run.config.data.context_length)
    read = np.sum(positions // 2 + 1 + positions % 2)  # the even ones up to its own, and an odd one's own
    for mode in ("masked", "decode"):
        found = evaluate.run(run.workdir.path, loaded=run, budgets=[0.1, 0.5], progress=False, mode=mode)
        assert [(row["method"], row["budget"]) for row in found.rows] == [("full", None), ("every_nth", 0.5)]
        assert found.rows[1]["setting"] == {"n": 2}
        assert found.rows[1]["kv_fraction"] == pytest.approx(read / np.sum(positions + 1))
        assert "At the KV budget 0.1, every n-th key is left out: the toy is too large." in found.notes
        assert "| every n-th key " in found.summary()
        page = (run.workdir.path / "report" / "report.html").read_text(encoding="utf-8")
        assert "--every_nth: #123456;" in page
        assert "--every_nth: #abcdef;" in page
        data = json.loads(re.search(r'id="report-data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
        assert data["methods"]["every_nth"] == {"label": "every n-th key", "marker": "v"}
        assert [row["method"] for row in data["rows"]] == ["full", "every_nth"]
        (legend,) = figures.pop().legends
        (handle,) = [h for h in legend.legend_handles if h.get_label() == "every n-th key"]
        assert (handle.get_color(), handle.get_marker()) == ("#123456", "v")


def test_a_toy_policy_generates_and_is_explained(toy, run, capsys):
    flags = [f"--workdir={run.workdir.path}", "--prompt_tokens=0,3,7,2", "--max_new_tokens=4"]
    generate_command.main([*flags, "--policy=every_nth:2"])
    assert "KV under every_nth, n 2: " in capsys.readouterr().err
    assert parse_policy("every_nth:3,1") == ENTRY.make(3, 1)
    for text, sentence in {
        "every_nth": "its numbers do not fit; give it as every_nth:N[,OFFSET]",
        "every_nth:0": "n=0: it must be 1 or more",
        "every_ntth:2": "there is no such policy; did you mean every_nth; choose one of full, every_nth:N[,OFFSET]",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"--policy={text}: {sentence}.")):
            parse_policy(text)
    with pytest.raises(SystemExit):
        generate_command.main(["--help"])
    assert "every_nth:N[,OFFSET]: every Nth key of a document" in " ".join(capsys.readouterr().out.split())


def test_the_help_of_evaluation_names_what_is_only_decoded(capsys):
    with pytest.raises(SystemExit):
        evaluate_command.main(["--help"])
    rivals = "random keys, H2O, SnapKV, Ada-SnapKV, TOVA, key norm, KeyDiff"
    assert f"which measures {rivals} too" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("entry", POLICIES.values(), ids=POLICIES)
def test_an_entry_is_whole(entry):
    module, _, name = entry.policy.partition(":")
    policy_class = getattr(importlib.import_module(module), name)
    assert policy_class.method == entry.name
    required = [number for number in entry.numbers if number.required]
    assert entry.numbers[: len(required)] == tuple(required)
    assert re.fullmatch(r"#[0-9a-f]{6}", entry.color)
    assert re.fullmatch(r"#[0-9a-f]{6}", entry.dark_color)
    assert f"{json.dumps(entry.marker)}: `M" in charts() or f" {entry.marker}: `M" in charts()
    style = report.style_of(entry.name)
    assert style == (entry.label, entry.color, entry.marker)
    if entry.for_budget is not None and not entry.reads_roles:
        kind = "selective" if policy_class.needs_selective else "nats"
        calibration = numbers.Calibration(tiny.config(model={"layer_types": kind}), np.array([200, 90, 30]), chunk=4)
        assert entry.make(*entry.numbers_for(calibration, 0.4).arguments).method == entry.name
        with pytest.raises(numbers.OutOfReachError):
            entry.numbers_for(calibration, 0.001)


def charts():
    return (ROOT / "natsjax/report/web/charts.js").read_text(encoding="utf-8")


def test_every_policy_of_the_package_has_an_entry():
    methods = {getattr(getattr(policies, name), "method", None) for name in dir(policies)} - {None}
    assert methods - set(POLICIES) == {"nats_sampled"}  # drawn for the budget check alone


def test_an_unknown_method_is_drawn_under_its_own_name():
    assert report.style_of("new") == ("new", "#7b5bd6", "v")


def test_own_roles_have_a_label_for_every_kind_of_layers_that_learns_them():
    assert set(registry.ROLE_LABELS) == set(ROLE_LAYER_TYPES)
    assert registry.label_of("nats", ("dense", "head_roles")) == "head roles"
    assert registry.label_of("nats", ("dense",)) == registry.NATS.label == "NAtS"
    assert registry.label_of("full", ("gated",)) == "full attention"
    assert registry.label_of("full", ("sliding",)) == "trained window"
    assert registry.label_of("full", ("sliding", "dense")) == "full beside trained windows"
    runs = [("nats",), ("sliding",), ("dense",)]
    assert shared_label("full", runs) == "full attention / trained window"
    assert shared_label("nats", runs) == "NAtS"
    assert registry.label_of("new", ("gated",)) == "new"


def test_the_docs_have_every_policy():
    generation = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
    assert "<!-- table: policies -->" in generation  # whose lines test_monitor.py compares
    evaluation = (ROOT / "docs/evaluate.md").read_text(encoding="utf-8")
    assert all(entry.label in evaluation for entry in POLICIES.values())


def test_nobody_else_asks_which_policy_it_is():
    """Outside ``policies/``: a policy answers what it is asked, so that a new one needs no edit elsewhere."""
    classes = {name for name in dir(policies) if name[0].isupper()} - {"EVICTIONS"}
    for path in sorted((ROOT / "natsjax").rglob("*.py")):
        if "policies" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                assert not asked & classes, f"{path}:{node.lineno}"
