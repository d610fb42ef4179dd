"""Stable Diffusion 3 and 3.5: a family of models, as plain functions and flat parameter dicts.

`load` reads a directory in diffusers layout, `describe` makes the same model from its architecture
alone, with shapes in place of weights. `networks.py` has the functions, `architecture.py` the
configs of the parts, `mmdit.py` the transformer. The conditioning of a prompt is {"tokens":
[P, L, E], "pooled": [P, V]}.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_jax.models import Family, Model, convert, directories, quantised
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3 import architecture
from flowgrpo_jax.models.sd3.architecture import PUBLISHED, Architecture
from flowgrpo_jax.models.sd3.networks import BASE_DTYPES, RULES, TEXT, describe
from flowgrpo_jax.models.sd3.tokenizers import MOST_T5, Tokenizers, require_t5, t5_limit
from flowgrpo_jax.models.weight_files import component_files

FOLDERS = (
    "scheduler",
    "transformer",
    "vae",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
)
T5_FOLDERS = ("tokenizer_3", "text_encoder_3")
JOINT_ATTENTION = tuple(
    f"attn.{name}"
    for name in (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
)


def resolve(model: str | Path, *, t5: bool = True, configs: bool = False) -> Path:
    """Return the directory of a model, with the folders that are read; `directories.resolve`.

    Args:
      t5: whether to download the largest text encoder of a model on the hub.
      configs: download the configs alone.
    """
    folders = (*FOLDERS, *T5_FOLDERS) if t5 else FOLDERS
    return directories.resolve(model, folders=folders, configs=configs)


def find_architecture(model: str | Path, *, t5: bool = True) -> Architecture:
    """Return the architecture of a path, name or hub id; published ones need no download."""
    parts = PUBLISHED.get(str(model)) or architecture.read(
        resolve(model, t5=t5, configs=True), t5=t5
    )
    return parts if t5 else replace(parts, text_encoder_3=None)


def describe_model(
    model: str | Path, *, t5: bool = True, t5_length: int = 0, **settings: Any
) -> Model:
    """Describe the model at a path or of a name: `Family.describe`. `load` has the options."""
    parts = find_architecture(model, t5=t5)
    if not t5_length:
        known = str(model) in PUBLISHED
        t5_length = MOST_T5 if known else t5_limit(resolve(model, t5=t5, configs=True))
    return describe(parts, t5_length=t5_length, **settings)


def load(
    model: str | Path,
    *,
    t5: bool = True,
    t5_length: int = 0,
    place: convert.Place | None = None,
    texts_alone: bool = False,
    **settings: Any,
) -> Model:
    """Load a model of the SD3 family.

    Args:
      model: a directory in diffusers layout, "shapes", "signs" or a hub id.
      t5: false leaves the largest text encoder out, as diffusers' `text_encoder_3=None`: zeros
        [P, t5_length, E] stand for its states. So does a directory that lacks it.
      t5_length: T5 tokens of a prompt (the paper: 128; diffusers: 256); 0 means as many as the
        tokenizer of the model says, at most 128.
      place: sharding of each frozen parameter, given component/path and its shape.
      texts_alone: load no weights but those of the text encoders, for callers that only encode
        prompts; `params` then holds shapes.
      settings: `describe` takes the rest.
    Raises:
      FileNotFoundError: a missing directory or file, by name.
      ValueError: weights that do not fit their config, all listed.
    """
    directory = resolve(model, t5=t5)
    parts = architecture.read(directory, t5=t5)
    t5 = parts.text_encoder_3 is not None
    if t5:
        require_t5(directory)
    t5_length = t5_length or t5_limit(directory)
    described = describe(parts, t5_length=t5_length, **settings)

    def read(name: str, shapes: Params) -> Params:
        return convert.load(
            directory / name,
            shapes,
            dtype=quantised.others_dtype(shapes),
            patch_size=parts.transformer.patch_size,
            **_stored(name),
            place=place and (lambda path, shape: place(f"{name}/{path}", shape)),
        )

    def read_all(components: dict[str, Params]) -> dict[str, Params]:
        return {name: read(name, shapes) for name, shapes in components.items()}

    tokenizers = Tokenizers.load(directory, t5_length, t5=t5)
    tokenizers.check(parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3, directory)
    needed = described.text_shapes if texts_alone else described.params | described.text_shapes
    _check_files(directory, needed, parts.transformer.patch_size)
    return replace(
        described,
        params=described.params if texts_alone else read_all(described.params),
        read_text=cache(lambda: read_all(described.text_shapes)),
        tokenize=tokenizers,
        text_files=lambda: text_files(directory, t5),
        directory=directory,
        name=str(model),
    )


def text_files(directory: Path, t5: bool) -> list[Path]:
    """List the files on which a prompt's states depend.

    Raises FileNotFoundError where weights are missing.
    """
    read: list[Path] = []
    for folder in sorted([*directory.glob("text_encoder*"), *directory.glob("tokenizer*")]):
        if folder.name in T5_FOLDERS and not t5:
            continue
        if folder.name.startswith("text_encoder"):
            read += [folder / "config.json", *component_files(folder)]
        else:
            read += sorted(f for f in folder.iterdir() if f.is_file())
    return read


def _stored(component: str) -> dict[str, Any]:
    """Return the options `ignore` and `tied` of `convert` for a component's files."""
    kind = TEXT.get(component)
    return {"ignore": getattr(kind, "ignored", ()), "tied": getattr(kind, "tied", {})}


def _check_files(directory: Path, components: dict[str, Params], patch_size: int) -> None:
    """Raise one error that lists all faults of the components' files, before any file is read.

    Without this check a fault of the text encoders would show up late, for they are read last.
    """
    problems: list[Exception] = []
    for name, shapes in components.items():
        try:
            convert.fit(directory / name, shapes, patch_size=patch_size, **_stored(name))
        except (FileNotFoundError, ValueError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def export(trained: Params, model: Path, out: Path) -> Path:
    """Write a transformer whose weights were all trained, in diffusers layout, f32.

    Args:
      model: the directory of the base, whose constants and config are taken over.
      out: the directory to write the component to.

    Raises OSError where the file does not read back as it was written.
    """
    parts = find_architecture(model, t5=False)
    shapes = describe(parts, lora_spec=LoRASpec(rank=0)).base
    patch = parts.transformer.patch_size
    params = convert.load(model / "transformer", shapes, patch_size=patch) | trained
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "transformer" / "config.json", file.parent)
    convert.save(params, file, patch_size=patch)
    again = convert.load(file.parent, shapes, patch_size=patch)
    if not all(np.array_equal(again[k], params[k]) for k in params):
        raise OSError(f"{file} does not read back as it was written: the disk may be full")
    return file


FAMILY = Family(
    describe=describe_model,
    load=load,
    export=export,
    rules=RULES,
    targets=JOINT_ATTENTION,
    options={"t5": True, "t5_length": 0},
    base_dtypes=BASE_DTYPES,
)
