"""All that is to be known about a GPU that can be had for minutes: benchmarks/gpu.sh runs this.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--model random:sd3.5-medium --size 512 ...]

Stages, the most needed first, each a process with a limit of its own. All that they find is in one
file, results.json in `--out`, a few seconds after they have found it:

  peak         products of bfloat16 matrices in JAX and in PyTorch: what "share of peak" refers to
  attention    the kernels against each other and against float32, forward and gradient
  ratio-KERNEL the figure `ratio_gap` of one update in bfloat16, for each kernel
  epoch        `benchmarks.epoch` without guidance: JAX, PyTorch and compiled PyTorch
  guided       the same with guidance 4.5
  shapes       `configs/shapes.py` until the time is up, evaluated every 25 epochs

A stage that fails or takes too long is named there with the end of its log, and the next one
begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = "results.json"
SIDE = 8192  # of the matrices of `peak`
TOKENS, HEADS, CHANNELS = 1229, 24, 64  # SD3.5-medium at 512 px


# --------------------------------------------------------------------------------- the stages


def peak(args: argparse.Namespace) -> dict[str, Any]:
    """TFLOP/s of a large product, the best of ten, in JAX and in PyTorch."""
    import jax
    import jax.numpy as jnp
    import torch

    side = args.side
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    theirs = torch.randn(side, side, device=args.torch_device, dtype=torch.bfloat16)

    def ours() -> None:
        product(x, x).block_until_ready()

    def torch_product() -> None:
        theirs @ theirs
        if args.device == "gpu":
            torch.cuda.synchronize()

    return {
        name: 2 * side**3 / min(_seconds(run) for _ in range(12)) / 1e12
        for name, run in (("jax", ours), ("torch", torch_product))
    }


def _seconds(run: Any) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Relative distances of each kernel, in bfloat16, to the plain one in float32; and seconds."""
    import jax
    import jax.numpy as jnp

    from flowgrpo_jax import sharding
    from flowgrpo_jax.models import attention as kernels
    from flowgrpo_jax.models import kernel_check

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    exact = kernel_check.streams((args.tokens,), HEADS, CHANNELS)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    found: dict[str, Any] = {}
    for name in _kernels(mesh):
        kernel = kernels.TABLE[name]
        value, gradient = kernel_check.distances(kernel, kernels.PLAIN, exact, HEADS, jnp.bfloat16)
        run = jax.jit(partial(kernel_check.run, kernel, heads=HEADS))
        jax.block_until_ready(run(half))
        took = min(_seconds(lambda: jax.block_until_ready(run(half))) for _ in range(5))  # noqa: B023
        found[name] = {"value": value, "gradient": gradient, "seconds": took}
    return found


def _kernels(mesh: Any) -> list[str]:
    """Return the kernels that run here."""
    import jax.numpy as jnp

    from flowgrpo_jax.models import attention as kernels

    return list(kernels.suited(mesh.devices.flat[0], jnp.dtype("bfloat16")))


def ratio(args: argparse.Namespace, kernel: str) -> dict[str, Any]:
    """Return the ratio_gap of an epoch's first update, of the bundled model in bfloat16."""
    import numpy as np

    from flowgrpo_jax import train
    from flowgrpo_jax.assembly import settings
    from flowgrpo_jax.assembly.run import build_run
    from flowgrpo_jax.command_line.stop import Stop
    from flowgrpo_jax.configs import shapes

    config = shapes.get_config()
    config.model.dtype, config.model.attention = "bfloat16", kernel
    config.sample.groups, config.sample.micro_batch = 2, 24
    config.prompts.test = ""
    settings.split_cpu(config)
    run = build_run(config.copy_and_resolve_references())
    _, figures = train.one_epoch(run, train.initial_state(run), 0, Stop())
    names = ("ratio_gap", "grad_norm", "reward")
    return {name: float(np.asarray(figures[name])) for name in names}


# ---------------------------------------------------------------------------------- the driver


def epoch_command(args: argparse.Namespace, out: Path, guidance: float) -> list[str]:
    sizes = {
        name: getattr(args, name)
        for name in ("model", "size", "groups", "group_size", "micro_batch", "steps", "window")
    }
    if guidance > 1:  # two branches: as many rows at once as without
        sizes["micro_batch"] = max(args.micro_batch // 2, 1)
    settings = [f"--{name}={value}" for name, value in sizes.items() if value]
    common = [f"--device={args.device}", f"--dtype={args.dtype}", f"--guidance={guidance}"]
    limits = ["--repeats=3", "--warmup=1", "--patience=100", f"--out={out}"]
    made = [f"--models={out.parent}"]  # for both stages
    if args.model.startswith("random:"):
        made += ["--t5_length=128", "--rank=32"]  # as the recipes of SD3.5
    return [sys.executable, "-m", "benchmarks.epoch", *common, *settings, *made, *limits]


def shapes_command(out: Path) -> list[str]:
    command = [sys.executable, "-m", "flowgrpo_jax.train", "--config=shapes", f"--workdir={out}"]
    return [*command, "--config.checkpoint.every=25", "--config.log.tensorboard=False"]


def own(stage: str, args: argparse.Namespace, file: Path) -> list[str]:
    """Return the command that runs one of the stages above by itself."""
    passed = [f"--device={args.device}", f"--side={args.side}", f"--tokens={args.tokens}"]
    return [sys.executable, "-m", "benchmarks.gpu", *passed, f"--stage={stage}", f"--out={file}"]


def stages(args: argparse.Namespace, out: Path) -> list[tuple[str, list[str], float]]:
    """(name, command, seconds that it may take) of each stage; a CPU has four times as many.

    Args:
      out: the folder for what they write, each its own NAME.json.
    """
    longer = 4 if args.device == "cpu" else 1
    ratios = ["xla"] if args.device == "cpu" else ["xla", "cudnn"]
    limits = [
        ("peak", own("peak", args, out / "peak.json"), 60),
        ("attention", own("attention", args, out / "attention.json"), 60),
        *(
            (f"ratio-{kernel}", own(f"ratio-{kernel}", args, out / f"ratio-{kernel}.json"), 90)
            for kernel in ratios
        ),
        ("epoch", epoch_command(args, out / "epoch.json", 1.0), 240),
        ("guided", epoch_command(args, out / "guided.json", 4.5), 240),
        ("shapes", shapes_command(out / "shapes"), 3600),
    ]
    return [(name, command, longer * seconds) for name, command, seconds in limits]


def drive(args: argparse.Namespace) -> int:
    """Run the stages until the time is up. Returns the number of those that failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(args.runs or tempfile.mkdtemp())
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {}
    results = {"machine": machine.described(args.device), "stages": found}
    platform = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    env = dict(os.environ, JAX_PLATFORMS=platform, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    for name, command, limit in stages(args, work):
        left = end - time.monotonic()
        if left < 10 or (args.only and name not in args.only):
            found[name] = {"result": "not run"}
            _write(args.out / RESULTS, results)
            continue
        print(f"== {name}: {' '.join(command[2:])}", flush=True)
        for result, seconds in _run(command, env, work / f"{name}.log", min(limit, left - 5)):
            took = {"result": result, "seconds": round(seconds, 1)}
            found[name] = took | {"figures": _figures(work, name), "log": _tail(work, name)}
            _write(args.out / RESULTS, results)
        print(f"   {result}, {seconds:.0f} s", flush=True)
    return sum(stage["result"].startswith("failed") for stage in found.values())


def _write(file: Path, result: Any) -> None:
    """Write a JSON file as a whole: at no time is it half-written."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(file)


def _run(
    command: list[str], env: dict[str, str], log: Path, limit: float
) -> Iterator[tuple[str, float]]:
    """Run a command. Yields its result, "running" every few seconds, and the seconds so far."""
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = None
        while code is None and (left := limit - (time.monotonic() - begun)) > 0:
            try:
                code = process.wait(min(left, 5))
            except subprocess.TimeoutExpired:
                yield "running", time.monotonic() - begun
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    failed = f"ended after {limit:.0f} s" if code is None else f"failed with {code}"
    yield failed if code != 0 else "done", time.monotonic() - begun


def _figures(work: Path, stage: str) -> Any:
    """Return what a stage has written so far; None for nothing. A run's figures are its rows."""
    with contextlib.suppress(OSError, ValueError):  # it may be writing
        if stage == "shapes":
            rows = (work / stage / "metrics.jsonl").read_text().splitlines()
            return [json.loads(row) for row in rows]
        return json.loads((work / f"{stage}.json").read_text())
    return None


def _tail(work: Path, stage: str, length: int = 4000) -> str:
    return (work / f"{stage}.log").read_text(errors="replace")[-length:]


def parse() -> argparse.Namespace:
    parser = machine.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, or a stage's JSON file")
    parser.add_argument("--stage", help="run this one here; for the driver itself")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of stages")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of all stages")
    parser.add_argument("--runs", help="folder of what the stages write")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="gpu", help="cpu tries the script"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--side", type=int, default=SIDE, help="of the product that is timed")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the attention alone")
    parser.add_argument("--model", default="random:sd3.5-medium", help="as of benchmarks.epoch")
    for name, default in (("size", 512), ("groups", 2), ("group_size", 8), ("micro_batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of benchmarks.epoch")
    for name, default in (("steps", 10), ("window", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of benchmarks.epoch")
    args = parser.parse_args()
    args.torch_device = "cuda" if args.device == "gpu" else "cpu"
    return args


def main() -> int:
    args = parse()
    if not args.stage:
        return drive(args)
    kind, _, kernel = args.stage.partition("-")
    result = (
        ratio(args, kernel)
        if kind == "ratio"
        else {"peak": peak, "attention": attention}[kind](args)
    )
    _write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
