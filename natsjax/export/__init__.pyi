from .folder import export as export
