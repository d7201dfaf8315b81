"""Measurements that the documentation quotes; each is a module to run from the repository root."""
