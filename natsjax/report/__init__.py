"""What evaluation stores, as table, picture and page; several runs side by side.

``python -m natsjax.report`` draws again what ``natsjax.evaluate`` measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
