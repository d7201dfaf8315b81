"""Attention over keys that live for an interval of queries, with a gradient for the roles that set the interval.

Call these two, both with the conventions of ``jax.nn.dot_product_attention``:

* ``nats_attention(query, key, value, roles, window=…)``: every key has a role (GLOBAL, LOCAL, SLIDING) that says how
  long it can be read; differentiable in query, key, value *and* roles.
* ``interval_attention(query, key, value, key_end)``: the interval of each key is given; causal attention, packed
  documents, sliding windows and StreamingLLM are all values of ``key_end``.

``roles`` holds what turns roles into intervals, ``api`` dispatches, ``xla`` is the backend for every platform,
``pallas_gpu`` the one for Hopper GPUs and ``reference`` the dense oracle that tests compare with.
"""

from pallas_kernels.nats_attention.api import (
    Exact,
    MaskGradient,
    Sampled,
    Visible,
    interval_attention,
    nats_attention,
)
from pallas_kernels.nats_attention.roles import GLOBAL, LOCAL, NO_END, NUM_ROLES, SLIDING, key_end_from_roles

__all__ = [
    "GLOBAL",
    "LOCAL",
    "NO_END",
    "NUM_ROLES",
    "SLIDING",
    "Exact",
    "MaskGradient",
    "Sampled",
    "Visible",
    "interval_attention",
    "key_end_from_roles",
    "nats_attention",
]
