"""The Slurm scripts, with a ``srun`` and a ``scontrol`` that only say how they were called."""

import os
import subprocess

import pytest
from processes import ROOT


@pytest.mark.parametrize(
    ("script", "tasks", "cpus", "asked", "expected"),
    [
        ("per_gpu", "8", "112", None, "14"),
        ("per_gpu", "8", "128(x3),96", None, "12"),  # every node must have as many
        ("per_node", "1", "96(x2)", None, "96"),
        ("per_gpu", "8", "112", "6", "6"),  # sbatch --cpus-per-task=6
    ],
)
def test_a_process_gets_its_share_of_the_cpus(tmp_path, script, tasks, cpus, asked, expected):
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"; echo "environment $SRUN_CPUS_PER_TASK"\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "WORKDIR": "/shared/run",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_JOB_CPUS_PER_NODE": cpus,
    } | ({} if asked is None else {"SLURM_CPUS_PER_TASK": asked})
    command = ["bash", f"launch/slurm_{script}.sh", "--config=configs/smoke.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    called, said = done.stdout.splitlines()
    assert called == (
        f"srun --cpus-per-task={expected} --kill-on-bad-exit=1 python train.py --workdir=/shared/run "
        "--config=configs/smoke.py"
    )
    assert said == f"environment {expected}"
