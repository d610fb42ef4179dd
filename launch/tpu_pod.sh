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
  local wrapper="'trap : TERM; \"\$@\"; echo \$? >train.status'"
  # FLOWGRPO_POD: join the other workers, of which no variable tells on these machines
  everywhere "cd flowgrpo_jax || exit; $up && exit; rm -f train.status; FLOWGRPO_POD=1 \
    nohup bash -c $wrapper run $train$(printf ' %q' "$@") >>train.log 2>&1 </dev/null &
    echo \$! >train.pid"
}

delete() {
  if queued; then queue delete --force --quiet; else tpu delete --quiet; fi
}

# A line of every worker: "run up", "run gone" without a trace, "run missing" where nothing is
# installed, or "run" and its exit status. Nothing where ssh fails.
progress() {
  everywhere "cd flowgrpo_jax 2>/dev/null || { echo run missing; exit; }
    if $up; then echo run up; else echo run \$(cat train.status 2>/dev/null || echo gone); fi" \
    2>/dev/null || true
}

again() {
  echo "$1: a new slice"
  until delete || true; create; do
    echo "no slice; again in $PAUSE s"
    sleep "$PAUSE"
  done
}

watch() {
  local said status
  while :; do
    case $(state) in
      READY)
        said=$(progress)
        case $said in
          *"run missing"*) install || true ;;
          *"run gone"*) start "$@" || true ;;
          *"run up"*) ;;
          *"run "*)
            status=$(grep -oE 'run [0-9]+' <<<"$said" | sort -rn -k 2 | head -n 1)
            echo "the run has ended with ${status#run }: see launch/tpu_pod.sh logs"
            return "${status#run }"
            ;;
          *) ;; # nobody answers: look again
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
  create | install | start | watch | delete) "$command" "$@" ;;
  logs) tpu ssh --worker=0 --command "tail -n 100 -F flowgrpo_jax/train.log" ;;
  stop) everywhere "cd flowgrpo_jax && pkill -TERM -P \$(cat train.pid) || true" ;;
  *) echo "launch/tpu_pod.sh: no command $command" >&2; exit 2 ;;
esac
