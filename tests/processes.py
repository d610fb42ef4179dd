"""Short training runs of a tiny model in processes of their own, one or several to a run."""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import compile_cache
import jax
import numpy as np
from etils import epath
from short_runs import timeless

from flowgrpo_jax import rewards
from flowgrpo_jax import train as training
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line import connection, exit_status
from flowgrpo_jax.storage import files
from flowgrpo_jax.train import initial_state, train

HERE = Path(__file__).parent
# Over two processes, on one device each: each has a part of every weight and of every group.
PAIR = {"mesh": {"data": 1, "fsdp": 2}, "devices": 2, "processes": 2}


calls: list[int] = []


def brightness(images, prompts, metadata):
    """Hardly moves when a value is rounded the other way. Kills its process at a call asked for,
    once the checkpoint asked for is complete: checkpoints are written in the background. Or does
    not return from a call asked for."""
    calls.append(len(images))
    if os.environ.get("KILL_AT_CALL") == str(len(calls)):
        deadline = time.monotonic() + 100
        while not Path(os.environ["KILL_AFTER"]).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("SLEEP_AT_CALL") == str(len(calls)):
        print("it sleeps", flush=True)
        time.sleep(10_000)
    return images.mean((1, 2, 3)) / 255, np.ones(len(images), bool)


ranked: list[int] = []


def rank(images, prompts, metadata):
    """The image's rank by brightness in its group, from 0 to 1."""
    ranked.append(len(images))
    place = images.mean((1, 2, 3)).argsort().argsort()
    return place / max(len(images) - 1, 1), np.ones(len(images), bool)


def distance(images, prompts, metadata):
    """The distance of the image's colour from the mean colour of the epoch."""
    colours = images.mean((1, 2))
    return np.linalg.norm(colours - colours.mean(0), axis=1), np.ones(len(images), bool)


rank.scope, distance.scope = "group", "epoch"


def load(folder, mesh, host_call):
    from flowgrpo_jax.configs import shapes

    c = shapes.get_config()
    c.model.path = str(folder / "model")
    c.model.height = c.model.width = 32
    c.model.product_dtype = ""
    c.epochs = 2
    c.lora.rank, c.lora.alpha = 8, 8.0
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 2, 8, 8  # a group on all devices
    c.sample.steps, c.sample.window, c.sample.window_range = 4, 2, (0, 3)
    c.sample.guidance_scale = c.eval.guidance_scale = 2.0
    c.reward.weights = {"brightness": 1.0, "processes:rank": 0, "processes:distance": 0}
    c.reward.host_call = host_call
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.steps = 2, 8, 8, 2
    c.eval.rewards, c.checkpoint.best = (), "brightness"
    c.monitor.move = False
    c.train.eps, c.train.learning_rate = 1.0, 1.0  # steps follow the gradient, not its sign
    c.checkpoint.every = 1
    c.mesh.update(mesh)
    return c


def adapted(config, name):
    """Runs whose name begins with "full" have no adapter."""
    config.lora.rank = 0 if name.startswith("full") else config.lora.rank
    return config


def refuse(read, unreadable, checkpoints, step, like):
    """`Checkpoints.read` where this process cannot read its part of a step."""
    if step == unreadable:
        raise OSError("a part of it is gone")
    return read(checkpoints, step, like)


def place(folder, name):
    """The work directory of a run, which may be in a bucket."""
    return epath.Path(name if files.in_bucket(name) else Path(folder) / name)


def run(folder, name, mesh, host_call="overlap", epochs=2):
    """What each child process does, as launchers have it done."""
    compile_cache.keep_of_every_process()
    connection.connect()
    rewards.TABLE["brightness"] = "processes:brightness"
    calls.clear()
    ranked.clear()
    config = adapted(load(Path(folder), mesh, host_call), name)
    if step := os.environ.get("UNREADABLE"):
        real = Checkpoints.read
        Checkpoints.read = lambda *arguments: refuse(real, int(step), *arguments)
    if host_call == "overlap":  # each with a cache of its own, as on machines without shared disks
        config.model.text_cache = f"{folder}/texts-{jax.process_index()}"
    if os.environ.get("LOADS_LONG"):
        training.build_run = lambda *_, **__: print("loading", flush=True) or time.sleep(300)
    config.epochs = epochs
    with exit_status.ending(), exit_status.exit_for_restart():
        train(config, place(folder, name), resume=True)
    Path(folder, f"scored-{Path(name).name}-{jax.process_index()}").write_text(str(sum(calls)))
    Path(folder, f"ranked-{Path(name).name}-{jax.process_index()}").write_text(json.dumps(ranked))


def spawn(folder, name, mesh, host_call="overlap", *, epochs=2, **settings):
    """One run in child processes."""
    return spawn_each(folder, [(name, mesh, host_call, epochs)], **settings)


def spawn_each(folder, runs, *, devices, processes=1, each=(), last=(), launcher=()):
    """Runs one after another, in child processes that share the given number of devices.

    Args:
      runs: the arguments of `run` for each.
      each, last: more environment, of every process and of the last one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"import processes\nfor run in {runs!r}: processes.run({str(folder)!r}, *run)"
    children = []
    for i in range(processes):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // processes),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        }
        if processes > 1:
            env |= {
                "FLOWGRPO_COORDINATOR": address,
                "FLOWGRPO_PROCESSES": str(processes),
                "FLOWGRPO_PROCESS": str(i),
            }
        env |= dict(each)
        if i == processes - 1:
            env |= dict(last)
        children.append(
            subprocess.Popen(
                [*launcher, sys.executable, "-c", code],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    started.extend(children)
    return children


started: list[subprocess.Popen] = []


def end_all():
    """Kill what a failed test has left running."""
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    started.clear()


def start(*run, **settings):
    """The same, until it has ended well; what each process printed."""
    return wait_for(spawn(*run, **settings))


def wait_for(children):
    """What each process printed. All of them must end well."""
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert not any(child.returncode for child in children), outputs
    return outputs


@functools.cache
def on_one_device(folder, full):
    """The parts of these runs, in this process, with which it reads what they have written."""
    return build_run(adapted(load(folder, {"data": 1}, "overlap"), "full" if full else ""))


def final_state(folder, name):
    """All that a run's last checkpoint holds of the training: LoRA, EMA, optimiser, key, step."""
    built = on_one_device(folder, name.startswith("full"))
    state, _ = Checkpoints(place(folder, name) / "checkpoints").resume(initial_state(built))
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


def outcome(folder, name):
    """(metrics without times, the EMA after training) of a run."""
    lines = (place(folder, name) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [timeless(row) for row in rows]
    built = on_one_device(folder, name.startswith("full"))
    return rows, jax.device_get(policies.load(place(folder, name), built.model))
