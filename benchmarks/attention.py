"""Speed of attention whose cost follows the live keys, forward and backward, against dense and block-sparse rivals.

    python -m benchmarks.attention --output=docs            the table of docs/attention.md, on a CPU or a GPU
    python -m benchmarks.attention --lengths=8192 --global_fractions=0.01,0.05,0.2 --windows=64,256,1024

Roles are random: a fraction of GLOBAL tokens, the rest half LOCAL, half SLIDING. Every round times each
contestant once, so that whatever else the machine does hits all of them; a ratio is the median over rounds of
rival / ours. On a CPU the rivals are ``torch`` (scaled_dot_product_attention, where PyTorch is installed) and ``jax``
(``jax.nn.dot_product_attention``, as long as its logits fit); on a GPU ``cudnn`` (the same function) and ``flex``
(torch FlexAttention). Rivals differentiate query, key and value; ours also the roles.

XLA runs most of a program's operations one after the other, so a CPU is used best with a device for each core and the
heads divided among them; ``--devices=1`` measures one device. JAX's rivals run in the same way.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.attention_contestants import (
    BY_HEAD,
    ROLES_BY_HEAD,
    Case,
    Contestant,
    inputs,
    jax_rival,
    ours,
    timed_call,
    torch_rivals,
)
from benchmarks.counting import count_pairs
from natsjax.config_fields import did_you_mean
from natsjax.runtime.flags import Parser, run_command
from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import api, tuning_table
from pallas_kernels.nats_attention.tiling import Tiling, num_cores

PASSES = ("forward", "sampled", "exact", "visible")


def race(contestants: list[Contestant], repeats: int) -> dict[str, list[float]]:
    """Times each contestant in each round, in seconds, after one call that is not timed."""
    for contestant in contestants:
        contestant.call()
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(repeats):
        for contestant in contestants:
            began = time.perf_counter()
            contestant.call()
            seconds[contestant.name].append(time.perf_counter() - began)
    return seconds


def ratio(rival: list[float], own: list[float]) -> float:
    """Returns the median over rounds of rival / own: how many times faster ``own`` is."""
    return statistics.median(x / y for x, y in zip(rival, own, strict=True))


def tilings_of(case: Case, implementation: str) -> dict[str, Tiling]:
    """Returns the default tiling ("tuned"), and the same with tiles of 128 tokens."""
    backend = api.BACKENDS[implementation]
    tuned = tuning_table.choose(implementation, backend, case.problem)
    block = min(128, case.length)
    small = dataclasses.replace(backend.default_tiling(case.problem), query_block=block, key_block=block)
    return {"128": small, "tuned": tuned}


def measure(case: Case, kind: str, arguments: argparse.Namespace, platform: str) -> dict[str, Any]:
    """Measures a row: seconds and ratios of a case and a pass."""
    given = inputs(case)
    by_name = tilings_of(case, arguments.implementation)
    contestants, temporaries = ours(case, given, kind, by_name, arguments.implementation)
    rivals = list(torch_rivals(case, given, kind, platform))
    dense = jax_rival(case, given, kind, platform)
    seconds = race([*contestants, *rivals], arguments.repeats)
    ratios = {(r.name, own): ratio(seconds[r.name], seconds[own]) for r in rivals for own in by_name}
    if dense is not None:  # so slow on a CPU that it gets a single round, beside ours
        beside = race([*contestants, dense], arguments.repeats if platform == "gpu" else 1)
        seconds[dense.name] = beside[dense.name]
        ratios |= {(dense.name, own): ratio(beside[dense.name], beside[own]) for own in by_name}
    row: dict[str, Any] = {"case": case, "pass": kind, "temporaries": temporaries, "ratio": ratios}
    row["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    end = na.key_end_from_roles(jnp.asarray(given.role_ids), window=case.window)
    row["pairs"] = {name: count_pairs(end, tiling) for name, tiling in by_name.items()}
    return row


def cost_of_layout(case: Case, arguments: argparse.Namespace, platform: str) -> dict[str, float]:
    """Measures, with all tokens GLOBAL, seconds of the roles' forward, of plain causal attention and of the rivals."""
    given = inputs(case)._replace(role_ids=np.zeros((1, case.num_kv_heads, case.length), np.int32))
    tuned = tuning_table.choose(arguments.implementation, api.BACKENDS[arguments.implementation], case.problem)
    contestants, _ = ours(case, given, "forward", {"all GLOBAL": tuned}, arguments.implementation)
    arrays = [jnp.asarray(x, case.dtype) for x in (given.query, given.key, given.value)]
    end = jnp.full((1, case.num_kv_heads, case.length), na.NO_END, jnp.int32)
    plain = dataclasses.replace(tuned, thresholds=())
    causal = functools.partial(na.interval_attention, implementation=arguments.implementation, tiling=plain)
    call, _ = timed_call(causal, case, (*arrays, end), (*[BY_HEAD] * 3, ROLES_BY_HEAD), BY_HEAD)
    contestants.append(Contestant("plain causal", call))
    rivals = list(torch_rivals(case, given, "forward", platform))
    seconds = race([*contestants, *rivals], arguments.repeats)
    return {name: ratio(values, seconds["all GLOBAL"]) for name, values in seconds.items() if name != "all GLOBAL"}


def print_row(row: dict[str, Any]) -> None:
    """Prints a line of the Markdown table."""
    case, seconds = row["case"], row["seconds"]
    rivals = dict.fromkeys(rival for rival, _ in row["ratio"])
    ratios = row["ratio"]
    faster = "; ".join(f"{rival} {ratios[rival, '128']:.2f}, {ratios[rival, 'tuned']:.2f}" for rival in rivals)
    times = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    pairs = ", ".join(f"{pairs.computed / pairs.live:.2f}" for pairs in row["pairs"].values())
    memory = ", ".join(f"{size / 2**20:.0f}" for size in row["temporaries"].values())
    print(
        f"| {case.length} | {100 * case.global_fraction:g} % | {case.window} | {row['pass']} | {faster or '-'} | "
        f"{times} | {pairs} | {memory} |",
        flush=True,
    )


def draw(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Times faster than each rival over the length, a line per pass, for the tuned tiling."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(PASSES, ("#0072b2", "#009e73", "#d55e00", "#999999"), strict=True))
    markers = {"torch": "o", "jax": "s", "cudnn": "o", "flex": "^"}
    first = rows[0]["case"]
    chosen = [r for r in rows if r["case"]._replace(length=0) == first._replace(length=0)]
    for kind in dict.fromkeys(row["pass"] for row in chosen):
        for rival in dict.fromkeys(rival for row in chosen for rival, _ in row["ratio"]):
            points = [
                (row["case"].length, row["ratio"][rival, "tuned"])
                for row in chosen
                if row["pass"] == kind and (rival, "tuned") in row["ratio"]
            ]
            axes.plot(*zip(*points, strict=True), color=colors[kind], marker=markers[rival], label=f"{kind}: {rival}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    lengths = sorted({row["case"].length for row in chosen})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} times")
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("times faster than the rival")
    axes.set_title(f"{100 * first.global_fraction:g} % GLOBAL, window {first.window}, {first.dtype}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda kind: lambda text: [kind(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=numbers(int), default=[8192, 16384, 32768], help="tokens")
    parser.add_argument("--global_fractions", type=numbers(float), default=[0.05], help="fractions of GLOBAL tokens")
    parser.add_argument("--windows", type=numbers(int), default=[256], help="of SLIDING tokens")
    parser.add_argument("--passes", type=numbers(str), default=["forward", "sampled", "exact"], help=", ".join(PASSES))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="(default: float32 on a CPU, bfloat16 elsewhere)"
    )
    parser.add_argument("--heads", type=numbers(int), default=[8, 2, 64], help="query heads, KV heads, head dim")
    parser.add_argument(
        "--implementation", default=None, choices=sorted(api.BACKENDS), help="backend (default: by platform)"
    )
    parser.add_argument(
        "--devices", type=int, default=None, help="devices that share the heads (default: a CPU's cores)"
    )
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder for the picture")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.passes) - set(PASSES)
    if unknown:
        meant = did_you_mean(min(unknown), PASSES)
        parser.error(f"--passes: {', '.join(sorted(unknown))} is none of {', '.join(PASSES)}{meant}.")
    num_kv_heads = arguments.heads[1]
    if arguments.devices is not None and (arguments.devices < 1 or num_kv_heads % arguments.devices):
        parser.error(f"--devices={arguments.devices}: {num_kv_heads} KV heads do not divide evenly among them.")
    return arguments


def _devices(arguments: argparse.Namespace) -> int:
    """Sets the number of CPU devices that share the heads, which JAX must know before its first use.

    Raises:
      SystemExit: there are not so many.
    """
    num_kv_heads = arguments.heads[1]

    def most(limit):
        return max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= limit)

    wanted = arguments.devices or most(num_cores())
    if wanted > 1:
        with contextlib.suppress(RuntimeError):  # too late: what there is may be enough
            jax.config.update("jax_num_cpu_devices", wanted)
    if arguments.devices is None:
        return most(min(num_cores(), jax.local_device_count())) if jax.default_backend() == "cpu" else 1
    if jax.local_device_count() < wanted:
        raise SystemExit(f"--devices={wanted}: JAX has {jax.local_device_count()} of them.")
    return wanted


def main() -> None:
    """Measures, prints, draws."""
    arguments = parse()
    devices = _devices(arguments)
    platform = jax.default_backend()
    if arguments.implementation is None:
        arguments.implementation = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform, "xla")
    dtype = arguments.dtype or ("float32" if platform == "cpu" else "bfloat16")
    heads = dict(zip(("num_heads", "num_kv_heads", "head_dim"), arguments.heads, strict=True))
    cases = [
        Case(length, fraction, window, **heads, dtype=dtype, devices=devices)
        for fraction in arguments.global_fractions
        for window in arguments.windows
        for length in arguments.lengths
    ]
    device = jax.devices()[0].device_kind
    where = f"{devices} {device} device{'s' if devices > 1 else ''}, {num_cores()} CPU cores"
    print(f"{arguments.implementation}, {where}, jax {jax.__version__}, {dtype}")
    print("\n| tokens | GLOBAL | window | pass | times faster, 128 and tuned | seconds | computed / live | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases:
        for kind in arguments.passes:
            rows.append(measure(case, kind, arguments, platform))
            print_row(rows[-1])
    print("\nAll tokens GLOBAL, forward: seconds of the other over ours\n")
    for case in cases:
        found = cost_of_layout(case, arguments, platform)
        print(
            f"* {case.length} tokens: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True
        )
    if arguments.output is not None:
        draw(arguments.output / "attention.png", rows)


if __name__ == "__main__":
    run_command(main)
