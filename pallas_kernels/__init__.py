"""Attention kernels, each in a folder of its own; they import jax and nothing of natsjax."""
