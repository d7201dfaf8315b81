"""Parameters in a folder of their own: ``export``, and the command ``python -m natsjax.export``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
