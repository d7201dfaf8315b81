"""The backend for TPUs: Pallas kernels that copy live blocks from HBM while they compute."""

from pallas_kernels.nats_attention.pallas_tpu.forward import forward
from pallas_kernels.nats_attention.pallas_tpu.heuristics import (
    PLATFORMS,
    TpuTiling,
    candidate_tilings,
    check,
    default_tiling,
)
from pallas_kernels.nats_attention.pallas_tpu.masked_out import masked_out_pass
from pallas_kernels.nats_attention.pallas_tpu.visible import visible_pass

__all__ = [
    "PLATFORMS",
    "TpuTiling",
    "candidate_tilings",
    "check",
    "default_tiling",
    "forward",
    "masked_out_pass",
    "visible_pass",
]
