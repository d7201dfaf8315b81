"""Retrieval tasks, generated from a run's own text: what does a KV budget cost where something has to be remembered?

python -m natsjax.tasks --workdir=DIR [--tasks=needle,mqar:pairs=8,length=256] [--budgets=0.05,0.1]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
