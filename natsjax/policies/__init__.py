"""Policies: which keys live."""
