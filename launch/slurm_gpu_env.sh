# shellcheck shell=bash
# Environment of the GPU jobs, sourced by slurm_per_node.sh and slurm_per_gpu.sh.

export JAX_PLATFORMS=cuda # without it a node whose GPUs do not come up would go on with its CPUs
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} # the rest is for NCCL and CUDA
# Collectives of the next layer run beside the arithmetic of this one.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# srun gives a task one CPU unless it is told how many, and since Slurm 22.05 sbatch's --cpus-per-task does not tell it:
# without this one core feeds all GPUs of a process. All CPUs of the smallest node in equal parts, or what sbatch was
# given.
smallest_node=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:?}" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((smallest_node / ${SLURM_NTASKS_PER_NODE:?}))}

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What your network needs, if NCCL chooses wrongly; nccl-tests tell whether it does:
# export NCCL_SOCKET_IFNAME=eth0     the interface for NCCL's own handshake
# export NCCL_IB_HCA=mlx5            the InfiniBand adapters

# gRPC would ask a proxy for the way to the next node.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY
