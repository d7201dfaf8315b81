"""Time of a checkpoint's checksums, compared with the save and the restore that they belong to.

    python -m benchmarks.checksums [--megabytes=13,500] [--repeats=3] [--folder=DIR]

A save continues in the background and so do its checksums; a restore waits for both. Medians; the file cache is warm.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.runs.checkpoint import Checkpoints
from natsjax.runtime import checksums

_ARRAYS = 30


def measure(folder: pathlib.Path, megabytes: float, repeats: int) -> str:
    """Measures a line: seconds of a save, of a restore and of the checksums of each."""
    size = int(megabytes * 1e6 / 4 / _ARRAYS)
    rng = np.random.default_rng(0)
    state = {f"w{n}": jnp.asarray(rng.standard_normal(size, np.float32)) for n in range(_ARRAYS)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    seconds: dict[str, list[float]] = {"saved": [], "hashed": [], "restored": [], "compared": []}
    checkpoints = Checkpoints(folder)

    def timed(name, call, *arguments):
        began = time.perf_counter()
        result = call(*arguments)
        seconds[name].append(time.perf_counter() - began)
        return result

    def save(step):
        checkpoints.save(step, state)
        checkpoints.wait()

    for step in range(1, repeats + 1):
        timed("saved", save, step)
        files = folder / str(step)
        names = checksums.names_below(files, "default")
        sums = timed("hashed", checksums.digests, files, names)
        timed("compared", checksums.first_damaged, files, sums, names)
        timed("restored", lambda: jax.block_until_ready(checkpoints.restore(abstract)))
    checkpoints.close()
    saved, hashed, restored, compared = (statistics.median(values) for values in seconds.values())
    return (
        f"{megabytes:g} MB: of a save of {saved:.2f} s hashing is {100 * hashed / saved:.0f} %; "
        f"of a restore of {restored:.2f} s comparing is {100 * compared / restored:.0f} %"
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="13,500", help="sizes of the state (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    flags = parser.parse_args()
    for megabytes in map(float, flags.megabytes.split(",")):
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            print(measure(pathlib.Path(folder), megabytes, flags.repeats), flush=True)


if __name__ == "__main__":
    main()
