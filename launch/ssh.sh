#!/usr/bin/env bash
# One process on each of a list of machines that share a file system, over plain ssh.
#
#   HOSTS="node1 node2" launch/ssh.sh --config configs/geneval.py --workdir /shared/runs/geneval
#
# DIRECTORY is where this repository lies on every machine (here, without it); PYTHON its
# interpreter; PORT a free port of the first machine. Ends when every process has ended; when one
# fails the others are told to stop.
set -euo pipefail

read -r -a hosts <<<"${HOSTS:?give the machines, HOSTS=\"node1 node2\"}"
DIRECTORY=${DIRECTORY:-$PWD}
PYTHON=${PYTHON:-python}
PORT=${PORT:-8476}
SSH=${SSH:-ssh}

arguments=$(printf ' %q' "$@")
pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT

for i in "${!hosts[@]}"; do
  # -tt: when this script is stopped, the hang-up reaches the remote process as well
  $SSH -tt -o BatchMode=yes "${hosts[$i]}" \
    "cd $(printf %q "$DIRECTORY") && FLOWGRPO_COORDINATOR=${hosts[0]}:$PORT" \
    "FLOWGRPO_PROCESSES=${#hosts[@]} FLOWGRPO_PROCESS=$i" \
    "launch/run.sh $PYTHON -m flowgrpo_jax.train$arguments" </dev/null 2>&1 |
    sed -u "s/^/[${hosts[$i]}] /" &
  pids+=($!)
done

status=0
for _ in "${pids[@]}"; do
  wait -n || { status=$?; stop; }
done
exit "$status"
