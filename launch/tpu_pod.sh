#!/usr/bin/env bash
# A Cloud TPU pod slice from nothing to a run, with gcloud. Every step can be repeated.
#
#   export NAME=flowgrpo ZONE=us-east5-b TYPE=v6e-64 PROJECT=my-project
#   launch/tpu_pod.sh create        # SPOT=1: as a spot slice through a queued resource
#   launch/tpu_pod.sh install       # EXTRAS=tpu,torch: what the recipe needs, see launch/README.md
#   launch/tpu_pod.sh start --config configs/geneval.py --workdir gs://my-bucket/runs/geneval
#   launch/tpu_pod.sh logs          # of worker 0, followed
#   launch/tpu_pod.sh watch ...     # start, and after a preemption create, install and start again
#   launch/tpu_pod.sh stop          # SIGTERM: saves and ends
#   launch/tpu_pod.sh delete
set -euo pipefail

: "${NAME:?the name of the slice}" "${ZONE:?its zone}" "${TYPE:?its type, such as v6e-64}"
VERSION=${VERSION:-v2-alpha-tpuv6e} # runtime: tpu-ubuntu2204-base for v4 and v5p
REPOSITORY=${REPOSITORY:-$(git config --get remote.origin.url || true)}
REVISION=${REVISION:-$(git rev-parse HEAD 2>/dev/null || true)}
EXTRAS=${EXTRAS:-tpu}
UV=0.9.26 # uv brings the Python: the machines' own, 3.10, is too old
PAUSE=${PAUSE:-60}
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" "${place[@]}" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command "$1"; }
state() { tpu describe --format='value(state)' 2>/dev/null || echo ABSENT; }

create() {
  if [[ ${SPOT:-} ]]; then
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id "$NAME" \
      --accelerator-type "$TYPE" --runtime-version "$VERSION" --spot
  else
    tpu create --accelerator-type "$TYPE" --version "$VERSION"
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

start() {
  local train="launch/run.sh .venv/bin/python -m flowgrpo_jax.train"
  # FLOWGRPO_POD: join the other workers, of which no variable tells on these machines
  everywhere "cd flowgrpo_jax; FLOWGRPO_POD=1 nohup $train$(printf ' %q' "$@") \
    >train.log 2>&1 </dev/null &"
}

delete() {
  if [[ ${SPOT:-} ]]; then
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
  else
    tpu delete --quiet
  fi
}

# The brackets keep the pattern from matching the command line of the shell that searches for it.
running() { everywhere "pgrep -f '[f]lowgrpo_jax.train'" >/dev/null 2>&1; }

watch() {
  [[ $(state) == READY ]] || { create; install; }
  start "$@"
  while sleep "$PAUSE"; do
    case $(state) in
      READY) running || { echo "the run has ended"; return 0; } ;;
      *) echo "the slice is gone: again"; delete || true; create; install; start "$@" ;;
    esac
  done
}

command=${1:?create, install, start, logs, watch, stop or delete}
shift
case $command in
  create | install | start | watch | delete) "$command" "$@" ;;
  logs) tpu ssh --worker=0 --command "tail -n 100 -F flowgrpo_jax/train.log" ;;
  stop) everywhere "pkill -TERM -f '[l]aunch/run.sh' || true" ;;
  *) echo "launch/tpu_pod.sh: no command $command" >&2; exit 2 ;;
esac
