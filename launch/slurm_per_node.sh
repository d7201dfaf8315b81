#!/usr/bin/env bash
# Slurm, one process per node with all GPUs of the node.
#
#   WORKDIR=/shared/runs/first sbatch --nodes=4 launch/slurm_per_node.sh --config=configs/X.py [flags of train.py]
#
# WORKDIR is on a filesystem that all nodes share. Stop: scancel --signal=TERM JOB (the run saves, ends and is queued
# again: see below) or scancel JOB (it saves if Slurm's KillWait is long enough, and is not queued again).
#SBATCH --job-name=natsjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=natsjax-%j.log
# --signal: SIGTERM to the processes 300 s before the time limit, for a step and a checkpoint.
set -euo pipefail
: "${WORKDIR:?a folder that all nodes share}"
cd "$SLURM_SUBMIT_DIR"
source launch/slurm_gpu_env.sh

# On Slurm JAX gives a process only the GPU of its local rank, unless this variable is set.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_PER_NODE##*:} - 1)))
export JAX_LOCAL_DEVICE_IDS

# The processes find each other through Slurm's variables: train.py needs no flags for that.
status=0
srun --cpus-per-task="$SRUN_CPUS_PER_TASK" --kill-on-bad-exit=1 python train.py --workdir="$WORKDIR" "$@" || status=$?
if [ "$status" -eq 130 ]; then # saved and stopped at the time limit: resume in a new allocation
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
