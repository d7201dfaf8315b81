"""Policies, which decide how long keys live: the learned roles, fixed rules and rivals, a file a family."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
