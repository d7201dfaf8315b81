"""The backend for every platform: blockwise loops over live key blocks in plain JAX."""

from pallas_kernels.nats_attention.xla.backward import masked_out_pass, visible_pass
from pallas_kernels.nats_attention.xla.forward import forward
from pallas_kernels.nats_attention.xla.heuristics import (
    PLATFORMS,
    XlaTiling,
    candidate_tilings,
    check,
    default_tiling,
)

__all__ = [
    "PLATFORMS",
    "XlaTiling",
    "candidate_tilings",
    "check",
    "default_tiling",
    "forward",
    "masked_out_pass",
    "visible_pass",
]
