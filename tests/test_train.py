"""The loop: resuming is exact, interruptions and killed processes lose little, mistakes are one sentence."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from processes import Process, has_checkpoint, run, wait_for

from natsjax import evaluate, train
from natsjax.data import RecallTask
from natsjax.errors import UserError
from natsjax.runs.checkpoint import SUMS_FILE, Checkpoints
from natsjax.runs.load import load
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.train import loop
from natsjax.train.step import Trainer


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "run", lambda *a, **k: None)


def losses_of(path):
    return [(line["step"], line["loss"], line["kv_penalty"], line["kv_fraction"]) for line in read_metrics(path)]


def test_resuming_gives_bit_for_bit_the_losses_of_the_uninterrupted_run(tmp_path, no_evaluation, monkeypatch):
    config = tiny.config(nats={"budget_ramp_steps": 6})
    train.run(config, tmp_path / "whole")
    real = loop._Loop._handle

    def stop_at_8(self, step, metrics, state=None):
        real(self, step, metrics, state)
        if step == 8:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_handle", stop_at_8)
        with pytest.raises(RuntimeError):
            train.run(config, tmp_path / "cut")
    assert losses_of(tmp_path / "cut/metrics.jsonl")[-1][0] == 8  # beyond the checkpoint of step 5
    train.run(config, tmp_path / "cut")
    whole = losses_of(tmp_path / "whole/metrics.jsonl")
    assert len(whole) == 12
    assert losses_of(tmp_path / "cut/metrics.jsonl") == whole


def test_microbatches_add_up_to_the_batch():
    """The dense baseline has no noise: its gradients and sums must not depend on the number of microbatches."""
    task = RecallTask(24, 2, 5, 5, 5)
    batch = task.rows(0, 4)
    results = []
    for count in (1, 2, 4):
        trainer = Trainer(
            tiny.config(model={"layer_types": "dense"}, train={"gradient_accumulation_steps": count}), task.vocab_size
        )
        state, metrics = trainer.step(trainer.init(), batch)
        results.append((state.parameters, metrics))
    for other in results[1:]:
        for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_loss_is_cross_entropy_plus_penalty_times_fraction():
    task = RecallTask(24, 2, 5, 5, 5)
    trainer = Trainer(tiny.config(nats={"kv_penalty": 3.0}), task.vocab_size)
    _, metrics = trainer.step(trainer.init(), task.rows(0, 4))
    loss = metrics["cross_entropy"] + 3.0 * metrics["kv_fraction"]
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(metrics["role_fractions"].sum(-1), 1, rtol=1e-5)
    assert 0 < float(metrics["kv_fraction"]) < 1


def test_the_penalty_lowers_the_fraction_and_nothing_else_can():
    """The gradient of a fixed KV penalty points the right way: with nothing to predict, roles become cheap."""
    task = RecallTask(24, 2, 5, 5, 5)
    batch = task.rows(0, 4)
    batch["loss_weight"] = np.zeros_like(batch["loss_weight"])
    for gradient in ("constant", "exact"):
        config = tiny.config(
            nats={"kv_penalty_mode": "fixed", "kv_penalty": 1.0, "kv_penalty_gradient": gradient},
            optimizer={"weight_decay": 0.0, "peak_learning_rate": 0.1},
            train={"num_steps": 60},
        )
        trainer = Trainer(config, task.vocab_size)
        state = trainer.init()
        fractions = []
        for _ in range(60):
            state, metrics = trainer.step(state, batch)
            fractions.append(float(metrics["kv_fraction"]))
        assert fractions[-1] < 0.6 * fractions[0]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, no_evaluation, monkeypatch):
    real = Trainer._step

    def spoilt(self, state, batch):
        state, metrics = real(self, state, batch)
        return state, metrics | {"loss": jnp.where(state.step == 8, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(Trainer, "_step", spoilt)
    sentence = (
        r"^the loss at step 8 is nan \(cross-entropy .*\); training cannot continue, and the last good checkpoint is "
        r"that of step 5\. The likely cause: .+; what may help: .+\.$"
    )
    with pytest.raises(UserError, match=sentence):
        train.run(tiny.config(), tmp_path)
    assert load(tmp_path).step == 5


def test_a_workdir_in_use_is_refused(tmp_path):
    with Workdir(tmp_path).lock(), pytest.raises(UserError, match=rf"in use by another process \(pid {os.getpid()}\)"):
        train.run(tiny.config(), tmp_path)


def test_a_forked_process_that_outlives_the_run_does_not_hold_its_workdir(tmp_path):
    code = f"""
import os, sys, time
from natsjax.runs.workdir import Workdir
os.setsid()
with Workdir({str(tmp_path)!r}).lock():
    if os.fork() == 0:
        print("here", flush=True)
        time.sleep(60)
    time.sleep(60)
"""
    process = Process("-c", code)
    try:
        assert process.stdout.readline() == "here\n"
        process.kill()
        process.wait()
        with Workdir(tmp_path).lock():
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.close()


def test_a_full_disk_leaves_the_earlier_checkpoint_usable(tmp_path):
    """A limit on file size, in a process of its own, stands in for the disk: TensorStore's real error comes up."""
    code = f"""
import resource, sys
import jax.numpy as jnp, pathlib
from natsjax.runs.checkpoint import SUMS_FILE, Checkpoints
from natsjax.errors import UserError
checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}))
checkpoints.save(5, {{"w": jnp.arange(3.0)}})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
import numpy as np
noise = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)))
try:
    checkpoints.save(10, {{"w": noise}})
    checkpoints.wait()
except UserError as error:
    print(error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 10 cannot be written" in done.stdout
    assert done.stdout.rstrip().endswith("the run can resume from step 5.")
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["5"]
    checkpoints = Checkpoints(tmp_path, read_only=True)
    state = checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(state["w"], np.arange(3.0))


def test_a_checkpoint_of_another_kind_of_device_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.arange(3.0)})
    checkpoints.close()
    for file in tmp_path.rglob("_sharding"):
        text = file.read_text()
        assert "cpu" in text.lower()
        file.write_text(text.replace("TFRT_CPU_0", "cuda:0").replace("cpu:0", "cuda:0"))
    (tmp_path / "1" / f"{SUMS_FILE}.0").unlink()  # they are of the file as it was
    state = Checkpoints(tmp_path, read_only=True).restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(state["w"], np.arange(3.0))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"nats": {"kv_budget": 0.05}}, r"nats.kv_budget = 0.05: .* no KV fraction is below 0\.\d+"),
        ({"data": {"source": "corpus", "input": "nowhere"}}, "nowhere"),
        ({"eval": {"budgets": (0.01,)}}, "KV budget = 0.01: .* no KV fraction is below "),
        (
            {"model": {"layer_types": "dense"}, "eval": {"budgets": (0.01,)}},
            "KV budget = 0.01: .* no KV fraction is below ",
        ),
    ],
)
def test_a_mistake_leaves_no_trace_and_the_corrected_command_runs(tmp_path, no_evaluation, mistake, message):
    with pytest.raises(UserError, match=message):
        train.run(tiny.config(**mistake), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    train.run(tiny.config(train={"num_steps": 2}), tmp_path)
    assert load(tmp_path).step == 2


def test_a_corpus_from_text_to_report_and_on_without_the_text(tmp_path, monkeypatch):
    """Text in a folder, prepared, trained and evaluated; loading and extending need the prepared corpus alone."""
    texts = tmp_path / "texts"
    monkeypatch.chdir(tmp_path)
    data = tiny.corpus(texts, input="texts")
    evaluation = train.run(tiny.config(data=data), "run")
    assert evaluation.budget_check is not None
    assert all(0 < row["bits_per_byte"] < 9 for row in evaluation.rows)
    assert all(path.exists() for path in evaluation.paths)

    (texts / "another.txt").write_text("a text that came later")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = load(tmp_path / "run")
    assert run.tokenizer.decode(run.tokenizer.encode("là")) == "là"
    train.run(tiny.config(data=data, train={"num_steps": 14}), tmp_path / "run")
    assert load(tmp_path / "run").step == 14

    other = tiny.config(data=data | {"prepared_dir": str(tmp_path / "run/corpus"), "tokenizer": "bpe"})
    with pytest.raises(UserError, match=r"data.tokenizer = 'bpe' .* does not match the corpus .* 'byte' of 258"):
        train.run(other, tmp_path / "run2")


def test_checkpoints_of_something_else_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path)
    config = tiny.config()
    Workdir(tmp_path).record(config, "a" * 64)
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path)
    Workdir(tmp_path).data_file.unlink()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.close()
    with pytest.raises(UserError, match="checkpoint of step 1"):
        load(tmp_path)


# test_kill.py kills runs by default.
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="ctrl-c"), pytest.param(signal.SIGKILL, id="kill-9", marks=pytest.mark.slow)],
)
def test_a_stopped_command_goes_on_where_it_was(tmp_path, number):
    """The real command in a process of its own, stopped from outside, then run again: the losses of one whole run."""
    config = tiny.config(train={"num_steps": 1500, "log_every": 5}, checkpoint={"save_every": 50})
    file, workdir = tiny.write_config(tmp_path / "experiment.py", config), tmp_path / "run"
    command = ["train.py", f"--config={file}", f"--workdir={workdir}"]
    process = Process(*command)
    wait_for(lambda: has_checkpoint(workdir), process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ("SIGINT: saved step" in errors) == (number == signal.SIGINT)
    reached = load(workdir).step
    assert 50 <= reached < 1500

    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {reached}" in done.stderr
    assert (workdir / "report/report.html").exists()
    assert "perplexity" in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run", lambda *a, **k: None)
        train.run(config, tmp_path / "whole")
    whole = losses_of(tmp_path / "whole/metrics.jsonl")
    assert len(whole) == 300
    assert losses_of(workdir / "metrics.jsonl") == whole

    if number == signal.SIGINT:  # a finished run started again evaluates again, and trains nothing
        again = run(*command)
        assert again.returncode == 0, again.stderr
        assert again.stdout == done.stdout
        assert losses_of(workdir / "metrics.jsonl") == whole


def test_a_users_mistake_is_one_line_and_exit_status_2(tmp_path):
    done = run("train.py", "--config=configs/smoke.py", f"--workdir={tmp_path}", "--config.train.num_step=3")
    assert done.returncode == 2
    assert done.stderr == "error: unknown config field train.num_step; did you mean train.num_steps.\n"
    assert not list(tmp_path.iterdir())
