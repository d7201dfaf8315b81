"""Our policies beside those of NVIDIA's kvpress: the same model, contexts and numbers of keys.

    pip install -e '.[torch,hf,kvpress]'
    python -m benchmarks.kvpress --workdir=runs/dense --output=runs/dense       the table, and kvpress.json

A dense run is exported with ``--format=hf`` and loaded in `transformers`. Every context is a prompt and its
continuation. The prompt is read with full attention and cut down to ``--keys`` keys of a head by a press of kvpress,
or by our policy through our buffer; the continuation is predicted from these and its own keys, all of which are kept.

Columns, each a perplexity of the same tokens:

* ``kvpress``: the press as it comes;
* ``by our definition``: the press, changed where the paper's own code has it otherwise (``kvpress_presses.py``);
* ``ours``: our policy, on the prompt alone as a press is. It must agree with the column before, or the program ends
  with status 1;
* ``ours, every token``: our policy as evaluation has it, where it evicts while the continuation is read.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import pathlib
import tempfile
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.data.packing import piece_spans
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.scoring import score
from natsjax.errors import UserError
from natsjax.export.hf import export_hf
from natsjax.interop.hf_config import OWN_TYPE
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.base import policy
from natsjax.policies.interval import FullAttention, IntervalPolicy, StreamingLLM
from natsjax.policies.key_score import KeyDiff, KeyNorm
from natsjax.runs.load import LoadedRun
from natsjax.runtime.flags import Parser, run_command
from pallas_kernels.nats_attention import NO_END

MAX_DIFFERENCE = 1e-4
"""Nats, of a token: largest difference of ours to a press with the same definition; both are float32."""

SAFEGUARD = 0.2
"""Of AdaKV, in its paper."""


@policy
class CutPrompt(IntervalPolicy):
    """StreamingLLM as a press: of a prompt the sinks and the newest keys, and all keys behind it."""

    method: ClassVar[str] = "cut_prompt"
    length: int
    num_sinks: int
    num_recent: int

    @property
    def setting(self) -> dict[str, int | float]:
        """Its numbers."""
        return {"length": self.length, "sinks": self.num_sinks, "recent": self.num_recent}

    def key_end(self, positions: jax.Array, num_kv_heads: int) -> jax.Array:
        """Returns int32 ``[b, 1, s]``."""
        is_kept = (positions < self.num_sinks) | (positions >= self.length - self.num_recent)
        return jnp.where(is_kept, NO_END, self.length)[:, None, :]


@policy
class H2OOnce(H2O):
    """H2O, on the prompt alone."""

    every_token: ClassVar[bool] = False


@policy
class TOVAOnce(TOVA):
    """TOVA, on the prompt alone."""

    every_token: ClassVar[bool] = False


@policy
class KeyNormOnce(KeyNorm):
    """The shortest keys, of the prompt alone; norms that differ by rounding alone are equal."""

    every_token: ClassVar[bool] = False
    step: float = 0.0

    def weights(self, keys: jax.Array, is_live: jax.Array) -> jax.Array:
        """Returns the norms, negative, in steps."""
        return jnp.round(super().weights(keys, is_live) / self.step)


@policy
class KeyDiffOnce(KeyDiff):
    """KeyDiff, on the prompt alone."""

    every_token: ClassVar[bool] = False


def policies(keys: int, length: int, num_sinks: int, norm_step: float) -> dict[str, tuple[Any, Any]]:
    """Returns our policies by name: as a press, and as evaluation has them where that is something else.

    Args:
      keys: of a head.
      length: tokens of a prompt.
      num_sinks: of StreamingLLM.
      norm_step: norms of keys that round to the same multiple of it are equal.
    """
    window = observed(keys)
    return {
        "streaming_llm": (CutPrompt(length, num_sinks, keys - num_sinks), StreamingLLM(num_sinks, keys - num_sinks)),
        "snapkv": (SnapKV(keys, window), None),
        "ada_snapkv": (AdaSnapKV(keys, window, SAFEGUARD), None),
        "h2o": (H2OOnce(keys, keys // 2), H2O(keys, keys // 2)),
        "tova": (TOVAOnce(keys), TOVA(keys)),
        "knorm": (KeyNormOnce(keys, norm_step), KeyNorm(keys)),
        "keydiff": (KeyDiffOnce(keys), KeyDiff(keys)),
    }


def observed(keys: int) -> int:
    """Returns the observation window of SnapKV: as evaluation has it."""
    return min(32, keys // 2)


def texts(run: LoadedRun, length: int, continued: int, most: int) -> np.ndarray:
    """Returns the beginnings of held-out documents, int32 ``[b, length + continued]``, at most ``most``.

    Raises:
      UserError: no document piece has so many tokens.
    """
    contexts = run.data.contexts("validation", run.config.eval.num_contexts)
    size = length + continued
    pieces = zip(*(x.tolist() for x in piece_spans(contexts)), strict=True)
    rows = [contexts["inputs"][row, start : start + size] for row, start, stop in pieces if stop - start >= size]
    if not rows:
        raise UserError(f"--prompt={length}: no held-out piece has {size} tokens; choose shorter prompts.")
    return np.stack(rows[:most]).astype(np.int32)


def nll_of_ours(run: LoadedRun, rival: Any, prompts: np.ndarray, continuations: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood of the continuations' tokens, nats, float64 ``[b, t]``."""
    settings = DecodeSettings(chunk=min(512, prompts.shape[1]), block=16)
    decoder, size = Decoder.of_run(run, rival, settings), run.config.eval.batch_size
    found = []
    for begin in range(0, len(prompts), size):
        rows = (x[begin : begin + size].tolist() for x in (prompts, continuations))
        found += [scored.logprobs for scored in score(decoder, *rows)]
    return -np.asarray(found, np.float64)


def compare(run: LoadedRun, folder: pathlib.Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every policy at every number of keys.

    Returns:
      ``contexts`` and ``rows``, each with ``policy``, ``keys``, perplexities by column, and in ``difference`` the
      largest of a token, nats, of ours to the press with the same definition; None where there is nothing to compare.
    """
    from benchmarks.kvpress_presses import NORM_STEP, NUM_SINKS, PRESSES, Numbers, Theirs

    found = texts(run, arguments.prompt, arguments.continued, arguments.contexts)
    prompts, continuations = np.split(found, [arguments.prompt], axis=1)
    theirs = Theirs(folder, prompts, continuations)
    ours = functools.partial(nll_of_ours, run, prompts=prompts, continuations=continuations)
    own, press = ours(FullAttention()), theirs.nll(None)
    rows = [row("full", arguments.prompt, press, None, own, None)]
    for keys in arguments.keys:
        ratio = 1 - (keys + 0.5) / arguments.prompt  # kvpress rounds the number of keys down
        numbers = Numbers(ratio, keys, keys // 2, observed(keys), SAFEGUARD)
        made = policies(keys, arguments.prompt, NUM_SINKS, NORM_STEP)
        for name in arguments.policies or PRESSES:
            as_it_comes, aligned = PRESSES[name]
            once, always = made.get(name, (None, None))
            columns = (
                theirs.nll(as_it_comes, numbers),
                None if aligned is None else theirs.nll(aligned, numbers),
                None if once is None else ours(once),
                None if always is None else ours(always),
            )
            rows.append(row(name, keys, *columns))
            print(f"{name}, {keys} keys: done", flush=True)
    return {"contexts": len(found), "rows": rows}


COLUMNS = ("kvpress", "aligned", "ours", "every_token")


def row(name: str, keys: int, *nll: np.ndarray | None) -> dict[str, Any]:
    """Returns the row of a policy from the losses of ``COLUMNS``, ``[b, t]`` each or None."""
    press, aligned, own, _ = nll
    same = press if aligned is None else aligned
    perplexities = [None if x is None else math.exp(x.mean()) for x in nll]
    difference = None if own is None or same is None else float(np.abs(own - same).max())
    return {"policy": name, "keys": keys, "difference": difference, **dict(zip(COLUMNS, perplexities, strict=True))}


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as Markdown."""
    lines = [
        "| policy | keys | kvpress | by our definition | ours | largest difference, nats | ours, every token |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = ["" if one[name] is None else f"{one[name]:.4f}" for name in COLUMNS]
        difference = "" if one["difference"] is None else f"{one['difference']:.1e}"
        if one["ours"] is not None and one["aligned"] is None:
            cells[1] = "the same"
        shown = (one["policy"], one["keys"], *cells[:3], difference, cells[3])
        lines.append("".join(f"| {cell} " for cell in shown) + "|")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",") if x]  # noqa: E731
    parser.add_argument("--workdir", required=True, help="a dense run, or an export")
    parser.add_argument("--prepared_dir", default=None, help="where its prepared corpus is now")
    parser.add_argument("--keys", type=numbers, default=[32, 64, 128], help="that a head keeps of a prompt")
    names = ("streaming_llm", "snapkv", "ada_snapkv", "h2o", "tova", "knorm", "keydiff", "expected_attention")
    parser.add_argument("--policies", nargs="+", choices=names, default=[], metavar="NAME", help="by default, all")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--continued", type=int, default=128, help="tokens behind it, that are predicted")
    parser.add_argument("--contexts", type=int, default=32, help="held-out documents, at most")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder for kvpress.json")
    arguments = parser.parse_args(argv)
    for name in ("prompt", "continued", "contexts"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: it must be at least 1.")
    for keys in arguments.keys:
        if not 8 <= keys < arguments.prompt:
            parser.error(f"--keys={keys}: it must be at least 8, and less than --prompt={arguments.prompt}.")
    if arguments.output is not None and not arguments.output.is_dir():
        parser.error(f"--output={arguments.output}: there is no such folder.")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes.

    Raises:
      SystemExit: ours and a press with the same definition differ.
      UserError: the run is not dense, or its layers are none that `transformers` has.
    """
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_hf(arguments.workdir, folder + "/model", prepared_dir=arguments.prepared_dir)
        if exported.architecture == OWN_TYPE:
            raise UserError(
                f"--workdir={arguments.workdir}: kvpress has no {', '.join(exported.own)}; use a dense run."
            )
        run = exported.run
        about = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "kvpress")}
        about |= {"run": run.config.model.layer_pattern, "step": run.step, "data": run.data.description}
        about |= {"prompt": arguments.prompt, "continued": arguments.continued, "architecture": exported.architecture}
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        found = compare(run, pathlib.Path(folder) / "model", arguments)
    print(f"\n{found['contexts']} contexts\n\n{table(found['rows'])}")
    if arguments.output is not None:
        text = json.dumps(about | found, indent=2)
        (arguments.output / "kvpress.json").write_text(text + "\n", encoding="utf-8")
    apart = [one for one in found["rows"] if one["difference"] is not None and not one["difference"] <= MAX_DIFFERENCE]
    if apart:
        names = ", ".join(f"{one['policy']} at {one['keys']} keys by {one['difference']:.1e}" for one in apart)
        raise SystemExit(f"ours differ from kvpress with the same definition: {names}.")


if __name__ == "__main__":
    run_command(main)
