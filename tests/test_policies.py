"""Policies say who reads which key: compared with their definitions pair by pair, on packed and padded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.config import Config, NatsConfig, TrainConfig
from natsjax.model.inputs import Batch
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.key_score import KeyDiff, KeyNorm
from natsjax.policies.nats import Nats, SampledNats

LENGTH = 12
CONFIG = Config()


def packed(rows):
    """``Batch [b, LENGTH]`` of documents of the given lengths, row by row, padded behind them."""
    positions, ends = np.zeros((2, len(rows), LENGTH), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            positions[row, at : at + length] = np.arange(length)
            ends[row, at : at + length] = at + length
            at += length
    return Batch(jnp.zeros_like(positions), jnp.asarray(positions), jnp.asarray(ends))


@st.composite
def batches(draw):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, LENGTH), max_size=4))
        while sum(lengths) > LENGTH:
            lengths.pop()
        rows.append(lengths)
    return packed(rows)


def visible(inputs, key_end):
    """bool ``[b, t, s]``; ``key_end`` counts from the start of the document."""
    index = np.arange(LENGTH)
    end = np.asarray(key_end, np.int64)[:, 0] + index - np.asarray(inputs.positions)
    end = np.minimum(end, np.asarray(inputs.document_end))[:, None]
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < end)


def expected(inputs, is_read):
    """The same from the definition: ``is_read(distance, position of the key)``, within documents."""
    result = np.zeros((len(inputs.positions), LENGTH, LENGTH), bool)
    for b, (positions, ends) in enumerate(zip(*map(np.asarray, inputs[1:3]), strict=True)):
        for s in range(LENGTH):
            for t in range(s, int(ends[s])):
                result[b, t, s] = is_read(t - s, positions[s])
    return result


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, LENGTH + 2), st.integers(0, LENGTH + 2))
def test_interval_policies_are_their_definitions(inputs, window, num_sinks):
    cases = [
        (FullAttention(), lambda distance, position: True),
        (SlidingWindow(window), lambda distance, position: distance <= window),
        (StreamingLLM(num_sinks, window), lambda distance, position: distance <= window or position < num_sinks),
    ]
    for policy, is_read in cases:
        choice = policy.choice(inputs.positions, CONFIG)
        assert choice.noise_key is None
        assert choice.bias is None
        assert choice.key_end.dtype == jnp.int32
        seen = visible(inputs, choice.key_end)
        np.testing.assert_array_equal(seen, expected(inputs, is_read), err_msg=str(policy))
        # Every query sees its own key, and padding sees nothing.
        np.testing.assert_array_equal(seen.diagonal(axis1=1, axis2=2), np.asarray(inputs.document_end) > 0)


@pytest.mark.parametrize(
    ("roles", "bias"), [("by_sign", [0.5, 0, 0]), ("global", [0.5, 0, 0]), ("global_local", [0.5, 0.5, 0])]
)
def test_the_role_bias_touches_the_roles_that_the_config_names(roles, bias):
    choice = Nats(0.5).choice(packed([[3]]).positions, Config(nats=NatsConfig(biased_roles=roles)))
    np.testing.assert_array_equal(choice.bias, bias)
    assert choice.key_end is None
    assert choice.noise_key is None


def test_sampled_roles_have_noise_and_no_bias():
    inputs = packed([[3]])
    keys = [jax.random.key_data(SampledNats(seed).choice(inputs.positions, CONFIG).noise_key) for seed in (1, 1, 2)]
    assert (keys[0] == keys[1]).all()
    assert (keys[0] != keys[2]).any()
    assert SampledNats().choice(inputs.positions, CONFIG).bias is None


def test_sampled_roles_have_the_noise_of_the_step_that_made_the_checkpoint():
    config = Config(nats=NatsConfig(noise=0.8, final_noise=0.2), train=TrainConfig(num_steps=101))
    steps = {0: 0.8, 1: 0.8, 21: 0.8, 46: 0.5, 71: 0.2, 101: 0.2, 5000: 0.2}  # linear from 20 % to 70 %
    positions = packed([[3]]).positions
    for step, scale in steps.items():
        assert float(SampledNats(1, step).choice(positions, config).noise) == pytest.approx(scale, rel=1e-5)
    assert float(SampledNats().choice(positions, config).noise) == pytest.approx(0.2, rel=1e-5)  # a finished run


@pytest.mark.parametrize(
    "policies",
    [
        [Nats(role_bias) for role_bias in (0.0, 1.5, -2.0)],
        [FullAttention(), SlidingWindow(0), SlidingWindow(5), StreamingLLM(2, 1), StreamingLLM(0, 9)],
    ],
)
def test_one_compilation_serves_every_setting(policies):
    inputs, traces = packed([[5, 4]]), []

    @jax.jit
    def consume(choice):
        traces.append(choice)
        return choice

    for policy in policies:
        consume(policy.choice(inputs.positions, CONFIG))
    assert len(traces) == 1


def test_settings_are_what_a_report_shows():
    assert FullAttention().setting == {}
    assert Nats(-0.25).setting == {"role_bias": -0.25}
    assert SlidingWindow(3).setting == {"window": 3}
    assert StreamingLLM(4, 3).setting == {"sinks": 4, "window": 3}
    assert SampledNats(3).setting == {"seed": 3}


CHOICE = jax.jit(lambda policy, positions: policy.choice(positions, CONFIG).key_end)
SCORES = jax.jit(lambda policy, *arrays: policy.scores(*arrays))
HUGE = (2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**40, 2**64)


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "make", [SlidingWindow, lambda n: StreamingLLM(0, n), lambda n: StreamingLLM(n, 0), lambda n: RandomKeys(0.0, n)]
)
def test_numbers_beyond_every_sequence_keep_everything(make, number):
    """Traced or not, nothing wraps; reports get the number that was given."""
    inputs, policy = packed([[7, 5], [12], [3]]), make(number)
    everything = visible(inputs, FullAttention().choice(inputs.positions, CONFIG).key_end)
    for key_end in (policy.choice(inputs.positions, CONFIG).key_end, CHOICE(policy, inputs.positions)):
        np.testing.assert_array_equal(visible(inputs, key_end), everything)
        assert np.asarray(key_end).min() > LENGTH
    assert number in policy.setting.values()


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "make",
    [lambda n: H2O(n, n // 2), lambda n: H2O(n, n), lambda n: SnapKV(n + 1, n), lambda n: AdaSnapKV(n + 1, n)],
)
def test_observing_policies_with_huge_numbers_order_what_there_is(make, number):
    policy = make(number)
    arrays = jnp.arange(5, dtype=jnp.int32)[None, None], jnp.full((1, 1, 5), 2**31 - 1), jnp.ones((1, 1, 5))
    at = jnp.full((1, 1, 1), 5)
    for first, second in (policy.scores(*arrays, at), SCORES(policy, *arrays, at)):
        assert np.all(np.asarray(first) == np.inf)  # all are recent
        assert np.array_equal(second, arrays[0])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(-1), "0 or more"),
        (lambda: StreamingLLM(-1, 2), "0 or more"),
        (lambda: StreamingLLM(1, -2), "0 or more"),
        (lambda: SlidingWindow(2.5), "window=2.5: a whole number"),
        (lambda: SlidingWindow(NAN), "window=nan: a whole number"),
        (lambda: SlidingWindow(True), "window=True: a whole number"),
        (lambda: StreamingLLM(INF, 3), "num_sinks=inf: a whole number"),
        (lambda: H2O(NAN, 1), "num_keys=nan: a whole number"),
        (lambda: H2O(4, NAN), "num_recent=nan: a whole number"),
        (lambda: H2O(4, 5), "num_recent=5: it must be between 0 and num_keys=4"),
        (lambda: SnapKV(NAN, 2), "num_keys=nan: a whole number"),
        (lambda: SnapKV(8, 8), "num_keys=8: it must be 9 or more"),
        (lambda: AdaSnapKV(8, 8), "num_keys=8: it must be 9 or more"),
        (lambda: AdaSnapKV(8, 4, 1.5), "safeguard=1.5: it must be between 0 and 1"),
        (lambda: AdaSnapKV(8, 4, NAN), "safeguard=nan: it must be between 0 and 1"),
        (lambda: TOVA(0), "num_keys=0: it must be 1 or more"),
        (lambda: KeyNorm(NAN), "num_keys=nan: a whole number"),
        (lambda: KeyDiff(0), "num_keys=0: it must be 1 or more"),
        (lambda: RandomKeys(NAN), "fraction=nan: it must be between 0 and 1"),
        (lambda: RandomKeys(INF), "fraction=inf"),
        (lambda: RandomKeys(0.5, NAN), "window=nan"),
        (lambda: RandomKeys(0.5, 0, -1), "seed=-1: it must be 0 or more"),
        (lambda: RandomKeys(0.5, 0, 2**32), "seed=4294967296: it must be less than"),
        (lambda: SampledNats(0, -1), "step=-1: it must be 0 or more"),
        (lambda: SampledNats(2**40), "seed=1099511627776: it must be less than"),
        (lambda: Nats(NAN), "role_bias=nan: a finite number"),
        (lambda: Nats(-INF), "role_bias=-inf: a finite number"),
    ],
)
def test_what_is_no_number_of_a_policy_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_seeds_up_to_the_largest_draw_differently():
    positions = jnp.arange(200)[None]
    ends = [np.asarray(RandomKeys(0.5, 0, seed).key_end(positions, 2)) for seed in (0, 2**31, 2**32 - 1)]
    assert not np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[1], ends[2])
    traced = jax.jit(lambda policy: policy.key_end(positions, 2))(RandomKeys(0.5, 0, 2**32 - 1))
    assert np.array_equal(traced, ends[2])
