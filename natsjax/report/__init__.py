"""Results of evaluations as table, picture and page; comparison of several runs.

``python -m natsjax.report`` draws again what ``natsjax.evaluate`` measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
