#!/usr/bin/env bash
# N processes on this machine, each with D faked CPU devices: a trial of N hosts with D chips each.
#
#   launch/local.sh N D --config=configs/smoke.py --workdir=/tmp/try [any other flag of train.py]
#
# Ctrl-C, or kill -TERM of this script or of one process, makes the run save and stop; the same command resumes it.
# To see the effect of a lost host, kill -9 one process: their numbers are printed at the start.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n 's/^# \{0,1\}//; 2,7p' "$0"
  exit 2
fi
count=$1 devices=$2
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

processes=()
for ((id = 0; id < count; id++)); do
  "$python" train.py "$@" --coordinator_address="127.0.0.1:$port" --num_processes="$count" --process_id="$id" &
  processes+=($!)
  echo "process $id is pid $!" >&2
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM

status=0
for process in "${processes[@]}"; do
  code=0
  wait "$process" || code=$?
  while kill -0 "$process" 2>/dev/null; do # the signal has woken us, not the end of the process
    code=0
    wait "$process" || code=$?
  done
  if [ "$status" -eq 0 ]; then status=$code; fi
done
exit "$status"
