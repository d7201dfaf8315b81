"""TPU: a kernel that copies the occupied blocks alone from HBM, while it computes with those that have come."""

from pallas_kernels.decode_attention.pallas_tpu.launch import PLATFORMS, READS, attend, check

__all__ = ["PLATFORMS", "READS", "attend", "check"]
