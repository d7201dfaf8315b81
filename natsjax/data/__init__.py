"""Data: from text to batches.

| module | content |
|---|---|
| ``readers`` | documents of text, JSON and Parquet files, saved datasets and installed packages |
| ``tokenizers`` | tokenizers by name: bytes, BPE trained here, Hugging Face's, SentencePiece's, tiktoken's |
| ``prepare`` | the command ``python -m natsjax.data.prepare`` and its function, which prepare a corpus from text |
| ``inspect`` | the command ``python -m natsjax.data.inspect``, which shows a context of a corpus or a run |
| ``corpus`` | a prepared corpus on disk |
| ``packing`` | documents concatenated and cut into contexts; the fields of a row |
| ``pipeline`` | the training stream and the evaluation contexts, through Grain |
| ``mixture`` | several corpora as one stream |
| ``recall`` | the associative-recall task |
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
