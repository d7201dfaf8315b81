"""A metric that is not finite is explained: the first of them, the likely cause, what to change."""

import jax
import numpy as np
import pytest
import tiny

from natsjax.data import RecallTask
from natsjax.model.parameters import PARTS
from natsjax.train.logs.nonfinite import FiniteCheck, NonFinite, Recent, explain
from natsjax.train.step import Trainer

NAN, INF = float("nan"), float("inf")
CALM = [Recent(3.0 - 0.01 * step, 1.0) for step in range(20)]
BASE = {
    "loss": 3.1,
    "cross_entropy": 3.0,
    "z_loss": 4.0,
    "accuracy": 0.1,
    "kv_fraction": 0.5,
    "kv_penalty": 0.2,
    "gradient_norm": 1.0,
    "update_norm": 0.1,
    "learning_rate": 1e-3,
    **{f"gradient_norm/{part}": 1.0 for part in PARTS},
    **{f"update_norm/{part}": 0.1 for part in PARTS},
}


def metrics(**changes):
    """Makes metrics of a step on the host."""
    return {name: np.float32(value) for name, value in (BASE | changes).items()}


def norms(kind, value, *parts):
    """Makes norms of parts of the model."""
    return {f"{kind}_norm/{part}": value for part in parts}


def found(recent=CALM, step=300, groups=None, **changes):
    return explain(step, metrics(**changes), recent, tiny.config(**(groups or {})))


def test_finite_numbers_are_no_case():
    assert found() is None
    assert found(loss=1e30, gradient_norm=1e30) is None


def test_what_was_first_and_where():
    assert found(loss=NAN, cross_entropy=NAN, gradient_norm=NAN, update_norm=NAN).what == (
        "the loss at step 300 is nan (cross-entropy nan, KV penalty 0.1)"
    )
    bad = {"gradient_norm": NAN, "update_norm": NAN}
    assert found(**bad, **norms("gradient", NAN, "scorer")).what == (
        "the loss at step 300 is 3.1, but its gradient is not finite, in scorer alone"
    )
    three = norms("gradient", INF, "scorer", "mlp", "norm")
    assert found(gradient_norm=INF, **three).what.endswith("is not finite, in scorer, mlp and norm alone")
    assert found(**bad, **norms("gradient", NAN, *PARTS)).what.endswith(", in all parts of the model")
    assert found(update_norm=INF, **norms("update", INF, "embedding")).what == (
        "loss and gradient at step 300 are finite (3.1, norm 1), but the update of the parameters is not, in embedding "
        "alone"
    )


@pytest.mark.parametrize(
    ("case", "cause", "advice"),
    [
        ({"kv_fraction": NAN}, "the batch holds no tokens at all", "natsjax.data.inspect"),
        ({"cross_entropy": 0, "accuracy": 0, "gradient_norm": NAN}, "loss_weight is 0 everywhere", "look at the batch"),
        (
            {"step": 1, "recent": [], "cross_entropy": NAN, "groups": {"train": {"init_from": "runs/a"}}},
            "train.init_from = 'runs/a'",
            "take another checkpoint",
        ),
        (
            {"loss": 3, "update_norm": INF, "step": 1, "recent": []},
            "the learning rate (0.001 here) is far too high",
            "lower optimizer.peak_learning_rate",
        ),
        ({"kv_penalty": INF}, "the KV penalty (inf) blew up beside a cross-entropy of 3", "nats.max_kv_penalty"),
        ({"cross_entropy": NAN, "kv_penalty": 100}, "the KV penalty (50) blew up", "nats.kv_penalty_lr"),
        ({"z_loss": INF, "groups": {"loss": {"z_loss": 1e-4}}}, "the z-loss (inf) blew up", "lower loss.z_loss"),
        (
            {"cross_entropy": NAN, "recent": [*CALM[:-4], *(Recent(3 + n, 1.0) for n in range(1, 5))]},
            "the cross-entropy had risen from 2.85 to 7 over the last 5 steps: the learning rate (0.001 here) is too",
            "in a new --workdir, lower optimizer.peak_learning_rate, lower optimizer.clip_by_global_norm or set",
        ),
        (
            {
                "cross_entropy": NAN,
                "recent": [*CALM, Recent(2.8, 40.0)],
                "groups": {"optimizer": {"clip_by_global_norm": 0.0}},
            },
            "the gradient's norm had grown to 40 where 1 was usual, and nothing clips it",
            "set optimizer.clip_by_global_norm = 1",
        ),
        ({"step": 1, "recent": [], "cross_entropy": NAN}, "the model as it is initialized", "look at model and nats"),
        (
            {"step": 2, "recent": CALM[:1], "cross_entropy": NAN, "groups": {"optimizer": {"warmup_steps": 0}}},
            "among the first steps, where the learning rate (0.001 here) has no warm-up",
            "raise optimizer.warmup_steps = 0",
        ),
        ({"loss": INF, "cross_entropy": INF}, "beyond what floating point holds", "model.final_logit_softcap"),
        ({"cross_entropy": NAN, "groups": {"model": {"dtype": "bfloat16"}}}, "are bfloat16", "model.dtype = float32"),
        ({"cross_entropy": NAN}, "nothing in the steps before announced it", "suspect the hardware"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else None,
)
def test_the_likely_cause_and_what_to_change(case, cause, advice):
    explanation = found(**({"loss": NAN} | case))
    assert cause in explanation.cause
    assert advice in explanation.advice
    for text in explanation:
        assert not text.endswith(".")
        assert "\n" not in text


def test_a_loss_that_falls_or_wavers_is_not_blamed():
    wavering = [Recent(3.0 + 0.1 * (step % 3), 1.0 + 0.5 * (step % 2)) for step in range(20)]
    for recent in (CALM, wavering):
        assert "nothing in the steps before" in found(recent=recent, loss=NAN, cross_entropy=NAN).cause


def test_the_sentences_name_the_checkpoint():
    explanation = NonFinite("the loss at step 8 is nan", "the learning rate is too high", "lower it")
    assert explanation.sentence(5) == (
        "the loss at step 8 is nan; training cannot continue, and the last good checkpoint is that of step 5. The "
        "likely cause: the learning rate is too high; what may help: lower it."
    )
    assert ", and there is no checkpoint yet. The" in explanation.sentence(None)


TASK = RecallTask(24, 2, 5, 5, 5)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(tiny.config(), TASK.vocab_size)


def run(trainer, config, spoil=lambda parameters: parameters, rows=None, steps=40):
    """NonFinite of real steps, and the step that it is of."""
    state = trainer.init()
    state = state._replace(parameters=spoil(state.parameters))
    check = FiniteCheck(config)
    for step in range(1, steps + 1):
        batch = TASK.rows(step, 4)
        state, values = trainer.step(state, batch if rows is None else rows(batch))
        explanation = check.look(step, jax.device_get(values))
        if explanation is not None:
            return explanation, step
    return None, steps


def test_real_numbers_of_a_learning_rate_that_is_far_too_high():
    optimizer = {"peak_learning_rate": 1e18, "warmup_steps": 0, "clip_by_global_norm": 0.0}
    config = tiny.config(model={"layer_types": "dense"}, optimizer=optimizer, train={"num_steps": 40})
    explanation, step = run(Trainer(config, TASK.vocab_size), config)
    assert step < 10
    assert "learning rate" in explanation.cause
    assert "lower optimizer.peak_learning_rate" in explanation.advice


def test_real_numbers_of_a_batch_of_padding(trainer):
    padding = lambda batch: {name: np.zeros_like(value) for name, value in batch.items()}  # noqa: E731
    explanation, step = run(trainer, trainer.config, rows=padding)
    assert step == 1
    assert explanation.cause == "the batch holds no tokens at all"


def test_real_numbers_of_a_broken_scorer(trainer):
    def spoil(parameters):
        def spoilt(path, value):
            return value * NAN if "scorer" in jax.tree_util.keystr(path) else value

        return jax.tree_util.tree_map_with_path(spoilt, parameters)

    explanation, step = run(trainer, tiny.config(train={"init_from": "runs/a"}), spoil)
    assert step == 1
    assert "train.init_from" in explanation.cause
