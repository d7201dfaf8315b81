"""Decoding through a KV buffer that frees what a policy drops."""
