"""LoRA files: written for diffusers, PEFT and ComfyUI, and read as any of them writes them.

diffusers reads `transformer.{module}.lora_{A,B}.weight` and takes alpha from a safetensors header;
without that header it silently uses alpha = rank. PEFT reads
`base_model.model.{module}.lora_{A,B}.weight` beside an adapter_config.json. ComfyUI reads the names
of either, but alpha only from a tensor `transformer.{module}.alpha` (comfy/lora.py), which
diffusers refuses; without it, it silently uses alpha = rank. `write` makes a file for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from flowgrpo_jax.models import peft_config
from flowgrpo_jax.models.convert import torch_names
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.weight_files import open_safetensors
from flowgrpo_jax.storage.files import read_object

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
COMFYUI_FILE = "lora.safetensors"
SETTINGS_FILE = "adapter_config.json"  # PEFT's, beside the factors
HEADER = "lora_adapter_metadata"  # diffusers' name of the settings in a safetensors header
PREFIXES = ("base_model.model.", "transformer.")
KINDS = {  # a part of a tensor's name: the kind of adapter that has it
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "vera_lambda": "VeRA",
    "ia3_": "IA3",
}


class Export(NamedTuple):
    """A LoRA file, its settings, and the base model that it names ("" where it names none)."""

    file: Path
    spec: LoRASpec
    base: str


def _rows(params: Params) -> dict[str, tuple[str, int | None]]:
    """{dotted torch module + .lora_A|B.weight: (path, layer in the stack or None)}."""
    rows = {}
    for path in params:
        module, leaf = path.rsplit("/", 1)
        suffix = {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]
        names = torch_names(f"{module}/kernel")
        for i, dotted in enumerate(names):
            row = f"{dotted.removesuffix('.weight')}.{suffix}.weight"
            rows[row] = (path, i if ":" in path else None)
    return rows


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """{module.lora_A.weight: [r, in], module.lora_B.weight: [out, r]}."""
    return {
        row: np.ascontiguousarray(np.asarray(params[path] if i is None else params[path][i]).T)
        for row, (path, i) in _rows(params).items()
    }


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Params) -> Params:
    """The inverse; raises ValueError that lists every missing, extra or misshapen factor."""
    rows = _rows(shapes)
    missing, extra = sorted(set(rows) - set(tensors)), sorted(set(tensors) - set(rows))
    params: Params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    misshapen = []
    for row in sorted(set(rows) & set(tensors)):
        path, i = rows[row]
        target = params[path] if i is None else params[path][i]
        value = np.asarray(tensors[row], np.float32).T
        if value.shape == target.shape:
            target[...] = value
        else:
            misshapen.append(f"{row}: file {value.shape[::-1]}, model {target.shape[::-1]}")
    if missing or extra or misshapen:
        raise ValueError(
            f"LoRA does not fit the model: missing {missing}, not in it {extra}, misshapen"
            f" {misshapen}. Set lora.rank and lora.targets to the file's"
        )
    return {k: jnp.asarray(v) for k, v in params.items()}


def write(params: Params, spec: LoRASpec, directory: str | Path, base_model: str) -> list[Path]:
    """Write `diffusers/` (load_lora_weights), `peft/` (PeftModel.from_pretrained), `comfyui/`."""
    directory = Path(directory)
    tensors = to_torch(params)
    rank_alpha = {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(spec.targets)}
    names = {"diffusers": DIFFUSERS_FILE, "peft": PEFT_FILE, "comfyui": COMFYUI_FILE}
    files = [directory / folder / name for folder, name in names.items()]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    named_base = {"base_model_name_or_path": base_model}
    header = {f"transformer.{k}": v for k, v in (rank_alpha | named_base).items()}
    metadata = {"format": "pt", HEADER: json.dumps(header)}
    named = {f"transformer.{k}": v for k, v in tensors.items()}
    modules = {k.removesuffix(".lora_A.weight") for k in named if k.endswith(".lora_A.weight")}
    alphas = {f"{module}.alpha": np.array(spec.alpha, np.float32) for module in modules}
    save_file(named, str(files[0]), metadata=metadata)
    save_file(named | alphas, str(files[2]), metadata=metadata)
    save_file(
        {f"base_model.model.{k}": v for k, v in tensors.items()},
        str(files[1]),
        metadata={"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        **named_base,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **rank_alpha,
    }
    (files[1].parent / SETTINGS_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return files


def read_spec(path: str | Path) -> Export:
    """The weight file of an exported LoRA with its rank, alpha and targets, and its base model.

    Args:
      path: an export directory, one of its folders, or a .safetensors file.
    Raises:
      FileNotFoundError: there is no LoRA, or PEFT's settings are not beside it.
      ValueError: a damaged file, another kind of adapter, or one whose alpha is not known.
    """
    path = Path(path)
    names = (f"diffusers/{DIFFUSERS_FILE}", DIFFUSERS_FILE, PEFT_FILE, COMFYUI_FILE)
    places = [path, *(path / name for name in names)]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no LoRA at {path}: looked for {', '.join(map(str, places[1:]))}")
    config = _peft_settings(file) if file.name == PEFT_FILE else _header(file)
    peft_config.check(config, file)
    ranks, alphas = _contents(file)
    alpha = _alpha(alphas, ranks, config.get("lora_alpha"), file)
    spec = peft_config.spec({**config, "lora_alpha": alpha}, file, modules=ranks)
    return Export(file, spec, _base(file, config))


def _peft_settings(file: Path) -> dict[str, Any]:
    settings = file.parent / SETTINGS_FILE
    if not settings.is_file():
        raise FileNotFoundError(
            f"{settings} does not exist, which has the alpha of {file.name}: copy it as well"
        )
    return read_object(settings)


def _header(file: Path) -> dict[str, Any]:
    """Read the settings in a file's header; the result is empty if the file has no such header."""
    with open_safetensors(file) as handle:
        header = (handle.metadata() or {}).get(HEADER)
    if header is None:
        return {}
    try:
        config = json.loads(header)
    except ValueError as error:
        raise ValueError(
            f"the {HEADER} header of {file} is damaged: {error}. Copy or export the file again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the {HEADER} header of {file} is {header}, it must be a JSON object")
    return {k.removeprefix("transformer."): v for k, v in config.items()}


def _base(file: Path, config: Mapping[str, Any]) -> str:
    """The name of the base model in the settings, or in PEFT's that lie beside in an export."""
    beside = file.parent.parent / "peft" / SETTINGS_FILE
    name = config.get("base_model_name_or_path")
    if not name and beside.is_file():
        name = read_object(beside).get("base_model_name_or_path")
    return str(name or "")


def _contents(file: Path) -> tuple[dict[str, int], dict[str, float]]:
    """The rank of each adapted module, and the alpha of each that has it as a tensor.

    Raises ValueError for tensors that are no LoRA of a transformer in diffusers' names.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with open_safetensors(file) as handle:
        for key in handle.keys():  # noqa: SIM118 (a file, no dict)
            _check_name(key, file)
            name = _bare(key)
            if name.endswith(".lora_A.weight"):
                ranks[name.removesuffix(".lora_A.weight")] = handle.get_slice(key).get_shape()[0]
            elif name.endswith(".alpha"):
                alphas[name.removesuffix(".alpha")] = float(handle.get_tensor(key))
    return ranks, alphas


def _check_name(key: str, file: Path) -> None:
    """Raise ValueError for a tensor of another kind of adapter, or under other names."""
    for part, kind in KINDS.items():
        if part in key:
            raise ValueError(f"{file} is a {kind} adapter (it has {key}): only LoRA is supported")
    if key.startswith(("text_encoder", "lora_te")):
        raise ValueError(
            f"{file} also adapts a text encoder ({key}): not supported. Save the transformer's"
            " factors alone"
        )
    if any(part in key for part in ("lora_down", "lora_up", "lora.down", "lora.up")):
        raise ValueError(
            f"{file} has the tensor names of kohya's sd-scripts ({key}), which are not read."
            " Rename MODULE.lora_down.weight to transformer.MODULE.lora_A.weight, lora_up to lora_B"
            " and MODULE.alpha to transformer.MODULE.alpha, where MODULE is the transformer's name"
            " of the linear in diffusers, such as transformer_blocks.0.attn.to_q"
        )


def _alpha(
    alphas: Mapping[str, float], ranks: Mapping[str, int], said: Any, file: Path
) -> float | Any:
    """The one alpha of all modules: what the settings say, or else the file's .alpha tensors.

    Raises ValueError where these differ, or where some modules have none.
    """
    values = sorted(set(alphas.values()))
    if not values:
        return said
    if len(values) > 1:
        raise ValueError(
            f"{file} has .alpha tensors of {values}: only one alpha is supported; multiply each"
            " module's lora_B by its alpha, and give all of them the alpha 1"
        )
    if said is not None:
        if not (isinstance(said, int | float) and np.isclose(said, values[0], rtol=1e-2)):
            raise ValueError(
                f"{file} has lora_alpha={said!r} and .alpha tensors of {values[0]}: they must be"
                " the same; correct lora_alpha, or leave it out"
            )
        return said
    if bare := sorted(set(ranks) - set(alphas)):
        raise ValueError(
            f"{file} lacks the .alpha tensors of {', '.join(bare)}: every adapted module needs"
            " one; export the adapter again"
        )
    return values[0]


def _bare(key: str) -> str:
    """A tensor's name without the prefix of the library that wrote it."""
    prefix = next((p for p in PREFIXES if key.startswith(p)), "")
    return key.removeprefix(prefix)


def read(file: str | Path, shapes: Params) -> Params:
    """The factors in an exported file. Raises ValueError where they do not fit the model."""
    with open_safetensors(Path(file)) as handle:
        keys = [key for key in handle.keys() if not key.endswith(".alpha")]  # noqa: SIM118
        return from_torch({_bare(key): handle.get_tensor(key) for key in keys}, shapes)
