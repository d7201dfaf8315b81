"""Text to batches.

| module | what it does |
|---|---|
| `corpus_reader` | reads documents from text, JSON, Parquet, saved datasets or an installed package |
| `tokenizer` | tokenizers by name: bytes, BPE trained here, Hugging Face's, SentencePiece's, tiktoken's |
| `prepare` | the command `python -m natsjax.data.prepare` and its function: text to a prepared corpus |
| `inspect`, `examples` | the command `python -m natsjax.data.inspect`: a context of a corpus or a run, for people |
| `corpus_statistics` | what is in a corpus: lengths of documents, the smallest possible KV fraction |
| `corpus` | a prepared corpus on disk, and reading it |
| `packing` | documents laid end to end and cut into contexts: the fields of a row |
| `pipeline` | the training stream and the evaluation slice, through Grain |
| `mixture` | several corpora as one stream |
| `locate` | finds the corpora of a run that were moved since |
| `synthetic` | the associative-recall task |

(`sources`, `input_folder`, `text_files`, `json_files`, `arrow_files` and `file_marks` are parts of `corpus_reader`;
`tokenizer_base`, `byte_tokenizers`, `pretrained_tokenizer`, `tiktoken_patterns` and a module per library are parts of
`tokenizer`; `prepare_request`, `preparation`, `scan`, `input_report`, `hold_out`, `encode`, `split_writer`,
`atomic_folder`, `worker_pool` and `progress` are parts of `prepare`, `lru_cache` is one of `pipeline`.)

`prepare` is imported as `from natsjax.data.prepare import prepare`: a function re-exported here would hide
the module of the same name, which is also a command.
"""

from natsjax.data.corpus import Corpus, Documents, SplitSummary
from natsjax.data.corpus_reader import CorpusReader, Document
from natsjax.data.packing import Row, piece_lengths
from natsjax.data.pipeline import PackedSource, RowSource, evaluation_contexts, iterate, train_dataset
from natsjax.data.synthetic import RecallTask
from natsjax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    Vocabulary,
    is_tokenizer_of,
    load_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "CorpusReader",
    "Document",
    "Documents",
    "HuggingFaceTokenizer",
    "PackedSource",
    "RecallTask",
    "Row",
    "RowSource",
    "SentencePieceTokenizer",
    "SplitSummary",
    "TiktokenTokenizer",
    "Tokenizer",
    "Vocabulary",
    "evaluation_contexts",
    "is_tokenizer_of",
    "iterate",
    "load_tokenizer",
    "piece_lengths",
    "train_dataset",
]
