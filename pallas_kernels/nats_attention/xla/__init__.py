"""The backend for every platform: blockwise loops over live key blocks in plain JAX."""

from pallas_kernels.nats_attention.xla.backward import masked_out_pass, visible_pass
from pallas_kernels.nats_attention.xla.forward import forward

__all__ = ["forward", "masked_out_pass", "visible_pass"]
