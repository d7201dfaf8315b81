"""Declarations of the training metrics, which everything that writes, shows or documents a metric follows.

To add a metric, add an entry to ``METRICS`` and compute its value: in the dict that a step returns
(``natsjax.train.step``), or in the line of a logged step (``natsjax.train.logs.monitor``). ``metrics.jsonl``,
TensorBoard, trackers, the panel on the terminal, the charts of the report and ``docs/metrics.md``
(``python -m benchmarks.docs_tables``) follow.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from natsjax.config import Config
from natsjax.runs.workdir import HELD_OUT_LOSS

_PART = "/PART"


def _always(config: Config) -> bool:
    return True


def _has_roles(config: Config) -> bool:
    return config.model.has_roles


def _is_controlled(config: Config) -> bool:
    return config.model.has_roles and config.nats.kv_penalty_mode == "controlled"


def _is_evaluated(config: Config) -> bool:
    return config.train.eval_every > 0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that is logged of training steps, or an array of them.

    Attributes:
      name: in ``metrics.jsonl``; ``NAME/PART`` stands for one number per part of the model (``parameters.PARTS``).
      doc: description for ``docs/metrics.md``, in Markdown.
      unit: "fraction" is shown in percent.
      shape: axes of an array, as in "l, k"; empty for a scalar.
      when: condition under which a line has it, in words; "always" for every line.
      panel: label and number format of its cell in the panel on a terminal; None: it has no cell.
      panel_if: condition on the config for the cell.
      line: its words in the plain lines of a log file; empty: it is not in them.
      curve: name on the y axis of its chart in the report; empty: it has no chart.
    """

    name: str
    doc: str
    unit: str = ""
    shape: str = ""
    when: str = "always"
    panel: tuple[str, str] | None = None
    panel_if: Callable[[Config], bool] = _always
    line: str = ""
    curve: str = ""

    @property
    def chart(self) -> dict[str, Any]:
        """``name``, ``title`` and ``percent`` of its chart, for the report's page."""
        percent = self.unit == "fraction"
        return {
            "name": self.name,
            "title": f"{self.curve}, {self.unit}" if self.unit and not percent else self.curve,
            "percent": percent,
        }


STEP_PHASES = {
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "other": "none of these",
}
"""Parts of a step that its time is measured of."""

_FIRST_LINE = "first line of a start"
_EVALUATED = "every `train.eval_every` steps"
_PROFILED = "one line of a start of 50 steps or more, with `train.step_breakdown`"
_OF_PARTS = "of the parts that there are"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("step", "steps done since the beginning", "steps"),
        Metric(
            "loss",
            "`cross_entropy + loss.z_loss * z_loss + kv_penalty * kv_fraction`",
            "nats per token",
            panel=("loss", "{:.4f}"),
            line="loss {:.3f}",
            curve="loss",
        ),
        Metric("cross_entropy", "mean over the predicted tokens", "nats per token"),
        Metric(
            "perplexity",
            "`exp(cross_entropy)`",
            panel=("perplexity", "{:.4g}"),
            line="perplexity {:.4g}",
            curve="training perplexity",
        ),
        Metric("z_loss", "mean squared logarithm of the output softmax's denominator, without its weight", "nats²"),
        Metric("accuracy", "predicted tokens whose most likely token is right", "fraction"),
        Metric(
            "kv_fraction",
            "live key-query pairs of the causal ones, with roles sampled as in training",
            "fraction",
            panel=("KV fraction", "{:.1%}"),
            line="KV {:.1%}",
            curve="KV fraction",
        ),
        Metric(
            "kv_budget",
            "KV fraction that a controlled KV penalty aims at in this step",
            "fraction",
            panel=("KV budget", "{:.1%}"),
            panel_if=_is_controlled,
        ),
        Metric(
            "kv_penalty",
            "penalty on a KV fraction of 1",
            "nats per token",
            panel=("KV penalty", "{:.4g}"),
            panel_if=_has_roles,
            curve="KV penalty",
        ),
        Metric(
            HELD_OUT_LOSS,
            "mean over the predicted tokens of `eval.num_contexts` held-out contexts, with the roles and the "
            "parameters that are served",
            "nats per token",
            when=_EVALUATED,
        ),
        Metric(
            "held_out_perplexity",
            "`exp(held_out_cross_entropy)`",
            when=_EVALUATED,
            panel=("held-out perplexity", "{:.4g}"),
            panel_if=_is_evaluated,
            line="held-out perplexity {:.4g}",
            curve="held-out perplexity",
        ),
        Metric(
            "held_out_kv_fraction",
            "live key-query pairs of the causal ones on that text, with the roles that are served",
            "fraction",
            when=_EVALUATED,
            curve="held-out KV fraction",
        ),
        Metric("gradient_norm", "Euclidean norm of the gradient, before clipping"),
        Metric("gradient_norm/PART", "the same for a part of the model", when=_OF_PARTS),
        Metric(
            "update_norm",
            "Euclidean norm of what was added to the parameters; 0 where the update was skipped",
        ),
        Metric("update_norm/PART", "the same for a part of the model", when=_OF_PARTS),
        Metric("learning_rate", "learning rate of all parameters but those of a scorer with a rate of its own"),
        Metric("temperature", "temperature of the straight-through softmax"),
        Metric("noise", "scale of the Gumbel noise on the scorer's logits"),
        Metric("skipped", "1 if this step's update was skipped as a loss spike", "0 or 1"),
        Metric("skipped_steps", "updates that were skipped as loss spikes since the beginning", "steps"),
        Metric("role_fractions", "tokens that are GLOBAL, LOCAL, SLIDING (one for each window)", "fraction", "l, k, r"),
        Metric("forced_globals", "tokens that are GLOBAL because they are the first of a document", "fraction"),
        Metric("live_keys", "keys that a query reads, mean", "keys", "l, k"),
        Metric(
            "live_key_quantiles",
            "keys that a query reads: median, 90 %, 99 %, most; rounded up to one of 64 steps",
            "keys",
            "l, 4",
        ),
        Metric(
            "scorer_entropy",
            "entropy of the scorer's softmax without noise, mean; at most ln 3 = 1.0986, with several windows more",
            "nats",
            "l, k",
        ),
        Metric("unended_locals", "LOCAL tokens that no GLOBAL one ends within their document", "fraction", "l, k"),
        Metric(
            "tokens_per_second",
            "speed since the line before",
            "tokens/s",
            panel=("tokens/s", "{:,.0f}"),
            line="{:,.0f} tokens/s",
        ),
        Metric(
            "flops_per_second",
            "the model's FLOP/s over all devices, since the line before: products of forward and backward without "
            "recomputation, attention at this step's `kv_fraction` in contexts of one document each",
            "FLOP/s",
        ),
        Metric(
            "mfu",
            "`flops_per_second` as a fraction of the devices' bfloat16 peaks",
            "fraction",
            when="on chips that `natsjax/runtime/chips.py` knows",
            panel=("MFU", "{:.1%}"),
        ),
        Metric("memory_in_use", "memory of the fullest device of process 0", "bytes", when="where devices report it"),
        Metric("peak_memory", "the most that it was since the start", "bytes", when="where devices report it"),
        Metric(
            "host_memory", "resident memory of process 0", "bytes", when="where devices do not report theirs (CPUs)"
        ),
        Metric(
            "goodput",
            "wall time of this start that was spent in steps (`natsjax.train.logs.wall_time`)",
            "fraction",
        ),
        Metric("input_wait", "wall time of this start in which devices waited for a batch", "fraction"),
        *(
            Metric(
                f"{phase}_fraction", f"time of a step's operations in {where}, by a profile", "fraction", when=_PROFILED
            )
            for phase, where in STEP_PHASES.items()
        ),
        Metric("time_to_first_step", "time from the start of the run to its first metrics", "s", when=_FIRST_LINE),
        Metric(
            "compile_time",
            "the part of this time for compiling the step, or loading it (`train.compilation_cache`)",
            "s",
            when=_FIRST_LINE,
        ),
        Metric("warnings", "names of the active warnings, see below", shape="names"),
    )
}
"""Every metric by name, in the order of a line of ``metrics.jsonl``."""


def metric_of(name: str) -> Metric:
    """Looks up the declaration of a name in ``metrics.jsonl``; "gradient_norm/mlp" is declared as "gradient_norm/PART".

    Raises:
      ValueError: there is none.
    """
    found = METRICS.get(name) or METRICS.get(name.partition("/")[0] + _PART)
    if found is None:
        raise ValueError(f"the metric {name} is not declared; add it to METRICS in natsjax/runs/metrics.py")
    return found


def in_order(line: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the values of a step in the order of ``METRICS``.

    Raises:
      ValueError: a name is not declared.
    """
    places = {name: place for place, name in enumerate(METRICS)}
    return dict(sorted(line.items(), key=lambda item: places[metric_of(item[0]).name]))


def panel_metrics(config: Config) -> list[Metric]:
    """Selects the metrics that have a cell in a run's panel."""
    return [metric for metric in METRICS.values() if metric.panel is not None and metric.panel_if(config)]


def curves() -> list[Metric]:
    """Selects the metrics that have a chart in the report."""
    return [metric for metric in METRICS.values() if metric.curve]


def format_number(template: str, value: float) -> str:
    """Formats a value; percent signs stand apart.

    Example:
      >>> format_number("KV {:.1%}", 0.31)
      'KV 31.0 %'
    """
    return template.format(value).replace("%", " %")


def parts_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Selects the values of ``NAME/PART``, by part of the model."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
