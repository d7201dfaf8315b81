"""Tilings: none changes a result, the table is found, the autotuner writes what it timed, pairs are counted right."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import arguments_of, compiled, nats
from cases import Shape

from benchmarks import counting
from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import autotune, tuning_table, xla
from pallas_kernels.nats_attention.tiling import Problem
from pallas_kernels.nats_attention.xla import XlaTiling

PROBLEM = Problem(1, 256, 256, 2, 2, 16, 8, "float32")


@pytest.mark.parametrize(
    "tiling",
    [
        XlaTiling(query_block=7, key_block=5),
        XlaTiling(query_block=8, key_block=16, lanes=2, thresholds=(16,), capacity=0.1),
        XlaTiling(query_block=16, key_block=8, lanes=5, thresholds=(8, 20), capacity=1.0),
        XlaTiling(query_block=64, key_block=64, lanes=16, thresholds=(9,)),
    ],
)
@pytest.mark.parametrize("pattern", ["random", "bursts"])
def test_no_tiling_changes_a_result(tiling, pattern):
    shape = Shape(2, 53, 2, 2, 8, 4)
    arguments = arguments_of(shape, [(pattern, "one")], np.random.default_rng(0))
    whole = XlaTiling(query_block=shape.length, key_block=shape.length)
    results = (compiled(nats(shape.window, tiling=one), *arguments) for one in (tiling, whole))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 300, 1000, 8192])
def test_default_tilings_cover_a_length_with_little_padding(length):
    problem = PROBLEM._replace(queries=length, keys=length)
    for tiling in (xla.default_tiling(problem), *xla.candidate_tilings(problem)):
        for block in (tiling.query_block, tiling.key_block):
            blocks = -(-length // block)
            assert 1 <= block <= length
            assert blocks * block - length < blocks  # less than one row for each block


def entry(problem=PROBLEM, device="cpu", **fields):
    blocks = {"query_block": 32, "key_block": 16, "capacity": 0.25, "sampled_run": 8, "lanes": 3}
    return tuning_table.Entry("xla", device, problem, blocks | fields)


def test_the_nearest_entry_of_the_table_is_chosen():
    table = (entry(), entry(PROBLEM._replace(keys=300, queries=300), query_block=48))
    chosen = tuning_table.choose("xla", xla, PROBLEM, table)
    expected = XlaTiling(query_block=32, key_block=16, capacity=0.25, sampled_run=8, lanes=3, thresholds=(16,))
    assert chosen == expected
    near = PROBLEM._replace(keys=290, queries=290, window=20)
    assert tuning_table.choose("xla", xla, near, table).query_block == 48
    assert tuning_table.choose("xla", xla, near, table).thresholds == (21,)  # they follow from the problem asked for


def test_an_entry_says_nothing_about_other_problems_or_devices():
    for other in ({"keys": 512, "queries": 512}, {"head_dim": 32}, {"dtype": "bfloat16"}, {"group": 1}, {"batch": 3}):
        problem = PROBLEM._replace(**other)
        assert tuning_table.choose("xla", xla, problem, (entry(),)) == xla.default_tiling(problem), other
    assert tuning_table.choose("xla", xla, PROBLEM, (entry(device="TPU v5e"),)) == xla.default_tiling(PROBLEM)


def test_the_committed_table_can_be_used():
    for row in tuning_table.read_table():
        backend = na.api.BACKENDS[row.backend]
        tiling = tuning_table.choose(row.backend, backend, row.problem, (entry(device=tuning_table.device_kind()), row))
        backend.check(row.problem, tiling)


def test_autotune_writes_the_fastest_and_keeps_other_rows(tmp_path, capsys, monkeypatch):
    path = tmp_path / "table.json"
    tuning_table.write_table([entry(device="TPU v5e")], path)
    candidates = [XlaTiling(query_block=8, key_block=8), XlaTiling(query_block=32, key_block=32)]
    monkeypatch.setattr(xla, "candidate_tilings", lambda problem: candidates)
    arguments = ["--lengths=32", "--heads=2,1,8", "--window=4", "--repeats=1", f"--output={path}"]
    autotune.main(arguments)
    autotune.main(arguments)  # replaces its own row
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())
    assert [row["device"] for row in rows] == ["TPU v5e", "cpu"]
    fastest = printed[len(printed) // 2]
    assert f"query_block={rows[1]['tiling']['query_block']}," in fastest
    tuning_table.read_table.cache_clear()
    assert tuning_table.read_table(path)[1].problem == Problem(1, 32, 32, 1, 2, 8, 4, "float32")


def test_pairs_are_counted_as_they_are():
    length, window = 40, 3
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 3, (2, 2, length)))
    key_end = np.asarray(na.key_end_from_roles(ids, window=window))
    tiling = XlaTiling(query_block=8, key_block=4)
    found = counting.count_pairs(jnp.asarray(key_end), tiling)
    t, s = np.arange(length)[:, None], np.arange(length)
    visible = (s <= t) & (t < key_end[..., None, :])
    tiles = visible.reshape(2, 2, 5, 8, 10, 4)
    assert found.live == visible.sum()
    assert found.causal == 4 * length * (length + 1) // 2
    assert found.computed >= 32 * tiles.any((3, 5)).sum()
    # A tile that begins and ends for different rows is computed without need: seldom.
    assert found.computed <= 1.1 * 32 * tiles.any((3, 5)).sum()


@pytest.mark.parametrize(("length", "most"), [(8192, 2.2), (16384, 1.8), (32768, 1.5)])
def test_few_pairs_are_computed_beside_the_live_ones(length, most):
    """5 % scattered GLOBAL keys, window 256, tiles of 128: what the project promises."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.choice(3, (1, 2, length), p=[0.05, 0.475, 0.475]))
    found = counting.count_pairs(
        na.key_end_from_roles(ids, window=256), XlaTiling(query_block=128, key_block=128, thresholds=(257,))
    )
    assert found.computed < most * found.live


def test_the_benchmark_prints_and_draws(capsys, monkeypatch, tmp_path):
    from benchmarks import attention as benchmark

    few = ["--lengths=40", "--passes=forward,sampled", "--windows=4", "--repeats=1", "--heads=2,1,8"]
    monkeypatch.setattr("sys.argv", ["attention", *few, f"--output={tmp_path}"])
    benchmark.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| 40 |")]
    assert [row.split(" | ")[3] for row in rows] == ["forward", "sampled"]
    assert all("jax" in row for row in rows)
    assert printed.count("plain causal") == 1
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_a_ratio_is_the_median_over_rounds():
    from benchmarks import attention as benchmark

    assert benchmark.ratio([2.0, 9.0, 4.0], [1.0, 1.0, 4.0]) == 2.0
    calls = itertools.count()
    seconds = benchmark.race([benchmark.Contestant("one", lambda: next(calls))], 3)
    assert len(seconds["one"]) == 3
    assert next(calls) == 4  # one call is not timed
