import typing

from .convert import Imported as Imported
from .convert import import_model as import_model

DType = typing.Literal["auto", "float32", "bfloat16"]
DTYPES: tuple[DType, ...]
