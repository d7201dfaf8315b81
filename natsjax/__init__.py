"""Training of transformer language models that learn which tokens to keep in their KV cache.

``natsjax.load(DIR)`` gives a trained run or an export; the commands are ``train.py`` and ``python -m`` with
``natsjax.data.prepare``, ``natsjax.plan``, ``natsjax.evaluate`` and ``natsjax.export``. Importing this touches no
device.
"""

from natsjax.errors import UserError
from natsjax.loading import LoadedRun, load

__all__ = ["LoadedRun", "UserError", "load"]
