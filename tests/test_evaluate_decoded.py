"""Measuring through the buffer: what masks say, and what no mask can."""

import decoding
import numpy as np
import pytest
import tiny

from natsjax import evaluate
from natsjax.errors import UserError
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.nats import Nats
from natsjax.policies.numbers import OutOfReachError, fraction_for_budget, keys_for_budget

CONTEXTS = decoding.packed_contexts()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return decoding.make_run(tmp_path_factory.mktemp("decode") / "run", decoding.config())


@pytest.mark.parametrize(
    "policy",
    [Nats(), Nats(-1.0), FullAttention(), SlidingWindow(3), StreamingLLM(1, 2), RandomKeys(0.3)],
    ids=lambda policy: f"{policy.method}-{policy.setting}",
)
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_the_buffer_gives_what_the_mask_gives(run, policy, chunk):
    """Packed documents, padding, one token at a time and several."""
    slices = {"even": (CONTEXTS["loss_weight"] > 0) & (CONTEXTS["targets"] % 2 == 0)}
    masked = measure(run, CONTEXTS, policy, slices=slices)
    decoded = measure_decoding(run, CONTEXTS, policy, chunk=chunk, slices=slices)
    assert np.array_equal(decoded.slices.tokens, masked.slices.tokens)
    assert decoded.slices.nll == pytest.approx(masked.slices.nll, rel=1e-3)
    assert abs(decoded.perplexity / masked.perplexity - 1) < 1e-4
    assert np.array_equal(decoded.documents.tokens, masked.documents.tokens)
    assert np.array_equal(decoded.documents.correct, masked.documents.correct)
    assert np.array_equal(decoded.live_pairs, masked.live_pairs)
    assert np.array_equal(decoded.live_max, masked.live_max)
    assert (decoded.causal_pairs, decoded.num_queries) == (masked.causal_pairs, masked.num_queries)
    assert np.all(decoded.allocated >= decoded.live_max.max(axis=1) - chunk)


@pytest.mark.parametrize("layers", [[None], [None, 6], [3, 0, None]])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_numbers_for_a_budget_are_by_hand(chunk, layers):
    lengths = np.array([3, 40, 17])
    positions = np.concatenate([np.arange(length) for length in lengths])
    begin, causal = positions // chunk * chunk, np.sum(positions + 1)

    def fraction(number):
        total = 0
        for own in layers:
            for query, first in zip(positions, begin, strict=True):
                held = [s for s in range(query + 1) if own is None or query - s <= own]
                total += min(number, sum(s < first for s in held)) + sum(s >= first for s in held)
        return total / len(layers) / causal

    for budget in (0.3, 0.5, 0.9):
        if not fraction(0) <= budget <= fraction(40):
            with pytest.raises(OutOfReachError):
                keys_for_budget(lengths, budget, chunk, layers)
        else:
            number = keys_for_budget(lengths, budget, chunk, layers)
            assert abs(fraction(number) - budget) <= min(abs(fraction(n) - budget) for n in range(41)) + 1e-12


def test_a_share_for_a_budget():
    lengths = np.full(50, 200)
    share, window = fraction_for_budget(lengths, 0.3, 8)
    assert window == 8
    policy, positions = RandomKeys(share, window, 1), np.arange(200, dtype=np.int32)[None]
    ends = np.minimum(np.asarray(policy.key_end(positions, 64))[0], 200)
    assert abs(np.sum(ends - positions) / 64 / (200 * 201 / 2) - 0.3) < 0.02
    assert fraction_for_budget(lengths, 0.02, 8) == (pytest.approx(0.02 - 0.0198, abs=1e-3), 0)
    with pytest.raises(OutOfReachError, match=r"^the first keys and each query's own key take more$"):
        fraction_for_budget(lengths, 0.001, 8)


def test_an_evaluation_through_the_buffer(tmp_path):
    """The same table as with masks, and the policies that have none."""
    config = tiny.config(nats={"kv_budget": 0.6})
    loaded = tiny.make_run(tmp_path / "run", config)
    masked = evaluate.run(tmp_path, loaded=loaded, budgets=[0.6, 0.8], progress=False)
    decoded = evaluate.run(tmp_path, loaded=loaded, budgets=[0.6, 0.8], progress=False, mode="decode", chunk=4)
    rows = {(row["method"], str(row["setting"])): row for row in decoded.rows}
    fixed = {"h2o", "snapkv", "tova", "knorm", "keydiff"}  # of every head
    assert {"random", "ada_snapkv", *fixed} <= {row["method"] for row in decoded.rows}
    for row in decoded.rows:  # no rival holds more than it says
        numbers = row["setting"]
        if row["method"] in fixed:
            assert row["kv_live_max"] <= numbers["keys"] + numbers.get("continued", 1)
        if row["method"] in fixed | {"ada_snapkv"}:
            assert row["kv_fraction"] == pytest.approx(row["budget"], abs=0.1)
    for row in masked.rows:
        other = rows[row["method"], str(row["setting"])]
        assert abs(other["perplexity"] - row["perplexity"]) < 1e-3
        assert other["kv_fraction"] == pytest.approx(row["kv_fraction"], abs=1e-6)
        assert other["by_position"]["tokens"] == row["by_position"]["tokens"]
        for mine, theirs in zip(row["by_position"]["perplexity"], other["by_position"]["perplexity"], strict=True):
            assert mine == theirs is None or mine == pytest.approx(theirs, rel=1e-4)
        assert row["kv_allocated"] is None
        assert other["kv_allocated"] >= 1
    assert "| slots |" in decoded.summary()
    assert "| slots |" not in masked.summary()
    assert "--mode=decode --chunk=4" in decoded.run_info["command"]
    with pytest.raises(UserError, match="--chunk=0"):
        evaluate.run(tmp_path, loaded=loaded, progress=False, chunk=0)
