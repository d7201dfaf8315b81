"""Attention over keys that live for an interval of queries, with a gradient for the roles that set the interval.

Call one of these two, with the conventions of ``jax.nn.dot_product_attention``:

* ``nats_attention(query, key, value, roles, window=…)``: every key has a role (GLOBAL, LOCAL, SLIDING), which
  determines how long it can be read; differentiable in query, key, value *and* roles.
* ``interval_attention(query, key, value, key_end)``: the interval of each key is given; causal attention, packed
  documents, sliding windows and StreamingLLM are all values of ``key_end``.

Both choose a backend for the platform; ``implementation="xla"`` (or another of ``api.BACKENDS``) names one, and
``tiling=`` divides its work, which changes no result except for the samples of ``Sampled``. A call goes through these
modules:

1. ``api`` checks the arguments, which ``contract`` converts for the backends, takes a tiling from ``tuning_table``
(timed
   by ``autotune`` in ``tuning_table.json``, else by the backend's ``heuristics``) and tries the backends in turn.
2. ``differentiable`` has the custom gradients: ``roles`` turns roles into intervals, ``layout`` gathers the long-lived
   keys, and the backend's three passes (``backend.Backend``) do the work; ``sampling`` samples the queries of
   ``Sampled``, and ``roles`` converts the resulting sums to the gradient of the roles.
3. A backend (a folder: ``pallas_tpu``, ``pallas_gpu`` for Hopper, ``xla`` in plain JAX for every platform) loops over
   the lists of live key blocks that ``blocks`` makes.

``reference`` is the dense oracle that tests compare with, and never a fallback.
"""

from pallas_kernels.nats_attention.api import (
    Exact,
    MaskGradient,
    Sampled,
    Visible,
    interval_attention,
    nats_attention,
)
from pallas_kernels.nats_attention.roles import (
    GLOBAL,
    LOCAL,
    NEVER,
    NO_END,
    SLIDING,
    key_end_from_roles,
    num_roles,
)

__all__ = [
    "GLOBAL",
    "LOCAL",
    "NEVER",
    "NO_END",
    "SLIDING",
    "Exact",
    "MaskGradient",
    "Sampled",
    "Visible",
    "interval_attention",
    "key_end_from_roles",
    "nats_attention",
    "num_roles",
]
