"""The folder of an export, as ``natsjax.export`` and ``natsjax.import_model`` write it.

config.json          of the run; ``data.prepared_dir`` is the full path of the corpus, which need not be there
data.json            which corpus that was
export.json          step, dtype and number of the parameters, where they came from, and the tokenizer's checksums
checkpoints/         the parameters, through Orbax, with their checksums
tokenizer/           the tokenizer, unless the data is the recall task, which is a part of the config
"""

import datetime
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.data import Tokenizer, Vocabulary
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.workdir import EXPORT_FORMAT, Workdir, natsjax_version
from natsjax.runtime import checksums
from natsjax.runtime.files import write_text_file
from natsjax.runtime.output_folder import OutputFolder

_MARKER = "export.json"
_NAMES = ("config.json", "data.json", "checkpoints", "tokenizer", "report")


def export_folder(output: str | os.PathLike[str]) -> OutputFolder:
    """Returns the folder that an export is written to.

    Raises:
      UserError: it is something else or cannot be written.
    """
    return OutputFolder(output, marker=_MARKER, names=_NAMES, what="an export")


def write_export(
    folder: pathlib.Path,
    *,
    config: Config,
    parameters: Any,
    dtype: str,
    step: int,
    vocabulary: Vocabulary,
    fingerprint: str,
    data: str,
    source: str,
) -> None:
    """Writes all files of an export into an empty folder.

    Args:
      folder: it.
      config: of the run, with the absolute path of its corpus.
      parameters: nested dict of arrays.
      dtype: of the numbers in the folder, "float32" or "bfloat16".
      step: optimizer steps that the parameters have had.
      vocabulary: the tokenizer, or the recall task.
      fingerprint: of the data that the parameters learned from.
      data: that data, for people.
      source: where the parameters came from, for people.

    Raises:
      OSError: a file cannot be written.
      UserError: the parameters cannot.
    """
    target = Workdir(folder)
    target.record(config, fingerprint)
    if isinstance(vocabulary, Tokenizer):
        vocabulary.save(target.tokenizer)
    stored = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), parameters)
    checkpoints = Checkpoints(target.checkpoints)
    try:
        checkpoints.save(step, {"step": jnp.int32(step), "parameters": stored})
        checkpoints.wait()
    finally:
        checkpoints.close()
    description = {
        "format_version": EXPORT_FORMAT,
        "step": step,
        "dtype": dtype,
        "num_parameters": num_parameters(parameters),
        "data": data,
        "source": source,
        "sha256": checksums.digests(target.path, checksums.names_below(target.path, target.tokenizer.name)),
        "natsjax_version": natsjax_version(),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    write_text_file(target.export_file, json.dumps(description, indent=2) + "\n")  # ASCII: a path may be no UTF-8


def num_parameters(parameters: Any) -> int:
    """Counts the numbers in the parameters, a nested dict of arrays."""
    return sum(x.size for x in jax.tree.leaves(parameters))
