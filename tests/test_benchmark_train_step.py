"""The benchmark of the train step: that it compares like with like, and prints what it says it does."""

import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import train_step as benchmark
from benchmarks import train_step_breakdown
from configs import speeches
from natsjax import UserError
from natsjax.config import OptimizerConfig
from pallas_kernels.nats_attention import key_end_from_roles

CASE = benchmark.Case(length=24, batch=4)


def start(attention):
    config = tiny.config(model={"layer_types": attention}, train={"num_steps": 50})
    return benchmark.Ours(config, tiny.VOCAB_SIZE, benchmark.batch_of(CASE, tiny.VOCAB_SIZE))


@pytest.fixture(scope="module")
def fresh_dense():
    """The step and its first state, which a step consumes."""
    step = start("dense")
    return step, jax.tree.map(np.array, step.state)


@pytest.fixture
def dense(fresh_dense):
    step, first = fresh_dense
    step.state = jax.device_put(first, step.trainer.shardings)
    step.metrics.clear()
    return step


@pytest.fixture
def rival():
    return pytest.importorskip("benchmarks.train_step_torch", reason="needs torch", exc_type=ImportError)


def test_torch_takes_the_same_steps_as_the_dense_model(dense, rival):
    parameters = jax.tree.map(np.asarray, dense.state.parameters)
    trainer = dense.trainer
    theirs = rival.Step(trainer.config, trainer.vocab_size, parameters, dense.batch, trainer.schedule, compiled=False)
    losses = np.array([(dense(), theirs()) for _ in range(8)])
    assert losses[-1, 0] < 0.95 * losses[0, 0]  # the optimizers have been at work: schedule, clipping, decay and all
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)


@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_fresh_roles_keep_about_the_budget(length):
    config = speeches.get_config()
    roles = benchmark.roles_for(config.nats.kv_budget, length, config.nats.window)
    assert sum(roles) == pytest.approx(1)
    ids = np.random.default_rng(0).choice(3, (1, 64, length), p=roles)
    ids[..., 0] = 0
    end = key_end_from_roles(jnp.asarray(ids), window=config.nats.window)
    alive = np.minimum(np.asarray(end), length) - np.arange(length)
    assert alive.mean() / ((length + 1) / 2) == pytest.approx(max(0.15, least_fraction(length)), rel=0.05)


def least_fraction(length):
    """The smallest KV fraction that any fraction of GLOBAL tokens gives, the others LOCAL and SLIDING half and half."""

    q = np.arange(length - 1)  # queries behind a key's own; the first key is GLOBAL

    def pairs(g):  # as docs/method.md 2.1 has it
        return length + np.sum(1 + g * q + (1 - g) / 2 * ((1 - (1 - g) ** q) / g + np.minimum(q, 4)))

    return min(pairs(g) for g in np.geomspace(1e-3, 0.9, 200)) / (length * (length + 1) / 2)


def test_the_batch_is_divided_or_else_the_heads():
    assert benchmark.mesh_sizes(1, 1, 2) == {}
    assert benchmark.mesh_sizes(2, 8, 2) == {"data": 2}
    assert benchmark.mesh_sizes(2, 1, 2) == {"tensor": 2}
    with pytest.raises(UserError, match="--devices=3 divides neither a batch of 8 nor 2 KV heads"):
        benchmark.mesh_sizes(3, 8, 2)


def test_other_devices_than_there_are_end_with_a_sentence():
    too_many = jax.device_count() + 1
    with pytest.raises(SystemExit, match=f"--devices={too_many}: JAX has {jax.device_count()} of them"):
        benchmark.ask_for_devices(too_many)


def test_contestants_differ_in_attention_and_mask_gradient_alone():
    configs = benchmark.configs_of(benchmark.Case(length=1024, batch=8), remat=True)
    assert {name: config.model.remat for name, config in configs.items()} == {
        "dense": "none",
        "nats": "none",
        "sampled": "none",
        "dots": "dots",
        "full": "full",
    }
    assert [config.model.layer_pattern for config in configs.values()] == ["dense"] + 4 * ["nats"]
    assert [configs[name].nats.mask_gradient for name in ("nats", "sampled", "dots")] == ["exact", "sampled", "exact"]
    for config in configs.values():
        assert (config.data.context_length, config.train.batch_size, config.data.vocab_size) == (1024, 8, 2048)
        assert (config.model.num_layers, config.model.embed_dim, config.model.dtype) == (4, 128, "float32")


def test_every_update_rule_is_a_contestant():
    configs = benchmark.configs_of(benchmark.Case(length=1024, batch=8), optimizers=True)
    rules = typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])
    found = {config.optimizer.name: config.model.layer_pattern for config in configs.values()}
    assert found == dict.fromkeys(rules, "dense") | {"adamw": "nats"}


def test_it_prints_a_table_and_writes_what_it_measured(dense, monkeypatch, capsys, tmp_path):
    steps = {"dense": dense, "nats": start("nats")}
    monkeypatch.setattr(benchmark, "Ours", lambda config, vocab_size, batch: steps[config.model.layer_pattern])
    monkeypatch.setattr(benchmark, "torch_rival", lambda dense: None)
    monkeypatch.setattr(benchmark, "ask_for_devices", lambda wanted: None)
    monkeypatch.setattr(benchmark, "NATS_MOST", {24: 1e9})
    benchmark.main(["--lengths=24", "--tokens=96", "--repeats=2", f"--output={tmp_path}"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 24, 4 |")]
    assert "(≤ 1e+09: met)" in line
    (row,) = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    assert set(row["seconds"]) == {"dense", "nats", "sampled"}
    assert set(row["ratios"]) == {"nats / dense", "sampled / dense"}
    assert 0.2 < row["kv_fraction"] < 0.8
    for flag in ("--repeats=0", "--lengths=1", f"--output={tmp_path / 'none'}"):
        with pytest.raises(UserError):
            benchmark.main([flag])


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_a_rival_that_computes_something_else_stops_it(dense, rival, monkeypatch, what):
    call = rival.Step.__call__

    def wrong(step):
        loss = call(step)
        step.gradient_norm *= 1.001 if what == "gradient's norm" else 1
        return loss * (1.001 if what == "loss" else 1)

    monkeypatch.setattr(rival.Step, "__call__", wrong)
    monkeypatch.setattr(rival.torch, "compile", lambda module: module)
    with pytest.raises(SystemExit, match=f"the {what} of step 0"):
        benchmark.torch_rival(dense)


def test_without_a_compiler_torch_is_timed_eagerly_and_said_to_be(dense, rival, monkeypatch, capsys):
    def no_compiler(module):
        def forward(*_):
            raise RuntimeError("no C++ compiler\nand more")

        return forward

    monkeypatch.setattr(rival.torch, "compile", no_compiler)
    name, _ = benchmark.torch_rival(dense)
    assert name == "torch (eager)"
    assert "torch.compile does not work here (RuntimeError: no C++ compiler); timed eagerly" in capsys.readouterr().out


def test_the_breakdown_knows_the_parts_of_a_step(dense):
    dense()
    by_part = train_step_breakdown.breakdown(dense, steps=1)
    known = {part for part, _ in train_step_breakdown.PARTS}
    assert set(by_part) <= known | {train_step_breakdown.COLLECTIVES, train_step_breakdown.REST}
    assert {"attention", "MLP", "logits and loss", "optimizer"} <= set(by_part)
    assert by_part["attention"] > 0
    assert by_part.get(train_step_breakdown.REST, 0) < 0.7 * sum(by_part.values())
