"""Parameters alone, with config and tokenizer, in one folder that can be moved to another machine.

    python -m natsjax.export --workdir=DIR --output=FOLDER [--dtype=float32|bfloat16]

``natsjax.load``, ``natsjax.evaluate`` and ``train.init_from`` read the folder as they read a workdir, on any
number of devices. ``natsjax.runs.export`` says what is in it.
"""

import contextlib
import dataclasses
import os

from natsjax.config import Config
from natsjax.config_fields import did_you_mean, resolve_paths
from natsjax.errors import UserError
from natsjax.export import DTYPES, DType
from natsjax.runs.export import export_folder, write_export
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.paths import locate


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
    folder = export_folder(output)  # tried before the parameters are read
    run = load(workdir, prepared_dir=prepared_dir, checkpoint=checkpoint)
    with folder.replaced() as temporary:
        write_export(
            temporary,
            config=_config(run, prepared_dir),
            parameters=run.parameters,
            dtype=dtype,
            step=run.step,
            vocabulary=run.tokenizer,
            fingerprint=run.data.fingerprint,
            data=run.data.description,
            source=str(run.workdir.path.absolute()),
        )
    return run


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
