"""Runs in EleutherAI's lm-evaluation-harness: the model ``natsjax``, offline tasks, ``python -m natsjax.lm_eval``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
