"""Sweeps over KV budgets or KV penalties and seeds: ``run``, and the command ``python -m natsjax.sweep``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
