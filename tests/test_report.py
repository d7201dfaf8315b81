"""The report contains what it was given: rows, strict JSON, one self-contained page; it can be drawn again."""

import copy
import html.parser
import itertools
import json
import math
import pathlib
import re
import struct
import tomllib

import numpy as np
import pytest
import tiny
from report_data import (
    BUDGET_CHECK,
    DENSE_WEIGHTS,
    NATS_WEIGHTS,
    RUN,
    START,
    by_position,
    make_metrics,
    make_row,
    make_rows,
    make_sample,
    make_workdir,
    write,
)

from benchmarks import docs_tables
from natsjax import report
from natsjax.errors import UserError
from natsjax.evaluate.rows import about_intervals
from natsjax.policies.registry import POLICIES
from natsjax.report import __main__ as report_command
from natsjax.report import fields, picture, results
from natsjax.report.page import slim
from natsjax.report.styles import RUN_COLORS
from natsjax.report.training import read_starts
from natsjax.runs.workdir import Workdir

HOSTILE_TOKENS = ["</script><b>", "<!--", "\u2028", "{{data}}", "&amp;", "\n", "\ud800", "\u202e", "", "\t\x00", '"\\']


def strict_json(text):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(text, parse_constant=refuse)


class PageParser(html.parser.HTMLParser):
    """Collects the scripts, and every tag with its attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.in_script = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


def parse(path):
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def embedded(path):
    return strict_json(parse(path).scripts[0])


def test_numpy_values_are_accepted(tmp_path):
    row = make_row("nats", NATS_WEIGHTS, {"role_bias": np.float32(0.5)}, np.float64(0.25), np.float32(50.0))
    row["kv_live_mean_per_head"] = np.ones((2, 2), np.float32)
    row["by_position"] = by_position(50.0) | {"edges": np.array([1, 2, 4, 6, 257])}
    read = strict_json(write(tmp_path, rows=[row], budget_check=None)[0].read_text())
    assert (read["setting"], read["kv_live_mean_per_head"]) == ({"role_bias": 0.5}, [[1.0, 1.0], [1.0, 1.0]])
    assert read["by_position"]["edges"] == [1, 2, 4, 6, 257]


def test_table_names_every_row_and_its_weights():
    rows = make_rows()
    rows[0]["weights"] = "odd | name\nof weights"
    header, rule, *lines = report.format_table(rows).splitlines()
    assert len(lines) == len(rows)
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    for row, line in zip(rows, lines, strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == len(header.split("|")) - 2 == 8
        assert cells[0] == report.style_of(row["method"]).label
        assert cells[2].replace("\\|", "|").split() == row["weights"].split()
        assert float(cells[6].split()[0]) == pytest.approx(row["perplexity"], rel=1e-3)
        assert float(cells[4].rstrip(" %")) == pytest.approx(100 * row["kv_fraction"], rel=5e-3)


def test_table_groups_by_weights_and_adds_accuracy_when_there_is_one():
    rows = [
        make_row("nats", NATS_WEIGHTS, {}, 0.1, 5.0, accuracy=0.991),
        make_row("full", DENSE_WEIGHTS, {}, 1.0, 4.0),
        make_row("nats", NATS_WEIGHTS, {}, 0.2, math.inf),
    ]
    header, _, *lines = report.format_table(rows).splitlines()
    assert header.split("|")[-2].strip() == "accuracy"
    assert [NATS_WEIGHTS in line for line in lines] == [True, True, False]
    assert "99.1 %" in lines[0]
    assert "inf [inf, inf]" in lines[1]
    assert "accuracy" not in report.format_table(rows, show_accuracy=False)


@pytest.mark.parametrize(("kind", "label"), [("gated", "SP-KV gates"), ("head_roles", "head roles"), ("nats", "NAtS")])
def test_a_report_names_the_roles_of_the_run(kind, label, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture, "as_png", lambda figure: figures.append(figure) or b"")
    run = RUN | {"layers": ["sliding", kind]}
    _, _, page, _ = write(tmp_path, run=run)
    assert embedded(page)["methods"]["nats"]["label"] == label
    assert label in [text.get_text() for text in figures[0].legends[0].get_texts()]
    first = report.format_table(make_rows(), layers=run["layers"]).splitlines()[2]
    assert first.split("|")[1].strip() == label


TOY = fields.Field("toy_size", "a toy", "bits", nullable=True, column="toy size", format=3, compared=True)


def test_a_row_field_is_one_entry_and_its_value(tmp_path, monkeypatch):
    """A toy field is stored, shown and documented; an evaluation from before it can be read."""
    before = make_workdir(tmp_path / "before")
    monkeypatch.setitem(fields.ROW_FIELDS, TOY.name, TOY)
    with pytest.raises(ValueError, match=r"rows\[0\] lacks toy_size"):
        write(tmp_path / "without")
    rows = [row | {TOY.name: 12.345} for row in make_rows()]
    lines, _, page, _ = write(tmp_path / "new", rows=rows)
    assert strict_json(lines.read_text().splitlines()[0])[TOY.name] == 12.345
    header, _, first, *_ = report.format_table(rows).splitlines()
    assert (header.split("|")[-2].strip(), first.split("|")[-2].strip()) == ("toy size", "12.3")
    shown = {"name": "toy_size", "column": "toy size", "format": 3, "interval": "", "aside": ""}
    assert shown in embedded(page)["columns"]
    assert "| `toy_size` |  | bits | a toy |" in docs_tables.TABLES["rows"]()
    assert [row[TOY.name] for row in results.read(before.report).rows] == [None] * len(rows)
    assert "toy" not in report.format_table(results.read(before.report).rows)


def check_self_contained(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    for tag, attributes in parse(path).tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset"} & set(attributes), (tag, attributes)
    assert "default-src 'none'" in text
    assert "{{" not in text
    kilobytes = int(re.search(r"([\d,]+) kB", text)[1].replace(",", ""))
    assert kilobytes == pytest.approx(path.stat().st_size / 1000, abs=1.5)


def test_page_is_self_contained_and_says_its_size(tmp_path):
    check_self_contained(write(tmp_path, samples=[make_sample()], metrics=make_metrics(), starts=[START])[2])


def test_page_knows_dark_and_light_and_shares_the_pictures_colors(tmp_path):
    text = write(tmp_path)[2].read_text(encoding="utf-8")
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert 'name="color-scheme" content="light dark"' in text
    for method, entry in POLICIES.items():
        assert f"--{method}: {entry.color};" in text
        assert f"--{method}: {entry.dark_color};" in text
    for number, color in enumerate(RUN_COLORS):
        assert f"--run-{number}: {color};" in text


def test_every_figure_has_a_heading_and_a_name(tmp_path):
    tags = parse(write(tmp_path, samples=[make_sample()])[2]).tags
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    named = [attributes.get(name) for _, attributes in tags for name in ("aria-labelledby", "aria-describedby", "for")]
    assert {reference for value in named if value for reference in value.split()} <= ids
    for tag, attributes in tags:
        if tag in ("section", "svg") or attributes.get("role") in ("region", "listbox", "group"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby"), (tag, attributes)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_embedded_data_survives_hostile_text(tmp_path):
    length = len(HOSTILE_TOKENS)
    sample = make_sample(HOSTILE_TOKENS, roles=[["0" + "2" * (length - 1)]])
    run = RUN | {"name": '</title><script>alert(1)</script>\ud800 "&{{data}}'}
    path = write(tmp_path, samples=[sample], run=run)[2]
    data = embedded(path)
    assert data["samples"] == [sample]
    assert data["run"] == {name: value for name, value in run.items() if name != "settings"}
    assert data["rows"] == [slim(row) for row in make_rows()]
    assert data["budget_check"] == BUDGET_CHECK
    parser = parse(path)
    assert len(parser.scripts) == 2
    assert "b" not in [tag for tag, _ in parser.tags]


def test_several_samples_are_kept_in_order(tmp_path):
    samples = [make_sample(), make_sample(("a",), roles=[["0"]])]
    assert embedded(write(tmp_path, samples=samples)[2])["samples"] == samples


def test_page_has_the_exact_commands_and_what_is_not_the_default(tmp_path):
    data = embedded(write(tmp_path, starts=[START, START, START | {"command": "python train.py --other"}])[2])
    commands = {command["title"]: command["command"] for command in data["commands"]}
    assert commands["Trained with"] == START["command"]
    assert commands["then with"] == "python train.py --other"
    assert commands["Evaluated with"] == RUN["command"]
    assert commands["Drawn again with"] == "python -m natsjax.report --workdir=runs/x"
    assert "--role_bias=-0.25" in commands["Continues text with"]
    changed = {line["field"]: (line["value"], line["default"]) for line in data["changed"]}
    assert changed["model.embed_dim"] == (16, 128)
    assert "model.rope_theta" not in changed
    (unknown, *_) = embedded(write(tmp_path / "other")[2])["commands"]
    assert (unknown["title"], unknown["command"]) == ("Trained with", "")


def test_training_curves_are_thinned_and_mark_what_was_skipped(tmp_path):
    metrics = make_metrics(3000, skipped=(12, 30, 30))
    metrics[99]["warnings"] = ["one_role: layer 1, head 0 is all SLIDING"]
    metrics[100]["warnings"] = ["one_role: layer 1, head 0 is all SLIDING"]
    curves = embedded(write(tmp_path, metrics=metrics)[2])["training"]
    assert len(curves["steps"]) == 400
    assert curves["steps"][-1] == 3000
    by_step = {line["step"]: line for line in metrics}
    assert list(curves["curves"]) == [chart["name"] for chart in curves["charts"]]
    assert list(curves["curves"]) == ["loss", "perplexity", "kv_fraction", "kv_penalty"]
    for name, curve in curves["curves"].items():
        assert curve == [by_step[step][name] for step in curves["steps"]]
    assert [(mark["step"], mark["kind"]) for mark in curves["marks"]] == [
        (12, "skipped"),
        (30, "skipped"),
        (100, "warning"),
    ]
    assert "2 steps" in curves["marks"][1]["text"]


def test_a_run_without_metrics_or_without_penalties_has_no_such_curves(tmp_path):
    assert embedded(write(tmp_path / "a")[2])["training"] is None
    dense = [line | {"kv_penalty": 0.0} for line in make_metrics()]
    assert set(embedded(write(tmp_path / "b", metrics=dense)[2])["training"]["curves"]) == {
        "loss",
        "perplexity",
        "kv_fraction",
    }


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def awkward_rows():
    wide = make_row("nats", NATS_WEIGHTS, {"role_bias": 0.1}, 0.02, 4000.0)
    nan, infinite, no_interval = make_rows()[:3]
    nan.update(perplexity=math.nan, perplexity_low=math.nan, perplexity_high=math.nan)
    infinite.update(perplexity_high=math.inf)
    no_interval.update(perplexity_low=None, perplexity_high=None, bits_per_byte=None, by_position=None)
    no_interval.update(bits_per_byte_low=None, bits_per_byte_high=None)
    no_budget_reached = make_row("own method $x$", "weights $\\bad", {"note": "a"}, 0.3, 55.0)
    return [wide, nan, infinite, no_interval, no_budget_reached]


def test_without_intervals_the_table_claims_none():
    rows = [row | {"perplexity_low": None, "perplexity_high": None} for row in make_rows()]
    table = report.format_table(rows)
    assert "95 %" not in table
    assert "[" not in table
    mixed = report.format_table([*rows[:-1], make_rows()[-1]])
    assert mixed.count("[") == 2  # the head's and one row's


def test_an_older_evaluation_of_few_documents_loses_its_intervals(tmp_path):
    rows = make_rows()
    for row in rows[:2]:
        row["num_documents"] = 9
    write(tmp_path, rows=rows)
    found = results.read(tmp_path / "report").rows
    for row, before in zip(found, rows, strict=True):
        few = before["num_documents"] < results.MIN_DOCUMENTS
        for name in ("perplexity", "bits_per_byte"):
            assert row[name] == before[name]
            assert row[f"{name}_low"] == (None if few else before[f"{name}_low"])
        by_position = row["by_position"]
        assert by_position["perplexity"] == before["by_position"]["perplexity"]
        assert by_position["perplexity_high"] == ([None] * 4 if few else before["by_position"]["perplexity_high"])


@pytest.mark.parametrize(
    ("changes", "resamplings", "words"),
    [
        ({}, 1000, None),
        ({"num_documents": 1}, 1000, "1 held-out document is too few for intervals (10 are the fewest), and too few"),
        ({"num_documents": 9}, 1000, "9 held-out documents are too few for intervals (10 are the fewest), and too few"),
        ({}, 39, "eval.bootstrap_samples = 39 is too few for intervals (40 are the fewest)."),
        ({}, 1000, "no interval of the perplexity: all 12 held-out documents came out alike."),
    ],
)
def test_the_reason_for_no_interval_is_given(changes, resamplings, words):
    none = {} if words is None else {"perplexity_low": None, "perplexity_high": None}
    rows = [row | changes | none for row in make_rows()]
    what, note = about_intervals(rows, tiny.config(eval={"bootstrap_samples": resamplings}))
    assert (note is None) if words is None else note.startswith(words)
    assert ("95 %" in what) == (words is None or "alike" in words)


CASES = {
    "usual": {"samples": [make_sample()], "metrics": make_metrics(), "starts": [START]},
    "one row": {"rows": make_rows()[:1], "metrics": make_metrics(1)},
    "one layer, one head": {
        "rows": [make_row("nats", NATS_WEIGHTS, {"role_bias": 0.0}, 0.2, 50.0, shape=(1, 1))],
        "samples": [make_sample(("a", "b"), roles=[["02"]], role_biases=[0.0])],
        "run": RUN | {"layers": ["nats"]},
    },
    "no NAtS rows": {"rows": make_rows()[4:], "budget_check": None, "run": RUN | {"layers": ["dense", "dense"]}},
    "NaN and infinity": {"rows": awkward_rows(), "budget_check": BUDGET_CHECK | {"met": False}},
    "nothing to draw": {
        "rows": [
            make_row("nats", NATS_WEIGHTS, {"role_bias": role_bias}, 0.2, math.nan) for role_bias in (-2.0, -0.25, 3.0)
        ],
        "samples": [make_sample()],
        "metrics": [line | {"loss": math.nan} for line in make_metrics()],
    },
    "accuracy": {
        "rows": [row | {"accuracy": 0.1 * index or None} for index, row in enumerate(make_rows())],
        "run": RUN | {"show_accuracy": True, "window": None},
        "samples": [make_sample(HOSTILE_TOKENS[:6])],
    },
    "layers of several kinds": {
        "rows": make_rows(),
        "run": RUN | {"layers": ["dense", "nats"]},
        "samples": [make_sample(roles=[("000000", "000000"), ("012012", "010101")], windows=[1, 3])],
    },
    "several windows": {
        "rows": make_rows(),
        "run": RUN | {"window": [1, 3]},
        "samples": [make_sample(roles=[("023013", "022222"), ("012012", "010101")], windows=[[1, 3], [1, 3]])],
    },
}
CASES["one layer, one head"]["samples"][0]["roles"] = [[["02"]]]


@pytest.mark.parametrize("case", CASES)
def test_every_case_gives_strict_json_a_picture_and_is_read_back(tmp_path, case):
    paths = rows_file, picture, page, kept = write(tmp_path, **copy.deepcopy(CASES[case]))
    assert [path.name for path in paths] == ["results.jsonl", "pareto.png", "report.html", "evaluation.json"]
    assert sorted((tmp_path / "report").iterdir()) == sorted(paths)
    rows = [strict_json(line) for line in rows_file.read_text().splitlines()]
    assert [{name: value for name, value in row.items() if name != "by_document"} for row in rows] == (
        embedded(page)["rows"]
    )
    assert rows == strict_json(kept.read_text())["rows"]
    assert rows == make_rows() or case != "usual"
    for row, read in zip(CASES[case].get("rows", make_rows()), rows, strict=True):
        assert float(read["perplexity"]) == pytest.approx(row["perplexity"], nan_ok=True)
    width, height = png_size(picture)
    assert width == 1800
    assert height > 800
    drawn = {path: path.read_bytes() for path in (picture, page)}
    for path in drawn:
        path.unlink()
    workdir = Workdir(tmp_path)
    workdir.record(tiny.config(), "a" * 64)
    assert report.rewrite(tmp_path) == list(drawn)
    assert {path: path.read_bytes() for path in drawn} == drawn


def test_mistakes_are_named(tmp_path):
    row = make_rows()[0]
    del row["weights"]
    with pytest.raises(ValueError, match=r"rows\[0\] lacks weights"):
        write(tmp_path, rows=[row])
    with pytest.raises(ValueError, match=r"rows\[0\].by_position lacks edges"):
        write(tmp_path, rows=[make_rows()[0] | {"by_position": {}}])
    with pytest.raises(ValueError, match="at least one row"):
        report.write_report(Workdir(tmp_path), rows=[], budget_check=None, samples=[], run=RUN)
    with pytest.raises(ValueError, match=r"samples\[0\] needs .* 6 digits"):
        write(tmp_path, samples=[make_sample(roles=[["01"]])])
    with pytest.raises(ValueError, match=r"samples\[0\] needs .* digits of roles"):  # one window has three roles
        write(tmp_path, samples=[make_sample(roles=[("023013", "022222"), ("012012", "010101")])])
    with pytest.raises(ValueError, match=r"samples\[0\] needs roles for 1 role biases"):
        write(tmp_path, samples=[make_sample(role_biases=[0.0])])
    assert not list(tmp_path.iterdir())


def test_unwritable_directory_is_a_user_error_and_keeps_the_file(tmp_path):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match=r"report/results\.jsonl cannot be written"):
        write(tmp_path)
    assert (tmp_path / "report").read_text() == "a file"


def test_a_run_that_was_not_evaluated_is_one_sentence_with_the_command(tmp_path):
    make_workdir(tmp_path / "a", evaluated=False)
    with pytest.raises(
        UserError, match=rf"evaluated yet; python -m natsjax\.evaluate --workdir={tmp_path}/a evaluates"
    ):
        report_command.main([f"--workdir={tmp_path}/a"])
    with pytest.raises(UserError, match="holds no run"):
        report_command.main([f"--workdir={tmp_path}/b"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1, "rows": []}', '{"format_version": 9}'])
def test_a_damaged_file_is_one_sentence(tmp_path, text):
    workdir = make_workdir(tmp_path / "a")
    (workdir.report / results.EVALUATION_FILE).write_text(text)
    with pytest.raises(UserError, match=r"evaluation\.json (cannot be read|has format_version 9)"):
        report_command.main([f"--workdir={tmp_path}/a"])


def test_damaged_metrics_are_one_sentence(tmp_path):
    workdir = make_workdir(tmp_path / "a")
    workdir.metrics_file.write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        report.rewrite(tmp_path / "a")


def test_starts_that_a_killed_process_left_unfinished_are_passed_over(tmp_path):
    workdir = make_workdir(tmp_path / "a")
    with open(workdir.starts_file, "a") as file:
        file.write('{"command": "pyth')
    assert len(read_starts(workdir)) == 1


def test_the_command_says_what_it_wrote_and_how_large_it_is(tmp_path, capsys):
    make_workdir(tmp_path / "a")
    report_command.main([f"--workdir={tmp_path}/a"])
    assert re.search(rf"wrote {tmp_path}/a/report/report\.html \(\d+ kB\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=,"], "give the folder of a run, or several"),
        (["--workdir=a", "--output=b"], "--output needs several runs"),
        (["--workdir=a", "--title=b"], "--title needs several runs"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        report_command.main(flags)


def test_a_start_is_written_down_with_its_command_and_versions(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    assert read_starts(workdir) == []
    for argv in (["python", "train.py", "--config=a b.py"], ["/usr/bin/python3", "-m", "natsjax.sweep"]):
        monkeypatch.setattr("sys.orig_argv", argv)
        workdir.record_start()
    first, second = read_starts(workdir)
    assert first["command"] == "python train.py '--config=a b.py'"
    assert second["command"] == "python -m natsjax.sweep"
    assert re.fullmatch(r"natsjax \S+, jax \S+, Python \S+", first["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])


def test_everything_that_a_page_is_made_of_is_installed():
    root = pathlib.Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    assets = [path for path in (root / "natsjax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.suffix for path in assets} == {".css", ".html", ".js", ".pyi"}
    assert all(any(path.match(pattern) for pattern in patterns) for path in assets)
