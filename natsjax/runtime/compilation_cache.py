"""Compiled programs on disk, so that a resumed run loads its step instead of compiling it again.

It is JAX's persistent cache, which is global to the process: it is set for as long as a run lasts, and put back. With
several processes all read the folder and process 0 writes it. Whoever can write the folder decides what runs: it
belongs to the workdir, which is trusted as much.

On CPUs there is none unless a folder is named. JAX's key knows the kind of an accelerator, but of a CPU nothing: a
workdir taken to another machine would run code made for the first one's instructions, where XLA warns of SIGILL
(https://github.com/jax-ml/jax/issues/38445; on some Intel CPUs it warns, or compiles again, on the very machine).
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from natsjax.config_fields import real_path
from natsjax.errors import UserError
from natsjax.runtime import distributed
from natsjax.runtime.files import make_folder

AUTO, NONE = "auto", "none"


@contextlib.contextmanager
def compilation_cache(setting: str, folder_of_run: Path) -> Iterator[None]:
    """Keeps what is compiled in the block, unless JAX has a cache already (``JAX_COMPILATION_CACHE_DIR``).

    Args:
      setting: ``train.compilation_cache``.
      folder_of_run: used where the setting is "auto" and the devices are no CPUs.

    Raises:
      UserError: the folder cannot be made or written. Process 0 alone looks, and alone raises it: the others compile
        nothing before they wait for it (``distributed.barrier``), which then ends them.
    """
    folder = _folder(setting, folder_of_run)
    known: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None or known is not None:
        yield
        return
    if distributed.is_main():
        _check(setting, folder)
    _use(str(real_path(folder)))
    try:
        yield
    finally:
        _use(None)


def _folder(setting: str, folder_of_run: Path) -> Path | None:
    if setting == AUTO:
        return None if jax.default_backend() == "cpu" else folder_of_run
    return None if setting in (NONE, "") else Path(setting)


def _check(setting: str, folder: Path) -> None:
    """Raises where JAX would warn and compile without the cache."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=real_path(folder)):
            pass
    except OSError as error:
        raise UserError(
            f"train.compilation_cache = {setting}: {folder} is no folder that can be written ({error.strerror}); name "
            "one that can be, or none."
        ) from error


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax_cache.reset_cache()  # JAX looks at the setting once
