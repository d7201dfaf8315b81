"""A run writes the metrics that are declared; the profiler never ends a run."""

import io
import re
import types

import jax
import numpy as np
import pytest
import report_data
import tiny
from monitors import go, make
from rich.console import Console

from benchmarks import docs_tables
from natsjax import evaluate, train
from natsjax.model.parameters import PARTS
from natsjax.runs.metrics import _EVALUATED, _PROFILED, METRICS, Metric, metric_of, parts_of
from natsjax.runs.workdir import read_metrics
from natsjax.runtime import chips
from natsjax.train import flops
from natsjax.train.logs import display, monitor
from natsjax.train.logs.monitor import EVERY_STEP, fetch_every_step


def declared(*, when=None):
    """Names of the declared metrics, one for each part of the model; those of a condition in words."""
    for metric in METRICS.values():
        for part in PARTS if metric.name.endswith("/PART") else [""]:
            if when is None or metric.when == when:
                yield metric.name.replace("PART", part)


def test_the_tables_of_the_docs_are_the_declarations():
    for path, text in docs_tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m benchmarks.docs_tables, which writes {path}"


def test_a_run_writes_what_is_declared(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "run", lambda *a, **k: None)
    config = tiny.config(train={"num_steps": 3})
    train.run(config, tmp_path)
    first, second, _ = read_metrics(tmp_path / "metrics.jsonl")
    order = [list(METRICS).index(metric_of(name).name) for name in first]
    assert order == sorted(order)
    assert first.keys() == second.keys() | set(declared(when="first line of a start"))
    assert set(declared(when="always")) <= second.keys()
    axes = {"l": config.model.num_layers, "k": config.model.num_kv_heads, "r": config.nats.num_roles}
    for name in second.keys() - {"warnings"}:
        sizes = [axes.get(axis, axis) for axis in re.findall(r"\w+", metric_of(name).shape)]
        assert list(np.shape(second[name])) == [int(size) for size in sizes], name
    norms = parts_of(second, "gradient_norm").values()
    assert sum(norm**2 for norm in norms) == pytest.approx(second["gradient_norm"] ** 2, rel=1e-4)


def test_all_that_is_declared_can_be_written(tmp_path, monkeypatch):
    """With devices that report their memory and whose speed is known."""
    monkeypatch.setattr(monitor, "chip_of", lambda device: chips.CHIPS["v5p"])
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}, None]
    devices = [types.SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    config = tiny.config()
    on_cpus = make(tmp_path / "cpu", config)
    go(on_cpus, config, [1])
    on_cpus.close()
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    watch = make(tmp_path, config)
    go(watch, config, [1, 2])
    watch.close()
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    written = line.keys() | read_metrics(tmp_path / "cpu/metrics.jsonl")[0].keys()
    elsewhere = {*declared(when=_PROFILED), *declared(when=_EVALUATED)}  # test_step_breakdown, test_held_out
    assert written == set(declared()) - elsewhere
    assert (line["memory_in_use"], line["peak_memory"]) == (7, 9)
    peak = len(jax.devices()) * 459e12
    assert line["mfu"] == pytest.approx(line["flops_per_second"] / peak)


def test_a_metric_is_one_entry_and_its_value(tmp_path, monkeypatch):
    """A toy metric is written, sent to TensorBoard, shown, drawn and documented."""
    config = tiny.config(train={"num_steps": 3})
    with pytest.raises(ValueError, match="the metric toy is not declared"):
        go(make(tmp_path / "undeclared", config), config, [1], toy=np.float32(0.5))
    toy = Metric("toy", "a toy", "fraction", panel=("toy", "{:.1%}"), line="toy {:.0%}", curve="toy curve")
    monkeypatch.setitem(METRICS, "toy", toy)
    watch = make(tmp_path, config)
    go(watch, config, range(1, 4), toy=np.float32(0.5))
    watch.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["toy"] for line in lines] == [0.5] * 3
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"toy" in events.read_bytes()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(display.panel(config, lines[0], 1, 75.0, "a run", 80, 24))
    assert re.search(r"toy +50\.0 %", console.export_text())
    assert "toy 50 %" in display._plain(lines[0])
    page = report_data.write(tmp_path)[2].read_text()
    assert '"toy": [0.5, 0.5, 0.5]' in page
    assert '{"name": "toy", "title": "toy curve", "percent": true}' in page
    assert "| `toy` |  | fraction | a toy | always |" in docs_tables.metrics_table()


def test_warnings_are_written_and_logged(tmp_path, capfd):
    config = tiny.config()
    watch = make(tmp_path, config)
    go(watch, config, range(1, 5), unended_locals=np.ones((2, 2)))
    go(watch, config, range(5, 9))
    watch.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    endless = ["endless-local" in line["warnings"] for line in lines]
    assert endless == [False, False, True, True, True, True, False, False]
    logged = [line for line in capfd.readouterr().err.splitlines() if "endless-local" in line]
    assert [line.split(":")[0] for line in logged] == ["warning", "endless-local"]
    assert "in all layers and heads." in logged[0]


def test_only_what_is_needed_is_fetched_between_logged_steps(tmp_path):
    read = []

    class Array:
        def __init__(self, name, value):
            self.name, self.value = name, value

        def __array__(self, dtype=None, copy=None):
            read.append(self.name)
            return np.asarray(self.value)

    def metrics(**changes):
        return {name: Array(name, value) for name, value in tiny.step_metrics(config, **changes).items()}

    config = tiny.config(train={"log_every": 2})
    watch = make(tmp_path, config)
    watch.finished(1, fetch_every_step(metrics()))
    assert read == list(EVERY_STEP)
    watch.finished(2, fetch_every_step(metrics()))
    watch.close()
    assert set(read) == set(metrics())
    read.clear()
    fetch_every_step(metrics(gradient_norm=np.float32(np.inf)))
    assert "accuracy" in read  # for the explanation


def test_flops_of_the_model():
    """Twice forward and four times backward, whatever is recomputed; attention at the fraction that was measured."""
    remat = tiny.config(model={"remat": "full"}, nats={"mask_gradient": "visible"})
    plain = tiny.config(nats={"mask_gradient": "visible"})
    found = flops.step_flops(remat, 16, kv_fraction=0.25, recomputation=False)
    assert found == flops.step_flops(plain, 16, kv_fraction=0.25, recomputation=False)
    pairs = 4 * 2 * 4 * 24 * 25 / 2
    assert found.attention == pytest.approx(0.25 * pairs * 6 * 2 * 4)
    assert found.weights == flops.step_flops(plain, 16).weights < flops.step_flops(remat, 16).weights


def test_rates_are_since_the_line_before(tmp_path, monkeypatch):
    config = tiny.config(train={"log_every": 2})
    now = 100.0
    monkeypatch.setattr(monitor, "time", types.SimpleNamespace(monotonic=lambda: now))
    watch = make(tmp_path, config, start=4)
    now = 101.0
    go(watch, config, [5, 6])
    now = 105.0
    go(watch, config, [7, 8])
    watch.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["tokens_per_second"] == pytest.approx(2 * 4 * 24)
    assert second["tokens_per_second"] == pytest.approx(2 * 4 * 24 / 4)
    assert second["flops_per_second"] == pytest.approx(first["flops_per_second"] / 4)


# --- the profiler ---


@pytest.fixture
def profiler(monkeypatch):
    log = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: log.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append("stop"))
    return log


def profiled(tmp_path, profiler, first, last, steps, start=0):
    """Lists the calls of the profiler and the numbers of the steps."""
    config = tiny.config(train={"profile": (first, last)})
    watch = make(tmp_path, config, start)
    for step in steps:
        watch.before(step, np.zeros(1))
        profiler.append(step)
    watch.close()
    return [entry[0] if isinstance(entry, tuple) else entry for entry in profiler]


def test_the_steps_of_a_profile(tmp_path, profiler, capfd):
    assert profiled(tmp_path, profiler, 3, 4, range(1, 7)) == [1, 2, "start", 3, 4, "stop", 5, 6]
    assert profiler[2] == ("start", str(tmp_path / "profile"))
    assert f"the profile is in {tmp_path / 'profile'}" in capfd.readouterr().err
    for first, last, steps, start, calls in (
        (3, 9, range(1, 5), 0, [1, 2, "start", 3, 4, "stop"]),  # it stops with the run
        (3, 6, range(5, 9), 4, ["start", 5, 6, "stop", 7, 8]),  # of a resumed run
        (3, 4, range(5, 9), 4, [5, 6, 7, 8]),
    ):
        profiler.clear()
        assert profiled(tmp_path, profiler, first, last, steps, start) == calls


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("no room\nwith a trace")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    profiled(tmp_path, [], 2, 3, range(1, 6))
    assert capfd.readouterr().err.count("the profiler does not start (no room); training continues\n") == 1
