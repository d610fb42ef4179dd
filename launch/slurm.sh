#!/usr/bin/env bash
# SLURM: one process a node, with all of its GPUs. JAX finds the other processes by itself.
#
#   sbatch --nodes=4 launch/slurm.sh --config configs/geneval.py --workdir /shared/runs/geneval
#
# SLURM sends SIGTERM two minutes before the time is up; the run saves, and the job puts itself
# back into the queue and goes on from there.
#SBATCH --job-name=flowgrpo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flowgrpo-%j.log
set -uo pipefail

PYTHON=${PYTHON:-python}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

srun --kill-on-bad-exit=1 launch/run.sh "$PYTHON" -m flowgrpo_jax.train "$@"
status=$?
if ((status == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
