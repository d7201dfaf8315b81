"""A context that a model is trained or measured on, decoded for people; ``python -m natsjax.data.inspect``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
