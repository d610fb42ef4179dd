"""The reward models' weights: found, read once, and shared.

The functions `read_*` keep what they have read, by file and dtype: rewards on the same weights
hold the very same arrays. These are numpy arrays on the host; who places them on the devices can
tell by identity which to place only once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.layers import Params, abstract
from flowgrpo_jax.models.towers.aesthetic_head import Head
from flowgrpo_jax.models.towers.blip import BLIPConfig, ImageReward
from flowgrpo_jax.models.towers.clip import CLIP, DualConfig, from_open_clip, is_open_clip
from flowgrpo_jax.models.weight_files import Tensors, open_file
from flowgrpo_jax.storage.files import read_object
from flowgrpo_jax.types import Metadata

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
HPS_FILES = ("HPS_v2.1_compressed.pt", *CLIP_FILES)
IMAGE_REWARD_FILES = ("ImageReward.pt", "model.safetensors")
HEAD_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors")
DTYPES = ("float32", "bfloat16", "float16")
SIDE_FILES = ["*.json", "*.txt"]  # configs and tokenizers


class Tower(NamedTuple):
    """A loaded model: apply(params, *args, method=...) and what describes it."""

    apply: Callable[..., Any]
    params: Params
    config: Any
    file: Path


def find(path: str, files: Sequence[str], option: str) -> Path:
    """The weight file at `path`: that file, the first of `files` in that folder or hub repository.

    Args:
      option: the setting that chose `path`, for the error.
    Raises:
      FileNotFoundError: what was looked for, where, and how to point elsewhere.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    advice = f"download it, then set {option} to the folder or to the file itself"
    if local.is_dir():
        for file in files:
            if (local / file).is_file():
                return local / file
        raise FileNotFoundError(f"{local} holds none of {', '.join(files)}: {advice}")
    if local.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise FileNotFoundError(
            f"{option}={path!r} is neither a file nor a folder, nor a hub id (organisation/name)"
        )
    problem = "it holds none of them"
    for file in files:
        try:
            found = snapshot(path, [file, *SIDE_FILES]) / file
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            break
        if found.is_file():
            return found
    raise FileNotFoundError(
        f"{option}={path!r}: {' or '.join(files)} could not be had from huggingface.co/{path}"
        f" ({problem}). Where it is reachable, `hf download {path}`; else {advice}"
    )


def snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=patterns))


CLIP_VOCABULARY: tuple[set[str], ...] = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
BERT_VOCABULARY: tuple[set[str], ...] = ({"tokenizer.json"}, {"vocab.txt"})


def vocabulary(
    beside: Path, fallback: str | None, choices: Sequence[set[str]], option: str
) -> Path:
    """The folder of a tokenizer: beside the weights where it is complete, else `fallback`."""

    def complete(folder: Path) -> bool:
        return any(all((folder / f).is_file() for f in files) for files in choices)

    if complete(beside):
        return beside
    problem, folder = "", Path(fallback or beside).expanduser()
    if not folder.is_dir():
        try:
            folder = snapshot(str(fallback), SIDE_FILES)
        except Exception as error:
            problem = f" ({type(error).__name__}: {error})"
    if complete(folder):
        return folder
    names = " or ".join(" and ".join(sorted(files)) for files in choices)
    raise FileNotFoundError(
        f"no tokenizer: {names} is neither in {beside} nor in {folder}{problem}; put it beside the"
        f" weights, or set {option}"
    )


def clip_tokenizer(beside: Path, fallback: str | None, option: str) -> Any:
    from transformers import CLIPTokenizer

    folder = vocabulary(beside, fallback, CLIP_VOCABULARY, option)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def bert_tokenizer(beside: Path, fallback: str | None, option: str) -> Any:
    from transformers import BertTokenizer

    folder = vocabulary(beside, fallback, BERT_VOCABULARY, option)
    return BertTokenizer.from_pretrained(folder, local_files_only=True)


# ------------------------------------------------------------------------------------- the models


def clip(
    path: str,
    dtype: str,
    option: str,
    files: Sequence[str] = CLIP_FILES,
    default: DualConfig | None = None,
) -> Tower:
    """A CLIP of transformers' or open_clip's layout.

    Args:
      option: the setting that chose `path`, for errors.
      default: its shape where no config.json lies beside the weights.
    """
    return read_clip(find(path, files, option), dtype, default)


@functools.cache
def read_clip(file: Path, dtype: str, default: DualConfig | None) -> Tower:
    config = file.parent / "config.json"
    if config.is_file():
        shape = DualConfig.read(read_object(config))
    elif default is None:
        raise FileNotFoundError(
            f"{config} does not exist, which says what shape {file.name} has: download it as well"
        )
    else:
        shape = default
    tensors = open_file(file)
    tensors = from_open_clip(tensors) if is_open_clip(tensors) else tensors
    return build(CLIP, shape, tensors, dtype, file)


@functools.cache
def read_head(file: Path, width: int) -> Tower:
    """The aesthetic head over embeddings of this width, in float32."""
    return build(Head, width, open_file(file), "float32", file)


@functools.cache
def read_image_reward(file: Path, dtype: str) -> Tower:
    config = file.parent / "med_config.json"
    raw = read_object(config) if config.is_file() else {}
    tensors = ImageReward.needed(open_file(file))
    return build(ImageReward, BLIPConfig.read(raw), tensors, dtype, file)


def describe(kind: Any, config: Any, dtype: str) -> Tower:
    """Describe a model by the shapes of its parameters. Raises ValueError for an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose from {', '.join(DTYPES)}")
    compute = jnp.dtype(dtype)
    apply, shapes = abstract(lambda rngs: kind(config, dtype=compute, rngs=rngs))
    full = getattr(kind, "full", ())  # parts that stay in float32
    params = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.float32 if path.startswith(full) else compute)
        for path, x in shapes.items()
    }
    return Tower(apply, params, config, Path())


@functools.cache
def described(weights: str, kind: Any, config: Any, dtype: str) -> Tower:
    """Describe a tower by the name of its weights. Rewards on the same weights share one, as they
    share those that the functions `read_*` have read."""
    return describe(kind, config, dtype)


def unprepared(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
    """Stand in for the `prepare` of a reward that is only described."""
    raise ValueError("this reward is only described: `rewards.load` it to prepare prompts")


def build(kind: Any, config: Any, tensors: Tensors, dtype: str, file: Path) -> Tower:
    """The described model, then its weights, as arrays on the host."""
    tower = describe(kind, config, dtype)
    compute, ignore = jnp.dtype(dtype), getattr(kind, "ignored", ())
    params = convert.from_tensors(
        tensors, tower.params, where=str(file), dtype=compute, ignore=ignore
    )
    if compute != jnp.float32:
        full = {path: x for path, x in tower.params.items() if x.dtype == jnp.float32}
        params |= convert.assemble(((name, x.read) for name, x in tensors.items()), full)
    return tower._replace(params=jax.device_get(params), file=file)


def precision(dtype: str) -> Any:
    """Compute float32 products in full precision; accelerators use fewer bits by default."""
    full = dtype == "float32"
    return jax.default_matmul_precision("highest") if full else contextlib.nullcontext()
