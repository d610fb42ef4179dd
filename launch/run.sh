#!/usr/bin/env bash
# Run a command again while it exits with 75 (stopped by SIGTERM after saving) or dies of a lost
# peer or machine, up to RESTARTS times. The other launchers wrap training in it:
#
#   launch/run.sh python -m flowgrpo_jax.train --config geneval --workdir runs/geneval
#
# --resume is always added: it goes on from the last checkpoint, and starts where there is none.
set -euo pipefail

RESTARTS=${RESTARTS:-20}
PAUSE=${PAUSE:-10}

child=""
stopping=""
again=75 # asks whoever started this for another start: after SIGTERM, not after Ctrl-C
# The machine or the user wants an end: let the run save, and do not start it again. A signal to the
# whole process group reaches the run twice, which counts once there (flowgrpo_jax.command_line.stop.Stop).
trap 'stopping=TERM interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
trap 'stopping=INT again=130 interrupted=1; kill -INT "$child" 2>/dev/null || true' INT

run() { # a command; sets $status
  (trap - INT; exec "$@") & # a background command would not see Ctrl-C
  child=$!
  if [[ $stopping ]]; then kill -"$stopping" "$child" 2>/dev/null || true; fi
  while # a signal cuts `wait` short and not the command
    interrupted="" status=0
    wait "$child" || status=$?
    [[ $interrupted ]]
  do :; done
}

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  run "$@" --resume
  # bash says -1 where a second signal comes as the command ends: how it ended is then unknown
  if [[ $stopping ]]; then exit $((0 <= status && status <= 2 ? status : again)); fi
  case $status in
    0) exit 0 ;;
    1 | 2) echo "launch/run.sh: failed with $status, which a restart does not mend" >&2; exit "$status" ;;
  esac
  echo "launch/run.sh: ended with $status, start $((attempt + 2)) in $PAUSE s" >&2
  run sleep "$PAUSE"
  if [[ $stopping ]]; then exit "$again"; fi
done
echo "launch/run.sh: gave up after $RESTARTS restarts" >&2
exit 75
