"""Parameters alone, with config and tokenizer, in one folder that can be moved to another machine.

    python -m natsjax.export --workdir=DIR --output=FOLDER [--dtype=float32|bfloat16]

``natsjax.load``, ``natsjax.evaluate`` and ``train.initial_parameters`` read the folder as they read a workdir, on any
number of devices. It holds

config.json          of the run; ``data.prepared_dir`` is the full path of the corpus, which is used where it is there
data.json            which corpus that was
export.json          step, dtype and number of the parameters, and where they came from
checkpoints/         the parameters, through Orbax
tokenizer/           the tokenizer, unless the data is the recall task, which is a part of the config
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from natsjax import processes
from natsjax.checkpoint import Checkpoints
from natsjax.command_line import Parser, run_command
from natsjax.config import Config
from natsjax.data import Tokenizer
from natsjax.data.atomic_folder import folder_lock, new_folder
from natsjax.data.mixture import parse_mixture
from natsjax.errors import UserError
from natsjax.loading import LoadedRun, load
from natsjax.settings import did_you_mean
from natsjax.workdir import EXPORT_FORMAT, Workdir, natsjax_version

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


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
      dtype: of the numbers in the folder. ``natsjax.load`` makes float32 of bfloat16, which are rounded and take half
        the space.
      prepared_dir: where the prepared corpus lies by now; None: where the run had it.

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
    target = Workdir(output)
    folder = target.path.absolute()
    replaced = folder.parent / f".{folder.name}.replaced"
    with _errors_of(target):
        if replaced.exists():  # an export was killed between its two renames, or is between them now
            with folder_lock(folder):
                _put_back(replaced, folder)
    _check_replaceable(target)
    run = load(workdir, prepared_dir=prepared_dir)
    with _errors_of(target), folder_lock(folder):
        try:
            with new_folder(folder) as temporary:
                _write(run, Workdir(temporary), dtype, prepared_dir)
                _check_replaceable(target)
                if target.is_export:
                    shutil.rmtree(replaced, ignore_errors=True)
                    folder.rename(replaced)
        finally:
            _put_back(replaced, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    return run


@contextlib.contextmanager
def _errors_of(target: Workdir) -> Iterator[None]:
    """Whatever the system refuses, as a sentence about the output."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={target.path} cannot be written: {error.strerror or error}.") from error


def _put_back(replaced: Path, folder: Path) -> None:
    """Gives the export that was set aside its name again, where no other has taken it.

    One without ``export.json`` was being deleted, when its successor was in place, by a process that was killed.
    """
    if Workdir(replaced).is_export and not folder.exists():
        replaced.rename(folder)


def _check_replaceable(target: Workdir) -> None:
    """Refuses to write over what is not an export."""
    path = target.path
    if path.is_dir() and not target.is_export and any(path.iterdir()):
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
        "natsjax_version": natsjax_version(),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    target.export_file.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(run: LoadedRun, prepared_dir: str | os.PathLike[str] | None) -> Config:
    """The run's, with the corpus where it lies whatever folder one is in."""
    data = run.config.data
    if data.source != "corpus":
        return run.config
    if data.mixture:
        mixture = os.fspath(prepared_dir) if prepared_dir is not None else data.mixture
        parts = [f"{Path(folder).absolute()}={share!r}" for folder, share in parse_mixture(mixture)]
        return dataclasses.replace(run.config, data=dataclasses.replace(data, mixture=",".join(parts)))
    folder = Path(prepared_dir or data.prepared_dir or run.workdir.corpus)
    return dataclasses.replace(run.config, data=dataclasses.replace(data, prepared_dir=str(folder.absolute())))


def num_parameters(run: LoadedRun) -> int:
    """How many numbers the parameters are."""
    return sum(x.size for x in jax.tree.leaves(run.parameters))


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      UserError: see ``export``.
    """
    parser = Parser(
        prog="python -m natsjax.export",
        description="Writes the parameters of a run's newest checkpoint, with its config and tokenizer, to one folder "
        "that can be moved, and that natsjax.load, natsjax.evaluate and train.initial_parameters read.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run, as given to train.py; or an export")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the folder to write; an export that is there is replaced"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the numbers in the folder (default: float32)"
    )
    parser.add_argument(
        "--prepared_dir", metavar="DIR", help="where the prepared corpus lies by now (default: where the run had it)"
    )
    flags = parser.parse_args(argv)
    run = export(flags.workdir, flags.output, dtype=flags.dtype, prepared_dir=flags.prepared_dir)
    processes.say(f"{run.config.model.attention}, step {run.step}; data: {run.data.description}")
    print(f"wrote {num_parameters(run):,} parameters in {flags.dtype} to {flags.output}")


if __name__ == "__main__":
    run_command(main)
