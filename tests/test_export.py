"""Parameters in a folder of their own: whole, movable, read without the corpus, on any devices."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from processes import run as run_process

import natsjax
from natsjax import evaluate, export, train
from natsjax.errors import UserError
from natsjax.runs.export import num_parameters
from natsjax.runs.load import load
from natsjax.runs.workdir import Workdir


@pytest.fixture(scope="module")
def corpus_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return tiny.make_run(folder / "run", tiny.config(data=tiny.corpus(folder / "texts")))


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory.mktemp("recall") / "run", tiny.config())


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other)


def test_an_export_is_the_run_wherever_it_is_moved(corpus_run, tmp_path):
    export.export(corpus_run.workdir.path, tmp_path / "here/out")
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here/out", tmp_path / "there/moved")
    run = natsjax.load(tmp_path / "there/moved")
    equal(run.parameters, corpus_run.parameters)
    assert run.step == 7
    assert run.tokenizer.fingerprint == corpus_run.tokenizer.fingerprint
    assert run.tokenizer.decode(run.tokenizer.encode("là")) == "là"
    assert (run.config.model, run.config.nats) == (corpus_run.config.model, corpus_run.config.nats)
    assert run.data.fingerprint == corpus_run.data.fingerprint
    assert len(run.data.contexts("validation", 2)["inputs"]) == 2  # the corpus is still where it was
    names = sorted(path.name for path in (tmp_path / "there/moved").iterdir())
    assert names == ["checkpoints", "config.json", "data.json", "export.json", "tokenizer"]
    said = json.loads((tmp_path / "there/moved/export.json").read_text())
    assert said["step"] == 7
    assert said["source"] == str(corpus_run.workdir.path)
    assert said["num_parameters"] == num_parameters(corpus_run.parameters)
    assert not list((tmp_path / "here").iterdir())
    ids = tmp_path / "there/moved/tokenizer/natsjax_tokenizer.json"
    text = ids.read_text()
    ids.write_text(text.replace('"', " ", 1))
    with pytest.raises(UserError, match=f"{ids} is not what was exported"):
        natsjax.load(tmp_path / "there/moved")
    ids.write_text(text)
    numbers = max((tmp_path / "there/moved/checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(numbers.read_bytes())
    content[len(content) // 2] ^= 1
    numbers.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot be read: {numbers} is not what was saved"):
        natsjax.load(tmp_path / "there/moved")


def test_without_its_corpus_it_loads_and_says_what_evaluation_needs(corpus_run, tmp_path):
    corpus, gone = corpus_run.workdir.corpus, tmp_path / "gone"
    export.export(corpus_run.workdir.path, tmp_path / "out")
    corpus.rename(gone)
    try:
        run = load(tmp_path / "out")
        assert run.tokenizer.fingerprint == corpus_run.tokenizer.fingerprint
        assert run.data.description == corpus_run.data.description
        sentence = rf"the corpus that .*out was trained on is not here \({corpus} holds none\); .* as --prepared_dir"
        with pytest.raises(UserError, match=sentence):
            evaluate.run(tmp_path / "out", progress=False)
        with pytest.raises(UserError, match="not here"):
            run.data.source.rows(0, 1)
        with pytest.raises(UserError, match="is no prepared corpus"):
            load(tmp_path / "out", prepared_dir=tmp_path / "nowhere")
        run = load(tmp_path / "out", prepared_dir=gone)
        assert len(run.data.contexts("validation", 2)["inputs"]) == 2
        assert load(corpus_run.workdir.path, prepared_dir=gone).step == 7

        other = tiny.make_run(
            tmp_path / "other", tiny.config(data=tiny.corpus(tmp_path / "texts", held_out_fraction=0.5))
        )
        with pytest.raises(UserError, match=r"is not the one that .*out was trained on .* as --prepared_dir"):
            load(tmp_path / "out", prepared_dir=other.workdir.corpus)
        shutil.copytree(other.workdir.corpus, corpus)  # another one in its place is as good as none
        with pytest.raises(UserError, match=r"\(what .* holds is another one\)"):
            load(tmp_path / "out").data.contexts("train", 1)
        shutil.rmtree(corpus)
    finally:
        gone.rename(corpus)


def test_evaluation_of_an_export_is_that_of_the_run(corpus_run, tmp_path):
    export.export(corpus_run.workdir.path, tmp_path / "out")
    whole = evaluate.run(corpus_run.workdir.path, progress=False)
    found = evaluate.run(tmp_path / "out", prepared_dir=corpus_run.workdir.corpus, progress=False)
    assert found.rows == whole.rows
    assert found.paths[0].parent == tmp_path / "out/report"
    assert found.run_info["command"].endswith(f"--workdir={tmp_path}/out --prepared_dir={corpus_run.workdir.corpus}")


def test_bfloat16_is_rounded_and_read_as_float32(recall_run, tmp_path):
    export.export(recall_run.workdir.path, tmp_path / "out", dtype="bfloat16")
    run = load(tmp_path / "out")
    assert {x.dtype for x in jax.tree.leaves(run.parameters)} == {jnp.dtype("float32")}
    equal(run.parameters, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), recall_run.parameters))
    with pytest.raises(UserError, match="--dtype=float16: one of float32, bfloat16 was expected"):
        export.export(recall_run.workdir.path, tmp_path / "half", dtype="float16")


def test_only_an_export_is_replaced(recall_run, tmp_path):
    with pytest.raises(UserError, match="holds something that is not an export"):
        export.export(recall_run.workdir.path, recall_run.workdir.path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export.export(recall_run.workdir.path, tmp_path / "file")
    with pytest.raises(UserError, match="file/out cannot be written: "):
        export.export(recall_run.workdir.path, tmp_path / "file/out")
    (tmp_path / "out").mkdir()
    export.export(recall_run.workdir.path, tmp_path / "out")
    (tmp_path / "out/report").mkdir()
    export.export(tmp_path / "out", tmp_path / "out", dtype="bfloat16")  # from itself, too
    assert Workdir(tmp_path / "out").read_export()["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert not (tmp_path / "out/report").exists()


def test_a_failure_leaves_what_was_there(recall_run, tmp_path, monkeypatch):
    export.export(recall_run.workdir.path, tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workdir, "record", full)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        export.export(recall_run.workdir.path, tmp_path / "out", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Workdir(tmp_path / "out").read_export()["dtype"] == "float32"


def test_where_the_new_one_cannot_take_its_place_the_old_one_is_put_back(recall_run, tmp_path, monkeypatch):
    export.export(recall_run.workdir.path, tmp_path / "out")
    rename = pathlib.Path.rename

    def fail_for_the_new_one(path, target):
        if path.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_the_new_one)
    with pytest.raises(UserError, match="out cannot be written: Input/output error"):
        export.export(recall_run.workdir.path, tmp_path / "out", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Workdir(tmp_path / "out").read_export()["dtype"] == "float32"
    equal(load(tmp_path / "out").parameters, recall_run.parameters)


def test_what_a_killed_export_set_aside_is_put_back(recall_run, tmp_path):
    out, replaced = tmp_path / "out", tmp_path / ".out.replaced"
    export.export(recall_run.workdir.path, out)
    out.rename(replaced)  # what is left of it between the two renames
    with pytest.raises(UserError, match="nowhere holds no run"):
        export.export(tmp_path / "nowhere", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    out.rename(replaced)
    export.export(out, out, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Workdir(out).read_export()["dtype"] == "bfloat16"
    out.rename(replaced)
    (replaced / "export.json").unlink()  # half deleted: not an export, and in nobody's way
    export.export(recall_run.workdir.path, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_not_trained_on(recall_run, tmp_path):
    export.export(recall_run.workdir.path, tmp_path / "out")
    with pytest.raises(UserError, match=r"is an export, .* name it as train.init_from, with a new --workdir"):
        train.run(recall_run.config, tmp_path / "out")
    Workdir(tmp_path / "out").export_file.write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="format_version 2, and this natsjax reads version 1"):
        load(tmp_path / "out")


def test_the_commands_on_two_devices(recall_run, tmp_path):
    """Exported on two devices, evaluated on two, where the recall task needs no corpus."""

    def command(name, *flags):
        return run_process("-m", f"natsjax.{name}", *flags, devices=2)

    done = command("export", f"--workdir={recall_run.workdir.path}", f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert (
        done.stdout == f"wrote {num_parameters(recall_run.parameters):,} parameters in float32 to {tmp_path / 'out'}\n"
    )
    equal(load(tmp_path / "out").parameters, recall_run.parameters)
    done = command("evaluate", f"--workdir={tmp_path / 'out'}", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "KV budget 40 %" in done.stdout
    done = command("evaluate", f"--workdir={tmp_path / 'out'}", f"--prepared_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.endswith("is a recall run, without corpus.\n")
