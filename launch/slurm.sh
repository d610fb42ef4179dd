#!/usr/bin/env bash
# SLURM: one process a node, with all of its GPUs. The processes find each other by themselves.
#
#   sbatch --nodes=4 launch/slurm.sh --config geneval --workdir /shared/runs/geneval
#
# SLURM sends SIGTERM two minutes before the time is up; the run saves, and the job puts itself
# back into the queue and goes on from there. To end it, saved, before: scancel --signal=INT JOB.
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

# The first process to exit, with 75 for one, must not have the others killed while they still save:
# they have as long as the signal gave. srun takes over sbatch's GPUs by itself, its cores not.
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" \
  launch/run.sh "$PYTHON" -m flowgrpo_jax.train "$@"
status=$?
if ((status == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
