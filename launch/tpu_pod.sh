#!/usr/bin/env bash
# A Cloud TPU pod slice from nothing to a run, with gcloud. Every step can be repeated.
#
#   export NAME=flowgrpo ZONE=us-east5-b TYPE=v6e-64 PROJECT=my-project
#   launch/tpu_pod.sh create        # QUEUED=1: as a queued resource; SPOT=1: and a spot slice
#   launch/tpu_pod.sh install       # EXTRAS=tpu,torch: what the recipe needs, see launch/README.md
#   launch/tpu_pod.sh start --config geneval --workdir gs://my-bucket/runs/geneval
#   launch/tpu_pod.sh logs          # of worker 0, followed
#   launch/tpu_pod.sh watch ...     # start, and after a preemption create, install and start again;
#                                   # ends when the run does, and can itself be started again
#   launch/tpu_pod.sh stop          # SIGTERM: saves and ends
#   launch/tpu_pod.sh delete
set -euo pipefail

: "${NAME:?the name of the slice}" "${ZONE:?its zone}" "${TYPE:?its type, such as v6e-64}"
VERSION=${VERSION:-v2-alpha-tpuv6e} # v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5
REPOSITORY=${REPOSITORY:-$(git config --get remote.origin.url || true)}
REVISION=${REVISION:-$(git rev-parse HEAD 2>/dev/null || true)}
EXTRAS=${EXTRAS:-tpu}
UV=0.9.26 # uv brings the Python: the machines' own, 3.10, is too old
PAUSE=${PAUSE:-60}
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" "${place[@]}" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command "$1"; }

# READY, CREATING, PREEMPTED, ...; ABSENT; UNKNOWN while gcloud does not say.
state() {
  local said
  if said=$(tpu describe --format='value(state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

queued() { [[ ${QUEUED:-}${SPOT:-} ]]; }
queue() { gcloud compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"; }

# Waits until the slice is ready; fails where there is none to be had.
create() {
  if queued; then
    queue create --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$VERSION" \
      ${SPOT:+--spot} || return
  else
    tpu create --accelerator-type "$TYPE" --version "$VERSION" || return
  fi
  while :; do
    case $(state) in
      READY) return ;;
      PREEMPTED | STOPPED | TERMINATED) return 1 ;;
    esac
    if queued && [[ $(queue describe --format='value(state.state)' 2>&1) =~ FAILED|SUSPENDED ]]; then
      return 1
    fi
    sleep "$PAUSE"
  done
}

install() {
  : "${REPOSITORY:?the address that every worker clones}"
  everywhere "set -e; [ -d flowgrpo_jax ] || git clone $(printf %q "$REPOSITORY") flowgrpo_jax
    cd flowgrpo_jax; rm -f .venv/installed; git fetch -q; git checkout -q $(printf %q "$REVISION")
    [ -x ~/.uv/uv ] ||
      curl -LsSf https://astral.sh/uv/$UV/install.sh | UV_UNMANAGED_INSTALL=~/.uv sh
    [ -d .venv ] || ~/.uv/uv venv -q --python 3.12 .venv
    UV_TORCH_BACKEND=cpu ~/.uv/uv pip install -q -e '.[$EXTRAS,bucket]'
    touch .venv/installed"
}

up="grep -qs flowgrpo_jax.train /proc/\$(cat train.pid 2>/dev/null)/cmdline"

# On the workers where no run is up. It leaves its exit status in train.status. That is 75 after
# `stop` as after a worker's reboot or preemption: train.stopped tells them apart.
start() {
  local train="launch/run.sh .venv/bin/python -m flowgrpo_jax.train"
  local wrapper="'trap : TERM; \"\$@\"; echo \$? >train.status'"
  # FLOWGRPO_POD: join the other workers, of which no variable tells on these machines
  everywhere "cd flowgrpo_jax || exit; $up && exit; rm -f train.status train.stopped
    FLOWGRPO_POD=1 nohup bash -c $wrapper run $train$(printf ' %q' "$@") \
      >>train.log 2>&1 </dev/null &
    echo \$! >train.pid"
}

stop() {
  everywhere "cd flowgrpo_jax || exit 0; touch train.stopped
    $up && pkill -TERM -P \$(cat train.pid) || true"
}

delete() {
  if queued; then queue delete --force --quiet; else tpu delete --quiet; fi
}

# The state of the run on the workers, a word; of several the first in the list below. "missing": not
# (wholly) installed. "stopping": still saving. 0, 1 and 2 are final, as in launch/run.sh. "stopped"
# and "gone": ended with any other status or none, with and without `stop`. Nothing where ssh fails.
progress() {
  local said word
  said=$(everywhere "cd flowgrpo_jax 2>/dev/null
    if $up; then [ -e train.stopped ] && echo run stopping || echo run up
    elif ! [ -e .venv/installed ]; then echo run missing
    elif grep -qsx '[012]' train.status; then echo run \$(cat train.status)
    elif [ -e train.stopped ]; then echo run stopped
    else echo run gone; fi" 2>/dev/null) || true
  for word in missing stopping 1 2 stopped gone up 0; do
    if grep -qw "run $word" <<<"$said"; then echo "$word"; return; fi
  done
}

again() {
  echo "$1: a new slice"
  until delete || true; create; do
    echo "no slice; again in $PAUSE s"
    sleep "$PAUSE"
  done
}

watch() {
  local found started=""
  while :; do
    case $(state) in
      READY)
        found=$(progress)
        case $started:$found in
          *:missing) install || true ;;
          *: | *:stopping | yes:up) ;; # nobody answers, or nothing to do: look again
          :* | *:gone) # once in any case: how it ended before this watch is not the end of this one
            echo "run $found: start where it is not up"
            if start "$@"; then started=yes; fi
            ;;
          *)
            # not to wait for a worker that has failed, nor to be joined by it with other arguments
            case $found in 1 | 2) stop || true ;; esac
            found=${found/stopped/75}
            echo "the run has ended with $found: see launch/tpu_pod.sh logs"
            return "$found"
            ;;
        esac
        ;;
      ABSENT | PREEMPTED | STOPPED | STOPPING | TERMINATED | DELETING) again "no slice" ;;
      *) ;; # being made or repaired, or gcloud does not say: look again
    esac
    sleep "$PAUSE"
  done
}

command=${1:?create, install, start, logs, watch, stop or delete}
shift
case $command in
  create | install | start | watch | stop | delete) "$command" "$@" ;;
  logs) tpu ssh --worker=0 --command "tail -n 100 -F flowgrpo_jax/train.log" ;;
  *) echo "launch/tpu_pod.sh: no command $command" >&2; exit 2 ;;
esac
