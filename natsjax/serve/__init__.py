"""A run behind OpenAI's HTTP interface for completions: ``run``, and the command ``python -m natsjax.serve``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
