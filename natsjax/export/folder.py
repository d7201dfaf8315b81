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
import shutil
from collections.abc import Iterator
from pathlib import Path

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
    folder_lock,
    hidden_name,
    is_free,
    new_folder,
    put_back,
    set_aside,
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
) -> LoadedRun:
    """Writes the parameters of a run's newest checkpoint to a folder of their own.

    Args:
      workdir: of the run; or an export, to write it in another dtype.
      output: the folder; it appears whole or not at all. An export that is there (with its ``report/``) is replaced.
      dtype: of the numbers in the folder. ``natsjax.load`` makes ``model.param_dtype`` of them again; bfloat16 numbers
        are rounded and take half the space.
      prepared_dir: where the prepared corpus is now; None: beside the run, or where it had it.

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
        _put_back(folder)
        _check_replaceable(target)
        # An empty folder stays the folder that it is; an export that is there is replaced as a whole, if it can be.
        in_place = folder.is_dir() and not (target.is_export and _can_be_renamed(folder))
        if in_place or not folder.is_dir():
            try_folder(folder)
    run = load(workdir, prepared_dir=prepared_dir)
    with _errors_of(target), folder_lock(folder):
        try:
            with new_folder(folder, _MARKER, inside=in_place) as temporary:
                _write(run, Workdir(temporary), dtype, prepared_dir)
                _check_replaceable(target)
                if not in_place and folder.is_dir():
                    folder.rename(_replaced(folder))
                elif target.is_export:
                    set_aside(folder, _MARKER)
        finally:
            _put_back(folder)
    return run


@contextlib.contextmanager
def _errors_of(target: Workdir) -> Iterator[None]:
    """Raises what the system refuses as a sentence about the output."""
    try:
        yield
    except OSError as error:
        raise unwritable(f"--output={target.path}", error) from error


def _replaced(folder: Path) -> Path:
    """Returns the place of an export while another one replaces the folder itself."""
    return folder.parent / hidden_name(folder.name, "replaced")


def _can_be_renamed(folder: Path) -> bool:
    """Returns whether a folder can be replaced as a whole: no mount point, nor somebody's current folder.

    Tried, by its rename and back; killed between the two, it is put back by the next call.
    """
    if os.path.samefile(folder, os.curdir):
        return False
    try:
        folder.rename(_replaced(folder))
    except OSError:
        return False
    _replaced(folder).rename(folder)
    return True


def _put_back(folder: Path) -> None:
    """Gives the export that was set aside its name again, where no other has taken it; else removes it.

    One without ``export.json`` was being deleted, when its successor was in place, by a process that was killed.
    """
    replaced = _replaced(folder)
    if Workdir(replaced).is_export and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    put_back(folder, _MARKER)


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
