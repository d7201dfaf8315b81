"""Update rules, schedules, averages: against optax's own on plain matrices, on eight devices, through a resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from planned import check_total, here, plan_and_program
from processes import SLOW, json_lines

from natsjax import train
from natsjax.config import Config, OptimizerConfig
from natsjax.data import RecallTask
from natsjax.errors import UserError
from natsjax.model.transformer import model_structure
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.load import load
from natsjax.train.optimizer import learning_rate, optimizer
from natsjax.train.step import Trainer, running_average

NAMES = ("adamw", "muon", "lion", "adafactor", "schedule_free")


def fields(name, **changes):
    """Optimizer fields with everything that goes with the rule."""
    common = {"name": name, "peak_learning_rate": 3e-3, "embedding_weight_decay": 0.05, "scorer_learning_rate": 1e-3}
    own = {"schedule": "constant"} if name == "schedule_free" else {"ema_decay": 0.9, "momentum_dtype": "bfloat16"}
    return common | own | ({"adamw_learning_rate": 2e-3} if name == "muon" else {}) | changes


# --- the rules ---


@pytest.fixture(scope="module")
def problem():
    """The tiny model's parameters with gradients of three steps, float32."""
    config = tiny.config()
    model = model_structure(config, tiny.VOCAB_SIZE)
    rng = np.random.default_rng(0)

    def normal():
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), model.parameters)

    return model, normal(), [normal() for _ in range(3)]


def updates_of(transform, parameters, gradients):
    state, found = transform.init(parameters), []
    for gradient in gradients:
        update, state = transform.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, update)
        found.append(update)
    return found


def plain(name, **changes):
    """The rule alone: a constant rate, no clipping, no decay."""
    own = {"peak_learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    return OptimizerConfig(name=name, clip_by_global_norm=0.0, **(own | changes))


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("adamw", optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0)),
        ("lion", optax.lion(0.1, b1=0.9, b2=0.95, weight_decay=0)),
        ("schedule_free", optax.contrib.schedule_free_adamw(0.1, b1=0.9, b2=0.95)),
    ],
)
def test_a_rule_is_optax_own(problem, name, oracle):
    model, parameters, gradients = problem
    found = updates_of(optimizer(plain(name), 10, model), parameters, gradients)
    for ours, theirs in zip(found, updates_of(oracle, parameters, gradients), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), ours, theirs)


# Axes of each layer's matrix that the inputs have; the rest of its axes are those of the outputs.
MATRICES = {
    ("attention", "query"): 1,
    ("attention", "key"): 1,
    ("attention", "value"): 1,
    ("attention", "output"): 3,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 1,
}


def layer_matrices(tree, module, name, layer):
    x = tree["blocks"][module][name][layer]
    return x.reshape(int(np.prod(x.shape[: MATRICES[module, name]])), -1)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("muon", optax.contrib.muon(0.1, beta=0.95, consistent_rms=0.2)),
        (
            "adafactor",
            optax.chain(
                optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=None, eps=1e-16),
                optax.ema(0.9),
                optax.scale(0.1),
            ),
        ),
    ],
)
def test_a_rule_for_matrices_sees_each_layer_as_one(problem, name, oracle):
    """The update of each layer's matrix is that of a two-dimensional parameter by itself."""
    model, parameters, gradients = problem
    found = updates_of(optimizer(plain(name), 10, model), parameters, gradients)
    # clip_by_block_rms of Adafactor looks at all layers at once, so it is compared up to a factor.
    for module, matrix in MATRICES:
        for layer in range(2):
            one = layer_matrices(parameters, module, matrix, layer)
            own = [layer_matrices(gradient, module, matrix, layer) for gradient in gradients]
            theirs = updates_of(oracle, {"w": one}, [{"w": gradient} for gradient in own])[0]["w"]
            ours = layer_matrices(found[0], module, matrix, layer)
            if name == "adafactor":
                ours, theirs = ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


def test_muon_leaves_everything_else_to_adamw(problem):
    model, parameters, gradients = problem
    found = updates_of(optimizer(plain("muon"), 10, model), parameters, gradients)
    adamw = updates_of(optimizer(plain("adamw"), 10, model), parameters, gradients)
    for ours, theirs in zip(found, adamw, strict=True):
        for update, other, part in zip(*map(jax.tree.leaves, (ours, theirs, model.parts)), strict=True):
            assert (part in ("attention", "mlp")) != np.allclose(update, other, rtol=1e-5, atol=1e-8)


def test_adafactor_factors_the_second_moment_of_large_matrices():
    config = tiny.config(model={"embed_dim": 128, "mlp_dim": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64})
    model = model_structure(config, 256)
    state = jax.eval_shape(optimizer(plain("adafactor", beta1=0.0), 10, model).init, model.parameters)
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert numbers < 0.05 * sum(x.size for x in jax.tree.leaves(model.parameters))


def test_embeddings_decay_by_a_rate_of_their_own(problem):
    model, parameters, _ = problem
    zero = jax.tree.map(jnp.zeros_like, parameters)
    (update,) = updates_of(optimizer(plain("adamw", embedding_weight_decay=0.5), 10, model), parameters, [zero])
    np.testing.assert_allclose(update["embedding"], -0.1 * 0.5 * parameters["embedding"], rtol=1e-6)
    assert not np.any(update["final_norm"]["scale"])
    assert not np.any(update["blocks"]["mlp"]["up"])
    model = model_structure(tiny.config(model={"token_shift": True}), tiny.VOCAB_SIZE)
    parameters = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.parameters)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    (update,) = updates_of(optimizer(plain("adamw", embedding_weight_decay=0.5), 10, model), parameters, [zero])
    assert np.any(update["embedding"])
    assert not np.any(update["shift"])  # a scale, which stands beside the embedding


def test_muons_other_parameters_may_have_a_rate_of_their_own(problem):
    model, parameters, gradients = problem
    changes = {"adamw_learning_rate": 0.02, "scorer_learning_rate": 0.3}
    (found,) = updates_of(optimizer(plain("muon", **changes), 10, model), parameters, gradients[:1])
    (same,) = updates_of(optimizer(plain("muon"), 10, model), parameters, gradients[:1])
    for update, other, part in zip(*map(jax.tree.leaves, (found, same, model.parts)), strict=True):
        factor = {"scorer": 3.0, "attention": 1.0, "mlp": 1.0}.get(part, 0.2)
        np.testing.assert_allclose(update, factor * other, rtol=1e-5)


# --- schedules ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("inverse_sqrt", {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ("wsd", {0: 0.0, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("cosine", {0: 0.0, 10: 1.0, 55: 0.55, 100: 0.1}),
    ],
)
def test_a_schedule_has_its_values(schedule, expected):
    config = OptimizerConfig(
        schedule=schedule, peak_learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10, decay_fraction=0.2
    )
    rate = learning_rate(config, 100)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "constant", "inverse_sqrt", "wsd", "cosine"])
def test_a_schedule_without_warm_up_begins_at_the_peak(schedule):
    config = OptimizerConfig(schedule=schedule, peak_learning_rate=1.0, final_learning_rate=0.1, warmup_steps=0)
    np.testing.assert_allclose(learning_rate(config, 100)(0), 1.0, rtol=1e-6)


# --- averages ---


def test_the_running_average_is_that_of_its_definition():
    average, expected = jnp.float32(1.0), 1.0
    for step, value in enumerate([2.0, 4.0, 8.0, 16.0]):
        average = running_average(average, jnp.float32(value), jnp.int32(step), 0.3)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(average, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_the_average_is_what_a_run_serves_evaluates_and_begins_others_from(tmp_path, name):
    config = tiny.config(optimizer=fields(name), train={"num_steps": 4}, eval={"budgets": (0.5,)})
    evaluation = train.run(config, tmp_path / "run")
    run = load(tmp_path / "run")
    trainer = Trainer(run.config, tiny.VOCAB_SIZE)
    state = Checkpoints(tmp_path / "run/checkpoints", read_only=True).restore(trainer.abstract_state())
    served = trainer.served_parameters(state)
    jax.tree.map(np.testing.assert_array_equal, run.parameters, served)
    assert not np.allclose(run.parameters["embedding"], state.parameters["embedding"])
    again = train.run(config, tmp_path / "run")  # everything is trained: evaluates what is stored
    assert [row["perplexity"] for row in again.rows] == [row["perplexity"] for row in evaluation.rows]
    begun = tiny.config(
        optimizer=fields(
            "adamw",
            ema_decay=0.0,
            momentum_dtype="float32",
            peak_learning_rate=0.0,
            final_learning_rate=0.0,
            scorer_learning_rate=0.0,
        ),
        train={"init_from": str(tmp_path / "run"), "num_steps": 2},
    )
    train.run(begun, tmp_path / "begun")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "begun").parameters, run.parameters)


# --- training, resuming, meshes, plans ---


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_for_bit_that_of_an_uninterrupted_one(tmp_path, name):
    config = tiny.config(optimizer=fields(name, spike_threshold=8.0), train={"num_steps": 6})
    task = RecallTask(config.data.context_length, 2, 5, 5, 5)
    trainer = Trainer(config, task.vocab_size)
    trainer.compile()

    def steps(state, first, last):
        losses = []
        for step in range(first, last):
            state, metrics = trainer.step(state, task.rows(4 * step, 4))
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = steps(trainer.init(), 0, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, trainer.to_save(state))
    checkpoints.wait()
    whole, rest = steps(state, 3, 6)
    resumed, again = steps(checkpoints.restore(trainer.abstract_state()), 3, 6)
    checkpoints.close()
    assert rest == again
    assert rest[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


MESHES = """
import json, sys
import jax
from natsjax.config import Config
from natsjax.data import RecallTask
from natsjax.model import sharding
from natsjax.train.step import Trainer

configs, meshes = json.load(sys.stdin)
for values in configs:
    config = Config.from_dict(values)
    task = RecallTask(config.data.context_length, 2, 5, 5, 5)
    for sizes in meshes:
        mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
        one = Config.from_dict(values | {"mesh": mesh})
        count = 8 if sizes else 1
        trainer = Trainer(one, task.vocab_size, sharding.make_mesh(one.mesh, jax.devices()[:count]))
        state, losses = trainer.init(), []
        for step in range(one.train.num_steps):
            state, metrics = trainer.step(state, task.rows(8 * step, 8))
            losses.append(float(metrics["loss"]))
        average = trainer.served_parameters(state)
        losses.append(float(sum(abs(x).sum() for x in jax.tree.leaves(jax.device_get(average)))))
        print(json.dumps(losses), flush=True)
"""


@pytest.mark.larger
def test_every_rule_has_the_same_losses_on_any_mesh():
    configs = [
        tiny.config(
            model={"layer_types": "dense"},
            optimizer=fields(name, momentum_dtype="float32"),  # bfloat16 would round a difference up
            train={"num_steps": 8, "batch_size": 8},
        ).to_dict()
        for name in NAMES
    ]
    meshes = [{}, {"fsdp": 4, "tensor": 2}] + [{"data": 2, "fsdp": 2, "context": 2}] * SLOW
    found = iter(json_lines(MESHES, [configs, meshes], devices=8))
    for name in NAMES:
        alone, *others = (next(found) for _ in meshes)
        assert alone[-2] < alone[0], name
        for losses in others:
            np.testing.assert_allclose(losses, alone, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "of_matrix", "of_other", "changes"),
    [
        ("lion", 4, 4, {}),
        ("muon", 2, 6, {"momentum_dtype": "bfloat16"}),
        ("muon", 8, 12, {"ema_decay": 0.9}),
        ("schedule_free", 8, 8, {"schedule": "constant"}),
    ],
)
def test_a_plan_counts_what_a_rule_keeps_of_each_parameter(name, of_matrix, of_other, changes):
    config = tiny.config(optimizer={"name": name} | changes, model={"layer_types": "dense"})
    made, compiled = plan_and_program(config, here())
    check_total(made.memory, compiled)
    model = model_structure(config, tiny.VOCAB_SIZE)
    sizes = list(zip(jax.tree.leaves(model.parts), jax.tree.leaves(model.parameters), strict=True))
    matrices = sum(x.size for part, x in sizes if part in ("attention", "mlp"))
    expected = of_matrix * matrices + of_other * (made.num_parameters - matrices)
    assert expected <= made.memory.optimizer <= expected + 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "schedule_free"}, r'optimizer.schedule = "cosine": .*averages in the place of a decay'),
        ({"name": "schedule_free", "schedule": "constant", "beta1": 0.0}, r"optimizer.beta1 = 0: "),
        ({"name": "schedule_free", "schedule": "constant", "ema_decay": 0.9}, r"optimizer.ema_decay = 0.9: "),
        ({"name": "schedule_free", "schedule": "constant", "momentum_dtype": "bfloat16"}, r"momentum_dtype"),
        ({"adamw_learning_rate": 1e-3}, r'optimizer.adamw_learning_rate = 0.001: optimizer.name = "adamw"'),
        (
            {"name": "muon", "adamw_learning_rate": 1e-3, "peak_learning_rate": 0.0, "final_learning_rate": 0.0},
            r"its schedule is that of optimizer.peak_learning_rate, which is 0",
        ),
        ({"name": "adam"}, r"optimizer.name"),
    ],
)
def test_what_does_not_fit_a_rule_is_refused(changes, message):
    values = tiny.config().to_dict()
    values["optimizer"] |= changes
    with pytest.raises(UserError, match=message):
        Config.from_dict(values)
