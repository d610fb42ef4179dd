#!/usr/bin/env bash
# Collect in wheels/ what a GPU machine without a network lacks: benchmarks/gpu.sh installs it there.
#
#   benchmarks/wheels.sh [PYTHON_VERSION]
#
# That machine is taken to have Python 3.12, CUDA builds of jax 0.11 and torch, transformers,
# tensorstore, and what these need. The wheels of the packages named here are 10 MB together.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:-3.12}
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)

rm -rf wheels && mkdir wheels
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
  --implementation cp "${platforms[@]}" -d wheels \
  flax==0.12.12 optax==0.2.8 orbax-checkpoint==0.12.8 treescope diffusers==0.42.1 peft==0.21.2 \
  ml_collections absl-py einops 'etils>=1.9' simplejson nest_asyncio importlib_resources \
  importlib_metadata tensorboardX zipp
git describe --always --dirty >wheels/commit # the GPU machine may have no git
du -sh wheels
