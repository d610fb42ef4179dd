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
  * before any timing the engines are compared on velocity, images and gradient for one rollout,
    and the command fails where they do not agree;
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
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.agreement import check
from benchmarks.engine import ENGINES, HUGEPAGES, Worker, environment
from benchmarks.epoch_figures import Epochs, describe, summary, table
from flowgrpo_jax.models import attention


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
    config.model.path = str(
        random_model.find(args.model, args.models or folder) or sd3.resolve(args.model)
    )
    for knob in ("remat", "dtype", "product_dtype", "attention"):
        config.model[knob] = getattr(args, knob)
    config.model.options.t5_length = args.t5_length or config.model.options.t5_length
    config.lora.rank = args.rank or config.lora.rank
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
    if size > config.model.height:  # a model of another size decodes as the recipes of SD3.5
        config.model.decode_batch = 0
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


def start(
    names: list[str], folder: Path, env: dict[str, str], warmup: int, patience: float | None
) -> Iterator[tuple[str, Worker | None, dict[str, Any]]]:
    """Start, probe and warm up the engines one by one. Yields each one's name, its worker, or None
    where it failed, and what is to be reported: its warm-up epochs, and seconds or failure."""
    for name in names:
        print(f"{name}: loading, compiling and warming up ...", flush=True)
        begun, worker = time.perf_counter(), Worker(name, folder, env)
        report: dict[str, Any] = {"epochs": []}
        try:
            worker.ask("probe", patience)
            for _ in range(warmup):
                report["epochs"].append(worker.ask("epoch", patience))
        except RuntimeError as error:
            worker.close()
            print(error, file=sys.stderr)
            yield name, None, report | {"failure": str(error)}
        else:
            yield name, worker, report | {"seconds": time.perf_counter() - begun}


def measure(workers: dict[str, Worker], repeats: int) -> Iterator[Epochs]:
    """Every engine's epochs, drawn in turns, each time in the other order: all so far, after each
    epoch."""
    epochs: Epochs = {}
    for i in range(repeats):
        for name, worker in reversed(workers.items()) if i % 2 else workers.items():
            epochs.setdefault(name, []).append(worker.ask("epoch"))
            print(f"{name}: epoch {i + 1}/{repeats} {epochs[name][-1]['epoch']:.2f} s", flush=True)
            yield epochs


def parse() -> argparse.Namespace:
    parser = machine.parser(
        __doc__,
        prog="python -m benchmarks.epoch",
        epilog="A size that is not given is that of configs/shapes.py.",
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
    parser.add_argument("--rank", type=int, help="of the adapter")
    parser.add_argument("--groups", type=int, help="prompts an epoch")
    parser.add_argument("--group_size", type=int, help="images of each prompt")
    parser.add_argument("--micro_batch", type=int, help="images at once")
    parser.add_argument("--steps", type=int, help="transitions of a rollout")
    parser.add_argument("--window", type=int, help="how many are stochastic and trained")
    parser.add_argument("--repeats", type=int, default=3, help="epochs measured of each engine")
    parser.add_argument("--warmup", type=int, default=2, help="epochs before them")
    parser.add_argument("--patience", type=float, default=0.0,
                        help="seconds for each answer of a starting engine; 0: any")  # fmt: skip
    parser.add_argument("--models", type=Path, help="folder in which a random model is kept")
    parser.add_argument("--engines", default="jax,torch,torch-compile",
                        help="first the reference; jax-tape: JAX with train.tape")  # fmt: skip
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
    env, hardware = environment(args.device, args.hugepages), machine.described(args.device)
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
        report: dict[str, Any] = {
            "config": config,
            "machine": hardware,
            "glibc_tunables": env.get("GLIBC_TUNABLES", ""),
        }
        for found in compare(args, folder, env, config):
            report |= found
            if args.out:  # a run that is cut off keeps what it had
                args.out.write_text(json.dumps(report, indent=2) + "\n")
    if "medians" not in report:
        return 1
    shown = table(report["medians"], report["ratios"])
    print(f"\nmedians of {args.repeats} epochs\n{shown}")
    return 1 if report["failures"] or report["disagreements"] else 0


def compare(
    args: argparse.Namespace, folder: Path, env: dict[str, str], config: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield what is found, as soon as it is: after each engine's start and after each epoch.

    Engines that do not agree are measured all the same, and the disagreement is reported.
    """
    workers: dict[str, Worker] = {}
    warmup: dict[str, Any] = {}
    try:
        for name, worker, found in start(
            args.engines, folder, env, args.warmup, args.patience or None
        ):
            warmup[name] = found
            if worker:
                workers[name] = worker
            failures = {n: w["failure"] for n, w in warmup.items() if "failure" in w}
            yield {"warmup": warmup, "failures": failures}
        if not workers:
            return
        differences, problems = check(folder, list(workers), args.product_dtype or args.device)
        for problem in problems:
            print(problem, file=sys.stderr)
        yield {"differences": differences, "disagreements": problems}
        for epochs in measure(workers, args.repeats):
            yield summary(epochs, {n: warmup[n]["seconds"] for n in epochs}, config)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
