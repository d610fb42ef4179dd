#!/usr/bin/env bash
# Run a command again while it exits with 75 (stopped by SIGTERM after saving) or dies of a lost
# peer or machine, up to RESTARTS times. The other launchers wrap training in it:
#
#   launch/run.sh python -m flowgrpo_jax.train --config configs/geneval.py --workdir runs/geneval
#
# --resume is added from the second start on, and on the first when the work directory already has
# a checkpoint, so that the same line starts a run and goes on with it.
set -euo pipefail

RESTARTS=${RESTARTS:-20}
PAUSE=${PAUSE:-10}

workdir=""
previous=""
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
    *) [[ $previous == --workdir ]] && workdir=$argument ;;
  esac
  previous=$argument
done
if [[ -z $workdir ]]; then
  echo "launch/run.sh: give --workdir, it says where a restart goes on" >&2
  exit 2
fi

saved() { # in a bucket nobody can look for files; --resume without a checkpoint starts from 0 there
  [[ $workdir == *://* ]] || compgen -G "$workdir/checkpoints/[0-9]*" >/dev/null
}

child=""
stopping=""
# The machine is going away: let the run save, and do not start it again.
trap 'stopping=1; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM INT

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  resume=()
  if saved; then resume=(--resume); fi
  "$@" "${resume[@]}" &
  child=$!
  status=0
  wait "$child" || status=$?
  if [[ -n $stopping ]]; then # the first wait was cut short by the signal
    wait "$child" 2>/dev/null && status=0 || status=$?
    exit "$status"
  fi
  case $status in
    0) exit 0 ;;
    1 | 2) echo "launch/run.sh: failed with $status, which a restart does not mend" >&2; exit "$status" ;;
  esac
  echo "launch/run.sh: ended with $status, start $((attempt + 2)) in $PAUSE s" >&2
  sleep "$PAUSE"
done
echo "launch/run.sh: gave up after $RESTARTS restarts" >&2
exit 75
