"""A run's LoRA (EMA weights) for diffusers, ComfyUI and PEFT.

    python -m flowgrpo_jax.export --workdir runs/shapes --out lora

Writes OUT/diffusers/pytorch_lora_weights.safetensors (`pipe.load_lora_weights`), OUT/peft/
(`PeftModel.from_pretrained`) and OUT/comfyui/lora.safetensors (for ComfyUI's models/loras), and
reads their factors back before it reports success. Of a run without an adapter (lora.rank=0) it
writes OUT/transformer, a component in diffusers layout (`SD3Transformer2DModel.from_pretrained`),
in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags
from etils import epath

from flowgrpo_jax import models
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.command_line.cli import CONFIG_FILE
from flowgrpo_jax.models import directories, lora_files
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.storage import outputs
from flowgrpo_jax.storage.files import read_json


def export(
    workdir: epath.PathLike, out: Path, step: int | None = None, *, best: bool = False
) -> list[Path]:
    """Write the EMA weights of a run's newest checkpoint, of `step`, or of the best under `out`."""
    if best and step is not None:
        raise ValueError(f"--best and --step={step} are two different checkpoints: give one")
    workdir = epath.Path(workdir)
    file = workdir / CONFIG_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: {workdir} is no work directory of train")
    config = read_json(file)
    c, path = config["lora"], config["model"]["path"]
    family = models.find(path, config["model"]["family"])
    spec = LoRASpec(c["rank"], c["alpha"], tuple(c["targets"]) or family.targets)
    model = family.describe(path, lora_spec=spec, **config["model"]["options"])
    source = workdir / "checkpoints" / str(step) if step is not None else workdir
    if best:
        source = workdir / "best"
        if not any(source.glob("[0-9]*")):
            raise FileNotFoundError(
                f"{workdir} has no best checkpoint: train with checkpoint.best and eval.every set,"
                " or export without --best"
            )
    policies.check(source)
    if out.is_file():
        raise NotADirectoryError(f"--out={out} is a file: name a directory, which gets several")
    outputs.check_directory(out, "--out")
    adapter = policies.load(source, model)
    if not spec.rank:
        base = directories.resolve(path, folders=["transformer"])
        return [family.export(adapter, base, out)]
    files = lora_files.write(adapter, spec, out, str(path))
    for written in files:
        again = lora_files.read(written, model.trained_shapes)
        if not all(np.array_equal(again[k], adapter[k]) for k in adapter):
            raise OSError(f"{written} does not read back as it was written: the disk may be full")
    return files


def main(_: list[str]) -> None:
    args = flags.FLAGS
    for file in export(args.workdir, Path(args.out), args.step, best=args.best):
        print(file)


if __name__ == "__main__":
    cli.define_flags(config=False)
    flags.DEFINE_string("workdir", None, "The work directory of a training run.", required=True)
    flags.DEFINE_string("out", None, "The directory to write.", required=True)
    flags.DEFINE_bool(
        "best", False, "Take the checkpoint with the best evaluation (checkpoint.best)."
    )
    flags.DEFINE_integer("step", None, "The epoch of the checkpoint; the newest without it.")
    cli.run(main)
