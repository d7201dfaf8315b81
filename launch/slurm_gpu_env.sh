# shellcheck shell=bash
# Environment of the GPU jobs, sourced by slurm_per_node.sh and slurm_per_gpu.sh.

export JAX_PLATFORMS=cuda # without it a node whose GPUs do not start would run on its CPUs
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} # NCCL and CUDA need the rest
# Collectives of the next layer run beside the arithmetic of this one.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# srun gives a task one CPU by default, and since Slurm 22.05 ignores sbatch's --cpus-per-task: without this one core
# would feed all GPUs of a process. A task gets an equal part of the CPUs of the smallest node, or sbatch's number.
smallest_node=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:?}" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((smallest_node / ${SLURM_NTASKS_PER_NODE:?}))}

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# For your network, if NCCL chooses wrongly (nccl-tests show that):
# export NCCL_SOCKET_IFNAME=eth0     the interface for NCCL's own handshake
# export NCCL_IB_HCA=mlx5            the InfiniBand adapters

# gRPC would use a proxy to reach the next node.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY
