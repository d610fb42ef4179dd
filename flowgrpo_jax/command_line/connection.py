"""How the processes of a run find each other."""

from __future__ import annotations

import os

import jax

COORDINATES = ("COORDINATOR", "PROCESSES", "PROCESS")
CLUSTERS = {  # environment variable -> does it say that there are several processes?
    "SLURM_NTASKS": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_NUM_SLICES": lambda value: int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "FLOWGRPO_POD": bool,  # launch/tpu_pod.sh: only a metadata server knows there, JAX asks it
}


def connect() -> None:
    """Join the other processes of the run, if there are any. The first thing an entry point does.

    JAX finds them by itself on TPU pods, under SLURM and under Open MPI. Elsewhere (Kubernetes,
    ssh) say it with FLOWGRPO_COORDINATOR=HOST:PORT, FLOWGRPO_PROCESSES=N and FLOWGRPO_PROCESS=i. A
    process has all GPUs that it can see; of several under SLURM or Open MPI that see the same ones,
    each has the one of its number on the machine.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; `Stop` does that
    own = {name: os.environ.get(f"FLOWGRPO_{name}") for name in COORDINATES}
    given = [name for name, value in own.items() if value]
    if given and len(given) < len(COORDINATES):
        absent = [f"FLOWGRPO_{name}" for name in COORDINATES if name not in given]
        raise ValueError(f"to join a run of several processes also set {', '.join(absent)}")
    if given:
        jax.distributed.initialize(
            own["COORDINATOR"],
            int(own["PROCESSES"] or 1),
            int(own["PROCESS"] or 0),
            # all is said: started from within a SLURM job JAX would still take one GPU, as below
            cluster_detection_method="deactivate",
        )
    elif any(several(os.environ[name]) for name, several in CLUSTERS.items() if name in os.environ):
        jax.distributed.initialize(local_device_ids=[] if has_all_devices() else None)


def has_all_devices() -> bool:
    """Return whether all GPUs that this process of SLURM or Open MPI can see are its own.

    By default JAX expects one process per GPU and gives a process the GPU of its number on the
    machine. A single process would then leave seven of eight GPUs idle, and process 5, if it sees
    only its own GPU as number 0, would not find number 5.
    """
    env = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return False
    gpus = env.get("CUDA_VISIBLE_DEVICES", "")
    if gpus and "," not in gpus:
        return True
    if "OMPI_COMM_WORLD_SIZE" in env:  # before SLURM, as JAX does: mpirun works in SLURM's jobs
        return env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # every node of a step has a task, so as many tasks as nodes are one on each
    return "SLURM_NTASKS" in env and env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES")
