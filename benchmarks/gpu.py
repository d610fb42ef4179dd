"""All that is to be known about a GPU that can be had for minutes: benchmarks/gpu.sh runs this.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--model random:sd3.5-medium --size 512 ...]

Stages, the most needed first, each a process with a limit of its own, whose results are in `--out`
as soon as it has them:

  peak         products of bfloat16 matrices in JAX and in PyTorch: what "share of peak" refers to
  attention    the kernels against each other and against float32, forward and gradient
  ratio-KERNEL the figure `ratio_gap` of one update in bfloat16, for each kernel
  epoch        `benchmarks.epoch` without guidance: JAX, PyTorch and compiled PyTorch
  guided       the same with guidance 4.5
  shapes       `configs/shapes.py` until the time is up, evaluated every 25 epochs

A stage that fails or takes too long is named in summary.json, and the next one begins.
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine

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
    from flowgrpo_jax.assembly import recipe, settings
    from flowgrpo_jax.command_line import cli
    from flowgrpo_jax.configs import shapes

    config = shapes.get_config()
    config.model.dtype, config.model.attention = "bfloat16", kernel
    config.sample.groups, config.sample.micro_batch = 2, 24
    config.prompts.test = ""
    settings.split_cpu(config)
    run = recipe.build(config.copy_and_resolve_references())
    _, figures = train.one_epoch(run, train.initial_state(run), 0, cli.Stop())
    names = ("ratio_gap", "grad_norm", "reward")
    return {name: float(np.asarray(figures[name])) for name in names}


# ---------------------------------------------------------------------------------- the driver


def epoch_command(args: argparse.Namespace, out: Path, guidance: float) -> list[str]:
    sizes = {
        name: getattr(args, name)
        for name in ("model", "size", "groups", "group_size", "micro_batch", "steps", "window")
    }
    settings = [f"--{name}={value}" for name, value in sizes.items() if value]
    common = [f"--device={args.device}", f"--dtype={args.dtype}", f"--guidance={guidance}"]
    limits = ["--repeats=3", "--warmup=1", f"--out={out}"]
    return [sys.executable, "-m", "benchmarks.epoch", *common, *settings, *limits]


def shapes_command(out: Path) -> list[str]:
    command = [sys.executable, "-m", "flowgrpo_jax.train", "--config=shapes", f"--workdir={out}"]
    return [*command, "--config.checkpoint.every=25", "--config.log.tensorboard=False"]


def own(stage: str, args: argparse.Namespace, file: Path) -> list[str]:
    """Return the command that runs one of the stages above by itself."""
    passed = [f"--device={args.device}", f"--side={args.side}", f"--tokens={args.tokens}"]
    return [sys.executable, "-m", "benchmarks.gpu", *passed, f"--stage={stage}", f"--out={file}"]


def stages(args: argparse.Namespace) -> list[tuple[str, list[str], float]]:
    """(name, command, seconds that it may take) of each stage; a CPU has four times as many."""
    out, longer = args.out, 4 if args.device == "cpu" else 1
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
        ("shapes", shapes_command(Path(args.runs or tempfile.mkdtemp()) / "shapes"), 3600),
    ]
    return [(name, command, longer * seconds) for name, command, seconds in limits]


def drive(args: argparse.Namespace) -> int:
    """Run the stages until the time is up. Returns the number of those that failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    summary: dict[str, Any] = {"machine": machine.described(args.device), "stages": {}}
    platform = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    env = dict(os.environ, JAX_PLATFORMS=platform, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    for name, command, limit in stages(args):
        left = end - time.monotonic()
        if left < 10 or (args.only and name not in args.only):
            summary["stages"][name] = {"result": "not run"}
            _write(args.out / "summary.json", summary)
            continue
        print(f"== {name}: {' '.join(command[2:])}", flush=True)
        begun = time.monotonic()
        with (args.out / f"{name}.log").open("w") as log:
            result = _run(command, env, log, min(limit, left - 5))
        if name == "shapes":
            _keep_curve(command, args.out)
        seconds = time.monotonic() - begun
        summary["stages"][name] = {"result": result, "seconds": round(seconds, 1)}
        print(f"   {result}, {seconds:.0f} s", flush=True)
        _write(args.out / "summary.json", summary)
    return sum(stage["result"].startswith("failed") for stage in summary["stages"].values())


def _write(file: Path, result: Any) -> None:
    file.write_text(json.dumps(result, indent=2) + "\n")


def _run(command: list[str], env: dict[str, str], log: Any, limit: float) -> str:
    process = subprocess.Popen(
        command,
        cwd=machine.ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
        return "done" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep_curve(command: list[str], out: Path) -> None:
    """Copy the run's figures, which are complete however it ended."""
    workdir = next(part for part in command if part.startswith("--workdir=")).partition("=")[2]
    figures = Path(workdir) / "metrics.jsonl"
    if figures.exists():
        (out / "shapes.jsonl").write_text(figures.read_text())


def parse() -> argparse.Namespace:
    parser = machine.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, or a stage's JSON file")
    parser.add_argument("--stage", help="run this one here; for the driver itself")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of stages")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of all stages")
    parser.add_argument("--runs", help="folder of the run of `shapes`")
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
