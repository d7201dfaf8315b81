"""Models of other projects as exports: ``import_model``, and the command ``python -m natsjax.import_model``."""

from typing import Literal

import lazy_loader

DType = Literal["auto", "float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
