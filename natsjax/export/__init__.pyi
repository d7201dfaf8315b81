from typing import Literal

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...]

from .folder import export as export
