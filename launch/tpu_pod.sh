#!/usr/bin/env bash
# A Cloud TPU pod slice from nothing to a run, with gcloud. Every step can be repeated.
#
#   export NAME=flowgrpo ZONE=us-east5-b TYPE=v6e-64 PROJECT=my-project
#   launch/tpu_pod.sh create        # QUEUED=1: as a queued resource; SPOT=1: and a spot slice
#   launch/tpu_pod.sh install       # EXTRAS=tpu,torch: what the recipe needs, see launch/README.md
#   launch/tpu_pod.sh start --config configs/geneval.py --workdir gs://my-bucket/runs/geneval
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

create() {
  if [[ ${QUEUED:-}${SPOT:-} ]]; then
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id "$NAME" \
      --accelerator-type "$TYPE" --runtime-version "$VERSION" ${SPOT:+--spot} || return
  else
    tpu create --accelerator-type "$TYPE" --version "$VERSION" || return
  fi
  until [[ $(state) == READY ]]; do sleep "$PAUSE"; done
}

install() {
  : "${REPOSITORY:?the address that every worker clones}"
  everywhere "set -e; [ -d flowgrpo_jax ] || git clone $(printf %q "$REPOSITORY") flowgrpo_jax
    cd flowgrpo_jax; git fetch -q; git checkout -q $(printf %q "$REVISION")
    [ -x ~/.uv/uv ] ||
      curl -LsSf https://astral.sh/uv/$UV/install.sh | UV_UNMANAGED_INSTALL=~/.uv sh
    [ -d .venv ] || ~/.uv/uv venv -q --python 3.12 .venv
    UV_TORCH_BACKEND=cpu ~/.uv/uv pip install -q -e '.[$EXTRAS]' gcsfs"
}

up="grep -qs flowgrpo_jax.train /proc/\$(cat train.pid 2>/dev/null)/cmdline"

# On the workers where no run is up. It leaves its exit status in train.status.
start() {
  local train="launch/run.sh .venv/bin/python -m flowgrpo_jax.train"
  local wrapper="'trap : TERM; echo \$\$ >train.pid; \"\$@\"; echo \$? >train.status'"
  # FLOWGRPO_POD: join the other workers, of which no variable tells on these machines
  everywhere "cd flowgrpo_jax; $up && exit; rm -f train.status; FLOWGRPO_POD=1 \
    nohup bash -c $wrapper run $train$(printf ' %q' "$@") >>train.log 2>&1 </dev/null &"
}

delete() {
  if [[ ${QUEUED:-}${SPOT:-} ]]; then
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
  else
    tpu delete --quiet
  fi
}

# Of every worker "run up", "run gone", or "run" and the exit status; nothing where ssh fails.
progress() {
  everywhere "cd flowgrpo_jax; if $up; then echo run up; else
    echo run \$(cat train.status 2>/dev/null || echo gone); fi" 2>/dev/null || true
}

again() {
  echo "$1: a new slice"
  until delete || true; create && install; do
    echo "no slice; again in $PAUSE s"
    sleep "$PAUSE"
  done
}

watch() {
  case $(state) in
    READY) ;;
    UNKNOWN) echo "gcloud does not answer: is it logged in?" >&2; return 1 ;;
    ABSENT) create && install ;;
    *) again "the slice is not ready" ;;
  esac
  start "$@"
  while sleep "$PAUSE"; do
    case $(state) in
      READY)
        case $(progress) in
          *"run gone"*) echo "a worker was started anew"; start "$@" ;;
          *"run up"*) ;;
          *"run 0"*) echo "the run has ended"; return 0 ;;
          *"run "*) echo "the run failed: see launch/tpu_pod.sh logs" >&2; return 1 ;;
          *) ;; # nobody answers: look again
        esac
        ;;
      PREEMPTED | STOPPED | STOPPING | TERMINATED | DELETING | ABSENT)
        again "the slice is gone"
        start "$@"
        ;;
      *) ;; # being repaired, or gcloud does not say: look again
    esac
  done
}

command=${1:?create, install, start, logs, watch, stop or delete}
shift
case $command in
  create | install | start | watch | delete) "$command" "$@" ;;
  logs) tpu ssh --worker=0 --command "tail -n 100 -F flowgrpo_jax/train.log" ;;
  # The brackets keep the pattern from matching the shell that searches for it.
  stop) everywhere "pkill -TERM -f '[l]aunch/run.sh' || true" ;;
  *) echo "launch/tpu_pod.sh: no command $command" >&2; exit 2 ;;
esac
