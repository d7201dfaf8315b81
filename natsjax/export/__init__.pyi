import typing

from .folder import export as export

DType = typing.Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...]
