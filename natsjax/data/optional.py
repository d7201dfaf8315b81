"""Libraries that only some formats need (``natsjax[formats]``, ``natsjax[hf]``)."""

from __future__ import annotations

import importlib
from typing import Any

from natsjax.errors import UserError


def import_optional(module: str, needed_by: str, extra: str = "formats") -> Any:
    """Imports a module (``"pyarrow.parquet"``) and returns its package; raises UserError if it is not installed."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs {package}, which is not installed; install it with `pip install 'natsjax[{extra}]'`."
        ) from error
