"""Text to batches.

| module | what it does |
|---|---|
| `readers` | documents of text, JSON and Parquet files, saved datasets and installed packages |
| `tokenizers` | tokenizers by name: bytes, BPE trained here, Hugging Face's, SentencePiece's, tiktoken's |
| `prepare` | the command `python -m natsjax.data.prepare` and its function: text to a prepared corpus |
| `inspect` | the command `python -m natsjax.data.inspect`: a context of a corpus or a run, for people |
| `corpus` | a prepared corpus on disk, and reading it |
| `packing` | documents laid end to end and cut into contexts: the fields of a row |
| `pipeline` | the training stream and the evaluation slice, through Grain |
| `mixture` | several corpora as one stream |
| `recall` | the associative-recall task |
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
