#!/usr/bin/env bash
# A run on a GKE cluster made by xpk (https://github.com/AI-Hypercomputer/xpk), which writes the JobSet.
#
#   export CLUSTER=… ZONE=… TPU_TYPE=v5litepod-16 IMAGE=REGION-docker.pkg.dev/…/natsjax WORKDIR=/mnt/runs/first
#   launch/gke_xpk.sh NAME --config=configs/X.py [any other flag of train.py]
#
# IMAGE has this repository at its working directory, installed with '.[tpu]'. WORKDIR is on storage that was attached
# to the cluster with `xpk storage attach` and is mounted in every pod (docs/clusters.md lists the kinds).
# More slices: SLICES=2. Stop: xpk workload delete --workload=NAME --cluster=$CLUSTER --zone=$ZONE, which sends SIGTERM:
# the run saves and ends. Start it again with the same WORKDIR to resume it.
set -euo pipefail
name=${1:?name of the workload}
shift
flags=$(printf ' %q' "--workdir=${WORKDIR:?}" "$@")

# exec, so that SIGTERM reaches Python and not a shell, which does not forward it.
xpk workload create \
  --workload="$name" \
  --cluster="${CLUSTER:?}" \
  --zone="${ZONE:?}" \
  --tpu-type="${TPU_TYPE:?}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?}" \
  --max-restarts=20 \
  --termination-grace-period-seconds=300 \
  --env="JAX_PLATFORMS=tpu,cpu" \
  --command="exec python train.py$flags"
