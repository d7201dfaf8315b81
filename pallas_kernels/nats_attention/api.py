"""The public functions: they check the arguments and choose a backend, or raise the reasons of all backends."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import as_int32, check_floats, check_head_dim, checked_scale, checked_windows
from pallas_kernels.manual_axes import vary_like
from pallas_kernels.nats_attention import (
    contract,
    differentiable,
    pallas_gpu,
    pallas_tpu,
    reference,
    ring,
    tuning_table,
    xla,
)
from pallas_kernels.nats_attention.backend import Backend
from pallas_kernels.nats_attention.differentiable import Settings
from pallas_kernels.nats_attention.roles import num_roles
from pallas_kernels.nats_attention.tiling import Problem, Tiling
from pallas_kernels.platforms import current_platform

BACKENDS: dict[str, Backend] = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "xla": xla}
"""Tried in this order, where the platform is theirs."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """Role gradients from every causal pair, also the masked-out ones: exact, and quadratic in the length."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Role gradients from the visible pairs and from a random sample of the masked-out ones.

    Attributes:
      fraction: fraction of the query blocks whose masked-out pairs are evaluated, in (0, 1].
    """

    fraction: float = 1 / 8

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Sampled(fraction={self.fraction}): the fraction must be in (0, 1].")


@dataclasses.dataclass(frozen=True)
class Visible:
    """Role gradients from the visible pairs only; no key gets credit for pairs that its role hides."""


MaskGradient = Exact | Sampled | Visible
_NAMES: dict[str, MaskGradient] = {"exact": Exact(), "sampled": Sampled(), "visible": Visible()}


def _mask_gradient(given: MaskGradient | str) -> MaskGradient:
    if isinstance(given, MaskGradient):
        return given
    if isinstance(given, str) and given in _NAMES:
        return _NAMES[given]
    expected = ", ".join([*map(repr, _NAMES), "Exact()", "Sampled(fraction)", "Visible()"])
    raise ValueError(f"mask_gradient={given!r}: one of {expected} was expected.")


def _share_of_masked_out(mask_gradient: MaskGradient) -> float:
    match mask_gradient:
        case Sampled(fraction):
            return fraction
        case Visible():
            return 0.0
    return 1.0


def _check(query, key, value) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape}: [b, t, n, h], [b, s, k, h] and [b, s, k, h] "
            "were expected."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {query.shape} and key {key.shape} differ in batch or head dim.")
    n, k = query.shape[2], key.shape[2]
    if n % k if k else n:
        raise ValueError(f"{n} query heads do not divide evenly among {k} KV heads.")
    check_floats(query=query, key=key, value=value)
    check_head_dim(query.shape[3])


def _is_empty(query: jax.Array, key: jax.Array) -> bool:
    """Returns True if there are no pairs: 0 sequences, queries, keys or heads, of which no tile can be cut."""
    return 0 in query.shape or 0 in key.shape


def _nothing(query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the results of a call without any pairs."""
    return jnp.zeros(query.shape, query.dtype), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)


def _expect(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; {shape} was expected.")


def _first_index(length: int, axis_name: str | None) -> jax.Array:
    """Returns the index in the sequence of the first token of this device's ``length``."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name) * length


def _check_divided(length: int, axis_name: str | None) -> None:
    if axis_name is not None and length % 2:
        raise ValueError(f"axis_name={axis_name!r}: a device's part is {length} tokens; an even number was expected.")


def _problem(query: jax.Array, key: jax.Array, value: jax.Array, window: int) -> Problem:
    (b, t, n, h), (s, k) = query.shape, key.shape[1:3]
    return Problem(b, t, s, k, n // k, h, window, jnp.result_type(query, key, value).name)


def _first_that_serves(
    implementation: str | None,
    problem: Problem,
    tiling: Tiling | None,
    call_backend: Callable[[Backend, Tiling], Any],
    call_reference: Callable[[], Any],
):
    """Calls the named backend, or the first one for this platform that does not refuse."""
    if implementation == "reference":  # dense: for tests, only by name
        return call_reference()
    if implementation is not None and implementation not in BACKENDS:
        known = ", ".join(map(repr, [*BACKENDS, "reference"]))
        raise ValueError(f"implementation={implementation!r}: one of {known} was expected.")
    platform = current_platform()
    refusals = []
    for name, backend in BACKENDS.items():
        if implementation not in (None, name) or (implementation is None and platform not in backend.PLATFORMS):
            continue
        try:
            chosen = tuning_table.choose(name, backend, problem) if tiling is None else tiling
            backend.check(problem, chosen)
            return call_backend(backend, chosen)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("no backend can serve this call; " + "; ".join(refusals))


def nats_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    roles: jax.Array,
    *,
    window: int | Sequence[int],
    document_end: jax.Array | None = None,
    scale: float | None = None,
    mask_gradient: MaskGradient | str = Exact(),
    sample_key: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    tiling: Tiling | None = None,
    axis_name: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes causal attention in which each key's role determines the last query that can read it.

    A GLOBAL key is read by every later query of its document, a LOCAL key up to and including the next GLOBAL token
    of its KV head, a SLIDING key by the ``window`` queries after it; every query reads at least its own key. With
    several windows there is a SLIDING role for each. The gradient for ``roles`` is that of the mask relaxed to
    ``G + S [t <= s + window] + Lo prod_{s<u<t} (1 - G[u])``, with the ratio of masked-out pairs clipped at 1: what a
    straight-through estimator needs. On a mesh call it inside ``jax.shard_map``, batch and heads divided, and with
    ``axis_name`` the sequence.

    Dtypes, scale, NaN and the result without any pairs are as in ``interval_attention``. Here the keys
    that nobody reads are those of padding, ``document_end[s] <= s``.

    Args:
      query: ``[b, t, n, h]``, float; the query heads of one KV head are neighbors.
      key, value: ``[b, t, k, h]``, float, ``n`` a multiple of ``k``.
      roles: float ``[b, k, t, r]``, one-hot over (GLOBAL, LOCAL, SLIDING), the last once for each window; of others the
        largest counts, the first of equal ones.
      window: tokens, 0 or more; 0 leaves a SLIDING key to its own query alone, one of ``t`` or more is no bound. A
        tuple in ascending order: of the SLIDING roles.
      document_end: int32 ``[b, t]``, exclusive index of the end of each token's document; 0 (or any number up to the
        token's own index) marks padding, whose rows are 0; ``t`` or more is the end of the sequence. It bounds who
        reads the token's own key, and need not agree with its neighbors'. None: one document.
      scale: of the logits, a positive Python number; default ``h ** -0.5``.
      mask_gradient: how much of the role gradient is computed: ``Exact()``, ``Sampled(fraction)``, ``Visible()``, or
        "exact", "sampled", "visible".
      sample_key: a PRNG key for ``Sampled``.
      return_lse: also return the log-sum-exp of the visible logits, differentiable in query, key and roles.
      implementation: "pallas_tpu", "pallas_gpu", "xla", "reference" (dense, for tests), or None for the first backend
        of this platform that can serve the call.
      tiling: how the work is cut; None: by the shapes.
      axis_name: inside ``jax.shard_map``, the axis of the mesh that the sequence is divided along: ``t`` is then this
        device's part, of an even number of tokens, and the parts are one sequence in the order of the axis.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``query``; with ``return_lse`` also float32 ``[b, t, n]``, −∞ for a query without
      a visible key.

    Raises:
      ValueError: shapes, dtypes, numbers or names that do not fit.
      NotImplementedError: no backend can serve the call; the message has each one's reason.

    Example:
      >>> roles = jax.nn.one_hot(jnp.array([[[0, 2, 1]]]), 3)
      >>> out = nats_attention(q, k, v, roles, window=1)  # q [1, 3, 2, 64], k and v [1, 3, 1, 64]

    Source: arXiv:2502.13251, section 3.
    """
    _check(query, key, value)
    b, t, _, _ = query.shape
    _expect("key", key, (b, t, *key.shape[2:]))
    windows = checked_windows(window)
    _expect("roles", roles, (b, key.shape[2], t, num_roles(len(windows))))
    check_floats(roles=roles)
    _check_divided(t, axis_name)
    length = t if axis_name is None else t * jax.lax.axis_size(axis_name)
    windows = tuple(min(x, length) for x in windows)  # a longer one is the same, and int32 has an end
    mask_gradient = _mask_gradient(mask_gradient)
    if isinstance(mask_gradient, Sampled) and sample_key is None:
        raise ValueError("mask_gradient=Sampled needs a sample_key.")
    scale = checked_scale(scale, query.shape[-1])
    if document_end is not None:
        document_end = as_int32("document_end", document_end, (b, t))
        unread = document_end <= _first_index(t, axis_name) + jnp.arange(t, dtype=jnp.int32)
        key, value = contract.clear(unread[:, None], key, value)
    if _is_empty(query, key):
        out, lse = vary_like(_nothing(query), (query, key, value, roles, document_end))
        return (out, lse) if return_lse else out

    def call_backend(backend, chosen):
        settings = Settings(backend, chosen, scale, windows, _share_of_masked_out(mask_gradient), return_lse)
        if axis_name is not None:
            return ring.nats_attention(query, key, value, roles, document_end, sample_key, settings, axis_name)
        return differentiable.nats_attention(query, key, value, roles, document_end, sample_key, settings)

    def call_reference():
        if axis_name is not None:
            raise NotImplementedError("the reference knows no divided sequence")
        if isinstance(mask_gradient, Sampled):
            raise NotImplementedError("it has no sampled role gradients; use Exact() or Visible()")
        return reference.closed_form_attention(
            query, key, value, roles, document_end, windows, scale, True, isinstance(mask_gradient, Visible), return_lse
        )

    problem = _problem(query, key, value, windows[-1])
    return _first_that_serves(implementation, problem, tiling, call_backend, call_reference)


def interval_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_end: jax.Array,
    *,
    query_position: jax.Array | None = None,
    key_position: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    tiling: Tiling | None = None,
    axis_name: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention in which query t reads key s when ``key_position[s] <= query_position[t] < key_end[s]``.

    Differentiable in query, key and value (and through the log-sum-exp). On a mesh call it inside ``jax.shard_map``,
    batch and heads divided.

    *Positions and ends* are any int32: negative, in any order, more than once, unrelated to each other. The inequality
    above is all that counts, so a key with ``key_end <= key_position`` is read by nobody, and a query at ``NO_END``
    (the largest int32) reads nothing. Integers of other dtypes are cut to the range of int32 (NumPy's before JAX makes
    them int32), and a query outside of it reads nothing. Neighboring positions in order are fast: a tile of queries
    and keys is left out when no interval of its keys can meet its queries.

    *Nothing to read*: a query without a visible key gives 0 and a log-sum-exp of −∞, gets the gradient 0 and gives none
    to any key, whatever its values and gradient, NaN included. The same holds for a key whose interval is empty, or
    before the first or after the last position of the queries. All other arguments are finite: where
    one query reads a key, the others' weight of 0 for it would be 0 times NaN. With 0 sequences, queries, keys or
    heads the results are zeros and −∞ of their shapes.

    *Precision*: logits, weights and sums are float32 whatever the dtypes, float64 included, and query, key and value
    may differ in theirs. Logits must not overflow float32. Gradients take the exponential of a logit less the
    log-sum-exp, so that what float32 rounds off a logit (6e-8 of it) is their relative error.

    Args:
      query: ``[b, t, n, h]``, float; the query heads of one KV head are neighbors.
      key, value: ``[b, s, k, h]``, float, ``n`` a multiple of ``k``.
      key_end: int32 ``[b, k, s]``, exclusive; ``NO_END`` for a key without an end, 0 for padding among positions of 0
        and more (``NEVER``, the smallest int32, among any).
      query_position: int32 ``[b, t]``, index of each query; default ``0 … t-1``.
      key_position: int32 ``[b, k, s]``, index of each key; default ``0 … s-1``.
      scale: of the logits, a positive Python number that float32 can hold; default ``h ** -0.5``.
      return_lse: also return the log-sum-exp of the visible logits.
      implementation: "pallas_tpu", "pallas_gpu", "xla", "reference" (dense, for tests), or None for the first backend
        of this platform that can serve the call.
      tiling: how the work is cut; None: by the shapes.
      axis_name: as in ``nats_attention``; without positions, which are refused.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``query``; with ``return_lse`` also float32 ``[b, t, n]``. A query without a
      visible key gets 0 and −∞.

    Raises:
      ValueError: shapes, dtypes, numbers or names that do not fit.
      NotImplementedError: no backend can serve the call; the message has each one's reason.

    Example:
      >>> sliding = jnp.arange(s) + min(window, s) + 1  # a plain sliding window; int32 has an end
      >>> out = interval_attention(q, k, v, jnp.broadcast_to(sliding, (b, num_kv_heads, s)))
    """
    _check(query, key, value)
    (b, t), (s, k) = query.shape[:2], key.shape[1:3]
    key_end = as_int32("key_end", key_end, (b, k, s))
    _check_divided(t, axis_name)
    if axis_name is not None and not (s == t and query_position is None and key_position is None):
        raise ValueError(f"axis_name={axis_name!r}: queries and keys are those of one sequence, without positions.")
    scale = checked_scale(scale, query.shape[-1])
    if axis_name is None:
        intervals, unread = contract.place(query_position, key_position, key_end, t)
    else:
        unread = key_end <= _first_index(t, axis_name) + jnp.arange(t, dtype=jnp.int32)
    key, value = contract.clear(unread, key, value)
    if _is_empty(query, key):
        out, lse = vary_like(_nothing(query), (query, key, value, unread))
        return (out, lse) if return_lse else out

    def call_backend(backend, chosen):
        if axis_name is not None:
            return ring.interval_attention(query, key, value, key_end, Settings(backend, chosen, scale), axis_name)
        return differentiable.interval_attention(query, key, value, intervals, Settings(backend, chosen, scale))

    def call_reference():
        if axis_name is not None:
            raise NotImplementedError("the reference knows no divided sequence")
        at, begin, end = intervals
        return reference.interval_attention(query, key, value, end, query_position=at, key_position=begin, scale=scale)

    out, lse = _first_that_serves(implementation, _problem(query, key, value, 0), tiling, call_backend, call_reference)
    return (out, lse) if return_lse else out
