"""Training: ``natsjax.train.run`` is what ``train.py`` calls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
