"""A full disk, a real one of a few MB: a run that meets it ends with one sentence, and goes on once there is room."""

import json
import os
import subprocess

import pytest
import tiny
from processes import ROOT, with_mounts

# In a mount namespace of its own, where the disk is gone with the process. Prints what was said, by where the disk
# became full, and what was there then.
PROGRAM = """
import json, os, pathlib, sys
from natsjax import evaluate, train
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runtime.flags import run_command
from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.runs.workdir import read_metrics
from natsjax.train.step import Trainer

disk = pathlib.Path(sys.argv[2])
evaluate.run = lambda *_, **__: None
base = json.loads(sys.argv[1])
filler = disk / "filler"

def fill(leave=0):
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
        file.truncate(file.tell() - leave)

def run(name, full_after=None, leave=0, **train_fields):
    "Runs, with a disk that becomes full after so many steps; then there is room again."
    taken = 0
    real = Trainer.step
    def step(self, *arguments):
        nonlocal taken
        taken += 1
        result = real(self, *arguments)
        if taken == full_after:
            fill(leave)
        return result
    if full_after == 0:
        fill()
    Trainer.step = step
    said = None
    try:
        train.run(Config.from_dict(base | {"train": base["train"] | train_fields}), disk / "run")
    except UserError as error:
        said = str(error)
    finally:
        Trainer.step = real
        filler.unlink(missing_ok=True)
    checkpoints = Checkpoints(disk / "run/checkpoints", read_only=True)
    steps = [line["step"] for line in read_metrics(disk / "run/metrics.jsonl")]
    print(json.dumps({"name": name, "said": said, "latest": checkpoints.latest_step(), "steps": steps}), flush=True)
    checkpoints.close()

def main():
    run("first", num_steps=6)
    run("config", full_after=0, num_steps=20)
    run("metrics", full_after=1, num_steps=20)
    run("tensorboard", full_after=2, num_steps=20, log_every=100)
    run("checkpoint", full_after=2, leave=8192, num_steps=20, log_every=100)  # room for what TensorBoard gets before it
    run("room again", num_steps=20)

run_command(main)
"""


@pytest.fixture
def disk(tmp_path):
    """The words of a Python that has a disk of 4 MB at ``tmp_path / "disk"``, and the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return with_mounts(f"mount -t tmpfs -o size=4m tmpfs {folder}"), folder


def test_every_file_that_cannot_be_written_is_a_sentence_and_the_run_goes_on_from_its_checkpoint(disk):
    words, folder = disk
    config = tiny.config(checkpoint={"save_every": 3}).to_dict()
    command = [*words, "-c", PROGRAM, json.dumps(config), str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # plugins that find no device say so with a traceback
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert (found["first"]["said"], found["first"]["latest"]) == (None, 6)
    why = "No space left on device"
    run = folder / "run"
    # Tried before anything else is done.
    assert found["config"]["said"] == f"--workdir={run} cannot be used: {run}/checkpoints: {why}; make room there."
    assert found["metrics"]["said"] == (
        f"{run}/metrics.jsonl cannot be written: {why}; put that right and run the same command again, which resumes "
        "from the newest checkpoint."
    )
    assert found["checkpoint"]["said"].startswith(f"the checkpoint of step 9 cannot be written to {run}/checkpoints: ")
    assert found["checkpoint"]["said"].endswith("; the run can resume from step 6.")
    assert found["tensorboard"]["said"] == found["metrics"]["said"].replace("metrics.jsonl", "tensorboard")
    for name in ("config", "metrics", "tensorboard", "checkpoint"):
        assert found[name]["latest"] == 6
        assert "\n" not in found[name]["said"]
    assert found["room again"] == {"name": "room again", "said": None, "latest": 20, "steps": list(range(1, 21))}
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
