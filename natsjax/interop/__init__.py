"""Models in the formats of other projects: Hugging Face folders and GGUF files, read and written; nothing is unpickled.

``python -m natsjax.import_model`` and ``python -m natsjax.export --format=hf`` are the commands.
"""
