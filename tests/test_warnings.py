"""Warnings begin when something holds for a while, name where, and end once."""

import numpy as np
import pytest
import tiny

from natsjax.train.logs.monitor import numbers
from natsjax.train.logs.warnings import NUM_POINTS, WARNINGS, ActiveWarnings, places


def line(config, **changes):
    changes = {"kv_fraction": config.nats.kv_budget, "kv_penalty": 0.1} | changes
    return numbers(tiny.step_metrics(config, **{name: np.float32(x) for name, x in changes.items()}))


def changes_of(active, lines, first=1):
    """``(step, name, began)`` of all changes."""
    changes = [change for step, values in enumerate(lines, first) for change in active.update(step, values)]
    return [(change.step, change.name, change.began) for change in changes]


def roles(config, where, shares):
    found = tiny.step_metrics(config)["role_fractions"].copy()
    found[where] = shares
    return found


def test_a_healthy_run_has_no_warnings():
    config = tiny.config()
    active = ActiveWarnings(config)
    assert changes_of(active, [line(config)] * config.train.num_steps) == []
    assert active.names == []


def test_a_warning_begins_once_and_ends_once():
    config = tiny.config()
    active = ActiveWarnings(config)
    good, bad = line(config), line(config, role_fractions=roles(config, (1, 0), (0.1, 0.0, 0.9)))  # 0.1 are forced
    assert changes_of(active, [bad] * 6) == [(3, "all-one-role", True), (3, "no-global", True)]
    assert active.names == ["all-one-role", "no-global"]
    assert changes_of(active, [good, good, bad, good, good], first=7) == []
    assert active.names == ["all-one-role", "no-global"]
    assert changes_of(active, [good] * 3, first=12) == [(12, "all-one-role", False), (12, "no-global", False)]
    assert active.names == []


def test_what_comes_and_goes_is_not_changes_of():
    config = tiny.config()
    good, bad = line(config), line(config, role_fractions=roles(config, (1, 0), (0.1, 0.0, 0.9)))
    elsewhere = line(config, role_fractions=roles(config, (0, 1), (0.1, 0.0, 0.9)))
    assert changes_of(ActiveWarnings(config), [bad, bad, good] * 3) == []
    assert changes_of(ActiveWarnings(config), [bad, elsewhere] * 5) == []  # another head each time


def test_with_several_windows_a_head_may_live_in_windows_and_not_all_of_them():
    config = tiny.config(nats={"windows": (2, 4), "initial_roles": ()})
    windows_alone = np.tile([0.1, 0.0, 0.5, 0.4], (config.model.num_layers, config.model.num_kv_heads, 1))
    windows_alone[1, 0] = [0.3, 0.1, 0.3, 0.3]  # this one has GLOBAL tokens
    some = [line(config, role_fractions=windows_alone)] * NUM_POINTS
    assert changes_of(ActiveWarnings(config), some) == []
    windows_alone[1, 0] = [0.1, 0.1, 0.4, 0.4]  # 0.1 are forced
    every = [line(config, role_fractions=windows_alone)] * NUM_POINTS
    assert [name for _, name, _ in changes_of(ActiveWarnings(config), every)] == ["no-global"]


@pytest.mark.parametrize(
    ("shares", "names"),
    [
        ((1.0, 0.0, 0.0), ["all-one-role"]),
        ((0.1, 0.9, 0.0), ["all-one-role", "no-global"]),
        ((0.1, 0.5, 0.4), ["no-global"]),
        ((0.11, 0.49, 0.4), []),
        ((0.12, 0.0, 0.88), []),
    ],
)
def test_roles_of_a_head(shares, names):
    config = tiny.config()
    active = ActiveWarnings(config)
    lines = [line(config, role_fractions=roles(config, (0, 1), shares))] * NUM_POINTS
    changes = [change for step, values in enumerate(lines, 1) for change in active.update(step, values)]
    assert [change.name for change in changes] == names
    for change in changes:
        assert "in layer 0 head 1." in change.text
        assert WARNINGS[change.name].advice in change.text


def test_endless_locals():
    config = tiny.config()
    unended = np.array([[0.4, 0.6], [0.0, 0.9]])
    active = ActiveWarnings(config)
    assert changes_of(active, [line(config, unended_locals=unended)] * 4) == [(3, "endless-local", True)]
    none = roles(config, ..., (0.5, 0.0, 0.5))
    assert changes_of(ActiveWarnings(config), [line(config, unended_locals=unended, role_fractions=none)] * 4) == []


def test_layers_without_roles_are_not_looked_at():
    """A dense layer is all GLOBAL, a sliding one all SLIDING; that is how they are."""
    config = tiny.config(model={"layer_types": "nats,sliding"})
    fractions = roles(config, 1, (0.0, 0.0, 1.0))
    assert changes_of(ActiveWarnings(config), [line(config, role_fractions=fractions, forced_globals=0)] * 4) == []
    dense = tiny.config(model={"layer_types": "dense"})
    fractions = roles(dense, ..., (1.0, 0.0, 0.0))
    assert changes_of(ActiveWarnings(dense), [line(dense, role_fractions=fractions, kv_fraction=1.0)] * 12) == []


def test_the_budget():
    config = tiny.config(train={"num_steps": 100})
    off = line(config, kv_fraction=0.5)
    assert changes_of(ActiveWarnings(config), [off] * 90) == []
    assert changes_of(ActiveWarnings(config), [off] * 100) == [(93, "budget-not-reached", True)]
    near = line(config, kv_fraction=0.43)
    assert changes_of(ActiveWarnings(config), [near] * 100) == []
    apart = [line(config, kv_fraction=0.3), line(config, kv_fraction=0.4), line(config, kv_fraction=0.5)]
    assert changes_of(ActiveWarnings(config), apart * 33) == []  # on average it is reached
    fixed = tiny.config(train={"num_steps": 100}, nats={"kv_penalty_mode": "fixed"})
    assert changes_of(ActiveWarnings(fixed), [line(fixed, kv_fraction=0.9)] * 100) == []


def test_a_model_that_wants_less_than_its_budget_is_no_fault():
    config = tiny.config(train={"num_steps": 100})
    least = config.nats.min_kv_penalty
    assert changes_of(ActiveWarnings(config), [line(config, kv_fraction=0.2, kv_penalty=least)] * 100) == []
    above = [line(config, kv_fraction=0.2, kv_penalty=2 * least)] * 100
    assert changes_of(ActiveWarnings(config), above) == [(93, "budget-not-reached", True)]
    more = [line(config, kv_fraction=0.6, kv_penalty=least)] * 100
    assert changes_of(ActiveWarnings(config), more) == [(93, "budget-not-reached", True)]


def test_the_penalty_at_its_upper_bound():
    penalty = 10.0
    config = tiny.config(train={"num_steps": 100}, nats={"budget_ramp_start": 4, "budget_ramp_steps": 6})
    active = ActiveWarnings(config)
    stuck = line(config, kv_penalty=penalty, kv_fraction=0.8)
    assert changes_of(active, [stuck] * 10) == []  # the budget is on its way down
    assert changes_of(active, [stuck] * 2, first=11) == []
    changes = active.update(13, stuck)
    assert [change.name for change in changes] == ["budget-not-reached", "penalty-at-bound"]
    assert "nats.max_kv_penalty = 10" in changes[1].text
    reached = line(config, kv_penalty=penalty)
    assert changes_of(active, [reached] * 9, first=14) == [(18, "budget-not-reached", False)]  # the mean lags
    assert active.names == ["penalty-at-bound"]


def test_skipped_spikes():
    config = tiny.config(model={"layer_types": "dense"})
    active = ActiveWarnings(config)
    counts = [0, 0, 2, 3, 3, 3, 3, 3]  # two between the logged steps
    lines = [line(config, skipped_steps=count) for count in counts]
    assert changes_of(active, lines) == [(3, "loss-spike-skipped", True), (7, "loss-spike-skipped", False)]
    assert changes_of(ActiveWarnings(config), [line(config, skipped_steps=5)] * 3) == []  # resumed: an old one
    now = line(config, skipped_steps=5, skipped=1)
    assert changes_of(ActiveWarnings(config), [now]) == [(1, "loss-spike-skipped", True)]


def test_places():
    held = np.zeros((6, 3), bool)
    held[[0, 1, 2, 5]] = [True, False, True]
    held[4] = True
    assert places(held) == "layers 0-2+5 heads 0+2, layer 4"
    assert places(np.ones((2, 2), bool)) == "all layers and heads"


def test_a_sliding_role_among_several_is_named_after_its_window():
    config = tiny.config(nats={"windows": (1, 4), "initial_roles": ()})
    fractions = np.tile([0.1, 0.3, 0.3, 0.3], (config.model.num_layers, config.model.num_kv_heads, 1))
    fractions[0, 1] = [0.1, 0.0, 0.0, 0.9]
    active = ActiveWarnings(config)
    lines = [line(config, role_fractions=fractions)] * NUM_POINTS
    texts = [change.text for step, values in enumerate(lines, 1) for change in active.update(step, values)]
    assert any("all SLIDING 4 in layer 0 head 1" in text for text in texts)
