"""Why numbers stopped being finite: what was the first of them, what led to it, and what to change."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from natsjax.config import Config
from natsjax.train.step import StepMetrics

NUM_RECENT = 20
"""Steps before that a diagnosis looks at."""

_LARGE = 10.0  # times what is usual
_RISE = 1.1  # of cross-entropy, against the lowest of the recent steps


class Recent(NamedTuple):
    """Of a step before, whose numbers were finite.

    Attributes:
      cross_entropy: nats per predicted token.
      gradient_norm: before clipping.
    """

    cross_entropy: float
    gradient_norm: float


class Diagnosis(NamedTuple):
    """Parts of sentences, without a full stop.

    Attributes:
      what: which number was the first that is not finite, and where.
      cause: the likely one.
      advice: what to change.
    """

    what: str
    cause: str
    advice: str

    def sentence(self, saved: int | None) -> str:
        """All of it, for a person; ``saved`` is the step of the newest checkpoint."""
        where = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
        return (
            f"{self.what}; training cannot go on, and {where}. The likely cause: {self.cause}; what may help: "
            f"{self.advice}."
        )


class FiniteCheck:
    """Looks at the metrics of every step, and remembers what a diagnosis needs.

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

    def look(self, step: int, values: StepMetrics) -> Diagnosis | None:
        """None where the metrics of the step, on the host, are finite."""
        found = diagnose(step, values, self._recent, self._config)
        if found is None:
            self._recent.append(Recent(float(values.cross_entropy), float(values.gradient_norm)))
        return found


def diagnose(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> Diagnosis | None:
    """Looks at the metrics of a step; None when they are finite.

    A step computes loss, then gradient, then update, so the first of the three that is not finite is where it began;
    the parameters that it began with were finite, for the step before was looked at too.

    Args:
      step: its number.
      values: its metrics, on the host.
      recent: the steps before since this start, oldest first, at most ``NUM_RECENT``.
      config: of the run.

    Example:
      >>> found = diagnose(8, values, [], config)
      >>> found.what
      'the loss at step 8 is nan (cross-entropy nan)'
    """
    what = _first(step, values, config)
    if what is None:
        return None
    for look in (_batch, _update, _terms, _initial, _rise, _gradients, _overflow):
        found = look(step, values, recent, config)
        if found is not None:
            return Diagnosis(what, *found)
    return Diagnosis(
        what,
        "nothing in the steps before announced it",
        "run the same command again, which repeats these steps exactly: if it passes then, suspect the hardware, else "
        "look at the batch (natsjax.data.inspect)",
    )


def _first(step: int, values: StepMetrics, config: Config) -> str | None:
    """The first number that is not finite."""
    if not math.isfinite(values.loss):
        terms = ", ".join(f"{name} {value:.4g}" for name, value in _loss_terms(values, config).items())
        return f"the loss at step {step} is {float(values.loss)} ({terms})"
    if not math.isfinite(values.gradient_norm):
        where = _in(values, "gradient")
        return f"the loss at step {step} is {float(values.loss):.4g}, but its gradient is not finite{where}"
    if not math.isfinite(values.update_norm):
        return (
            f"loss and gradient at step {step} are finite ({float(values.loss):.4g}, norm "
            f"{float(values.gradient_norm):.4g}), but the update of the parameters is not{_in(values, 'update')}"
        )
    return None


def _in(values: StepMetrics, kind: str) -> str:
    """The parts that it happened in."""
    norms = values.gradient_norms if kind == "gradient" else values.update_norms
    parts = [part for part, norm in norms.items() if not math.isfinite(norm)]
    if not parts:
        return ""
    if len(parts) == len(norms):
        return ", in all parts of the model"
    return f", in {' and '.join(', '.join(parts).rsplit(', ', 1))} alone"


def _loss_terms(values: StepMetrics, config: Config) -> dict[str, float]:
    terms = {"cross-entropy": float(values.cross_entropy)}
    if config.loss.z_loss:
        terms["z-loss"] = config.loss.z_loss * float(values.z_loss)
    if config.model.has_roles:
        with np.errstate(all="ignore"):
            terms["KV penalty of the KV"] = float(values.kv_penalty) * float(values.kv_fraction)
    return terms


# ------------------------------------------------------------------------------------------- causes, the surest first


def _batch(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    advice = "look at the batch (natsjax.data.inspect) and at the corpus that it came from"
    if math.isfinite(values.cross_entropy) and math.isnan(values.kv_fraction) and math.isfinite(values.kv_penalty):
        return "the batch holds no tokens at all", advice
    if values.cross_entropy == 0 and values.accuracy == 0:
        return "no token of the batch is predicted (its loss_weight is 0 everywhere)", advice
    return None


def _update(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """What came of finite gradients."""
    if not math.isfinite(values.loss) or not math.isfinite(values.gradient_norm):
        return None
    cause = f"the learning rate ({float(values.learning_rate):.3g} here) is far too high"
    return cause, _calmer(step, config)


def _initial(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """The first step, which no update came before."""
    source = config.train.init_from
    if step > 1:
        return None
    if source:
        return (
            f"it is the first step: parameters of train.init_from = {source!r} are not finite, or too large",
            "take another checkpoint",
        )
    return (
        "it is the first step: the model as it is initialised is too much for its number format",
        f"look at model and nats in the config{', and try model.dtype = float32' * (config.model.dtype != 'float32')}",
    )


def _terms(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """A part of the loss that is not the cross-entropy."""
    terms = _loss_terms(values, config)
    entropy = terms.pop("cross-entropy")
    if not math.isfinite(entropy):
        entropy = recent[-1].cross_entropy if recent else math.inf
        terms = {name: value for name, value in terms.items() if math.isfinite(value)}
    fields = {
        "KV penalty of the KV": "lower nats.max_kv_penalty, nats.kv_penalty_lr or a fixed nats.kv_penalty",
        "z-loss": "lower loss.z_loss, or bound the logits with model.final_logit_softcap",
    }
    for name, value in terms.items():
        if not math.isfinite(value) or value > _LARGE * max(entropy, 1.0):
            return f"the {name} ({value:.4g}) blew up beside a cross-entropy of {entropy:.4g}", fields[name]
    return None


def _rise(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """Divergence: the loss had been rising."""
    losses = [known.cross_entropy for known in recent]
    if len(losses) < 3:
        return None
    lowest, last = min(losses), losses[-1]
    if last <= _RISE * lowest or last < statistics.mean(losses):
        return None
    ago = len(losses) - losses.index(lowest)
    cause = (
        f"the cross-entropy had risen from {lowest:.4g} to {last:.4g} over the last {ago} steps: the learning rate "
        f"({float(values.learning_rate):.3g} here) is too high"
    )
    return cause, _calmer(step, config)


def _gradients(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """Gradients that grew before the loss did."""
    norms = [known.gradient_norm for known in recent]
    if len(norms) >= 3 and norms[-1] > _LARGE * statistics.median(norms):
        unclipped = ", and nothing clips it (optimizer.clip_by_global_norm = 0)"
        cause = (
            f"the gradient's norm had grown to {norms[-1]:.4g} where {statistics.median(norms):.4g} was usual"
            f"{'' if config.optimizer.clip_by_global_norm else unclipped}"
        )
        return cause, _calmer(step, config)
    if len(norms) < 3 and step <= max(10, config.optimizer.warmup_steps):
        warmup = config.optimizer.warmup_steps
        return (
            f"it is among the first steps, where the learning rate ({float(values.learning_rate):.3g} here) "
            f"{'has no warm-up (optimizer.warmup_steps = 0)' if not warmup else 'is often too high'}",
            _calmer(step, config),
        )
    return None


def _overflow(step: int, values: StepMetrics, recent: Sequence[Recent], config: Config) -> tuple[str, str] | None:
    """Numbers too large for their format, or too coarse."""
    bounds = "bound them with model.qk_norm or model.final_logit_softcap"
    if math.isinf(values.loss) or math.isinf(values.gradient_norm):
        return "numbers grew beyond what floating point holds (inf)", f"{bounds}, or set loss.z_loss"
    if config.model.dtype == "bfloat16":
        return (
            "the loss was not rising before; activations are bfloat16, whose 8 bits of precision large logits do not "
            "bear",
            f"{bounds}, or try model.dtype = float32 from the checkpoint's parameters (train.init_from)",
        )
    return None


def _calmer(step: int, config: Config) -> str:
    """What makes a run calmer, by what the config has not done yet."""
    optimizer = config.optimizer
    steps = ["lower optimizer.peak_learning_rate"]
    if step <= 2 * max(optimizer.warmup_steps, 10):
        steps.append(f"raise optimizer.warmup_steps = {optimizer.warmup_steps}")
    steps.append(
        "lower optimizer.clip_by_global_norm"
        if optimizer.clip_by_global_norm
        else "set optimizer.clip_by_global_norm = 1"
    )
    if not optimizer.spike_threshold:
        steps.append("set optimizer.spike_threshold")
    return f"in a new --workdir, {', '.join(steps[:-1])} or {steps[-1]}"
