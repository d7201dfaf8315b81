"""Non-finite training metrics: the first non-finite number of a step, its likely cause, and what to change."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from natsjax.config import Config
from natsjax.runs.metrics import parts_of
from natsjax.train.step import StepMetrics

NUM_RECENT = 20
"""Steps before the present one that are taken into account."""

_LARGE = 10.0  # times what is usual
_RISE = 1.1  # of the cross-entropy, against the lowest of the recent steps


class Recent(NamedTuple):
    """Metrics of an earlier step, all finite.

    Attributes:
      cross_entropy: nats per predicted token.
      gradient_norm: before clipping.
    """

    cross_entropy: float
    gradient_norm: float


class NonFinite(NamedTuple):
    """Explanation of a non-finite metric, in parts of sentences without a full stop.

    Attributes:
      what: the first non-finite number, and the part of the model that it is in.
      cause: the likely cause.
      advice: what to change.
    """

    what: str
    cause: str
    advice: str

    def sentence(self, saved: int | None) -> str:
        """Joins the parts for a person; ``saved`` is the step of the newest checkpoint."""
        where = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
        return (
            f"{self.what}; training cannot continue, and {where}. The likely cause: {self.cause}; what may help: "
            f"{self.advice}."
        )


class FiniteCheck:
    """Check of the metrics of every step; keeps the recent ones for the explanation.

    Args:
      config: of the run.

    Example:
      >>> found = check.look(8, values)
      >>> if found is not None:
      ...     raise UserError(found.sentence(checkpoints.latest_step()))
    """

    def __init__(self, config: Config):
        self._config = config
        self._recent: deque[Recent] = deque(maxlen=NUM_RECENT)

    def look(self, step: int, values: StepMetrics) -> NonFinite | None:
        """Returns None if the metrics of the step, on the host, are finite."""
        found = explain(step, values, self._recent, self._config)
        if found is None:
            self._recent.append(Recent(float(values["cross_entropy"]), float(values["gradient_norm"])))
        return found


def explain(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> NonFinite | None:
    """Explains non-finite metrics of a step; returns None if they are finite.

    A step computes loss, then gradient, then update, so the first non-finite one of the three is the origin. The
    parameters before the step were finite, for the step before was checked too.

    Args:
      step: its number.
      values: its metrics, on the host.
      recent: earlier steps of this start, oldest first, at most ``NUM_RECENT``.
      config: of the run.

    Example:
      >>> found = explain(8, values, [], config)
      >>> found.what
      'the loss at step 8 is nan (cross-entropy nan)'
    """
    numbers = {name: float(value) for name, value in values.items() if np.ndim(value) == 0}
    what = _first(step, numbers, config)
    if what is None:
        return None
    for rule in _RULES:
        found = rule(step, numbers, recent, config)
        if found is not None:
            return NonFinite(what, *found)
    return NonFinite(
        what,
        "nothing in the steps before announced it",
        "run the same command again, which repeats these steps exactly: if it passes then, suspect the hardware, else "
        "look at the batch (natsjax.data.inspect)",
    )


def _first(step: int, values: Mapping[str, float], config: Config) -> str | None:
    """Finds the first number that is not finite."""
    loss, norm = values["loss"], values["gradient_norm"]
    if not math.isfinite(loss):
        terms = ", ".join(f"{name} {value:.4g}" for name, value in _loss_terms(values, config).items())
        return f"the loss at step {step} is {loss} ({terms})"
    if not math.isfinite(norm):
        return f"the loss at step {step} is {loss:.4g}, but its gradient is not finite{_in(values, 'gradient_norm')}"
    if not math.isfinite(values["update_norm"]):
        return (
            f"loss and gradient at step {step} are finite ({loss:.4g}, norm {norm:.4g}), but the update of the "
            f"parameters is not{_in(values, 'update_norm')}"
        )
    return None


def _in(values: Mapping[str, float], name: str) -> str:
    """Names the parts of the model whose norm is not finite."""
    norms = parts_of(values, name)
    parts = [part for part, norm in norms.items() if not math.isfinite(norm)]
    if not parts:
        return ""
    if len(parts) == len(norms):
        return ", in all parts of the model"
    return f", in {' and '.join(', '.join(parts).rsplit(', ', 1))} alone"


def _loss_terms(values: Mapping[str, float], config: Config) -> dict[str, float]:
    terms = {"cross-entropy": values["cross_entropy"]}
    if config.loss.z_loss:
        terms["z-loss"] = config.loss.z_loss * values["z_loss"]
    if config.model.has_roles:
        terms["KV penalty"] = values["kv_penalty"] * values["kv_fraction"]
    return terms


# Rules ------------------------------------------------------------------------------------------
# Each returns cause and advice, or None where it does not apply; ``_RULES`` has the surest first.

_Found = tuple[str, str] | None


def _batch(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to a batch without tokens, or without tokens to predict."""
    advice = "look at the batch (natsjax.data.inspect) and at the corpus that it came from"
    entropy = values["cross_entropy"]
    if math.isfinite(entropy) and math.isnan(values["kv_fraction"]) and math.isfinite(values["kv_penalty"]):
        return "the batch holds no tokens at all", advice
    if entropy == 0 and values["accuracy"] == 0:
        return "no token of the batch is predicted (its loss_weight is 0 everywhere)", advice
    return None


def _update(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to an update of finite gradients."""
    if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
        return None
    return f"the learning rate ({values['learning_rate']:.3g} here) is far too high", _calmer(step, config)


def _terms(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to a term of the loss that is not the cross-entropy."""
    terms = _loss_terms(values, config)
    entropy = terms.pop("cross-entropy")
    if not math.isfinite(entropy):
        entropy = recent[-1].cross_entropy if recent else math.inf
        terms = {name: value for name, value in terms.items() if math.isfinite(value)}
    fields = {
        "KV penalty": "lower nats.max_kv_penalty, nats.kv_penalty_lr or a fixed nats.kv_penalty",
        "z-loss": "lower loss.z_loss, or bound the logits with model.final_logit_softcap",
    }
    for name, value in terms.items():
        if not math.isfinite(value) or value > _LARGE * max(entropy, 1.0):
            return f"the {name} ({value:.4g}) blew up beside a cross-entropy of {entropy:.4g}", fields[name]
    return None


def _initial(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to the first step, before any update."""
    source = config.train.init_from
    if step > 1:
        return None
    if source:
        return (
            f"it is the first step: parameters of train.init_from = {source!r} are not finite, or too large",
            "take another checkpoint",
        )
    other = ", and try model.dtype = float32" if config.model.dtype != "float32" else ""
    return (
        "it is the first step: the model as it is initialized is too much for its number format",
        f"look at model and nats in the config{other}",
    )


def _rise(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to divergence: the loss had been rising."""
    losses = [known.cross_entropy for known in recent]
    if len(losses) < 3:
        return None
    lowest, last = min(losses), losses[-1]
    if last <= _RISE * lowest or last < statistics.mean(losses):
        return None
    ago = len(losses) - losses.index(lowest)
    cause = (
        f"the cross-entropy had risen from {lowest:.4g} to {last:.4g} over the last {ago} steps: the learning rate "
        f"({values['learning_rate']:.3g} here) is too high"
    )
    return cause, _calmer(step, config)


def _gradients(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to gradients that grew before the loss did, and to the first steps."""
    norms, optimizer = [known.gradient_norm for known in recent], config.optimizer
    if len(norms) >= 3 and norms[-1] > _LARGE * statistics.median(norms):
        cause = f"the gradient's norm had grown to {norms[-1]:.4g} where {statistics.median(norms):.4g} was usual"
        if not optimizer.clip_by_global_norm:
            cause += ", and nothing clips it (optimizer.clip_by_global_norm = 0)"
        return cause, _calmer(step, config)
    if len(norms) < 3 and step <= max(10, optimizer.warmup_steps):
        why = "is often too high" if optimizer.warmup_steps else "has no warm-up (optimizer.warmup_steps = 0)"
        cause = f"it is among the first steps, where the learning rate ({values['learning_rate']:.3g} here) {why}"
        return cause, _calmer(step, config)
    return None


def _overflow(step: int, values: Mapping[str, float], recent: Sequence[Recent], config: Config) -> _Found:
    """Applies to numbers too large for their format, or too coarse."""
    bounds = "bound them with model.qk_norm or model.final_logit_softcap"
    if math.isinf(values["loss"]) or math.isinf(values["gradient_norm"]):
        return "numbers grew beyond what floating point holds (inf)", f"{bounds}, or set loss.z_loss"
    if config.model.dtype == "bfloat16":
        return (
            "the loss was not rising before; activations are bfloat16, whose 8 bits of precision are too few for large "
            "logits",
            f"{bounds}, or try model.dtype = float32 from the checkpoint's parameters (train.init_from)",
        )
    return None


_RULES: tuple[Callable[[int, Mapping[str, float], Sequence[Recent], Config], _Found], ...] = (
    _batch,
    _update,
    _terms,
    _initial,
    _rise,
    _gradients,
    _overflow,
)


def _calmer(step: int, config: Config) -> str:
    """Lists changes that make a run calmer, as far as the config does not have them yet."""
    optimizer = config.optimizer
    steps = ["lower optimizer.peak_learning_rate"]
    if step <= 2 * max(optimizer.warmup_steps, 10):
        steps.append(f"raise optimizer.warmup_steps = {optimizer.warmup_steps}")
    clips = bool(optimizer.clip_by_global_norm)
    steps.append("lower optimizer.clip_by_global_norm" if clips else "set optimizer.clip_by_global_norm = 1")
    if not optimizer.spike_threshold:
        steps.append("set optimizer.spike_threshold")
    return f"in a new --workdir, {', '.join(steps[:-1])} or {steps[-1]}"
