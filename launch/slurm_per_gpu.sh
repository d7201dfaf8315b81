#!/usr/bin/env bash
# Slurm, one process per GPU.
#
#   WORKDIR=/shared/runs/first sbatch --nodes=4 launch/slurm_per_gpu.sh --config=configs/X.py [flags of train.py]
#
# As slurm_per_node.sh, which has more comments, but with more processes: each reads data and traces the step, and a delay
# in Python delays one GPU only.
#SBATCH --job-name=natsjax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=natsjax-%j.log
# No --gpus-per-task or --gpu-bind: JAX takes the GPU whose number is the local rank of the process, so that each must
# see all GPUs of its node.
set -euo pipefail
: "${WORKDIR:?a folder that all nodes share}"
cd "$SLURM_SUBMIT_DIR"
source launch/slurm_gpu_env.sh

status=0
srun --cpus-per-task="$SRUN_CPUS_PER_TASK" --kill-on-bad-exit=1 python train.py --workdir="$WORKDIR" "$@" || status=$?
if [ "$status" -eq 130 ]; then # saved and stopped at the time limit: resume in a new allocation
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
