"""Several runs in one page: each by a name of its own, what differs, what is missing, and nothing lost."""

import json

import pytest
from report_data import make_rows, make_workdir
from test_report import check_self_contained, embedded, png_size

from natsjax.errors import UserError
from natsjax.report import __main__ as report_command
from natsjax.report.compare import compare, comparison_table


@pytest.fixture
def runs(tmp_path):
    """Two budgets, a dense run and one that was not evaluated."""
    make_workdir(tmp_path / "a")
    make_workdir(tmp_path / "b", budget=0.3, perplexity=0.9)
    make_workdir(tmp_path / "dense", attention="dense")
    make_workdir(tmp_path / "young", evaluated=False)
    return [tmp_path / name for name in ("a", "b", "dense", "young")]


def test_the_page_and_the_picture_are_written_and_self_contained(runs, tmp_path):
    page, picture = compare(runs, tmp_path / "out", title="My <runs>")
    assert (page.name, picture.name) == ("report.html", "pareto.png")
    assert page.parent == picture.parent == tmp_path / "out"
    check_self_contained(page)
    assert "<h1>My &lt;runs&gt;</h1>" in page.read_text()
    assert png_size(picture)[0] == 1800


def test_every_run_is_there_with_what_it_has(runs, tmp_path):
    """What is missing is named with the command, and of the settings only those are listed that differ."""
    data = embedded(compare(runs, tmp_path / "out")[0])
    by_name = {run["name"]: run for run in data["runs"]}
    assert list(by_name) == ["a", "b", "dense", "young"]
    assert len(by_name["a"]["rows"]) == len(make_rows())
    assert by_name["b"]["budget_check"]["kv_budget"] == 0.3
    assert by_name["dense"]["budget_check"] is None
    assert by_name["young"]["rows"] == []
    assert all(run["training"]["steps"][-1] == 40 for run in data["runs"])
    nats, dense = ["nats", "nats"], ["dense", "dense"]
    assert {run: by_name[run]["layers"] for run in by_name} == {"a": nats, "b": nats, "dense": dense, "young": nats}
    commands = {command["title"]: command["command"] for command in data["commands"]}
    assert commands["b: trained with"].endswith("# b")
    assert commands["Drawn again with"].endswith(",".join(map(str, runs)))
    assert {line["field"]: line["values"] for line in data["settings"]} == {
        "model.layer_types": [["nats"], ["nats"], ["dense"], ["nats"]],
        "nats.kv_budget": [0.15, 0.3, 0.15, 0.15],
    }
    command = f"python -m natsjax.evaluate --workdir={tmp_path}/young"
    assert data["notes"][0] == f"young has not been evaluated yet: {command} evaluates it."
    assert len(data["notes"]) == 2
    assert "1 of them was not evaluated" in data["evaluation"]


def test_every_row_names_the_roles_of_its_run(tmp_path):
    for kind in ("gated", "dense", "nats"):
        make_workdir(tmp_path / kind, attention=kind)
    data = embedded(compare([tmp_path / kind for kind in ("gated", "dense", "nats")], tmp_path / "out")[0])
    labels = [{row["label"] for row in run["rows"] if row["method"] == "nats"} for run in data["runs"]]
    assert labels == [{"SP-KV gates"}, set(), {"NAtS"}]
    assert data["methods"]["nats"]["label"] == "SP-KV gates / NAtS"
    assert data["methods"]["full"]["label"] == "full attention"
    data = embedded(compare([tmp_path / "gated", tmp_path / "dense"], tmp_path / "out")[0])
    assert data["methods"]["nats"]["label"] == "SP-KV gates"


def test_without_an_evaluation_there_is_a_page_of_training_and_no_picture(tmp_path):
    for name in ("a", "b"):
        make_workdir(tmp_path / name, evaluated=False)
    (page,) = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert len(embedded(page)["notes"]) == 2


def test_runs_on_other_text_are_not_compared_silently(tmp_path):
    make_workdir(tmp_path / "a")
    make_workdir(tmp_path / "b", fingerprint="b" * 64)
    (note,) = embedded(compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")[0])["notes"]
    assert "not all were measured on the same held-out tokens (a; b)" in note[0].lower() + note[1:]


def test_runs_are_compared_with_the_dense_one_on_each_document(tmp_path):
    make_workdir(tmp_path / "nats")
    make_workdir(tmp_path / "dense", attention="dense")
    make_workdir(tmp_path / "elsewhere", fingerprint="b" * 64)
    make_workdir(tmp_path / "before")
    results = tmp_path / "before/report/evaluation.json"
    stored = json.loads(results.read_text())
    for row in stored["rows"]:  # of an older evaluation, beside a dense baseline of its own
        row |= {"by_document": None, "perplexity_ratio": 0.5}
    results.write_text(json.dumps(stored))
    page = embedded(
        compare([tmp_path / name for name in ("nats", "dense", "elsewhere", "before")], tmp_path / "out")[0]
    )
    nats, itself, elsewhere, before = (run["rows"] for run in page["runs"])
    (full,) = (row for row in itself if row["method"] == "full")
    assert full["perplexity_ratio"] == 1
    for row in (*nats, *itself):
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / full["perplexity"], rel=1e-9)
        assert "by_document" not in row
    assert all(row["perplexity_ratio"] is None for row in (*elsewhere, *before))
    assert [column["column"] for column in page["columns"]].count("to dense") == 1
    assert any("full attention in dense" in note for note in page["notes"])
    stored = json.loads((tmp_path / "dense/report/evaluation.json").read_text())
    (tmp_path / "dense/report/evaluation.json").write_text(
        json.dumps(stored | {"rows": [row | {"by_document": None} for row in stored["rows"]]})
    )
    page = embedded(compare([tmp_path / "nats", tmp_path / "dense"], tmp_path / "out")[0])
    assert any("dense was evaluated by a version" in note and "natsjax.evaluate" in note for note in page["notes"])


def test_the_table_has_what_each_run_was_trained_to_be_over_the_reference(tmp_path, capsys):
    """Learned roles are those biased to the run's budget; a run without roles is its layers as they are."""
    make_workdir(tmp_path / "nats")
    make_workdir(tmp_path / "window", attention="sliding")
    make_workdir(tmp_path / "young", evaluated=False)
    own = {"nats": ("nats", {"role_bias": -0.25}), "window": ("full", {})}
    rows = {
        name: next(
            row
            for row in json.loads((tmp_path / name / "report/evaluation.json").read_text())["rows"]
            if (row["method"], row["setting"]) == own[name]
        )
        for name in own
    }
    runs = [tmp_path / name for name in ("nats", "window", "young")]
    assert "to " not in comparison_table(runs)  # no dense run, and none was named
    for name, other in (("nats", "window"), ("window", "nats")):
        lines = comparison_table(runs, reference=tmp_path / other).splitlines()
        cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[:4]}
        assert cells["run"][-1] == f"to {other} [95 %]"
        assert set(cells) == {"run", "-" * max(3, len("window")), "nats", "window"}
        assert cells[other][-1] == "1"
        ratio = rows[name]["perplexity"] / rows[other]["perplexity"]
        assert float(cells[name][-1].split()[0]) == pytest.approx(ratio, rel=1e-3)
        assert f"over that of {other}" in lines[-1]
        page = embedded(compare(runs, tmp_path / "out", reference=tmp_path / other)[0])
        assert [column["column"] for column in page["columns"]].count(f"to {other}") == 1
        assert any(f"--reference={tmp_path / other}" in command["command"] for command in page["commands"])
    report_command.main([f"--workdir={runs[0]},{runs[1]}", f"--reference={runs[1]}", f"--output={tmp_path / 'out'}"])
    assert "| to window [95 %] |" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--reference=.*elsewhere is none of the runs in --workdir; name one of them"):
        compare(runs, tmp_path / "out", reference=tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--reference=.*young has no sums by document.*natsjax.evaluate"):
        compare(runs, tmp_path / "out", reference=tmp_path / "young")


def test_slices_are_compared_where_they_are_the_same_tokens(tmp_path):
    make_workdir(tmp_path / "nats", marks=("all", "few", "none"))
    make_workdir(tmp_path / "window", attention="sliding", perplexity=1.1, marks=("all", "few", "none"))
    make_workdir(tmp_path / "dense", attention="dense", marks=("all", "others", "none"))
    make_workdir(tmp_path / "plain")
    names = ["nats", "window", "dense", "plain"]
    page = embedded(compare([tmp_path / name for name in names], tmp_path / "out")[0])
    rows = {name: run["rows"] for name, run in zip(names, page["runs"], strict=True)}
    (window,) = (row for row in rows["window"] if row["method"] == "full")
    (dense,) = (row for row in rows["dense"] if row["method"] == "full")
    for row in rows["nats"]:
        slices = row["by_slice"]
        to_dense, to_window = (row["perplexity"] / other["perplexity"] for other in (dense, window))
        assert slices["perplexity_ratio"] == [pytest.approx(to_dense, rel=1e-4), None, None]
        assert slices["window_ratio"] == [
            pytest.approx(to_window, rel=1e-4),
            pytest.approx(to_window**2, rel=1e-4),
            None,
        ]
        for name, empty in (("perplexity_ratio", 2), ("window_ratio", 1)):
            # Documents that gain alike in everything have no spread.
            assert slices[f"{name}_low"].count(None) >= empty
    assert all(row["by_slice"] is None for row in rows["plain"])
    assert 'On slices, "the trained window" is window.' in page["notes"]
    (note,) = (note for note in page["notes"] if "slices of the same name" in note)
    assert (
        '1 slices of the same name, as "rare bigram seen again", are not the same tokens (nats, window; dense)' in note
    )


def test_names_are_as_short_as_they_are_unique(tmp_path):
    for path in ("x/run", "y/run", "z/other"):
        make_workdir(tmp_path / path, evaluated=False)
    paths = [tmp_path / path for path in ("x/run", "y/run", "z/other")]
    names = [run["name"] for run in embedded(compare(paths, tmp_path / "out")[0])["runs"]]
    assert names == ["x/run", "y/run", "z/other"]


def test_many_runs_have_colors_and_dashes(tmp_path):
    paths = [tmp_path / f"seed{seed}" for seed in range(9)]
    for path in paths:
        make_workdir(path)
    page, picture = compare(paths, tmp_path / "out")
    assert "and 5 more" in page.read_text()
    assert png_size(picture)[1] > 800


def test_the_command_compares_into_report_here(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report_command.main(["--workdir=a,b,young"])
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["pareto.png", "report.html"]
    assert "wrote report/report.html (" in capsys.readouterr().out
    report_command.main(["--workdir=a,b", "--output=elsewhere", "--title=two runs"])
    assert "two runs" in (tmp_path / "elsewhere" / "report.html").read_text()


def test_mistakes_are_one_sentence_and_lose_nothing(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"names .*/a twice"):
        compare([runs[0], runs[1], tmp_path / "x/../a"], tmp_path / "out")
    with pytest.raises(UserError, match="holds no run"):
        compare([runs[0], tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(UserError, match="two or more were expected"):
        compare(runs[:1], tmp_path / "out")
    before = (runs[0] / "report" / "report.html").read_bytes()
    monkeypatch.chdir(runs[0])
    with pytest.raises(UserError, match="holds the report of the run"):
        report_command.main(["--workdir=.,../b"])
    assert (runs[0] / "report" / "report.html").read_bytes() == before
    assert not (tmp_path / "out").exists()
