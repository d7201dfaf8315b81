"""A run as a folder that transformers loads.

    python -m natsjax.export --workdir=DIR --format=hf --output=FOLDER [--dtype=float32|bfloat16]

Dense and sliding models become Llama, Mistral, Qwen2 or Qwen3 folders where these have all that the model has; others,
those with roles among them, come with ``modeling_natsjax.py`` and are loaded with ``trust_remote_code=True``.
``natsjax.import_model`` reads both. Parameters that transformers' classes have no field for are folded: a factor of
the embeddings into the embeddings, and where the output layer is the embedding, its inverse into the last norm.
"""

import datetime
import importlib.resources
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.config_fields import did_you_mean
from natsjax.data import Tokenizer
from natsjax.errors import UserError
from natsjax.export import DTYPES, DType
from natsjax.interop.hf_config import OWN_TYPE, architecture_of, hf_config
from natsjax.interop.hf_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, write_json, write_tensors
from natsjax.interop.hf_tokenizer import tokenizer_files
from natsjax.interop.layout import tensors_of
from natsjax.model.layers import rotary_size, scaled_frequencies
from natsjax.report.picture import pareto
from natsjax.report.results import Results, read
from natsjax.report.table import format_table
from natsjax.runs.export import num_parameters
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import natsjax_version
from natsjax.runtime.files import write_file, write_text_file
from natsjax.runtime.log import logger
from natsjax.runtime.output_folder import OutputFolder

MODELING_FILE = "modeling_natsjax.py"
_MARKER = "natsjax_export.json"
_CARD, _CURVE, _GENERATION = "README.md", "pareto.png", "generation_config.json"
_NAMES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, _GENERATION, MODELING_FILE, _CARD, _CURVE)
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")


class ExportedToHF(NamedTuple):
    """Result of ``export_hf``.

    Attributes:
      run: as ``natsjax.load`` gives it.
      architecture: ``model_type`` of its config.json.
      own: the fields for which that is none of transformers' own.
    """

    run: LoadedRun
    architecture: str
    own: list[str]


def export_hf(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    prepared_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "newest",
    largest_file: int = 5 * 2**30,
) -> ExportedToHF:
    """Writes a run as a folder for transformers.

    Args:
      workdir: of the run; or an export.
      output: the folder; it appears whole or not at all. A folder that was exported so before is replaced.
      dtype: of the tensors; with ``modeling_natsjax.py`` norms, scorers and sinks are float32 in any case.
      prepared_dir: where the prepared corpus is now; None: beside the run, or where it had it.
      checkpoint: "newest", "best" or a step, as in ``natsjax.load``.
      largest_file: bytes of a file of tensors, of which there are several where one would be larger.

    Raises:
      UserError: there is no run, its tokenizer has no tokenizer.json, or the output is something else or cannot be
        written.

    Example:
      >>> export_hf("runs/quickstart", "quickstart-hf").architecture
      'natsjax'
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: one of {', '.join(DTYPES)} was expected{did_you_mean(dtype, DTYPES)}.")
    folder = OutputFolder(output, marker=_MARKER, names=(*_NAMES, *_TOKENIZER_NAMES), what="an export with --format=hf")
    run = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint)
    kind, own = architecture_of(run.config.model)
    tokenizer = run.tokenizer if isinstance(run.tokenizer, Tokenizer) else None
    files = {}
    if tokenizer is not None:
        # An imported tokenizer is the publisher's, who says himself what begins a text.
        begins = run.config.data.source != "none"
        files = tokenizer_files(tokenizer, context_length=run.config.data.context_length, begins_with_bos=begins)
    bos_id, eos_id = (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    config = hf_config(run.config, run.tokenizer.vocab_size, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    if kind == OWN_TYPE:
        config |= _rotary(run.config)
    files |= {
        CONFIG_FILE: config,
        _GENERATION: {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id},
    }
    with folder.replaced() as temporary:
        for name, values in files.items():
            write_json(temporary / name, values)
        if kind == OWN_TYPE:
            code = importlib.resources.files("natsjax.interop").joinpath(MODELING_FILE).read_text(encoding="utf-8")
            write_text_file(temporary / MODELING_FILE, code)
        evaluated = _evaluation(run.workdir.report)
        if evaluated is not None:
            write_file(temporary / _CURVE, pareto(evaluated))
        write_text_file(temporary / _CARD, _card(run, kind, evaluated, has_tokenizer=tokenizer is not None))
        parameters = run.parameters if kind == OWN_TYPE else _folded(run.config, run.parameters, kind)
        write_tensors(temporary, tensors_of(_as(parameters, dtype, kind)), largest=largest_file)
        write_json(temporary / _MARKER, _provenance(run, kind, dtype))
    return ExportedToHF(run, kind, own)


def _rotary(config: Config) -> dict[str, Any]:
    """Returns the frequencies that ``modeling_natsjax.py`` reads: those of our own rotary embedding."""
    model = config.model
    half = model.head_dim // 2
    usual = model.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequencies = np.asarray(scaled_frequencies(usual, model), np.float64).tolist()
    return {"rotary_frequencies": frequencies, "rotary_size": rotary_size(model), "role_bias": 0.0}


def _folded(config: Config, parameters: Any, kind: str) -> Any:
    """Returns parameters of a model whose embeddings have no factor, and that has the biases of its architecture."""
    model = config.model
    parameters = jax.tree.map(lambda x: x, parameters)  # whose dicts may be changed
    scale = model.embedding_scale or math.sqrt(model.embed_dim)
    if scale != 1:
        wide = parameters["embedding"].astype(jnp.float32)
        parameters["embedding"] = wide * jnp.float32(scale)
        if model.tie_embeddings:
            parameters["final_norm"]["scale"] = parameters["final_norm"]["scale"] / jnp.float32(scale)
    if kind == "qwen2" and not model.qkv_bias:
        attention = parameters["blocks"]["attention"]
        for name in ("query", "key", "value"):
            weight = attention[name]
            attention[f"{name}_bias"] = jnp.zeros((weight.shape[0], *weight.shape[2:]), weight.dtype)
    return parameters


def _as(parameters: Any, dtype: str, kind: str) -> Any:
    wide = {"scale", "sink", "scorer"} if kind == OWN_TYPE else set()

    def cast(path, x):
        is_wide = bool(wide & {str(key.key) for key in path})
        return np.asarray(x).astype(jnp.dtype("float32" if is_wide else dtype))

    return jax.tree_util.tree_map_with_path(cast, parameters)


def _provenance(run: LoadedRun, kind: str, dtype: str) -> dict[str, Any]:
    return {
        "architecture": kind,
        "step": run.step,
        "dtype": dtype,
        "num_parameters": num_parameters(run.parameters),
        "data": run.data.description,
        "natsjax_version": natsjax_version(),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _card(run: LoadedRun, kind: str, evaluated: Results | None, *, has_tokenizer: bool) -> str:
    """Returns a model card: what it is, how it is loaded, and perplexity against KV where that was evaluated."""
    model = run.config.model
    own = ", trust_remote_code=True" if kind == OWN_TYPE else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {run.workdir.path.resolve().name}, exported by natsjax",
        "",
        f"{kind}, {num_parameters(run.parameters):,} parameters; {model.num_layers} layers ({model.layer_pattern}), "
        f"width {model.embed_dim}, {model.num_heads} query heads and {model.num_kv_heads} KV heads of "
        f"{model.head_dim}; step {run.step}; data: {run.data.description}.",
        "",
        "    from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""),
        "",
        *(["    tokenizer = AutoTokenizer.from_pretrained(FOLDER)"] if has_tokenizer else []),
        f"    model = AutoModelForCausalLM.from_pretrained(FOLDER{own})",
    ]
    if model.has_roles:
        lines += [
            "",
            "Every token has a role in each layer and KV head, which says how long its key is kept; the cache drops "
            "keys whose role has ended. `model.config.role_bias` above 0 keeps more of them, below 0 fewer.",
        ]
    if evaluated is not None:
        lines += [
            "",
            "## Perplexity against the KV cache",
            "",
            f"![perplexity against KV fraction]({_CURVE})",
            "",
            format_table(evaluated.rows, show_accuracy=evaluated.run["show_accuracy"], layers=evaluated.run["layers"]),
            "",
            str(evaluated.run["evaluation"]),
        ]
    return "\n".join(lines) + "\n"


def _evaluation(report: pathlib.Path) -> Results | None:
    """Reads the results of the run's evaluation; None where it was not evaluated."""
    try:
        return read(report)
    except FileNotFoundError:
        return None
    except UserError as error:
        logger.warning(f"warning: the model card is without the curve: {error}")
        return None
