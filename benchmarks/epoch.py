"""Compare one training epoch in JAX and in PyTorch, on the same CPU or the same NVIDIA GPU.

    python -m benchmarks.epoch --model shapes --repeats 3 [--out FILE.json] \\
        [--engines jax,torch,torch-compile] [--groups 12 --steps 10 --window 5 ...]
    python -m benchmarks.epoch --device gpu --dtype bfloat16 --model random:sd3.5-medium \\
        --size 512 --groups 2 --group_size 8 --micro_batch 4 --steps 10 --window 3 [--guidance 4.5]

An epoch is sampling (CPS noise and log-probs within the window), decoding to uint8 on the host, and
one policy update over the window: LoRA on the joint attention, clipped ratio loss, gradient clip,
AdamW, EMA. It is configs/shapes.py with the flags on top. Text is encoded once per prompt outside
the timing; advantages are random in place of a reward, which costs both the same. The PyTorch side
is diffusers and peft, see engine_torch.py. `random:` is a published transformer and VAE with random
weights (random_model.py): speed does not depend on them, and they need no download.

How it measures:
  * every engine is a process of its own, so that its peak memory (resident set) is its own;
  * before any timing the engines must agree on velocity, images and gradient for one rollout;
  * compilation and the warm-up epochs are excluded and reported apart;
  * engines take turns, one epoch each, and the waiting ones are stopped: they never compete, and a
    machine that slows down slows down all of them; reported are medians;
  * all get the same environment, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in it (Linux: large
    temporaries in huge pages, which spares most page faults); --no-hugepages leaves that out.

Both keep all activations for the backward pass; with --remat JAX recomputes them, block by block,
as the recipes of large models do. On a GPU both may use TF32 for float32 products, peak memory is
the device's, and the engines share it: JAX takes what it needs instead of most of it at the start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from flowgrpo_jax.models import attention

ENGINES = {
    "jax": "benchmarks.engine_jax",
    "torch": "benchmarks.engine_torch",
    "torch-compile": "benchmarks.engine_torch",
}
TIMES = ("sample", "decode", "update", "epoch")  # seconds; sampling includes decoding
# Largest relative difference to the first engine; of images, largest difference in grey levels.
# On a GPU products are in TF32 or bfloat16, and so are the differences.
TOLERANCES = {
    "cpu": {"velocity": 1e-4, "gradient": 1e-3, "images": 1.0},
    "bfloat16": {"velocity": 0.05, "gradient": 0.1, "images": 1.0},  # of products on the CPU
    "gpu": {"velocity": 5e-2, "gradient": 2e-1, "images": 16.0},
}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft", "numpy")
HUGEPAGES = "glibc.malloc.hugetlb=1"
ROOT = Path(__file__).parent.parent

Arrays = dict[str, np.ndarray]


# ------------------------------------------------------------------------------- what is measured


class Engine(Protocol):
    """One implementation of the epoch. Every method returns when its work is done."""

    def draw(self) -> Arrays:
        """A micro-batch's rollout: x [W + 1, M, H, W, C] and log_prob [W, M] of its window."""
        ...

    def probe(self, drawn: Arrays) -> Arrays:
        """On such a rollout: the first step's velocity, the images uint8 that x[0] decodes to, and
        the gradient of each factor "lora..."."""
        ...

    def sample(self) -> None:
        """Draw an epoch's trajectories and bring its images to the host as uint8."""
        ...

    def decode(self) -> None:
        """Decode the epoch's latents once more: the second part of `sample`, for itself."""
        ...

    def update(self) -> None:
        """One policy update on the epoch's trajectories."""
        ...

    def device_peak(self) -> float:
        """Most GiB of an accelerator's memory in use so far; 0 on the CPU."""
        ...


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write config.json and inputs.npz: all that engines share, so that none favours itself.

    The last row of the texts in inputs.npz is the empty prompt's.

    Runs in a process of its own, because it needs the text encoders and the engines do not.
    """
    import jax

    from benchmarks import random_model
    from flowgrpo_jax import prompts
    from flowgrpo_jax.configs import shapes
    from flowgrpo_jax.models import lora, lora_files, sd3

    config = shapes.get_config()
    config.model.path = str(random_model.find(args.model, folder) or sd3.resolve(args.model))
    for knob in ("remat", "dtype", "product_dtype", "attention"):
        config.model[knob] = getattr(args, knob)
    config.model.options.t5_length = args.t5_length or config.model.options.t5_length
    for knob in ("groups", "group_size", "micro_batch", "steps", "window"):
        config.sample[knob] = getattr(args, knob) or config.sample[knob]
    config.sample.window_range = (0, 0)  # it begins with the first step
    config.sample.guidance_scale = args.guidance
    config.prompts.test = ""  # nothing is evaluated

    config.lora.targets = sd3.JOINT_ATTENTION
    spec = lora.LoRASpec(config.lora.rank, config.lora.alpha, config.lora.targets)
    length = config.model.options.t5_length
    model = sd3.load(config.model.path, lora_spec=spec, t5_length=length, texts_alone=True)
    size = args.size or model.default_size
    config.model.height = config.model.width = size

    s, rng = config.sample, np.random.default_rng(0)
    batch = prompts.sample(prompts.load(config.prompts.train), s.groups, seed=0, epoch=0)
    cond = model.encode([*batch.prompts, ""])  # the last one is what guidance moves away from
    adapter = lora_files.to_torch(model.init_trained(jax.random.key(0)))
    for name, factor in adapter.items():  # B = 0 would hide the adapter from the comparison
        if "lora_B" in name:
            adapter[name] = rng.normal(scale=0.02, size=factor.shape).astype(np.float32)
    np.savez(
        folder / "inputs.npz",
        tokens=cond["tokens"],
        pooled=cond["pooled"],
        sigmas=model.sigmas(s.steps, config.model.height, config.model.width),
        advantages=rng.normal(size=s.groups * s.group_size).astype(np.float32),
        **{f"lora.{name}": factor for name, factor in adapter.items()},
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


# ------------------------------------------------------------------------------- engine's side


def serve(load: Callable[[str, dict[str, Any], Arrays], Engine]) -> None:
    """Be an engine's process: answer each command on stdin with a line of JSON on stdout."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    config = json.loads((folder / "config.json").read_text())
    engine = load(name, config, dict(np.load(folder / "inputs.npz")))
    for command in sys.stdin:
        if command.strip() == "probe":
            np.savez(folder / f"{name}.npz", **engine.probe(shared_rollout(engine, folder)))
            print("{}", file=answers)
        else:
            print(json.dumps(one_epoch(engine)), file=answers)


def shared_rollout(engine: Engine, folder: Path) -> Arrays:
    """Return the rollout that all engines are probed with; the first engine draws it."""
    file = folder / "drawn.npz"
    if not file.exists():
        np.savez(file, **engine.draw())
    drawn = dict(np.load(file))
    drawn["log_prob"][:, ::2] += 0.01  # every other image out of the clip range: that counts too
    return drawn


def one_epoch(engine: Engine) -> dict[str, float]:
    """Seconds of each phase, and the process's peak memory so far in GiB."""
    figures = {}
    for phase in (engine.sample, engine.update, engine.decode):
        begun = time.perf_counter()
        phase()
        figures[phase.__name__] = time.perf_counter() - begun
    figures["epoch"] = figures["sample"] + figures["update"]
    figures["peak_gib"] = engine.device_peak() or resident_peak()
    return figures


def resident_peak() -> float:
    """Most GiB of the host's memory that this process has had."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------------------------- driver's side


class Worker:
    """An engine's process, stopped whenever it is not asked for anything."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name, self._log = name, folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENGINES[name], str(folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment,
            )

    def ask(self, command: str) -> dict[str, float]:
        """Raises RuntimeError with the end of its log when the process has died."""
        assert self._process.stdin and self._process.stdout
        answer = ""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(command + "\n")
            answer = self._process.stdout.readline()
            if answer:  # otherwise it is ending, and would never end if it were stopped
                self._process.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            pass
        if not answer:
            end = "\n".join(self._log.read_text().splitlines()[-12:])
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{end}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(device: str, hugepages: bool) -> dict[str, str]:
    """Return the environment variables of every engine's process."""
    platform = {"cpu": "cpu", "gpu": "cuda"}[device]
    result = dict(os.environ, JAX_PLATFORMS=platform, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if hugepages:
        tunables = [result.get("GLIBC_TUNABLES", ""), HUGEPAGES]
        result["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    return result


def differences(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """{engine: {velocity, gradient, images}}, each engine against the first."""
    first, *others = ({k: v for k, v in np.load(folder / f"{n}.npz").items()} for n in names)
    return {name: _difference(other, first) for name, other in zip(names[1:], others)}


def _difference(a: Arrays, b: Arrays) -> dict[str, float]:
    if a.keys() != b.keys():
        raise RuntimeError(f"only one engine has {sorted(a.keys() ^ b.keys())}")

    def relative(names: list[str]) -> float:
        x, y = (np.concatenate([part[n].ravel() for n in names]) for part in (a, b))
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    levels = np.abs(a["images"].astype(int) - b["images"]).max()
    gradient = sorted(name for name in a if name.startswith("lora."))
    return {
        "velocity": relative(["velocity"]),
        "gradient": relative(gradient),
        "images": float(levels),
    }


def check(folder: Path, names: list[str], kind: str) -> dict[str, dict[str, float]]:
    """Print how far engines differ on one rollout. Raises RuntimeError when it is too far."""
    found = differences(folder, names)
    for name, values in found.items():
        print(
            f"{name} against {names[0]}, same weights and rollout: velocity differs by"
            f" {values['velocity']:.1e} (relative), gradient by {values['gradient']:.1e}, images by"
            f" at most {values['images']:.0f} of 255 levels"
        )
        for what, value in values.items():
            if not value <= TOLERANCES[kind][what]:
                raise RuntimeError(
                    f"{name} and {names[0]} do not compute the same {what}: {value:.2g} is above"
                    f" {TOLERANCES[kind][what]:g}, so a comparison of their times means nothing"
                )
    return found


def start(
    names: list[str], folder: Path, env: dict[str, str], warmup: int
) -> tuple[dict[str, Worker], dict[str, float], dict[str, str]]:
    """Start, probe and warm up the engines one by one: (workers, seconds of it, failures)."""
    workers: dict[str, Worker] = {}
    seconds, failures = {}, {}
    for name in names:
        print(f"{name}: loading, compiling and warming up ...", flush=True)
        begun, worker = time.perf_counter(), Worker(name, folder, env)
        try:
            for command in ("probe", *["epoch"] * warmup):
                worker.ask(command)
        except RuntimeError as error:
            worker.close()
            failures[name] = str(error)
            print(error, file=sys.stderr)
            continue
        workers[name], seconds[name] = worker, time.perf_counter() - begun
    return workers, seconds, failures


Epochs = dict[str, list[dict[str, float]]]  # {engine: the figures of each}


def measure(workers: dict[str, Worker], repeats: int) -> Iterator[Epochs]:
    """Every engine's epochs, drawn in turns, each time in the other order: all so far, after each
    turn."""
    epochs: Epochs = {name: [] for name in workers}
    for i in range(repeats):
        for name, worker in reversed(workers.items()) if i % 2 else workers.items():
            epochs[name].append(worker.ask("epoch"))
            print(f"{name}: epoch {i + 1}/{repeats} {epochs[name][-1]['epoch']:.2f} s", flush=True)
        yield epochs


def summarise(epochs: list[dict[str, float]], images: int) -> dict[str, float]:
    """Medians of the times; memory is a high-water mark, so its last value counts."""
    result = {t: median(e[t] for e in epochs) for t in TIMES}
    return result | {
        "images_per_second": images / result["epoch"],
        "peak_gib": epochs[-1]["peak_gib"],
    }


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": gpu() if device == "gpu" else None,
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit,
        **{name: version(name) for name in PACKAGES},
    }


def gpu() -> str:
    """Name, memory and driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def version(name: str) -> str | None:
    """None where it is not installed: JAX can be measured alone."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(figures: dict[str, dict[str, float]], ratio: dict[str, dict[str, float]]) -> str:
    columns = {
        "sample+decode s": "sample",
        "decode s": "decode",
        "update s": "update",
        "epoch s": "epoch",
        "images/s": "images_per_second",
        "peak GiB": "peak_gib",
        "warm-up s": "warmup",
    }
    lines = [f"{'':20}" + "".join(f"{title:>17}" for title in columns)]
    for name, values in (figures | ratio).items():
        cells = (f"{values[key]:17.2f}" if key in values else "" for key in columns.values())
        lines.append(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{engine: {time or memory: its value / JAX's}}; above 1 JAX is ahead."""
    if "jax" not in figures:
        return {}
    jax = figures["jax"]
    return {
        f"{name} / jax": {key: values[key] / jax[key] for key in (*TIMES, "peak_gib")}
        for name, values in figures.items()
        if name != "jax"
    }


def describe(config: dict[str, Any], hardware: dict[str, Any], env: dict[str, str]) -> str:
    s, model = config["sample"], config["model"]
    versions = ", ".join(f"{name} {hardware[name]}" for name in PACKAGES)
    return "\n".join(
        [
            f"{model['path']}, {model['height']} px, {model['dtype']}, LoRA rank"
            f" {config['lora']['rank']}",
            f"{s['groups']} groups x {s['group_size']} images in micro-batches of"
            f" {s['micro_batch']}; {s['steps']} steps, {s['window']} of them stochastic and"
            f" trained; remat in JAX: {model['remat']}",
            f"{hardware['gpu'] or 'no GPU'}; {hardware['cpu']}, {hardware['cores']} cores,"
            f" {hardware['memory_gib']:.0f} GiB, GLIBC_TUNABLES={env.get('GLIBC_TUNABLES', '')!r}",
            f"Python {hardware['python']}, {versions}, commit {hardware['commit']}",
        ]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.epoch",
        description=__doc__,
        epilog="A size that is not given is that of configs/shapes.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="shapes",
                        help="directory, hub id, shapes, or random:NAME")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of all engines")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the transformer; VAE and adapter stay float32")  # fmt: skip
    parser.add_argument("--product_dtype", choices=("", "bfloat16"), default="",
                        help="of the operands of JAX's linears; PyTorch has autocast")  # fmt: skip
    parser.add_argument("--attention", choices=attention.CHOICES, default="auto", help="of JAX")
    parser.add_argument("--guidance", type=float, default=1.0, help="its scale; 1 means none")
    parser.add_argument("--size", type=int, help="of the images, in pixels; the model's own")
    parser.add_argument("--t5_length", type=int, help="T5 tokens of a prompt")
    parser.add_argument("--groups", type=int, help="prompts an epoch")
    parser.add_argument("--group_size", type=int, help="images of each prompt")
    parser.add_argument("--micro_batch", type=int, help="images at once")
    parser.add_argument("--steps", type=int, help="transitions of a rollout")
    parser.add_argument("--window", type=int, help="how many are stochastic and trained")
    parser.add_argument("--repeats", type=int, default=3, help="epochs measured of each engine")
    parser.add_argument("--warmup", type=int, default=2, help="epochs before them")
    parser.add_argument("--engines", default=",".join(ENGINES), help="the first is the reference")
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=False,
                        help="JAX recomputes activations in the backward pass")  # fmt: skip
    parser.add_argument("--hugepages", action=argparse.BooleanOptionalAction, default=True,
                        help=f"run every engine with GLIBC_TUNABLES={HUGEPAGES}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    args.engines = args.engines.split(",")
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"--engines: no {sorted(unknown)}, choose from {', '.join(ENGINES)}")
    return args


def main() -> int:
    args = parse()
    env, hardware = environment(args.device, args.hugepages), machine(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = multiprocessing.get_context("spawn").Process(target=prepare, args=(args, folder))
        job.start()
        job.join()
        if job.exitcode:
            return job.exitcode
        config = json.loads((folder / "config.json").read_text())
        config["model"]["path"] = args.model  # as it was named, wherever it lies
        print(describe(config, hardware, env), end="\n\n")
        workers, warmup, failures = start(args.engines, folder, env, args.warmup)
        if not workers:
            return 1
        report = {
            "config": config,
            "machine": hardware,
            "glibc_tunables": env.get("GLIBC_TUNABLES", ""),
            "failures": failures,
        }
        try:
            report["differences"] = check(folder, list(workers), args.product_dtype or args.device)
            for epochs in measure(workers, args.repeats):
                report |= summary(epochs, warmup, config)
                if args.out:  # after each turn: a run that is cut off keeps what it had
                    args.out.write_text(json.dumps(report, indent=2) + "\n")
        finally:
            for worker in workers.values():
                worker.close()
    shown = table(report["medians"], report["ratios"])
    print(f"\nmedians of {args.repeats} epochs\n{shown}")
    return 1 if failures else 0


def summary(
    epochs: Epochs, warmup: dict[str, float], config: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the medians of the epochs so far, their ratios, and the epochs themselves."""
    images = config["sample"]["groups"] * config["sample"]["group_size"]
    figures = {
        name: summarise(runs, images) | {"warmup": warmup[name]} for name, runs in epochs.items()
    }
    return {"medians": figures, "ratios": ratios(figures), "epochs": epochs}


if __name__ == "__main__":
    sys.exit(main())
