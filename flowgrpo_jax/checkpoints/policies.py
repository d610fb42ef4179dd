"""Policies: what a run has trained, read from a run, a checkpoint or an exported LoRA."""

from __future__ import annotations

import dataclasses
import logging

import jax
from etils import epath
from jax.sharding import Mesh

from flowgrpo_jax import sharding
from flowgrpo_jax.checkpoints.checkpoint import FOLDERS, Checkpoints
from flowgrpo_jax.checkpoints.run_record import base_of, same_settings
from flowgrpo_jax.models import Model, base_model, lora_files
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.types import Params

log = logging.getLogger(__name__)
BASE = "base"  # the name of the policy before training


def load(source: epath.PathLike, model: Model, mesh: Mesh | None = None) -> Params:
    """Read the trained weights of a policy: an adapter, or those of the whole transformer.

    A policy that was trained from another base model of equal shapes is read with a warning.

    Args:
      source: "base"; a work directory or its `checkpoints` (newest), `checkpoints/STEP` or `best`;
        an export directory or .safetensors file. Of a run these are the EMA weights.
      mesh: where a checkpoint's weights go; one device without it.
    Raises:
      FileNotFoundError: there is no policy at `source`.
      ValueError: it does not fit the model, or cannot be read.
    """
    if str(source) == BASE:
        return model.reference(model.init_trained(jax.random.key(0)))
    path, folder, step = _find(source)
    if folder.name == "checkpoints" or _holds_steps(folder):
        return _of_run(folder, step, model, mesh)
    return _of_export(path, model)


def check(source: epath.PathLike) -> None:
    """Raise FileNotFoundError where there is no policy, before a model is loaded for it."""
    if str(source) != BASE:
        _find(source)


def _find(source: epath.PathLike) -> tuple[epath.Path, epath.Path, int | None]:
    """The path of a policy, the folder that it lies in, and its step where that is given."""
    path = epath.Path(source)
    step = int(path.name) if path.name.isdigit() and path.parent.name in FOLDERS else None
    folder = path.parent if step is not None else path
    if not folder.exists():
        raise FileNotFoundError(
            f"checkpoint {source!r} does not exist: give base, a work directory or an exported LoRA"
        )
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if step is not None and not path.exists():
        steps = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
        raise FileNotFoundError(f"no checkpoint {step} in {folder}: choose from {steps}")
    return path, folder, step


def _holds_steps(folder: epath.Path) -> bool:
    return folder.name in FOLDERS and folder.is_dir() and any(folder.glob("[0-9]*"))


def _of_run(folder: epath.Path, step: int | None, model: Model, mesh: Mesh | None) -> Params:
    """Read the EMA weights of a run's checkpoint: of `step`, or of the newest."""
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    layout = sharding.state_shardings(mesh, model.trained_shapes, model.rules)
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout[path])
        for path, x in model.trained_shapes.items()
    }
    checkpoints = Checkpoints(folder)
    if step is not None and step not in checkpoints.steps():
        raise FileNotFoundError(
            f"no checkpoint {step} in {folder}: choose from {checkpoints.steps()}"
        )
    trees, record = checkpoints.newest({"ema": shapes}, None if step is None else [step])
    checkpoints.close()
    ours = {"lora": dataclasses.asdict(model.lora_spec)}
    same_settings(record, ours, ("lora", "alpha"), folder)
    _warn_of_another_base(base_of(record), model, str(folder))
    return trees["ema"]


def _of_export(path: epath.Path, model: Model) -> Params:
    """Read the factors of an exported LoRA."""
    file, spec, base = lora_files.read_spec(str(path))
    if spec.scale != model.lora_spec.scale:
        raise ValueError(
            f"{file} has alpha / rank = {spec.scale}, the config {model.lora_spec.scale}: set"
            f" lora.rank={spec.rank} and lora.alpha={spec.alpha}"
        )
    _warn_of_another_base(BaseModel(base), model, str(file))
    return lora_files.read(file, model.trained_shapes)


def _warn_of_another_base(then: BaseModel, model: Model, where: str) -> None:
    """Warn where a policy was trained from another model; one that is only described is none."""
    if not model.name:
        return
    now = base_model.of(model)
    if base_model.is_another(then, now):
        log.warning(
            "%s was trained from the base model %s and is used here with %s, which has other"
            " weights: it will not draw what it was trained to",
            where,
            then.name,
            now.name,
        )
