"""Attention of one token over the live slots of a KV buffer, with a length for every (sequence, KV head).

Call ``decode_attention(query, key, value, storage, key_end=…, length=…, position=…, layer=…)``; ``storage`` has keys
and values in the format that ``storage_format()`` names for the platform. ``api`` tries
the backends in turn: ``pallas_tpu`` copies live blocks alone from HBM, ``cudnn`` is the library call with heads folded
into the batch, ``xla`` is plain JAX for every platform. ``reference`` is the dense oracle of the tests, and never a
fallback.

``observed_attention`` is for policies that evict by the attention that keys receive, which no kernel reports.
"""

from pallas_kernels.decode_attention.api import decode_attention, storage_format
from pallas_kernels.decode_attention.observed import observed_attention
from pallas_kernels.decode_attention.storage import Format, Storage

__all__ = ["Format", "Storage", "decode_attention", "observed_attention", "storage_format"]
