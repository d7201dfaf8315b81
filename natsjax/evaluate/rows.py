"""Rows and samples of an evaluation, as ``natsjax.report.fields`` declares them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from natsjax.config import Config
from natsjax.data import Row
from natsjax.evaluate.masked import DocumentSums, Measurement, PositionSums, Slices, chosen_roles
from natsjax.evaluate.settings import Setting
from natsjax.evaluate.slices import mark
from natsjax.kv_fraction import perplexity, sliding_windows
from natsjax.policies.nats import Nats
from natsjax.report.intervals import NO_RATIO, bootstrap_interval, ratio_fields, rounded, slice_ratio_fields
from natsjax.report.results import MIN_DOCUMENTS, MIN_RESAMPLINGS
from natsjax.runs.load import LoadedRun
from natsjax.runtime.progress import bar

_NUM_SAMPLES = 3  # contexts for the role reader
_MAX_ROLES = 2_000_000  # of all samples, role biases, layers and heads: a byte each in the page


def row_of(
    setting: Setting,
    found: Measurement,
    config: Config,
    reference: Measurement | None = None,
    window: Measurement | None = None,
    slices: Slices | None = None,
) -> dict[str, Any]:
    """Computes the row of a setting: every field of ``natsjax.report.fields.ROW_FIELDS``.

    Args:
      setting: the setting that was measured.
      found: its measurement.
      config: of the run; ``eval.bootstrap_samples`` and ``train.seed`` are used for the intervals.
      reference: of full attention on the dense baseline, on the same contexts; None: there is none.
      window: of a run with trained windows, on the same contexts; None: there is none.
      slices: of these contexts, which were measured too; None: there are none.
    """
    sums = found.documents

    def interval(name: str, numerator: np.ndarray, denominator: np.ndarray, of: Callable = float) -> dict[str, Any]:
        ends = _interval(numerator, denominator, config)
        pairs = zip(("low", "high"), ends, strict=True)
        return {f"{name}_{end}": None if np.isnan(value) else of(float(value)) for end, value in pairs}

    bits: dict[str, Any] = {"bits_per_byte_low": None, "bits_per_byte_high": None}
    if sums.text_nll is not None and sums.bytes is not None:
        bits = interval("bits_per_byte", sums.text_nll / np.log(2), sums.bytes)
    return {
        "method": setting.policy.method,
        "weights": setting.weights,
        "setting": setting.numbers,
        "budget": setting.budget,
        "kv_fraction": found.kv_fraction,
        "kv_live_mean": float(found.live_mean.mean()),
        "kv_live_max": int(found.live_max.max()),
        "kv_allocated": None if found.allocated is None else float(found.allocated.mean()),
        "mean_context": found.mean_context,
        "kv_live_mean_per_head": found.live_mean.tolist(),
        "kv_live_max_per_head": found.live_max.tolist(),
        "perplexity": found.perplexity,
        **interval("perplexity", sums.nll, sums.tokens, perplexity),
        **_ratio(sums, None if reference is None else reference.documents, config),
        "bits_per_byte": found.bits_per_byte,
        **bits,
        "accuracy": found.accuracy,
        **interval("accuracy", sums.correct, sums.tokens),
        "num_tokens": int(sums.tokens.sum()),
        "num_documents": len(sums.ids),
        "by_position": _by_position(found.positions, config),
        "by_slice": None if slices is None else _by_slice(slices, found, reference, window, config),
        "by_document": {
            "ids": sums.ids.tolist(),
            "nll": _stored_nll(sums.nll),
            "tokens": sums.tokens.astype(int).tolist(),
        },
    }


def about_intervals(rows: Sequence[Mapping[str, Any]], config: Config) -> tuple[str, str | None]:
    """Describes the intervals of rows.

    Returns:
      A clause about the intervals for the sentence about the evaluation, and a note with the reason if there are none.
    """
    count, resamplings = rows[0]["num_documents"], config.eval.bootstrap_samples
    metrics = ("perplexity", "accuracy") if rows[0]["bits_per_byte"] is None else ("perplexity",)
    missing = [metric for metric in metrics if all(row[f"{metric}_low"] is None for row in rows)]
    if not missing:
        return "intervals are 95 % bootstrap intervals by document", None
    if count < MIN_DOCUMENTS:
        documents = "1 held-out document is" if count == 1 else f"{count} held-out documents are"
        why = f"{documents} too few for intervals ({MIN_DOCUMENTS} are the fewest)"
        return "there are no intervals", f"{why}, and too few to judge if a budget is met."
    if resamplings < MIN_RESAMPLINGS:
        why = f"eval.bootstrap_samples = {resamplings} is too few for intervals ({MIN_RESAMPLINGS} are the fewest)."
        return "there are no intervals", why
    found = "intervals are 95 % bootstrap intervals by document, where documents differ"
    return found, f"no interval of the {' and the '.join(missing)}: all {count} held-out documents came out alike."


def _interval(numerator: np.ndarray, denominator: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    return bootstrap_interval(numerator, denominator, num_samples=config.eval.bootstrap_samples, seed=config.train.seed)


def _ratio(sums: DocumentSums, reference: DocumentSums | None, config: Config) -> dict[str, float | None]:
    """Returns ``perplexity_ratio`` and its interval."""
    if reference is None:
        return NO_RATIO
    samples, seed = config.eval.bootstrap_samples, config.train.seed
    return ratio_fields(sums.nll, reference.nll, sums.tokens, num_samples=samples, seed=seed)


def _by_position(sums: PositionSums, config: Config) -> dict[str, list[Any]]:
    """Computes ``POSITION_FIELDS``, with five significant digits."""
    tokens = sums.tokens.sum(axis=0)
    found = {"edges": sums.edges.tolist(), "tokens": tokens.astype(int).tolist()}
    for name, numerator, of in (("perplexity", sums.nll, perplexity), ("accuracy", sums.correct, float)):
        with np.errstate(invalid="ignore"):
            mean = numerator.sum(axis=0) / tokens
        for end, values in zip(("", "_low", "_high"), (mean, *_interval(numerator, sums.tokens, config)), strict=True):
            found[name + end] = [None if np.isnan(value) else float(f"{of(value):.5g}") for value in values]
    return found


def _by_slice(
    slices: Slices, found: Measurement, reference: Measurement | None, window: Measurement | None, config: Config
) -> dict[str, Any]:
    """Computes ``SLICE_FIELDS``, with five significant digits."""
    sums = found.slices
    assert sums is not None
    with np.errstate(invalid="ignore"):
        mean = sums.nll.sum(axis=0) / sums.tokens.sum(axis=0)
    values = {
        "slices": list(slices),
        "marks": [mark(members) for members in slices.values()],
        "tokens": sums.tokens.sum(axis=0).astype(int).tolist(),
        "documents": np.count_nonzero(sums.tokens, axis=0).tolist(),
    }
    for end, nll in zip(("", "_low", "_high"), (mean, *_interval(sums.nll, sums.tokens, config)), strict=True):
        with np.errstate(over="ignore"):
            values[f"perplexity{end}"] = rounded(np.exp(nll))
    for name, other in (("perplexity_ratio", reference), ("window_ratio", window)):
        if other is None:
            values |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
            continue
        assert other.slices is not None
        sides = sums.nll.T, other.slices.nll.T, sums.tokens.T
        samples, seed = config.eval.bootstrap_samples, config.train.seed
        values |= slice_ratio_fields(name, *sides, num_samples=samples, seed=seed)
    return values | {
        "nll_by_document": [_stored_nll(nll) for nll in sums.nll.T],
        "tokens_by_document": sums.tokens.T.astype(int).tolist(),
    }


def _stored_nll(sums: np.ndarray) -> list[float]:
    """Rounds sums of documents to nine digits; zeros become short ones."""
    return [float(f"{nll:.9g}") or 0 for nll in sums]


def samples_of(this: LoadedRun, held_out: Row, role_biases: Sequence[float], progress: bool) -> list[dict[str, Any]]:
    """Samples held-out text from evenly spaced contexts, with the roles that the model chooses under each role bias.

    A model with many heads gets fewer samples, and then shorter ones, to keep the page small.

    Args:
      this: the run.
      held_out: contexts, arrays ``[n, t]``.
      role_biases: ascending.
      progress: show a progress bar.
    """
    model, count = this.config.model, len(held_out["inputs"])
    length = this.config.eval.num_sample_tokens
    capacity = _MAX_ROLES // (len(role_biases) * model.num_layers * model.num_kv_heads)
    wanted = max(1, min(_NUM_SAMPLES, capacity // length))
    length = max(1, min(length, capacity // wanted))
    chosen = sorted({(2 * n + 1) * count // (2 * wanted) for n in range(wanted)})
    contexts = {name: values[chosen] for name, values in held_out.items()}
    roles = [
        chosen_roles(this, contexts, Nats(role_bias))
        for role_bias in bar(role_biases, "roles of the samples", progress)
    ]
    return [
        _sample(this, {name: values[n] for name, values in contexts.items()}, [ids[n] for ids in roles], length)
        | {"title": f"held-out context {chosen[n] + 1} of {count}", "role_biases": list(role_biases)}
        for n in range(len(chosen))
    ]


def _sample(this: LoadedRun, row: Row, roles: list[np.ndarray], length: int) -> dict[str, Any]:
    """Makes the sample of one context, arrays ``[t]``, with the roles ``[l, k, t]`` under each role bias."""
    length, windows = min(length, int(np.sum(row["document_end"] > 0))), sliding_windows(this.config)
    return {
        "tokens": [this.data.vocabulary.token_text(int(token)) for token in row["inputs"][:length]],
        "roles": [[["".join(map(str, head[:length])) for head in layer] for layer in biased] for biased in roles],
        "windows": (windows[:, 0] if windows.shape[1] == 1 else windows).tolist(),
        "document_starts": np.flatnonzero(row["positions"][:length] == 0).tolist(),
    }
