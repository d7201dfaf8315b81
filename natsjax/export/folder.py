"""Parameters alone, with config and tokenizer, in one folder that can be moved to another machine.

    python -m natsjax.export --workdir=DIR --output=FOLDER [--dtype=float32|bfloat16]

``natsjax.load``, ``natsjax.evaluate`` and ``train.init_from`` read the folder as they read a workdir, on any
number of devices. It holds

config.json          of the run; ``data.prepared_dir`` is the full path of the corpus, which need not be there
data.json            which corpus that was
export.json          step, dtype and number of the parameters, where they came from, and the tokenizer's checksums
checkpoints/         the parameters, through Orbax, with their checksums
tokenizer/           the tokenizer, unless the data is the recall task, which is a part of the config
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.config_fields import did_you_mean, real_path, resolve_paths
from natsjax.data import Tokenizer
from natsjax.errors import UserError
from natsjax.export import DTYPES, DType
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.paths import locate
from natsjax.runs.workdir import EXPORT_FORMAT, Workdir, natsjax_version
from natsjax.runtime import checksums
from natsjax.runtime.files import (
    can_be_renamed,
    folder_lock,
    is_free,
    put_back,
    replaced_folder,
    try_folder,
    unwritable,
    write_text_file,
)

_MARKER = "export.json"  # written last: what has it is whole
_NAMES = (_MARKER, "config.json", "data.json", "checkpoints", "tokenizer", "report")


def export(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    prepared_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | int = "newest",
) -> LoadedRun:
    """Writes the parameters of a run's checkpoint to a folder of their own.

    Args:
      workdir: of the run; or an export, to write it in another dtype.
      output: the folder; it appears whole or not at all. An export that is there (with its ``report/``) is replaced.
      dtype: of the numbers in the folder. ``natsjax.load`` makes ``model.param_dtype`` of them again; bfloat16 numbers
        are rounded and take half the space.
      prepared_dir: where the prepared corpus is now; None: beside the run, or where it had it.
      checkpoint: "newest", "best" or a step, as in ``natsjax.load``.

    Returns:
      The run that was exported, as ``natsjax.load`` gives it.

    Raises:
      UserError: there is no run or no checkpoint, or the output is something else or cannot be written.

    Example:
      >>> from natsjax.export import export
      >>> export("runs/quickstart", "quickstart-450", dtype="bfloat16").step
      450
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: one of {', '.join(DTYPES)} was expected{did_you_mean(dtype, DTYPES)}.")
    if not os.fspath(output):
        raise UserError("--output is empty; name the folder to make ('.' is the current one).")
    target = Workdir(output)
    folder = real_path(target.path)
    with _errors_of(target), folder_lock(folder):  # tried before the parameters are read
        put_back(folder, _MARKER)
        _check_replaceable(target)
        # An empty folder stays the folder that it is; an export that is there is replaced as a whole, if it can be.
        in_place = folder.is_dir() and not (target.is_export and can_be_renamed(folder))
        if in_place or not folder.is_dir():
            try_folder(folder)
    run = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint)
    with _errors_of(target), folder_lock(folder), replaced_folder(folder, _MARKER, inside=in_place) as temporary:
        _write(run, Workdir(temporary), dtype, prepared_dir)
        _check_replaceable(target)
    return run


@contextlib.contextmanager
def _errors_of(target: Workdir) -> Iterator[None]:
    """Raises what the system refuses as a sentence about the output."""
    try:
        yield
    except OSError as error:
        raise unwritable(f"--output={target.path}", error) from error


def _check_replaceable(target: Workdir) -> None:
    """Refuses to write over what is not an export."""
    path = target.path
    if path.is_dir() and not target.is_export and not is_free(real_path(path), _NAMES):
        raise UserError(f"--output={path} holds something that is not an export; name a new folder.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output={path} is a file; name a new folder.")


def _write(run: LoadedRun, target: Workdir, dtype: DType, prepared_dir: str | os.PathLike[str] | None) -> None:
    target.record(_config(run, prepared_dir), run.data.fingerprint)
    if isinstance(run.tokenizer, Tokenizer):
        run.tokenizer.save(target.tokenizer)
    parameters = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), run.parameters)
    checkpoints = Checkpoints(target.checkpoints)
    try:
        checkpoints.save(run.step, {"step": jnp.int32(run.step), "parameters": parameters})
        checkpoints.wait()
    finally:
        checkpoints.close()
    description = {
        "format_version": EXPORT_FORMAT,
        "step": run.step,
        "dtype": dtype,
        "num_parameters": num_parameters(run),
        "data": run.data.description,
        "source": str(run.workdir.path.absolute()),
        "sha256": checksums.digests(target.path, checksums.names_below(target.path, target.tokenizer.name)),
        "natsjax_version": natsjax_version(),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    write_text_file(target.export_file, json.dumps(description, indent=2) + "\n")  # ASCII: a path may be no UTF-8


def _config(run: LoadedRun, prepared_dir: str | os.PathLike[str] | None) -> Config:
    """Returns the config of the run, with the absolute path of its corpus."""
    data = run.config.data
    if data.source != "corpus":
        return run.config
    if prepared_dir is None:
        with contextlib.suppress(UserError):  # an export may be far from its corpus: then where that was stays known
            data = locate(data, run.workdir.path, run.data.fingerprint)
    elif data.mixture:
        data = dataclasses.replace(data, mixture=os.fspath(prepared_dir))
    else:
        data = dataclasses.replace(data, prepared_dir=os.fspath(prepared_dir))
    here = resolve_paths(data)
    data = dataclasses.replace(data, mixture=here.mixture, prepared_dir=here.prepared_dir)
    return dataclasses.replace(run.config, data=data)


def num_parameters(run: LoadedRun) -> int:
    """Counts the numbers in the parameters."""
    return sum(x.size for x in jax.tree.leaves(run.parameters))
