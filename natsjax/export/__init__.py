"""Parameters in a folder of their own: ``export``, ``export_hf`` and the command ``python -m natsjax.export``."""

from typing import Literal

import lazy_loader

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
Format = Literal["natsjax", "hf"]
FORMATS: tuple[Format, ...] = ("natsjax", "hf")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
