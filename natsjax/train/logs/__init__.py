"""Logs of training steps: files, terminal, warnings."""
