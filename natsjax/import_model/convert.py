"""Models of other projects as exports.

    python -m natsjax.import_model --input=FOLDER|FILE.gguf --output=DIR [--dtype=auto|float32|bfloat16]

The export has no corpus (``data.source`` is "none"): it is measured on any that was prepared with its tokenizer.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.config_fields import did_you_mean
from natsjax.data import Tokenizer
from natsjax.data.tokenizers.base import read_json
from natsjax.errors import UserError
from natsjax.import_model import DTYPES, DType
from natsjax.interop.gguf_file import GGUFFile
from natsjax.interop.gguf_tokenizer import gguf_tokenizer
from natsjax.interop.hf_config import DescribedModel, read_hf_config
from natsjax.interop.hf_folder import CONFIG_FILE, SafetensorsFolder, open_tokenizer
from natsjax.interop.layout import TensorSource, read_parameters
from natsjax.model.transformer import model_structure
from natsjax.runs.data import token_meaning
from natsjax.runs.export import export_folder, num_parameters, write_export


class Imported(NamedTuple):
    """Result of ``import_model``.

    Attributes:
      config: of the export.
      num_parameters: numbers in the parameters.
      dtype: of the export, "float32" or "bfloat16".
      description: the model, for people.
      vocabulary: the tokenizer, for people.
    """

    config: Config
    num_parameters: int
    dtype: str
    description: str
    vocabulary: str


class _Opened(NamedTuple):
    """A model of another project, before its numbers are read."""

    described: DescribedModel
    source: TensorSource
    tokenizer: Tokenizer
    is_bfloat16: bool
    kind: str


def import_model(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: DType = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
    context_length: int | None = None,
) -> Imported:
    """Writes an export of a model of another project; its logits are those of transformers.

    Nothing is unpickled, and nothing of the model is run.

    Args:
      input: a Hugging Face folder (config.json, safetensors, tokenizer.json) of a Llama, Mistral, Qwen2 or Qwen3 model
        or of one that natsjax has exported, or a GGUF file of the architecture "llama".
      output: the folder; it appears whole or not at all. An export that is there is replaced.
      dtype: of the parameters, and ``model.dtype``; "auto" is bfloat16 where all tensors are, else float32.
      tokenizer: its folder or file; None: that of the model.
      context_length: tokens of a context in evaluation and training, at most those that the model was made for; None:
        as many.

    Raises:
      UserError: the input is damaged, not whole, or a model that natsjax cannot represent; or the output is something
        else or cannot be written.

    Example:
      >>> from natsjax.import_model import import_model
      >>> import_model("SmolLM2-135M", "smollm2").num_parameters
      134515008
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: one of {', '.join(DTYPES)} was expected{did_you_mean(dtype, DTYPES)}.")
    path = pathlib.Path(os.path.expanduser(input))
    if not path.exists():
        raise UserError(f"--input={os.fspath(input)} does not exist.")
    folder = export_folder(output)  # tried before the parameters are read
    opened = _opened(path, None if tokenizer is None else pathlib.Path(os.path.expanduser(tokenizer)))
    chosen = dtype if dtype != "auto" else "bfloat16" if opened.is_bfloat16 else "float32"
    config = _changed(opened.described.config, chosen, context_length)
    abstract = model_structure(config, opened.described.vocab_size).parameters
    parameters = read_parameters(opened.source, abstract)
    meaning = token_meaning(opened.tokenizer)
    description = f"{path.name} ({opened.kind}), imported"
    with folder.replaced() as temporary:
        write_export(
            temporary,
            config=config,
            parameters=jax.tree.map(jnp.asarray, parameters),
            dtype=chosen,
            step=0,
            vocabulary=opened.tokenizer,
            fingerprint=hashlib.sha256(f"no data, {meaning}".encode()).hexdigest(),
            data=description,
            source=str(path.absolute()),
        )
    vocabulary = f"{opened.tokenizer.kind} tokenizer of {opened.tokenizer.vocab_size}"
    return Imported(config, num_parameters(parameters), chosen, description, vocabulary)


def _opened(path: pathlib.Path, tokenizer: pathlib.Path | None) -> _Opened:
    if path.is_dir():
        return _open_folder(path, tokenizer)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path, tokenizer)
    raise UserError(f"--input={path} is neither a Hugging Face folder nor a .gguf file.")


def _open_folder(path: pathlib.Path, tokenizer: pathlib.Path | None) -> _Opened:
    config_file = path / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"--input={path} is no Hugging Face folder of a model: it has no {CONFIG_FILE}.")
    values = read_json(config_file)
    described = read_hf_config(values, str(config_file))
    source = SafetensorsFolder(path, is_tied=described.config.model.tie_embeddings)
    opened = open_tokenizer(path if tokenizer is None else tokenizer, described)
    return _Opened(described, source, opened, source.is_bfloat16, str(values["model_type"]))


def _open_gguf(path: pathlib.Path, tokenizer: pathlib.Path | None) -> _Opened:
    file = GGUFFile(path)
    described = read_hf_config(file.config, str(path))
    opened = gguf_tokenizer(file, described) if tokenizer is None else open_tokenizer(tokenizer, described)
    return _Opened(described, file, opened, False, "GGUF, llama")


def _changed(config: Config, dtype: str, context_length: int | None) -> Config:
    """Returns the config with a dtype, and shorter contexts where they are asked for."""
    longest = config.data.context_length
    if context_length is not None and not 2 <= context_length <= longest:
        raise UserError(
            f"--context_length={context_length}: the model reads {longest:,} tokens at most; choose 2 to {longest}."
        )
    model = dataclasses.asdict(config.model) | {"dtype": dtype, "param_dtype": dtype}
    data = dataclasses.asdict(config.data) | {"context_length": context_length or longest}
    return Config.from_dict(config.to_dict() | {"model": model, "data": data})
