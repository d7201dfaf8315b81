"""Plans for other hardware: memory, communication and least time; the command ``python -m natsjax.plan``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
