"""Perplexity against KV budget: measures a run with its roles and under fixed policies, and writes the report.

python -m natsjax.evaluate --workdir=DIR [--budgets=0.05,0.1] [--baseline_workdir=DIR] [--prepared_dir=DIR]
"""

import lazy_loader

DEFAULT_CHUNK = 16
"""Tokens that ``mode="decode"`` reads at once; for SnapKV and Ada-SnapKV, those that follow a prompt."""

DEFAULT_RARE = 10
"""Most occurrences in the training text of a bigram that slices count as rare."""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
