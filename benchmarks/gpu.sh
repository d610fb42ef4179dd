#!/usr/bin/env bash
# Measure everything on a GPU that can be had for minutes, in one run: see benchmarks/gpu.py.
#
#   benchmarks/wheels.sh                         # once, where there is a network
#   benchmarks/gpu.sh OUT_FOLDER [OPTION...]     # on the GPU machine; options of benchmarks.gpu
#
# Nothing but OUT_FOLDER is written to in the checkout. On a machine that has all packages, such as
# one with `pip install -e '.[test]'`, wheels/ may be missing. A try without a GPU takes some 15
# minutes:
#
#   benchmarks/gpu.sh OUT_FOLDER --minutes 20 --device cpu --dtype float32 --model shapes --size 64 \
#     --groups 1 --group_size 2 --micro_batch 2 --steps 4 --window 2 --side 512 --tokens 200
set -euo pipefail
mkdir -p "$1"
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."

if compgen -G 'wheels/*.whl' >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" wheels/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
exec python3 -m benchmarks.gpu --out "$out" "$@"
