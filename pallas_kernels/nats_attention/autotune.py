"""Times the candidate tilings of a backend on the device at hand, and writes the fastest to a table.

    python -m pallas_kernels.nats_attention.autotune --lengths=1024,8192 [--backend=xla] [--output=tuning_table.json]

Without ``--output`` the rows go into the package's own ``tuning_table.json``, where ``tuning_table.choose`` finds them;
rows of other devices and problems stay. A round times every candidate once, one after the other, so that whatever else
the machine does hits all of them; the fastest by the median over rounds wins.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from natsjax.runtime.flags import Parser, run_command  # a command, which the kernels do not import
from pallas_kernels.nats_attention import api, tuning_table
from pallas_kernels.nats_attention.roles import num_roles
from pallas_kernels.nats_attention.tiling import Problem, Tiling


def random_inputs(problem: Problem, global_fraction: float, key: jax.Array) -> tuple[jax.Array, ...]:
    """Returns random ``(query, key, value, roles)`` of a problem; half of the other roles are LOCAL, half SLIDING."""
    keys = jax.random.split(key, 4)
    b, t, s, k, group, h, _, dtype = problem
    query = jax.random.normal(keys[0], (b, t, k * group, h), dtype)
    key, value = (jax.random.normal(one, (b, s, k, h), dtype) for one in keys[1:3])
    rest = (1 - global_fraction) / 2
    logits = jnp.log(jnp.asarray([global_fraction, rest, rest]))
    ids = jax.random.categorical(keys[3], logits, shape=(b, k, s))
    return query, key, value, jax.nn.one_hot(ids, num_roles(1))


def time_tilings(
    name: str,
    problem: Problem,
    candidates: Sequence[Tiling],
    *,
    mask_gradient: api.MaskGradient | str = "sampled",
    global_fraction: float = 0.05,
    repeats: int = 3,
) -> dict[Tiling, float]:
    """Returns median seconds of forward and backward under each tiling; prints those that cannot be compiled.

    Args:
      name: of the backend in ``api.BACKENDS``.
      problem: as many queries as keys.
      candidates: tilings.
      mask_gradient: how much of the role gradient is computed.
      global_fraction: of the tokens.
      repeats: rounds.
    """
    arrays = random_inputs(problem, global_fraction, jax.random.key(0))
    sample_key = jax.random.key(1)

    def loss(query, key, value, roles, tiling):
        out = api.nats_attention(
            *(query, key, value, roles),
            window=problem.window,
            mask_gradient=mask_gradient,
            sample_key=sample_key,
            implementation=name,
            tiling=tiling,
        )
        return jnp.sum(typing.cast(jax.Array, out).astype(jnp.float32))

    programs = {}
    for tiling in candidates:
        step = jax.jit(jax.grad(functools.partial(loss, tiling=tiling), argnums=(0, 1, 2, 3)))
        try:
            jax.block_until_ready(step(*arrays))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as problem_found:
            print(f"left out {tiling}: {str(problem_found).splitlines()[0]}", flush=True)
            continue
        programs[tiling] = step
    seconds: dict[Tiling, list[float]] = {tiling: [] for tiling in programs}
    for _ in range(repeats):
        for tiling, step in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[tiling].append(time.perf_counter() - began)
    return {tiling: statistics.median(values) for tiling, values in seconds.items()}


def _entry(name: str, problem: Problem, tiling: Tiling) -> tuning_table.Entry:
    fields = dataclasses.asdict(tiling)
    del fields["thresholds"]  # they follow from the problem
    return tuning_table.Entry(name, tuning_table.device_kind(), problem, fields)


def main(argv: list[str] | None = None) -> None:
    """Times, writes, prints."""
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="xla", choices=sorted(api.BACKENDS))
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192], help="tokens")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--heads", type=numbers, default=[8, 2, 64], help="query heads, KV heads, head dim")
    parser.add_argument("--window", type=int, default=256, help="of SLIDING tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--global_fraction", type=float, default=0.05)
    parser.add_argument("--mask_gradient", default="sampled", choices=("exact", "sampled", "visible"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--output", type=pathlib.Path, default=tuning_table.TABLE, help="table to put the rows into")
    arguments = parser.parse_args(argv)
    num_heads, num_kv_heads, head_dim = arguments.heads
    for length in arguments.lengths:
        group = num_heads // num_kv_heads
        shape = (arguments.batch, length, length, num_kv_heads, group, head_dim)
        problem = Problem(*shape, arguments.window, arguments.dtype)
        backend = api.BACKENDS[arguments.backend]
        seconds = time_tilings(
            arguments.backend,
            problem,
            list(dict.fromkeys([backend.default_tiling(problem), *backend.candidate_tilings(problem)])),
            mask_gradient=arguments.mask_gradient,
            global_fraction=arguments.global_fraction,
            repeats=arguments.repeats,
        )
        if not seconds:
            raise SystemExit(f"no tiling of {arguments.backend} could be compiled for {problem}.")
        best = _entry(arguments.backend, problem, min(seconds, key=lambda tiling: seconds[tiling]))
        same = (best.backend, best.device, best.problem)
        tuning_table.read_table.cache_clear()
        kept = [x for x in tuning_table.read_table(arguments.output) if (x.backend, x.device, x.problem) != same]
        tuning_table.write_table([*kept, best], arguments.output)
        tuning_table.read_table.cache_clear()
        for tiling, value in sorted(seconds.items(), key=lambda pair: pair[1]):
            print(f"{value:.4f} s  {tiling}", flush=True)


if __name__ == "__main__":
    run_command(main)
