"""Budgets, windows and role biases: exact where counting is possible, close and frugal where it is a search."""

import itertools
import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.errors import UserError
from natsjax.kv_fraction import (
    all_sliding_kv_fraction,
    all_sliding_model_kv_fraction,
    least_kv_fraction,
    least_model_kv_fraction,
    live_fraction,
    window_fraction,
    window_pairs,
)
from natsjax.policies.budgets import (
    about_global_tokens,
    check_budgets,
    check_role_budgets,
    dense_budgets,
    nats_budgets,
    wanted_budgets,
)
from natsjax.policies.interval import RANDOM_DRAWS
from natsjax.policies.numbers import (
    Calibration,
    OutOfReachError,
    fraction_for_budget,
    interval_fractions,
    keys_for_budget,
    window_for_budget,
)
from natsjax.policies.registry import POLICIES
from natsjax.policies.role_bias import role_bias_for_budget

pieces = st.lists(st.integers(1, 15), min_size=1, max_size=6).map(np.array)


def counted_fraction(lengths, num_sinks, window):
    read = sum(
        position < num_sinks or query - position <= window
        for length in lengths
        for query in range(length)
        for position in range(query + 1)
    )
    return read / sum(length * (length + 1) / 2 for length in lengths)


@settings(max_examples=60, deadline=None)
@given(pieces, st.integers(0, 17))
def test_interval_fractions_are_counted_pairs(lengths, num_sinks):
    fractions = interval_fractions(lengths, num_sinks)
    expected = [counted_fraction(lengths, num_sinks, window) for window in range(max(lengths))]
    np.testing.assert_allclose(fractions, expected)
    assert fractions[-1] == 1


@settings(max_examples=60, deadline=None)
@given(
    pieces,
    st.integers(0, 5),
    st.lists(st.none() | st.integers(0, 12) | st.tuples(*[st.integers(0, 12)] * 2), min_size=1, max_size=3),
)
def test_a_layers_own_window_limits_what_the_policy_leaves(lengths, num_sinks, layers):
    def reads(query, position, window, own):
        left = position < num_sinks or query - position <= window
        return left and (own is None or query - position <= own)

    expected = [
        np.mean(
            [
                sum(reads(q, p, window, own) for length in lengths for q in range(length) for p in range(q + 1))
                for of_layer in layers
                for own in (of_layer if isinstance(of_layer, tuple) else (of_layer, of_layer))  # two heads
            ]
        )
        for window in range(max(lengths))
    ]
    causal = sum(length * (length + 1) / 2 for length in lengths)
    np.testing.assert_allclose(interval_fractions(lengths, num_sinks, layers), np.array(expected) / causal)


COUNTED = [entry for entry in POLICIES.values() if entry.for_budget is not None and entry.name != "selective"]


@pytest.mark.parametrize("entry", COUNTED, ids=lambda entry: entry.name)
def test_a_budget_that_the_layers_own_windows_rule_out_has_no_numbers(entry):
    """And the reason is the right one of two."""
    calibration = Calibration(tiny.config(), np.array([30, 30]), [None, 2], chunk=8)
    most = interval_fractions(calibration.piece_lengths, 0, calibration.layers)[-1]
    assert 0.5 < most < 0.6
    entry.numbers_for(calibration, 0.5)
    with pytest.raises(OutOfReachError, match=r"^the windows of the model's own layers leave less$"):
        entry.numbers_for(calibration, 0.6)
    with pytest.raises(OutOfReachError, match=r" takes? more$"):
        entry.numbers_for(calibration, 0.01)


def test_keys_are_counted_for_heads_of_different_windows():
    lengths, layers = np.array([19, 30, 4]), [None, (2, 11)]
    causal = np.sum(lengths * (lengths + 1) // 2)

    def read(query, number, chunk, own):  # keys of the chunk, and kept ones of the tokens before that the window holds
        begin = query // chunk * chunk
        return min(query - begin, own) + 1 + min(number, begin, max(own - (query - begin), 0))

    for chunk in (1, 4):
        fractions = [
            np.mean([sum(read(q, n, chunk, own) for m in lengths for q in range(m)) for own in (30, 30, 2, 11)])
            / causal
            for n in range(31)
        ]
        for budget in (0.35, 0.5, 0.62):
            if fractions[0] <= budget:
                found = keys_for_budget(lengths, budget, chunk, layers)
                assert abs(fractions[found] - budget) == pytest.approx(np.abs(np.array(fractions) - budget).min())


def test_random_keys_are_counted_for_heads_of_different_windows():
    lengths, layers = np.array([19, 30, 4]), [None, (2, 11)]
    draws = np.random.default_rng(0).integers(0, RANDOM_DRAWS, (2, 30))
    fraction, window = fraction_for_budget(lengths, 0.5, 1, layers, draws)
    read = sum(
        p == 0 or draws[head, p] < fraction * RANDOM_DRAWS or q - p <= window
        for m in lengths
        for head, own in ((0, 30), (1, 30), (0, 2), (1, 11))
        for q in range(m)
        for p in range(q + 1)
        if q - p <= own
    )
    assert read / 4 / np.sum(lengths * (lengths + 1) // 2) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(pieces, st.floats(0.01, 1), st.integers(0, 4))
def test_the_window_for_a_budget_is_the_closest(lengths, budget, num_sinks):
    fractions = [counted_fraction(lengths, num_sinks, window) for window in range(max(lengths))]
    if fractions[0] > budget:
        with pytest.raises(OutOfReachError, match=f"{num_sinks} sinks and each" if num_sinks else "^each query's own"):
            window_for_budget(lengths, budget, num_sinks=num_sinks)
    else:
        window = window_for_budget(lengths, budget, num_sinks=num_sinks)
        distances = [abs(fraction - budget) for fraction in fractions]
        assert distances[window] == pytest.approx(min(distances))


@given(pieces)
def test_one_sink_and_the_window_are_what_all_tokens_sliding_cost(lengths):
    for window, fraction in enumerate(interval_fractions(lengths, num_sinks=1)):
        assert all_sliding_kv_fraction(lengths, window) == pytest.approx(fraction)


def pairs_of_roles(roles, window):
    """By the definition of a lifetime: 0 GLOBAL, 1 LOCAL, 2 SLIDING."""
    length = len(roles)
    next_global = [next((u for u in range(s + 1, length) if roles[u] == 0), length - 1) for s in range(length)]
    ends = [(length, next_global[s] + 1, s + window + 1)[role] for s, role in enumerate(roles)]
    return sum(min(end, length) - s for s, end in enumerate(ends))


@pytest.mark.parametrize("window", [0, 1, 2, 4, 9])
def test_no_roles_keep_less_than_the_least(window):
    for length in range(1, 8):
        every = itertools.product((0, 1, 2), repeat=length - 1)
        fewest = min(pairs_of_roles((0, *others), window) for others in every)
        assert least_kv_fraction([length], window) == pytest.approx(fewest / (length * (length + 1) / 2))


@pytest.mark.parametrize("window", [0, 1, 5, 16, 64, 400])
def test_the_least_looks_at_every_distance_that_could_pay(window):
    """Long documents, where only some distances to the next GLOBAL token are tried: against all of them."""
    length = 250
    behind = np.cumsum(np.minimum(np.arange(length + 1), window + 1))
    least = [0]
    for m in range(1, length + 1):
        least.append(m + min([behind[m - 1], *(behind[d] - 1 + least[m - d] for d in range(1, m))]))
    for m in (1, 2, 30, 100, 249, 250):
        assert least_kv_fraction([m], window) == pytest.approx(least[m] / (m * (m + 1) / 2))
    lengths = [250, 3, 250, 77]
    expected = sum(least[m] for m in lengths) / sum(m * (m + 1) / 2 for m in lengths)
    assert least_kv_fraction(lengths, window) == pytest.approx(expected)


def test_the_figures_of_the_method():
    every_16th = [0 if s % 16 == 0 else 1 for s in range(256)]
    assert round(100 * pairs_of_roles(every_16th, 64) / (256 * 257 / 2), 1) == 13.1
    figures = {(1024, 16): (3.5, 3.4), (256, 16): (13.5, 11.5), (256, 64): (44.8, 12.5)}
    for (length, window), expected in figures.items():
        found = all_sliding_kv_fraction([length], window), least_kv_fraction([length], window)
        assert tuple(round(100 * fraction, 1) for fraction in found) == expected


def test_layers_without_roles_add_what_they_read():
    config = tiny.config(
        model={"layer_types": "nats,sliding,dense", "num_layers": 3, "sliding_window": 3}, nats={"window": 8}
    )
    lengths, sliding = [24, 24], window_fraction([24], 3)
    for of_model, of_layer in (
        (all_sliding_model_kv_fraction, all_sliding_kv_fraction),
        (least_model_kv_fraction, least_kv_fraction),
    ):
        assert of_model(config, lengths) == pytest.approx((of_layer(lengths, 8) + sliding + 1) / 3)
    assert live_fraction(config) == config.nats.kv_budget
    fixed = tiny.config(model={"layer_types": "sliding,dense", "sliding_window": 3})
    assert live_fraction(fixed) == pytest.approx((sliding + 1) / 2)
    assert window_pairs([24], 3) == 1 + 2 + 3 + 21 * 4


class Counted:
    """A fraction function that counts its calls."""

    def __init__(self, function):
        self.function, self.role_biases = function, []

    def __call__(self, role_bias):
        self.role_biases.append(role_bias)
        return self.function(role_bias)


def sigmoid(role_bias):
    return 0.03 + 0.97 / (1 + math.exp(-(role_bias - 1)))


def steps(role_bias):
    return 0.05 if role_bias < -0.37 else 0.2 if role_bias < 0.5 else 0.7


def valley(role_bias):
    """Without GLOBAL tokens nothing ends the LOCAL keys: the fraction rises again on the left."""
    return 0.1 + 0.9 * math.tanh(abs(role_bias + 1) / 3)


@pytest.mark.parametrize("function", [sigmoid, valley], ids=["monotone", "valley"])
@pytest.mark.parametrize("budget", [0.15, 0.3, 0.6, 0.9])
def test_a_smooth_fraction_is_met_within_a_hundredth(function, budget):
    fraction_at = Counted(function)
    found = role_bias_for_budget(fraction_at, budget)
    assert found.kv_fraction == function(found.role_bias) == pytest.approx(budget, rel=0.01)
    assert len(fraction_at.role_biases) <= 10
    assert round(found.role_bias, 3) == pytest.approx(found.role_bias, abs=1e-9)


@pytest.mark.parametrize(
    ("function", "budget", "best"),
    [
        (steps, 0.06, 0.05),
        (steps, 0.15, 0.2),
        (steps, 0.5, 0.7),
        (steps, 0.99, 0.7),
        (steps, 0.01, 0.05),
        (valley, 0.04, 0.1),
        (lambda role_bias: 0.4, 0.1, 0.4),
    ],
)
def test_what_cannot_be_met_ends_with_the_closest_that_was_seen(function, budget, best):
    fraction_at, seen = Counted(function), {}
    found = role_bias_for_budget(fraction_at, budget, seen)
    assert len(fraction_at.role_biases) <= 20
    assert len(set(fraction_at.role_biases)) == len(fraction_at.role_biases)
    assert abs(found.kv_fraction - budget) == min(abs(fraction - budget) for fraction in seen.values())
    assert found.kv_fraction == pytest.approx(best, abs=0.01)


def test_budgets_share_what_was_seen():
    fraction_at, seen = Counted(sigmoid), {}
    budgets = nats_budgets(0.15, smallest=0.04)
    found = [role_bias_for_budget(fraction_at, budget, seen) for budget in budgets]
    assert len(fraction_at.role_biases) == len(set(fraction_at.role_biases)) == len(seen) <= 16
    assert [match.role_bias for match in found] == sorted(match.role_bias for match in found)


@pytest.mark.parametrize(
    ("kv_budget", "smallest"), [(0.15, 0.04), (0.15, 0.14), (1.0, 0.1), (0.6, 0.3), (0.1, 0.046), (0.15, 0.2)]
)
def test_six_budgets_around_the_trained_one(kv_budget, smallest):
    budgets = nats_budgets(kv_budget, smallest)
    assert len(budgets) >= 6
    assert budgets == sorted(set(budgets))
    assert kv_budget in budgets
    assert all(smallest <= budget <= 1 for budget in budgets if budget != kv_budget)


def test_dense_budgets_are_those_that_a_window_can_meet():
    assert dense_budgets(0.01) == [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    assert min(dense_budgets(0.12)) == 0.15


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_a_budget_is_a_fraction(budget):
    with pytest.raises(UserError, match=rf"KV budget = {budget:g}: it is no fraction of the KV; choose one above 0"):
        check_budgets([0.2, budget], 0.1, "with a window of 4")


def test_a_budget_below_the_least_names_the_least_rounded_up():
    with pytest.raises(
        UserError, match=r"^budget = 0\.05: with window 4, no KV fraction is below 0\.1001; choose that"
    ):
        check_budgets([0.05, 0.2], 0.10001, "with window 4", "budget")
    assert check_budgets([0.3, 0.2, 0.3], 0.1, "") == [0.2, 0.3]


def test_budgets_below_what_sliding_tokens_cost_are_allowed_and_reported():
    """Window 64 in 256 tokens: SLIDING tokens keep 44.8 %, and GLOBAL ones with LOCAL ones between them much less."""
    config, lengths = tiny.config(nats={"window": 64, "kv_budget": 0.2}), np.array([256])
    assert check_role_budgets(config, [0.5, 0.13], lengths) == [0.13, 0.5]
    assert about_global_tokens(config, [0.5], lengths) is None
    note = about_global_tokens(config, [0.5, 0.2, 0.13], lengths)
    assert note.startswith("KV budget 20 %, 13 %: with every token SLIDING the KV fraction is 44.84 %; below that")
    with pytest.raises(
        UserError, match=r"^nats\.kv_budget = 0\.12: with nats\.window = 64 .*no KV fraction is below 0\.1246"
    ):
        check_role_budgets(config, [0.12], lengths, "nats.kv_budget")
    assert wanted_budgets(config, None, lengths) == [0.14, 0.16, 0.2, 0.25, 0.32, 0.4]
    # A range begins at what SLIDING tokens cost, unless the run itself was trained below that.
    assert min(wanted_budgets(tiny.config(nats={"window": 64, "kv_budget": 0.5}), None, lengths)) == 0.45
    dense = tiny.config(model={"layer_types": "dense"})
    assert about_global_tokens(dense, [0.01], lengths) is None
