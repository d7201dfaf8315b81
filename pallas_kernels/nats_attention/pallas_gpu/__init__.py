"""The backend for Hopper GPUs: Mosaic GPU kernels in which one warpgroup copies live tiles for two that compute."""

from pallas_kernels.nats_attention.pallas_gpu.forward import forward
from pallas_kernels.nats_attention.pallas_gpu.heuristics import (
    PLATFORMS,
    GpuTiling,
    candidate_tilings,
    check,
    default_tiling,
)
from pallas_kernels.nats_attention.pallas_gpu.masked_out import masked_out_pass
from pallas_kernels.nats_attention.pallas_gpu.visible import visible_pass

__all__ = [
    "PLATFORMS",
    "GpuTiling",
    "candidate_tilings",
    "check",
    "default_tiling",
    "forward",
    "masked_out_pass",
    "visible_pass",
]
