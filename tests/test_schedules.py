"""What changes over a run: learning rates, temperature, budget; and updates that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from natsjax.config import NatsConfig, OptimizerConfig
from natsjax.errors import UserError
from natsjax.model import parameters
from natsjax.model.roles import TokenRoles, lifetime_sum, noise_at
from natsjax.runs.metrics import parts_of
from natsjax.train import budget_controller, loop, loss_spikes, optimizer
from natsjax.train.step import Trainer
from pallas_kernels.nats_attention import key_end_from_roles


@pytest.mark.parametrize(("warmup", "fraction", "steps"), [(10, 0.2, 100), (0, 0.5, 40), (5, 1.0, 50), (3, 0.0, 20)])
def test_wsd_warms_up_stays_and_decays(warmup, fraction, steps):
    config = OptimizerConfig(
        schedule="wsd", warmup_steps=warmup, decay_fraction=fraction, peak_learning_rate=1e-2, final_learning_rate=1e-4
    )
    rate = np.array([optimizer.learning_rate(config, steps)(step) for step in range(steps + 1)])
    decay = min(max(1, round(fraction * steps)), steps - warmup)
    expected = np.interp(
        np.arange(steps + 1), [0, warmup, steps - decay, steps], [1e-2 if warmup == 0 else 0, 1e-2, 1e-2, 1e-4]
    )
    np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-9)


def test_a_longer_wsd_run_goes_the_same_way_until_the_shorter_one_decays():
    config = OptimizerConfig(schedule="wsd", warmup_steps=5)
    short, long = (optimizer.learning_rate(config, steps) for steps in (100, 1000))
    assert all(float(short(step)) == float(long(step)) for step in range(80))
    assert float(short(90)) < float(long(90))


def test_the_scorer_has_a_learning_rate_of_its_own():
    batch = tiny.packed_batch(batch=4)
    moved = {}
    for rate in (0.0, 1e-3, 1e-1):
        config = tiny.config(optimizer={"scorer_learning_rate": rate, "warmup_steps": 0, "peak_learning_rate": 1e-2})
        trainer = Trainer(config, tiny.VOCAB_SIZE)
        _, metrics = trainer.step(trainer.init(), batch)
        moved[rate] = {part: float(norm) for part, norm in parts_of(metrics, "update_norm").items()}
    assert moved[1e-3]["scorer"] == pytest.approx(moved[0.0]["scorer"] / 10, rel=1e-4)
    assert moved[1e-1]["scorer"] == pytest.approx(moved[0.0]["scorer"] * 10, rel=1e-4)
    for rate in (1e-3, 1e-1):
        assert moved[rate] | {"scorer": 0} == pytest.approx(moved[0.0] | {"scorer": 0}, rel=1e-5)


def test_a_longer_run_says_every_schedule_that_jumps(capfd):
    def of(steps, **nats):
        return tiny.config(
            nats={"temperature": 2.0, "final_temperature": 0.5, "budget_ramp_steps": 8} | nats,
            optimizer={"scorer_learning_rate": 1e-1},
            train={"num_steps": steps},
        )

    loop._say_new_schedule(of(101), of(51), 50)
    now = 1e-3 + 9e-3 * (1 + np.cos(np.pi * 48 / 99)) / 2  # peak 1e-2, end 1e-3, 2 steps of warm-up
    ends = "now ends at step 101 instead of 51: at step 50 it goes from"
    assert capfd.readouterr().err.splitlines() == [
        f"the learning rate's schedule {ends} {1e-3 + 9e-3 * (1 + np.cos(np.pi * 48 / 49)) / 2:.3g} to {now:.3g}",
        f"the scorer learning rate's schedule {ends} 0.0101 to {10 * now:.3g}",
        f"the temperature's schedule {ends} 0.5 to 1",
    ]
    for earlier in (None, of(101)):
        loop._say_new_schedule(of(101), earlier, 50)
    loop._say_new_schedule(of(101, final_temperature=0.0), of(51, final_temperature=0.0), 50)
    assert "temperature" not in capfd.readouterr().err


def test_temperature_goes_a_geometric_way_and_reaches_the_roles_gradient():
    config = NatsConfig(temperature=2.0, final_temperature=0.5)
    found = [float(budget_controller.temperature_at(jnp.int32(step), config, 11)) for step in range(13)]
    np.testing.assert_allclose(found[:11], np.geomspace(2, 0.5, 11), rtol=1e-5)
    assert found[12] == pytest.approx(0.5)
    assert float(budget_controller.temperature_at(jnp.int32(7), NatsConfig(temperature=1.5), 11)) == 1.5
    norms = []
    for nats in ({"temperature": 4.0}, {"temperature": 1.0, "final_temperature": 4.0}):
        trainer = Trainer(tiny.config(nats=nats, train={"num_steps": 11}), tiny.VOCAB_SIZE)
        state = trainer.init()
        state = state._replace(step=state.step + 10)  # the last
        norms.append(float(trainer.step(state, tiny.packed_batch(batch=4))[1]["gradient_norm/scorer"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_noise_falls_to_its_last_value_and_reaches_the_roles():
    config = NatsConfig(noise=1.0, final_noise=0.0, noise_decay_fraction=0.5, noise_end=0.9)
    found = np.array([noise_at(jnp.int32(step), config, 101) for step in range(101)])
    np.testing.assert_allclose(found[:41], 1)
    np.testing.assert_allclose(found[40:91], np.linspace(1, 0, 51), atol=1e-6)
    np.testing.assert_allclose(found[90:], 0, atol=1e-6)
    sudden = NatsConfig(final_noise=0.5, noise_decay_fraction=0.0, noise_end=0.9)
    assert [float(noise_at(jnp.int32(step), sudden, 101)) for step in (89, 92)] == [1.0, 0.5]
    # Without noise the roles of a step are those of the largest logit.
    nats = {"initial_roles": (0.2, 0.3, 0.5), "final_noise": 0.0}
    trainer = Trainer(tiny.config(nats=nats, train={"num_steps": 11}), tiny.VOCAB_SIZE)
    for step, sliding in ((0, 0.5), (10, 1.0)):
        state = trainer.init()
        state = state._replace(step=state.step + step)
        metrics = trainer.step(state, tiny.packed_batch(batch=4))[1]
        expected = sliding * (1 - float(metrics["forced_globals"]))
        found = float(metrics["role_fractions"][..., 2].mean())
        assert found == pytest.approx(expected, abs=0.15 if step == 0 else 1e-6)


@pytest.mark.parametrize(("path", "middle"), [("linear", 0.55), ("geometric", 0.1**0.5), ("cosine", 0.55)])
def test_budgets_fall_from_one_after_the_start(path, middle):
    def budgets(**fields):
        config = NatsConfig(kv_budget=0.1, budget_ramp=path, **fields)
        return np.array([budget_controller.budget_at(jnp.int32(step), config) for step in range(100)])

    found = budgets(budget_ramp_start=20, budget_ramp_steps=40)
    np.testing.assert_allclose(found[:20], 1)
    assert found[39] == pytest.approx(middle, rel=1e-5)
    np.testing.assert_allclose(found[59:], 0.1, rtol=1e-5)
    assert np.all(np.diff(found[19:60]) < 0)
    found = budgets(budget_ramp_steps=10)  # from the first step on
    assert found[0] < 1
    assert found[0] == pytest.approx({"linear": 0.91, "geometric": 0.1**0.1}.get(path, found[0]), rel=1e-5)
    np.testing.assert_allclose(found[9:], 0.1, rtol=1e-5)
    np.testing.assert_allclose(budgets(budget_ramp_steps=0), 0.1, rtol=1e-5)


def test_skipped_steps_in_a_ramp_lose_nothing_of_the_proportional_part():
    """The penalty's changes add up to the gain times the change of the error, whatever steps are skipped."""
    config = NatsConfig(
        kv_budget=0.3,
        budget_ramp_start=3,
        budget_ramp_steps=20,
        kv_penalty_lr=1e-12,
        kv_penalty_gain=2.0,
        kv_penalty=0.1,
    )
    state, average = budget_controller.start_controller(config), 1.0
    fractions = 0.3 + 0.7 * np.exp(-np.arange(15) / 9)
    for step, fraction in enumerate(fractions):
        if step in (5, 8, 9, 14):
            state = budget_controller.update_after_skip(state, jnp.int32(step), config)
        else:
            state = budget_controller.update_controller(state, jnp.float32(fraction), jnp.int32(step), config, 15)
            average = 0.9 * average + 0.1 * fraction
        budget = 1 - 0.7 * np.clip((step + 1 - 3) / 20, 0, 1)
        assert float(state.average) == pytest.approx(average, rel=1e-5)
        assert float(state.log_kv_penalty) == pytest.approx(np.log(0.1) + 2 * np.log(average / budget), abs=1e-5)
    still = budget_controller.update_after_skip(state, jnp.int32(40), config)  # behind the ramp nothing moves
    np.testing.assert_array_equal(still, state)


def test_a_skipped_step_of_a_run_moves_the_penalty_with_the_budget_alone():
    nats = {"budget_ramp_steps": 10, "kv_penalty_gain": 4.0, "kv_penalty": 0.1, "kv_budget": 0.4}
    trainer = Trainer(tiny.config(nats=nats, optimizer={"spike_threshold": 4.0}), tiny.VOCAB_SIZE)
    known = loss_spikes.SpikeDetector(*(jnp.float32(x) for x in (0.1, 0.0)), jnp.int32(100), jnp.int32(0))
    controller = budget_controller.Controller(jnp.log(0.1), jnp.float32(0.8))
    state = trainer.init()._replace(spikes=known, controller=controller, step=jnp.int32(4))
    after, metrics = trainer.step(state, tiny.packed_batch(batch=4))
    assert float(metrics["skipped"]) == 1
    assert float(after.controller.average) == pytest.approx(0.8)
    change = 4 * (np.log(0.8 / (1 - 0.6 * 0.5)) - np.log(0.8 / (1 - 0.6 * 0.4)))
    assert float(after.controller.log_kv_penalty) == pytest.approx(np.log(0.1) + change, rel=1e-5)


def test_a_spike_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    losses = 3 + 3 * np.exp(-np.arange(400) / 60) + 0.05 * rng.normal(size=400)
    losses[[200, 300]] += 1.0
    losses[10] += 5  # too early to say
    detector, found = loss_spikes.start_detector(), []
    for step, loss in enumerate(losses):
        is_spike, detector = loss_spikes.detect(detector, jnp.float32(loss), 6.0)
        found += [step] if is_spike else []
    assert found == [200, 300]
    assert int(detector.skipped) == 2


def test_a_loss_that_stays_high_is_accepted_in_the_end():
    detector = loss_spikes.start_detector()
    for step in range(300):
        is_spike, detector = loss_spikes.detect(detector, jnp.float32(2 + 0.01 * (step % 3) + (step >= 100)), 5.0)
    assert not is_spike
    assert 1 <= int(detector.skipped) <= 60


@pytest.mark.parametrize(("loss", "threshold"), [(np.nan, 3.0), (np.inf, 3.0), (1e9, 0.0)])
def test_what_is_not_finite_is_no_spike_and_threshold_0_finds_none(loss, threshold):
    detector = loss_spikes.start_detector()
    for _ in range(100):
        _, detector = loss_spikes.detect(detector, jnp.float32(2), threshold)
    assert not loss_spikes.detect(detector, jnp.float32(loss), threshold)[0]


def test_a_skipped_update_leaves_all_but_the_step_as_it_was():
    config = tiny.config(optimizer={"spike_threshold": 4.0})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    known = loss_spikes.SpikeDetector(*(jnp.float32(x) for x in (0.1, 0.0)), jnp.int32(100), jnp.int32(3))
    state = trainer.init()._replace(spikes=known)  # a loss of 0.1 would be usual
    before = jax.device_get(state)
    after, metrics = trainer.step(state, tiny.packed_batch(batch=4))
    assert (float(metrics["skipped"]), float(metrics["skipped_steps"]), float(metrics["update_norm"])) == (1, 4, 0)
    assert float(metrics["gradient_norm"]) > 0
    schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    states = [(x.parameters, x.optimizer, x.controller) for x in (before, jax.device_get(after))]
    clocks = []
    for old, new in zip(*(jax.tree.leaves(state, is_leaf=schedule) for state in states), strict=True):
        if schedule(old):
            clocks.append((int(old.count), int(new.count)))
        else:
            np.testing.assert_array_equal(old, new)
    assert clocks == [(0, 1)]  # the learning rate goes on with the steps
    assert int(after.step) == 1
    _, metrics = trainer.step(after._replace(spikes=loss_spikes.start_detector()), tiny.packed_batch(batch=4))
    assert (float(metrics["skipped"]), float(metrics["update_norm"]) > 0) == (0, True)


def test_every_parameter_has_its_part_and_norms_add_up():
    config = tiny.config(model={"tie_embeddings": False, "qkv_bias": True, "qk_norm": True})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    labels = trainer.model.parts
    blocks = labels["blocks"]
    assert set(jax.tree.leaves(labels)) == set(parameters.PARTS)
    assert (labels["embedding"], labels["unembedding"]) == ("embedding", "unembedding")
    assert blocks["attention"]["query_norm"]["scale"] == blocks["mlp_norm"]["scale"] == "norm"
    assert blocks["attention"]["query_bias"] == "attention"
    assert set(jax.tree.leaves(blocks["attention"]["scorer"])) == {"scorer"}
    _, metrics = trainer.step(trainer.init(), tiny.packed_batch(batch=4))
    for name in ("gradient_norm", "update_norm"):
        norms, total = parts_of(metrics, name), metrics[name]
        assert list(norms) == sorted(parameters.PARTS)
        assert np.sqrt(sum(float(x) ** 2 for x in norms.values())) == pytest.approx(float(total), rel=1e-5)


def test_a_window_without_end_costs_what_the_sequence_is_long():
    ids = jnp.array([[[0, 2, 1, 2, 2, 2]]])
    end = jnp.full((1, 6), 6, jnp.int32)
    for window in (6, 10**6, 2**31 - 1):
        roles = TokenRoles(ids, jax.nn.one_hot(ids, 3), key_end_from_roles(ids, window=window))
        gradient = jax.grad(lambda r, w=window: lifetime_sum(r, end, (w,), "constant").sum(), allow_int=True)(
            roles
        ).one_hot
        np.testing.assert_array_equal(gradient[0, 0, :, 2], [6, 5, 4, 3, 2, 1])


def test_a_scorer_rate_without_a_schedule_is_one_sentence():
    rates = {"peak_learning_rate": 0.0, "final_learning_rate": 0.0, "scorer_learning_rate": 1e-3}
    with pytest.raises(UserError, match=r"scorer_learning_rate = 0.001: its schedule is that of"):
        tiny.config(optimizer=rates)
