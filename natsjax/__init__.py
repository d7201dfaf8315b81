"""Training of transformer language models that learn which tokens to keep in their KV cache.

``natsjax.load(DIR)`` gives a trained run or an export. The commands are ``train.py`` and ``python -m`` with

natsjax.data.prepare   text to a corpus                          ``natsjax.data.prepare.prepare``
natsjax.data.inspect   what a model is trained on, decoded
natsjax.evaluate       perplexity against KV budget, the report  ``natsjax.evaluate.run``
natsjax.report         a report again, or runs compared          ``natsjax.report.rewrite``, ``.compare.compare``
natsjax.sweep          a run for every budget and seed           ``natsjax.sweep.run``
natsjax.generate       text from prompts                         ``natsjax.generate.run``
natsjax.serve          completions over HTTP                     ``natsjax.serve.run``
natsjax.export         parameters in a folder of their own       ``natsjax.export.export``
natsjax.import_model   a model of another project, exported     ``natsjax.import_model.import_model``
natsjax.plan           what a step takes on other hardware       ``natsjax.plan.train_step.plan_apart``

and ``natsjax.train.run`` is what ``train.py`` calls. ``docs/`` has a page for each, ``docs/tour.md`` goes once
around in Python. Importing this touches no device.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
