import typing

from .folder import export as export
from .hf import ExportedToHF as ExportedToHF
from .hf import export_hf as export_hf

DType = typing.Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...]
Format = typing.Literal["natsjax", "hf"]
FORMATS: tuple[Format, ...]
