#!/usr/bin/env bash
# The hosts of a Cloud TPU slice, all at once, through gcloud; from your own machine.
#
#   export TPU_NAME=… ZONE=… WORKDIR=/mnt/runs/first REPOSITORY=https://…/natsjax.git
#   launch/tpu_vm.sh setup                             clone and install on every host
#   launch/tpu_vm.sh start --config=configs/X.py       on every host, in the background; again after a stop, to resume
#   launch/tpu_vm.sh log                               of process 0, which logs for all; ends with Ctrl-C
#   launch/tpu_vm.sh stop                              save, then end
#
# WORKDIR is on a filesystem that every host has mounted at the same place (docs/clusters.md lists them). The
# processes find each other through the metadata of the slice: train.py needs no flags for that.
set -euo pipefail
: "${TPU_NAME:?}" "${ZONE:?}"
action=${1:?setup, start, log or stop}
shift

on() { # WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case $action in
setup)
  on all "git clone --depth=1 ${REPOSITORY:?} natsjax && cd natsjax &&
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
  ;;
start)
  # JAX_PLATFORMS: without it a host whose TPU does not start would run on its CPU.
  # setsid, nohup: the run continues after the ssh session.
  # XLA flags for TPUs go into LIBTPU_INIT_ARGS, not XLA_FLAGS; start with libtpu's defaults.
  flags=$(printf ' %q' "--workdir=${WORKDIR:?}" "$@")
  on all "cd natsjax && export JAX_PLATFORMS=tpu,cpu &&
    (setsid nohup .venv/bin/python train.py$flags > ~/natsjax.log 2>&1 < /dev/null & echo \$! > ~/natsjax.pid)"
  ;;
log)
  on 0 'tail -n 50 -F ~/natsjax.log' # the logs of the others have only errors
  ;;
stop)
  on all "kill -TERM \$(cat ~/natsjax.pid)" # one host is enough: they agree on the step
  ;;
*)
  echo "$action: setup, start, log or stop was expected" >&2
  exit 2
  ;;
esac
