"""The optimizer, from optax: clipping by global norm, the update rule, weight decay, the learning rate.

To add an update rule, add its name to ``optimizer.name`` in ``natsjax/config.py`` and an entry to ``_RULES``.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from natsjax.config import OptimizerConfig
from natsjax.model import sharding
from natsjax.model.transformer import ModelStructure

_MUON_RMS = 0.2
"""Root mean square of Muon's updates: about AdamW's, so that both take the same learning rates (arXiv:2502.16982)."""


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step (from 0): a warm-up from 0, then ``schedule``.

    "cosine" and "linear" decay from the end of the warm-up to ``num_steps``. "wsd" stays at the peak and decays
    linearly over the last ``decay_fraction`` of the steps (warm-up-stable-decay, arXiv:2404.06395). "constant" stays
    at the peak. "inverse_sqrt" decays as ``sqrt(warmup_steps / step)``, whatever the length of the run
    (arXiv:1706.03762).
    """
    peak, final, warmup = config.peak_learning_rate, config.final_learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.schedules.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(num_steps, warmup + 1),
            end_value=final,
        )
    after: list[optax.Schedule] = [optax.schedules.constant_schedule(peak)]
    boundaries = []
    if config.schedule == "linear":
        after = [optax.schedules.linear_schedule(peak, final, max(1, num_steps - warmup))]
    elif config.schedule == "wsd":
        decay = min(max(1, round(config.decay_fraction * num_steps)), max(1, num_steps - warmup))
        after.append(optax.schedules.linear_schedule(peak, final, decay))
        boundaries.append(max(num_steps - decay, warmup))
    elif config.schedule == "inverse_sqrt":
        scale = max(1, warmup)
        after = [lambda step: peak * jnp.sqrt(scale / (jnp.maximum(step, 0) + scale))]
    if warmup:
        after.insert(0, optax.schedules.linear_schedule(0.0, peak, warmup))
        boundaries.insert(0, warmup)
    return optax.schedules.join_schedules(after, boundaries)


def optimizer(config: OptimizerConfig, num_steps: int, model: ModelStructure) -> optax.GradientTransformation:
    """Builds the optimizer.

    Args:
      config: the update rule, rates and decays.
      num_steps: length of the run, for the schedule.
      model: the parameters, and the parts of the model that they belong to.
    """
    schedule = learning_rate(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_by_global_norm) if config.clip_by_global_norm else optax.identity()
    rule = _RULES[config.name](config, model)
    rest = _weight_decay(config, model), optax.scale_by_learning_rate(schedule), _own_rates(config, model)
    if config.name == "schedule_free":
        return optax.chain(clip, contrib.schedule_free(optax.chain(rule, *rest), schedule, b1=config.beta1))
    return optax.chain(clip, rule, *rest)


def schedule_free_average(state: Any, parameters: Any) -> Any:
    """Returns the parameters that a schedule-free run is evaluated with.

    Args:
      state: of its ``optimizer``.
      parameters: those of the next step.
    """
    return contrib.schedule_free_eval_params(state[1], parameters)


def _adamw(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=_momentum_dtype(config))


def _lion(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2, mu_dtype=_momentum_dtype(config))


def _schedule_free(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    # AdamW without momentum: the average that schedule-free makes takes its place (arXiv:2405.15682).
    return optax.scale_by_rms(decay=config.beta2, eps=config.epsilon, eps_in_sqrt=False, bias_correction=True)


def _adafactor(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    """Makes Adafactor without its scaling by the parameters' size: a learning rate then means what AdamW's does."""
    momentum = optax.identity()
    if config.beta1:
        momentum = optax.ema(config.beta1, accumulator_dtype=_momentum_dtype(config))
    factored = optax.scale_by_factored_rms(epsilon=config.epsilon**2)
    rules = {"matrix": _on_whole_layers(_as_matrices(factored, model)), "other": factored}
    labels = jax.tree.map(lambda count: "matrix" if count else "other", _input_axes(model))
    return optax.chain(optax.partition(rules, labels), optax.clip_by_block_rms(1.0), momentum)


def _muon(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    """Makes Muon for the matrices of attention and MLP, and AdamW for embeddings, norms, biases and the scorer."""

    def axes(x: Any, inputs: int) -> Any:
        if not inputs:
            return optax.MaskedNode()
        return contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, x.ndim)))

    inputs = _input_axes(model)
    muon = contrib.muon(
        -1.0,  # the sign is turned where the learning rate is applied, below all update rules alike
        beta=config.muon_beta,
        mu_dtype=_momentum_dtype(config),
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=lambda _: jax.tree.map(axes, model.parameters, inputs),
    )
    labels = jax.tree.map(lambda count: "muon" if count else "adamw", inputs)
    return optax.partition({"muon": _on_whole_layers(muon), "adamw": _adamw(config, model)}, labels)


_RULES: dict[str, Callable[[OptimizerConfig, ModelStructure], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "schedule_free": _schedule_free,
}
"""Update rules: from gradients to directions, which weight decay and the learning rate are applied to."""


def _weight_decay(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, mask=model.decayed)
    if not config.embedding_weight_decay:
        return decay
    is_part = _is_part(model, "embedding", "unembedding")
    is_embedding = jax.tree.map(lambda x, is_part: is_part and x.ndim == 2, model.parameters, is_part)
    return optax.chain(decay, optax.add_decayed_weights(config.embedding_weight_decay, mask=is_embedding))


def _own_rates(config: OptimizerConfig, model: ModelStructure) -> optax.GradientTransformation:
    """Scales the updates of parameters that have a learning rate of their own, on the same schedule."""
    peak, scales = config.peak_learning_rate, []
    if config.scorer_learning_rate:
        scales.append((config.scorer_learning_rate, _is_part(model, "scorer")))
    if config.name == "muon" and config.adamw_learning_rate:
        is_matrix, is_scorer = _input_axes(model), _is_part(model, "scorer")
        others = jax.tree.map(lambda inputs, scorer: not inputs and not scorer, is_matrix, is_scorer)
        scales.append((config.adamw_learning_rate, others))
    if not scales:
        return optax.identity()
    own = [optax.masked(optax.scale(rate / peak), mask) for rate, mask in scales]
    return own[0] if len(own) == 1 else optax.chain(*own)


def _is_part(model: ModelStructure, *parts: str) -> Any:
    return jax.tree.map(lambda part: part in parts, model.parts)


def _input_axes(model: ModelStructure) -> Any:
    """Counts the input axes of the matrices of attention and MLP; 0 for every other parameter."""
    return jax.tree.map(
        lambda inputs, part: inputs if part in ("attention", "mlp") else 0, model.num_input_axes, model.parts
    )


def _momentum_dtype(config: OptimizerConfig) -> jnp.dtype | None:
    """Returns None for float32, that of the parameters."""
    return None if config.momentum_dtype == "float32" else jnp.dtype(config.momentum_dtype)


def _on_whole_layers(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps a rule that reads whole matrices: devices get whole layers, and the state stays in its own layout."""

    def update(updates, state, params=None):
        placed = jax.tree.map(sharding.whole_layers, (updates, state, params))
        result = rule.update(*placed)
        return jax.tree.map(sharding.reshard_as, result, (updates, state))

    return optax.GradientTransformation(rule.init, update)


def _as_matrices(rule: optax.GradientTransformation, model: ModelStructure) -> optax.GradientTransformation:
    """Wraps a rule to get each layer's matrices, and nothing else, as ``[l, inputs, outputs]``."""
    inputs = jax.tree.map(lambda count: count or optax.MaskedNode(), _input_axes(model))

    def matrices(tree):
        return jax.tree.map(lambda x, count: x.reshape(len(x), math.prod(x.shape[1 : 1 + count]), -1), tree, inputs)

    def update(updates, state, params=None):
        result, state = rule.update(matrices(updates), state, matrices(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), result, updates), state

    return optax.GradientTransformation(lambda params: rule.init(matrices(params)), update)
