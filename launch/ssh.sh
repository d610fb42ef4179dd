#!/usr/bin/env bash
# One process on each of a list of machines that share a file system, over plain ssh.
#
#   HOSTS="node1 node2" launch/ssh.sh --config geneval --workdir /shared/runs/geneval
#
# DIRECTORY is where this repository lies on every machine (here, without it); PYTHON its
# interpreter; PORT a free port of the first machine. Ends when every process has ended. Ctrl-C,
# SIGTERM and the failure of one machine tell all of them to save and end, and hang up on those that
# have not done so after GRACE seconds, or at the second Ctrl-C.
set -euo pipefail

read -r -a hosts <<<"${HOSTS:?give the machines, HOSTS=\"node1 node2\"}"
DIRECTORY=${DIRECTORY:-$PWD}
PYTHON=${PYTHON:-python}
PORT=${PORT:-8476}
SSH=${SSH:-ssh}
GRACE=${GRACE:-120}

arguments=$(printf ' %q' "$@")
run="launch/run.sh env FLOWGRPO_RUN=${HOSTNAME:-here}-$$"
pids=()
deadline=""

stop() {
  if [[ $deadline ]]; then deadline=$SECONDS; return; fi
  deadline=$((SECONDS + GRACE))
  # Found by its command line, from the start: in that of this machine's ssh it stands further behind.
  for host in "${hosts[@]}"; do
    $SSH -o BatchMode=yes "$host" "pkill -TERM -f '^[^ ]*bash [^ ]*$run '" </dev/null &>/dev/null &
  done
}
trap stop TERM INT

set -m # every machine's pipeline is a process group of its own
for i in "${!hosts[@]}"; do
  # -tt: a hang-up reaches the remote process as well
  {
    $SSH -tt -o BatchMode=yes "${hosts[$i]}" \
      "cd $(printf %q "$DIRECTORY") && FLOWGRPO_COORDINATOR=${hosts[0]}:$PORT" \
      "FLOWGRPO_PROCESSES=${#hosts[@]} FLOWGRPO_PROCESS=$i" \
      "exec $run $PYTHON -m flowgrpo_jax.train$arguments" </dev/null 2>&1 |
      sed -u "s/^/[${hosts[$i]}] /"
  } &
  pids+=($!)
done
set +m # or Ctrl-C would reach a `sleep` alone

status=0
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[$i]}" 2>/dev/null; then
      if [[ $deadline ]] && ((SECONDS >= deadline)); then
        kill -TERM -- "-${pids[$i]}" 2>/dev/null || true
      fi
      continue
    fi
    code=0
    wait "${pids[$i]}" || code=$?
    unset "pids[$i]"
    # the first that went wrong; a program's own error, 1 or 2, before those that have saved
    if ((code && (!status || code <= 2))); then status=$code; fi
    if ((code)) && [[ ! $deadline ]]; then stop; fi
  done
  sleep 0.2 || true
done
exit "$status"
