"""The benchmark of decoding: that it compares like with like, and prints what it says it does."""

import dataclasses
import json
import re

import decoding
import jax
import numpy as np
import pytest
import tiny

from benchmarks import decode as benchmark
from natsjax import UserError
from natsjax.decode.decoder import DecodeSettings
from natsjax.model.transformer import init_parameters
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats

BATCH, CONTEXT, LIVE, TOKENS = 2, 40, 12, 6


@pytest.fixture(scope="module", autouse=True)
def small():
    """A tiny model, whose blocks of slots are short too."""
    patch = pytest.MonkeyPatch()
    real = benchmark.config
    patch.setattr(benchmark, "VOCAB_SIZE", tiny.VOCAB_SIZE)
    patch.setattr(benchmark, "config", lambda num_layers: tiny_config(real(num_layers)))
    yield
    patch.undo()


def tied():
    """As the rival's is."""
    return decoding.config(model={"tie_embeddings": True, "key_shift": False, "token_shift": False})


def tiny_config(config):
    """The benchmark's config with tiny sizes, everything else as it is."""
    model = dataclasses.replace(tied().model, num_layers=config.model.num_layers)
    return dataclasses.replace(config, model=model, nats=dataclasses.replace(config.nats, window=4))


@pytest.fixture(scope="module")
def decoders(small):
    found = benchmark.decoders(benchmark.config(3))
    for decoder in found.values():
        decoder.settings = DecodeSettings(block=8)
    return found


@pytest.fixture(scope="module")
def full(decoders):
    loop = benchmark.Ours(decoders["full"], BATCH, CONTEXT, CONTEXT, TOKENS)
    loop()
    return loop


@pytest.fixture(scope="module")
def rival():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"needs {name}")
    from benchmarks import decode_transformers

    return decode_transformers


def test_the_contestants_have_one_model_and_differ_in_the_policy(decoders):
    assert isinstance(decoders["full"].policy, FullAttention)
    assert isinstance(decoders["nats"].policy, Nats)
    assert decoders["full"].parameters is decoders["nats"].parameters
    assert decoders["nats"].eviction is None


def test_every_key_is_kept_and_a_call_can_be_repeated(full):
    before = np.asarray(full.segment.tokens), np.asarray(full.segment.logprobs)
    assert np.all(np.asarray(full.loop.at) == CONTEXT + TOKENS)
    assert np.all(np.asarray(full.loop.buffer[0].length) == CONTEXT + TOKENS)
    full.reset()
    assert np.all(np.asarray(full.loop.at) == CONTEXT)
    full()
    np.testing.assert_array_equal(full.segment.tokens, before[0])
    np.testing.assert_allclose(full.segment.logprobs, before[1], rtol=1e-5)
    assert np.all(np.asarray(full.segment.num_drawn) == TOKENS)


def test_nats_has_always_as_many_live_keys(decoders):
    loop = benchmark.Ours(decoders["nats"], BATCH, CONTEXT, LIVE, TOKENS)  # more than the window
    model = loop.decoder.config.model
    heads = BATCH * model.num_layers * model.num_kv_heads
    for _ in range(2):
        loop.reset()
        loop()
        assert np.all(np.asarray(loop.segment.need) == LIVE)
        # A query reads its own key too.
        assert np.asarray(loop.loop.read).sum() == TOKENS * heads * (LIVE + 1)
    assert loop.loop.buffer[0].capacity == 16  # whole blocks, and no room for the tokens that come


def test_memory_is_what_the_arrays_take(full):
    (group,) = full.loop.buffer
    slots = BATCH * full.decoder.config.model.num_layers * full.decoder.config.model.num_kv_heads * group.capacity
    stored = slots * 2 * full.decoder.config.model.head_dim * 4
    assert stored + 8 * slots <= full.cache_bytes < stored + 9 * slots  # position and end, and some numbers
    assert full.temporary_bytes() > 0


def test_llama_with_our_parameters_is_our_model(rival):
    config = tied()
    _, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))
    for n, norm in enumerate((parameters["blocks"]["mlp_norm"], parameters["final_norm"])):
        norm["scale"] *= jax.random.uniform(jax.random.key(n), norm["scale"].shape, minval=0.5, maxval=1.5)
    module = rival.llama(config.model, tiny.VOCAB_SIZE, 24)
    rival.take_over(module, parameters)
    rows = decoding.prompts([20, 20])
    expected, _ = decoding.masked_logits(config, parameters, rows, FullAttention())
    with rival.torch.inference_mode():
        found = module(rival.torch.tensor(rows)).logits.numpy()
    assert decoding.error(found, expected, rows) < 1e-5


def test_transformers_draws_what_full_draws(full, rival, capsys):
    found = benchmark.rivals(full)
    assert list(found) == ["transformers", "static"]
    assert capsys.readouterr().out.count(f"{BATCH * TOKENS} of {BATCH * TOKENS} tokens") == 2
    assert len(np.unique(full.segment.tokens)) > 2  # not one token over and over
    for greedy in found.values():
        with pytest.raises(RuntimeError, match="reset"):
            greedy()
        greedy.reset()
        tokens, logprobs = greedy.check()  # it looks at how many tokens a step reads
        assert benchmark.compare(full, tokens, logprobs)[0] < 1e-5
    model = full.decoder.config.model
    slot = BATCH * model.num_layers * model.num_kv_heads * model.head_dim * 2 * 4
    for name, after in (("transformers", 0), ("static", TOKENS)):  # a static cache stays as large as it was allocated
        assert found[name].cache_bytes == (CONTEXT + TOKENS) * slot
        found[name].reset()
        assert found[name].cache_bytes == (CONTEXT + after) * slot


def test_a_rival_that_does_other_work_stops_it(full, rival, monkeypatch):
    layers = [(keys, 1.1 * values) for keys, values in full.layers()]
    monkeypatch.setattr(full, "layers", lambda: layers)
    with pytest.raises(SystemExit, match="log-probabilities of full and transformers differ"):
        benchmark.rivals(full)


def test_without_transformers_ours_are_timed_alone(full, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert benchmark.rivals(full) == {}
    assert "torch, transformers: not installed, transformers is not timed." in capsys.readouterr().out


def test_it_prints_tables_and_writes_what_it_measured(decoders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "decoders", lambda shape: decoders)
    sizes = {"layers": 3, "batch": BATCH, "context": CONTEXT, "live": 0.3}
    monkeypatch.setattr(benchmark, "SIZES", sizes)
    monkeypatch.setattr(benchmark, "BARS", {"full / nats": 1e-9, "transformers / full": 1.0})
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += [f"--tokens={TOKENS}", "--rounds=2", "--contexts=36,40", "--no_transformers", f"--output={tmp_path}"]
    benchmark.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines if line.startswith(("| full |", "| nats |"))] == [
        [" full ", " 40 "],
        [" nats ", " 12 "],
    ]
    (line,) = [line for line in lines if line.startswith("| full / nats |")]
    assert "(≥ 1e-09: met)" in line
    points = [line for line in lines if line.startswith(("| 36 |", "| 40 |"))]
    assert [re.findall(r"\((\d+) keys\)", line) for line in points] == [["36", "12", "11"], ["40", "12", "12"]]
    written = json.loads((tmp_path / "decode.json").read_text())
    assert [(row["name"], row["live"], len(row["seconds"])) for row in written["rows"]] == [
        ("full", 40, 2),
        ("nats", 12, 2),
    ]
    assert len(written["curve"]) == 6
    for flag in ("--rounds=0", "--live=0", "--contexts=0", f"--output={tmp_path / 'none'}"):
        with pytest.raises(UserError):
            benchmark.main([flag])


def test_bars_are_those_of_one_size():
    assert benchmark.verdict("full / nats", 2.4, benchmark.SIZES) == "2.40 (≥ 2.5: missed)"
    assert benchmark.verdict("full / nats", 2.4, benchmark.SIZES | {"batch": 1}) == "2.40"
    assert benchmark.verdict("static / full", 2.4, benchmark.SIZES) == "2.40"
