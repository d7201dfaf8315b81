"""Declarations of the fields that an evaluation stores; whatever writes, shows or documents a field follows them.

To add a field to the rows, add an entry to ``ROW_FIELDS`` and compute its value in ``natsjax.evaluate.rows.row_of``.
``results.jsonl``, ``evaluation.json``, the table on the terminal, the tables and axes of the page, the picture and
``docs/report.md`` (``python -m benchmarks.docs_tables``) follow.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
"""One measured setting, a dict of ``ROW_FIELDS``."""

Format = Literal["method", "setting", "text", "integer", "percent"] | int
"""Way to show a value; an int is a number of significant digits."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of what an evaluation stores.

    Attributes:
      name: in the file.
      doc: description for ``docs/report.md``, in Markdown.
      unit: of its numbers.
      shape: axes of an array, as in "l, k"; empty for anything else.
      nullable: it may be null; an older evaluation that lacks it can be read.
      interval: there are ``NAME_low`` and ``NAME_high`` as well; tables show them beside the value ("shown") or the
        page in a tooltip ("stored"); empty: there are none.
      column: head of its column in tables of rows; empty: it has none. A column without any value is left out.
      format: of its column.
      aside: name of an integer field that is shown in parentheses behind it; empty: none.
      as_metric: it has a column only in evaluations that it is the metric of.
      compared: it has a column in the table of several runs too.
      late: its column is one of the last on the page, which a phone does not show at first.
      axis: title of its axis in pictures; empty: it is on none.
    """

    name: str
    doc: str
    unit: str = ""
    shape: str = ""
    nullable: bool = False
    interval: Literal["", "stored", "shown"] = ""
    column: str = ""
    format: Format = "text"
    aside: str = ""
    as_metric: bool = False
    compared: bool = False
    late: bool = False
    axis: str = ""


def by_name(*fields: Field, interval: str = "95 % bootstrap interval by document") -> dict[str, Field]:
    """Maps names to fields, those of intervals among them.

    Args:
      fields: the fields, in order.
      interval: what the ends of their intervals are of.
    """
    found: dict[str, Field] = {}
    for field in fields:
        found[field.name] = field
        if field.interval:
            for end, word in (("low", "lower"), ("high", "upper")):
                doc = f"{word} end of the {interval}"
                found[f"{field.name}_{end}"] = Field(f"{field.name}_{end}", doc, field.unit, field.shape, nullable=True)
    return found


ROW_FIELDS = by_name(
    Field("method", "policy that decided which keys live", column="method", format="method"),
    Field("setting", "numbers of the policy by name, as `role_bias` or `window`", column="setting", format="setting"),
    Field("weights", "weights that it ran on: those of the run, or of the dense baseline", column="weights", late=True),
    Field(
        "budget",
        "KV budget that the setting was chosen for",
        "fraction",
        nullable=True,
        column="budget",
        format="percent",
        late=True,
    ),
    Field(
        "kv_fraction",
        "mean live keys per query over `mean_context`, in (0, 1]",
        "fraction",
        column="KV",
        format="percent",
        compared=True,
        axis="KV fraction: live keys per query / context",
    ),
    Field(
        "kv_live_mean",
        "live keys per query, mean",
        "keys",
        column="live keys (max)",
        format=3,
        aside="kv_live_max",
        late=True,
    ),
    Field("kv_live_max", "live keys per query, largest", "keys"),
    Field(
        "kv_allocated",
        "slots of a head that the KV buffer had, mean over layers; null where masks stood for it",
        "slots",
        nullable=True,
        column="slots",
        format=3,
        late=True,
    ),
    Field("mean_context", "keys per query of full attention, mean", "keys"),
    Field("kv_live_mean_per_head", "`kv_live_mean` by layer and KV head", "keys", "l, k"),
    Field("kv_live_max_per_head", "`kv_live_max` by layer and KV head", "keys", "l, k"),
    Field(
        "perplexity",
        "exp of the mean negative log-likelihood of the predicted tokens",
        interval="shown",
        column="perplexity",
        format=4,
        compared=True,
        axis="held-out perplexity",
    ),
    Field(
        "perplexity_ratio",
        "perplexity over that of full attention on the dense baseline, interval paired by document (both are read on "
        "the same ones); null without a dense baseline",
        nullable=True,
        interval="shown",
        column="to dense",
        format=4,
        compared=True,
    ),
    Field(
        "bits_per_byte",
        "negative log-likelihood of the text over its UTF-8 bytes; null where there is no text",
        "bits",
        nullable=True,
        interval="stored",
        column="bits/byte",
        format=4,
        compared=True,
    ),
    Field(
        "accuracy",
        "predicted tokens whose most likely token is right",
        "fraction",
        nullable=True,
        interval="stored",
        column="accuracy",
        format="percent",
        as_metric=True,
        compared=True,
        axis="accuracy, %",
    ),
    Field("num_tokens", "predicted tokens", "tokens"),
    Field("num_documents", "documents that they are from", "documents"),
    Field("by_position", "the same by position in the document, see below", shape="object", nullable=True),
    Field(
        "by_slice",
        "the same on slices of the tokens (`--slices`), see below; null where none were asked for",
        shape="object",
        nullable=True,
    ),
    Field(
        "by_document",
        "`ids`, `nll` (sum of the negative log-likelihood, nats) and `tokens` (predicted) of each document; other "
        "evaluations on the same contexts are compared by them",
        shape="object",
        nullable=True,
    ),
)
"""Fields of a row, which is one measured setting, in the order of a line of ``results.jsonl``."""

POSITION_FIELDS = by_name(
    Field(
        "edges",
        "bucket i holds `edges[i]` to `edges[i + 1] - 1` tokens before the prediction",
        "tokens",
        "p + 1",
    ),
    Field("tokens", "predicted tokens", "tokens", "p"),
    Field("perplexity", "of these tokens; null where there are none", shape="p", interval="shown"),
    Field("accuracy", "of these tokens; null where there are none", "fraction", "p", interval="stored"),
)
"""Fields of a row's ``by_position``: results by the number of tokens of the document before the predicted one."""

SLICE_FIELDS = by_name(
    Field("slices", "names of the slices", shape="z"),
    Field("marks", "hash of each slice's tokens; evaluations compare slices of equal marks", shape="z"),
    Field("tokens", "predicted tokens", "tokens", "z"),
    Field("documents", "documents with any of them", "documents", "z"),
    Field("perplexity", "of these tokens; null where there are none", shape="z", interval="shown"),
    Field(
        "perplexity_ratio",
        "perplexity over that of full attention on the dense baseline, interval paired by document; null without one",
        shape="z",
        nullable=True,
        interval="shown",
    ),
    Field(
        "window_ratio",
        "perplexity over that of the run with trained windows (`--window_workdir`), interval paired by document; null "
        "without one",
        shape="z",
        nullable=True,
        interval="shown",
    ),
    Field("nll_by_document", "sums of the negative log-likelihood, in the order of `by_document.ids`", "nats", "z, d"),
    Field("tokens_by_document", "predicted tokens, in the same order", "tokens", "z, d"),
)
"""Fields of a row's ``by_slice``: results on sets of predicted tokens (``natsjax.evaluate.slices``)."""

BUDGET_CHECK_FIELDS = by_name(
    Field("kv_budget", "budget of the run, `nats.kv_budget`", "fraction"),
    Field("sampled", "KV fraction with roles sampled as in training, where they are", "fraction", nullable=True),
    Field("argmax", "KV fraction with the most likely roles", "fraction"),
    Field("biased", "KV fraction with the most likely roles under `role_bias`", "fraction"),
    Field("role_bias", "bias of the role logits that meets the budget on training-split text"),
    Field("tolerance", "largest relative distance of `biased` to the budget that meets it", "fraction"),
    Field("met", "true if the budget is met"),
    Field("smallest_possible", "KV fraction of the window alone", "fraction"),
)
"""Fields of the budget check (docs/method.md 4.4); a run without roles has none."""

SAMPLE_FIELDS = by_name(
    Field("title", "name of the text"),
    Field("tokens", "the tokens as text", shape="t"),
    Field("role_biases", "role biases that the roles were chosen under, each that of a row", shape="b"),
    Field("roles", "a digit per token: 0 GLOBAL, 1 LOCAL, 2 and more SLIDING, one for each window", shape="b, l, k"),
    Field(
        "windows",
        "queries behind its own that read a key of each SLIDING role; `[l, k, r]` where KV heads differ, one number in "
        "older files",
        "tokens",
        "l, r",
    ),
    Field("document_starts", "indices of the tokens that begin a document", shape="any"),
)
"""Fields of a sample, which is held-out text with its roles; a run without roles has none."""

RUN_FIELDS = by_name(
    Field("name", "name of the run"),
    Field("workdir", "folder of the run"),
    Field("command", "command of the evaluation"),
    Field("config", "path of the run's `config.json`"),
    Field("settings", "the config", shape="object"),
    Field("layers", "kinds of the layers", shape="l"),
    Field("step", "steps that the weights were trained for", "steps"),
    Field("num_parameters", "parameters of the model"),
    Field("corpus", "description of the data"),
    Field("context_length", "length of a context", "tokens"),
    Field("window", "window of SLIDING keys, or several; null for a run without roles", "tokens", nullable=True),
    Field("show_accuracy", "true if accuracy is the metric, as for data without text"),
    Field("evaluation", "sentences about what was measured"),
    Field("versions", "versions of natsjax, jax and Python"),
    Field("device", "kind of the devices"),
    Field("created", "time of the evaluation, UTC"),
)
"""Fields that tell where the results come from."""


def columns(rows: Sequence[Row], *, show_accuracy: bool, of: Mapping[str, Field] = ROW_FIELDS) -> list[Field]:
    """Selects the fields that have a column in a table of these rows, of those that are declared."""
    return [
        field
        for field in of.values()
        if field.column
        and (show_accuracy or not field.as_metric)
        and any(row.get(field.name) is not None for row in rows)
    ]


def has_interval(field: Field, rows: Sequence[Row]) -> bool:
    """Checks if tables show an interval of the field beside its value in any of the rows."""
    return field.interval == "shown" and any(row.get(f"{field.name}_low") is not None for row in rows)


def page_columns(
    rows: Sequence[Row], *, show_accuracy: bool, compared: bool = False, of: Mapping[str, Field] = ROW_FIELDS
) -> list[dict[str, Any]]:
    """Describes the columns of a table of rows to the page, or those that several runs are compared by.

    Late ones come last, and of these long texts.
    """
    found = [field for field in columns(rows, show_accuracy=show_accuracy, of=of) if field.compared or not compared]
    return [
        {name: getattr(field, name) for name in ("name", "column", "format", "interval", "aside")}
        for field in sorted(found, key=lambda field: (field.late, field.format == "text"))
    ]
