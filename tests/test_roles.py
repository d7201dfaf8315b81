"""Roles, lifetimes, the KV penalty and its controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import Shape, document_ends, role_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax import kv_fraction
from natsjax.config import NatsConfig
from natsjax.model.inputs import Batch
from natsjax.model.roles import (
    TokenRoles,
    choose_roles,
    lifetime_sum,
    lifetimes,
    role_bias_logits,
    scorer_bias,
    straight_through,
)
from natsjax.train import budget_controller
from pallas_kernels.nats_attention import GLOBAL, key_end_from_roles, reference

SHAPE = Shape(b=3, length=23, k=2, g=1, h=4, window=(1, 5))


def positions_of(document_end):
    """Distance to the start of each document, from exclusive ends ``[b, s]``."""
    positions = np.zeros_like(document_end)
    for row, ends in zip(positions, document_end, strict=True):
        for s in range(1, len(ends)):
            row[s] = row[s - 1] + 1 if ends[s] == ends[s - 1] and ends[s] else 0
    return positions


def lifetimes_of(ids, one_hot, end, kv_penalty_gradient):
    key_end = key_end_from_roles(jnp.asarray(ids), window=SHAPE.window, document_end=end)
    return lifetime_sum(TokenRoles(jnp.asarray(ids), one_hot, key_end), end, SHAPE.window, kv_penalty_gradient)


@pytest.mark.parametrize("documents", ["packed", "padding"])
@pytest.mark.parametrize("pattern", ["random", "no_global", "bursts", "all_local"])
def test_the_penalty_is_the_relaxed_masks_sum_with_its_gradient(pattern, documents):
    rng = np.random.default_rng(0)
    ids, end = role_ids(pattern, SHAPE, rng), document_ends(documents, SHAPE, rng)
    with jax.enable_x64(True):
        roles = jax.nn.one_hot(ids, SHAPE.num_roles, dtype=jnp.float64)
        weight = jnp.asarray(rng.normal(size=SHAPE.k))

        def relaxed(roles):
            mask = reference.relaxed_mask(roles, window=SHAPE.window, document_end=end)
            return jnp.sum(jnp.sum(mask, axis=(0, 2, 3)) * weight)

        def exact(roles):
            return jnp.sum(lifetimes_of(ids, roles, end, "exact") * weight)

        np.testing.assert_allclose(exact(roles), relaxed(roles), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(exact)(roles), jax.grad(relaxed)(roles), atol=1e-5)


def test_constant_penalty_gradient_is_the_lifetime_that_each_role_would_have_here():
    rng = np.random.default_rng(1)
    ids, end = role_ids("random", SHAPE, rng), document_ends("packed", SHAPE, rng)
    gradient = jax.grad(lambda roles: lifetimes_of(ids, roles, end, "constant").sum())(
        jax.nn.one_hot(ids, SHAPE.num_roles)
    )
    for role in range(SHAPE.num_roles):
        for b, k, s in np.ndindex(ids.shape):
            changed = ids.copy()
            changed[b, k, s] = role
            key_end = key_end_from_roles(jnp.asarray(changed), window=SHAPE.window, document_end=end)
            assert gradient[b, k, s, role] == lifetimes(key_end, end)[b, k, s]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 8), st.integers(0, 2**31))
def test_smallest_fraction_is_what_sliding_everything_costs(length, window, seed):
    shape = Shape(2, length, 1, 1, 4, window)
    end = document_ends("padding", shape, np.random.default_rng(seed)) if length > 1 else np.ones((2, 1), np.int32)
    positions = positions_of(end)
    ids = np.where((positions == 0)[:, None], GLOBAL, 2)
    key_end = key_end_from_roles(jnp.asarray(ids), window=window, document_end=end)
    lifetime = np.asarray(lifetimes(key_end, jnp.asarray(end)))
    pairs = float(Batch(None, jnp.asarray(positions), jnp.asarray(end)).causal_pairs)
    starts = (positions == 0) & (end > 0)
    lengths = end[starts] - np.nonzero(starts)[1]
    assert pairs == sum(n * (n + 1) / 2 for n in lengths)
    np.testing.assert_allclose(kv_fraction.all_sliding_kv_fraction(lengths, window), lifetime.sum() / pairs, rtol=1e-6)


def test_roles_are_exactly_one_hot_with_the_softmaxs_gradient():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (2, 3, 11, 3)) * 5
    first = jnp.zeros((2, 11), bool).at[:, [0, 4]].set(True)
    ids = choose_roles(logits, first)
    weight = jax.random.normal(key, logits.shape)

    def through(logits):
        return straight_through(logits, ids, first, 0.5)

    roles = through(logits)
    np.testing.assert_array_equal(roles, jax.nn.one_hot(ids, 3))
    assert (ids[:, :, [0, 4]] == GLOBAL).all()
    gradient = jax.grad(lambda x: jnp.sum(through(x) * weight))(logits)
    expected = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x / 0.5) * weight))(logits)
    np.testing.assert_allclose(gradient, jnp.where(first[:, None, :, None], 0, expected), rtol=1e-6)
    assert (gradient[:, :, 4] == 0).all()


@pytest.mark.parametrize("fractions", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.1, 0.2)])
def test_the_scorers_start_draws_the_stated_fractions(fractions):
    noise = jax.random.gumbel(jax.random.key(1), (1, 1, 100_000, 3))
    ids = choose_roles(scorer_bias(fractions) + noise, jnp.zeros((1, 100_000), bool))
    np.testing.assert_allclose(np.bincount(np.asarray(ids).ravel(), minlength=3) / ids.size, fractions, atol=0.01)


def drawn_kv_fraction(lengths, window, fractions, draws=300):
    """By drawing roles, from the lifetimes that attention reads."""
    length = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    document_end = np.repeat(np.cumsum(lengths), lengths)[None].repeat(draws, 0)
    ids = np.random.default_rng(0).choice(len(fractions), (draws, 1, length), p=fractions)
    ids[:, :, starts] = 0
    key_end = key_end_from_roles(jnp.asarray(ids), window=window, document_end=jnp.asarray(document_end))
    pairs = np.asarray(lifetimes(key_end, jnp.asarray(document_end))).sum(-1).mean()
    return pairs / sum(n * (n + 1) / 2 for n in lengths)


@pytest.mark.parametrize("lengths", [[200], [150, 1, 30, 200]])
@pytest.mark.parametrize(
    "fractions", [(0.03, 0.05, 0.92), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.1, 0.1, 0.6, 0.2)]
)
def test_the_kv_fraction_of_random_roles_is_what_drawing_gives(lengths, fractions):
    found = kv_fraction.random_kv_fraction(lengths, (6, 20)[: len(fractions) - 2], fractions)
    assert found == pytest.approx(drawn_kv_fraction(lengths, (6, 20), fractions), rel=0.02)


def test_roles_begin_halfway_to_the_budget():
    for budget, window, length in ((0.15, 4, 256), (0.07, 16, 1024), (0.4, 16, 4096), (0.7, 2, 64)):
        nats = {"kv_budget": budget, "window": window, "initial_roles": ()}
        config = tiny.config(nats=nats, data={"context_length": length})
        fractions = kv_fraction.roles_at_start(config)
        assert sum(fractions) == pytest.approx(1)
        assert fractions[0] == fractions[1]
        found = kv_fraction.random_kv_fraction([length], (window,), fractions)
        sliding = kv_fraction.all_sliding_kv_fraction([length], window)
        assert found == pytest.approx((budget + sliding) / 2, rel=1e-3)
    # The window alone costs more than that: nearly all SLIDING, and something of the others to learn from.
    nats = {"kv_budget": 0.02, "window": 16, "initial_roles": ()}
    config = tiny.config(nats=nats, data={"context_length": 512})
    assert kv_fraction.roles_at_start(config)[0] == pytest.approx(kv_fraction.FEWEST, rel=1e-3)
    # Dense layers cost what they cost: the rest is for those with roles.
    nats = {"kv_budget": 0.6, "window": 16, "initial_roles": ()}
    mixed = tiny.config(nats=nats, model={"layer_types": "nats,dense"}, data={"context_length": 1024})
    alone = tiny.config(nats=nats | {"kv_budget": 0.2}, data={"context_length": 1024})
    np.testing.assert_allclose(kv_fraction.roles_at_start(mixed), kv_fraction.roles_at_start(alone), rtol=1e-6)
    # Under a ramp the first budget is 1.
    ramp = tiny.config(nats=nats | {"budget_ramp_steps": 10})
    assert kv_fraction.roles_at_start(ramp) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # A window as wide as the budget leaves nothing to begin halfway to.
    wide = tiny.config(nats=nats | {"kv_budget": 0.9, "window": 700}, data={"context_length": 1024})
    assert kv_fraction.roles_at_start(wide)[0] == kv_fraction.FEWEST
    # Of several windows nearly all have the longest that fits the budget; there are as many of each other role.
    for budget, base in ((0.3, 1), (0.08, 0), (0.5, 2), (1.0, 2)):
        nats = {"windows": (4, 16, 64), "initial_roles": (), "kv_budget": budget}
        ladder = tiny.config(nats=nats, data={"context_length": 256})
        fractions = kv_fraction.roles_at_start(ladder)
        assert np.argmax(fractions) == 2 + base
        others = np.delete(fractions, 2 + base)
        assert np.all(others == others[0])
        assert sum(fractions) == pytest.approx(1)
        found = kv_fraction.random_kv_fraction([256], (4, 16, 64), fractions)
        alone = kv_fraction.all_sliding_kv_fraction([256], (4, 16, 64)[base])
        assert found <= budget
        assert others[0] == pytest.approx(0.2) or found == pytest.approx((budget + alone) / 2, rel=0.05)
    # Under a ramp, which begins at 1, still the window that fits the budget at its end.
    nats = {"windows": (4, 16, 64), "initial_roles": (), "kv_budget": 0.05, "budget_ramp_steps": 10}
    ramped = kv_fraction.roles_at_start(tiny.config(nats=nats, data={"context_length": 256}))
    assert ramped == pytest.approx([0.2] * 5)
    given = tiny.config(nats={"initial_roles": (0.5, 0.25, 0.25)})
    assert kv_fraction.roles_at_start(given) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("roles", "role_bias", "expected"),
    [
        ("by_sign", 2.0, [2, 0, 0]),
        ("by_sign", -2.0, [-2, -2, 0]),
        ("global", 2.0, [2, 0, 0]),
        ("global", -2.0, [-2, 0, 0]),
        ("global_local", 2.0, [2, 2, 0]),
        ("global_local", -2.0, [-2, -2, 0]),
    ],
)
def test_role_bias(roles, role_bias, expected):
    np.testing.assert_array_equal(jax.jit(role_bias_logits, static_argnums=1)(role_bias, roles), expected)


def test_with_several_windows_the_role_bias_grows_with_the_lifetime():
    bias = np.asarray(role_bias_logits(2.0, "global_local", (3, 15, 10**9), 255))
    # Logarithms of 4, 16 and 256 tokens, the last of which is the whole context.
    np.testing.assert_allclose(bias, [2, 2, 0, 2 * (4 - 2) / (8 - 2), 2], rtol=1e-6)


def controlled_for(steps, fraction_of_penalty, config):
    state = budget_controller.start_controller(config)
    history = []
    step = jax.jit(lambda state, f, n: budget_controller.update_controller(state, f, n, config, steps))
    for n in range(steps):
        penalty = float(budget_controller.kv_penalty(state))
        history.append(penalty)
        state = step(state, jnp.float32(fraction_of_penalty(penalty)), jnp.int32(n))
    return state, history


def test_a_controlled_penalty_settles_where_the_budget_is_met():
    config = NatsConfig(kv_budget=0.2, kv_penalty=0.01, budget_ramp_steps=50)
    state, _ = controlled_for(1000, lambda penalty: 1 / (1 + penalty), config)
    assert abs(float(state.average) - 0.2) < 0.01
    config = NatsConfig(kv_budget=0.2, kv_penalty_gain=0.0)  # the integral alone
    changes = np.abs(np.diff(np.log(controlled_for(300, lambda penalty: 1 / (1 + penalty), config)[1])))
    assert changes.max() <= budget_controller.integral_rate(config, 300) * (1 + 1e-5)


@pytest.mark.parametrize(("num_steps", "rate"), [(100, 0.1), (600, 0.1), (1200, 0.05), (3000, 0.02), (100_000, 0.02)])
def test_the_integral_is_faster_in_short_runs(num_steps, rate):
    assert budget_controller.integral_rate(NatsConfig(), num_steps) == pytest.approx(rate)
    assert budget_controller.integral_rate(NatsConfig(kv_penalty_lr=0.3), num_steps) == 0.3
    # A model that learns to want more: what holds the budget becomes 100 times as much in the run.
    state = {"log_fraction": math.log(0.15), "step": 0}
    found = []

    def fraction(penalty):
        state["step"] += 1
        held = 0.03 * 100 ** (state["step"] / num_steps)
        state["log_fraction"] += 0.02 * np.clip(np.log(held / penalty), -1, 1)
        found.append(math.exp(min(state["log_fraction"], 0)))
        return found[-1]

    controlled_for(num_steps, fraction, NatsConfig(kv_budget=0.15, kv_penalty=0.03))
    if 600 <= num_steps < 10_000:  # others are too short to say, and too long to wait for
        assert np.abs(np.log(np.array(found[-num_steps // 10 :]) / 0.15)).max() < 0.1


def slow_model(penalty, state):
    """A KV fraction that drifts with the penalty's distance from what holds it: an oscillator, if only integrated."""
    state["log_fraction"] += 0.02 * np.clip(np.log(0.3 / penalty), -1, 1)
    return math.exp(min(state["log_fraction"], 0))


@pytest.mark.parametrize("start", [0.03, 0.3, 1.0])
def test_the_proportional_part_damps_what_the_integral_makes_swing(start):
    """Roles answer to the KV penalty with their rate of change, which makes an integral controller overshoot."""
    off = {}
    for gain in (0.0, 4.0):
        config = NatsConfig(kv_budget=0.15, kv_penalty_gain=gain, kv_penalty=0.1)
        state = {"log_fraction": math.log(start)}
        found = []

        def fraction(penalty, state=state, found=found):
            found.append(slow_model(penalty, state))
            return found[-1]

        controlled_for(500, fraction, config)
        off[gain] = np.abs(np.log(np.array(found[-50:]) / 0.15)).max()
    assert off[4.0] < 0.12 < off[0.0]


def test_a_resumed_controller_goes_on_as_it_would_have():
    """Its error of the step before is not stored: it follows from the average."""
    config = NatsConfig(kv_budget=0.2, kv_penalty=0.01, budget_ramp_steps=50, min_kv_penalty=1e-9, max_kv_penalty=1e9)
    fractions = np.random.default_rng(0).uniform(0.1, 0.6, 80)
    state = budget_controller.start_controller(config)
    errors, integral = [0.0], math.log(0.01)
    average = float(budget_controller.budget_at(jnp.int32(0), config))
    for step, fraction in enumerate(fractions):
        state = budget_controller.update_controller(state, jnp.float32(fraction), jnp.int32(step), config, 80)
        average = 0.9 * average + 0.1 * fraction
        errors.append(np.clip(math.log(average / float(budget_controller.budget_at(jnp.int32(step), config))), -1, 1))
        integral += 0.1 * errors[-1]  # of a run as short as this
        expected = integral + config.kv_penalty_gain * errors[-1]  # as long as no bound is met
        assert float(state.log_kv_penalty) == pytest.approx(expected, abs=1e-4)


def test_a_controlled_penalty_stays_within_its_bounds():
    config = NatsConfig(kv_budget=0.1, max_kv_penalty=0.5)
    assert max(controlled_for(300, lambda penalty: 1.0, config)[1]) <= 0.5 * (1 + 1e-6)
    config = NatsConfig(kv_budget=0.5, min_kv_penalty=0.05, kv_penalty=0.1)
    assert min(controlled_for(300, lambda penalty: 0.1, config)[1]) >= 0.05 * (1 - 1e-6)


def test_a_fixed_penalty_stays_fixed_also_at_zero():
    for penalty in (0.0, 0.7):
        config = NatsConfig(kv_penalty_mode="fixed", kv_penalty=penalty)
        np.testing.assert_allclose(controlled_for(20, lambda penalty: 1.0, config)[1], penalty, rtol=1e-6)
