"""Checks of the attention kernels on the device at hand: values and every gradient against oracles in float64.

The cases and the oracles are those of the tests, which run where there is no such device. An oracle gets the rounded
numbers that the backend gets, and computes on the same device: a mistake of the device's float64 would show, not hide.
"""

import contextlib
import functools
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import decode_attention_oracle as decoding
from attention_oracle import (
    BACKENDS,
    GPU_IN_PLACE,
    any_call,
    arguments_of,
    compiled,
    expected_results,
    interval,
    narrowed,
    nats,
    oracle,
    relative_error,
    results,
    sampled,
    worst_error,
)
from cases import ROLE_PATTERNS, SHAPES, Shape, pairs_of

from pallas_kernels.decode_attention.storage import FORMATS
from pallas_kernels.nats_attention.tiling import Tiling

NARROW_TOLERANCE = 3e-2
"""Of ``xla`` where operands of products are rounded: to bfloat16, or by a GPU to the ten bits of TF32."""
DECODE_TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 4e-3}
"""In 16 bits a library rounds the weights, too."""
FOUND = ("group", "tolerance", "errors", "within", "refused", "failed", "seconds")
"""What a record of a check has beside what was checked."""
RESULTS = ("out", "dquery", "dkey", "dvalue", "droles")
EVERY_PATTERN = tuple(pairs_of(ROLE_PATTERNS, ("whole", "packed", "padding"), every=False))
SOME_PATTERNS = (("random", "packed"), ("bursts", "padding"), ("no_global", "whole"))
# Keys are gathered from 512 on. The oracle's time grows with the cube of the length: a minute on a busy CPU.
LONG = {
    "long": Shape(1, 700, 2, 2, 64, 64),
    "long, head dim 128": Shape(1, 700, 2, 1, 128, 64),
    "long, ladder": Shape(1, 700, 1, 2, 64, (12, 46, 184)),
}
INTERPRETED = Shape(1, 131, 1, 1, 64, 5)


class Check(NamedTuple):
    """One comparison.

    Attributes:
      what: what is compared, for its record.
      tolerance: largest relative error that is expected of it.
      errors: computes the relative error of each result.
    """

    what: dict[str, Any]
    tolerance: float
    errors: Callable[[], dict[str, float]]


def _precision(name: str) -> contextlib.AbstractContextManager:
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


class Variant(NamedTuple):
    """Tiling, dtype and precision of products ("": JAX's default) that a backend is called with."""

    backend: str
    dtype: str
    precision: str = ""
    tiling: Tiling | None = None

    @property
    def tolerance(self) -> float:
        """Largest relative error that is expected."""
        if self.backend == "xla" and (self.dtype != "float32" or self.precision != "highest"):
            return NARROW_TOLERANCE
        return BACKENDS[self.backend].tolerance

    def check(self, kind: str, shape: str, errors: Callable[..., dict[str, float]], **details: Any) -> Check:
        """Returns a check of this variant; ``details`` are for its record."""
        what = {"group": self.backend, "backend": self.backend, "kind": kind, "shape": shape, "dtype": self.dtype}
        precision = {"precision": self.precision or "default"} if self.backend == "xla" else {}
        return Check(what | precision | details, self.tolerance, errors)


def _of_roles(
    variant: Variant, name: str, shape: Shape, patterns: Sequence[tuple[str, str]], mask_gradient: str = "exact"
) -> Check:
    """Compares values and all gradients with the dense closed form."""

    def errors():
        arguments = _arguments(variant, shape, patterns)
        options = {"implementation": variant.backend, "tiling": variant.tiling}
        with _precision(variant.precision):
            got = compiled(nats(shape.window, mask_gradient=mask_gradient, **options), *arguments)
        expected = oracle(shape.window, arguments, mask_gradient)
        return _worst_by_result(got, expected, shape.b)

    return variant.check("roles", name, errors, mask_gradient=mask_gradient)


def _of_sampling(variant: Variant, name: str, shape: Shape) -> Check:
    """Compares a sampled gradient with that of ``xla`` on the CPU for the same sample."""

    def errors():
        arguments = _arguments(variant, shape, [("random", "packed")])
        options = {"implementation": variant.backend, "tiling": variant.tiling}
        with _precision(variant.precision):
            got = compiled(sampled(shape.window, 1 / 4, 7, **options), *arguments)
        wide = [x if x is None or x.dtype == np.int32 else np.asarray(x, np.float32) for x in arguments]
        with jax.default_device(jax.devices("cpu")[0]):  # where products of float32 are not rounded
            expected = compiled(sampled(shape.window, 1 / 4, 7, implementation="xla"), *wide)
        return _worst_by_result(got, expected, shape.b)

    return variant.check("roles", name, errors, mask_gradient="sampled")


def _of_positions(variant: Variant, sizes: tuple[int, ...], seed: int) -> Check:
    """Compares values, log-sum-exps and gradients at any positions and ends with the definition in NumPy."""

    def errors():
        call, wide = narrowed(any_call(*sizes, seed), jnp.dtype(variant.dtype))
        attention = interval(variant.backend, variant.tiling)
        with _precision(variant.precision):
            got = jax.jit(functools.partial(results, attention))(call)
        return {"out, lse and gradients": worst_error(got, expected_results(wide, sizes[-1] ** -0.5))}

    return variant.check("positions", "b={} t={} s={} k={} g={} h={}".format(*sizes), errors, seed=seed)


def _arguments(variant: Variant, shape: Shape, patterns: Sequence[tuple[str, str]]) -> tuple:
    options = {"dtype": jnp.dtype(variant.dtype), "spread": BACKENDS[variant.backend].spread}
    return arguments_of(shape, list(patterns), np.random.default_rng(2), **options)


def _worst_by_result(got: Iterable, expected: Iterable, b: int) -> dict[str, float]:
    """Returns the largest error of each result over the patterns, which have ``b`` sequences each."""
    found = {}
    for name, x, y in zip(RESULTS, got, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        parts = [slice(first, first + b) for first in range(0, len(y), b)]
        found[name] = float(np.max([relative_error(x[part], y[part]) for part in parts]))  # NaN too
    return found


def _of_decoding(backend: str, shape: decoding.Shape, format: str, dtype: str, precision: str = "") -> Check:
    """Compares attention of one token over a KV buffer with the dense reference."""

    def errors():
        case = decoding.cast(decoding.case_of(shape), jnp.dtype(dtype))
        found = {}
        for layer in range(shape.layers):
            with _precision(precision):
                got = decoding.run(case, layer, format, shape.u, backend)
            found[f"layer {layer}"] = float(relative_error(got, decoding.expected_of(case, layer)))
        return found

    sizes = " ".join(f"{name}={size}" for name, size in shape._asdict().items())
    what = {"group": "decoding", "backend": backend, "kind": "decoding", "shape": sizes}
    what |= {"format": format, "dtype": dtype, "precision": precision or "default"}
    narrow = dtype == "float32" and precision != "highest"
    return Check(what, NARROW_TOLERANCE if narrow else DECODE_TOLERANCES[dtype], errors)


def gpu_checks() -> list[Check]:
    """Returns the checks of ``pallas_gpu``, those that say most first."""
    narrow = Variant("pallas_gpu", "bfloat16")
    shapes = {name: SHAPES[name]._replace(h=64) for name in SHAPES}  # the kernels take 64 and 128
    long = LONG["long"]
    return [
        _of_roles(narrow, "grouped", shapes["grouped"], EVERY_PATTERN),
        _of_roles(narrow, "long", long, SOME_PATTERNS),
        _of_positions(narrow, (6, 5, 100, 1, 2, 64), 0),
        _of_sampling(narrow, "long", long),
        _of_roles(narrow, "long", long, SOME_PATTERNS, "visible"),
        *(_of_roles(narrow, name, LONG[name], SOME_PATTERNS) for name in ("long, ladder", "long, head dim 128")),
        _of_roles(narrow, "two_blocks", shapes["two_blocks"], SOME_PATTERNS),
        _of_roles(narrow, "long, one document", long, [("random", "one")]),
        _of_positions(narrow, (4, 130, 300, 2, 1, 128), 1),
        _of_roles(narrow._replace(dtype="float16"), "grouped", shapes["grouped"], EVERY_PATTERN),
        *(
            _of_roles(narrow, name, shapes[name], EVERY_PATTERN)
            for name in ("ladder", "one_token", "tiny", "no_window", "wide_window")
        ),
    ]


def interpreted_gpu_checks() -> list[Check]:
    """Returns a check of ``pallas_gpu`` in the GPU interpreter, which takes seconds for a kernel.

    Raises:
      NotImplementedError: this jax has no such interpreter.
    """
    if jax.__version_info__[:2] < (0, 11):
        raise NotImplementedError(f"the GPU interpreter needs jax >= 0.11; this is {jax.__version__}")
    variant = Variant("pallas_gpu", "bfloat16", tiling=GPU_IN_PLACE)
    return [_of_roles(variant, "interpreted", INTERPRETED, [("bursts", "padding")], "visible")]


def xla_checks() -> list[Check]:
    """Returns the checks of ``xla``, with products in full precision, and as a model calls it."""
    exact = Variant("xla", "float32", "highest")
    return [
        _of_roles(exact, "grouped", SHAPES["grouped"], EVERY_PATTERN),
        _of_roles(exact, "long", LONG["long"], SOME_PATTERNS),
        _of_roles(Variant("xla", "float32"), "long", LONG["long"], SOME_PATTERNS),
        _of_roles(Variant("xla", "bfloat16"), "long", LONG["long"], SOME_PATTERNS),
        _of_positions(exact, (8, 13, 21, 2, 2, 4), 0),
        _of_sampling(exact, "long", LONG["long"]),
        _of_roles(exact, "grouped", SHAPES["grouped"], EVERY_PATTERN, "visible"),
        *(
            _of_roles(exact, name, SHAPES[name], EVERY_PATTERN)
            for name in ("ladder", "one_token", "tiny", "no_window", "wide_window")
        ),
    ]


def smallest_xla_checks() -> list[Check]:
    """Returns two quick checks of ``xla``."""
    exact = Variant("xla", "float32", "highest")
    return [_of_roles(exact, "tiny", SHAPES["tiny"], EVERY_PATTERN), _of_positions(exact, (2, 5, 9, 1, 2, 4), 1)]


def decode_checks() -> list[Check]:
    """Returns the checks of decode attention: of cuDNN's, and of ``xla`` in every format of a buffer."""
    small, large = decoding.Shape(2, 2, 2, 3, 256, 64, 256), decoding.Shape(2, 4, 4, 4, 4096, 64, 4096)
    blocks = decoding.Shape(2, 2, 2, 3, 256, 64, 128)
    return [
        *(
            _of_decoding("cudnn", shape, "plain", dtype)
            for dtype in ("bfloat16", "float16")
            for shape in (small, large)
        ),
        _of_decoding("cudnn", large._replace(g=1, h=128), "plain", "bfloat16"),
        *(_of_decoding("xla", blocks, format, "float32", "highest") for format in FORMATS),
        _of_decoding("xla", blocks, "plain", "float32"),
        _of_decoding("xla", large, "plain", "bfloat16"),
    ]


def smallest_decode_checks() -> list[Check]:
    """Returns a quick check of decode attention by ``xla``."""
    return [_of_decoding("xla", decoding.Shape(1, 2, 2, 3, 60, 8, 20), "plain", "float32", "highest")]


def run(checks: Sequence[Check], write: Callable[[dict[str, Any]], None], end: float) -> int:
    """Runs checks and writes a record of each as soon as it is there.

    A record has what was checked, and ``errors`` by result, ``tolerance`` and ``within``; or ``refused``, the reason
    why the backend does not serve the call; or ``failed``, a traceback.

    Args:
      checks: to run, in this order.
      write: takes a record.
      end: ``time.monotonic()`` before which the last one should be done: none begins that would end later if it took as
        long as the longest so far.

    Returns:
      The number of checks that were not run.
    """
    longest = 0.0
    for number, check in enumerate(checks):
        began = time.monotonic()
        if began + longest > end:
            return len(checks) - number
        record: dict[str, Any] = {**check.what, "tolerance": check.tolerance}
        try:
            record["errors"] = check.errors()
            record["within"] = is_close(record)
        except NotImplementedError as refusal:
            record["refused"] = str(refusal)
        except Exception:
            record["failed"] = traceback.format_exc()
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        write(record | {"seconds": round(seconds, 2)})
    return 0


def is_close(record: Mapping[str, Any], times: float = 1) -> bool:
    """Returns whether all errors of a record are below so many times their tolerance; no errors are not, nor is NaN."""
    errors = record.get("errors", {}).values()
    return bool(errors) and all(error < times * record["tolerance"] for error in errors)
