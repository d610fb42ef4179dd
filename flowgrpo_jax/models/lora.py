"""Low-rank adapters with PEFT's semantics: y += (alpha / rank) x A B.

Source: Hu et al. 2021 (arXiv 2106.09685). Init as PEFT's `gaussian`: A ~ N(0, 1/rank^2), B = 0, so
an adapter starts as the identity and "the reference policy" is the adapter with B = 0.

Files: diffusers reads `transformer.{module}.lora_{A,B}.weight` and takes alpha from a safetensors
header; without that header it silently uses alpha = rank. PEFT reads
`base_model.model.{module}.lora_{A,B}.weight` beside an adapter_config.json. ComfyUI reads the names
of either, but alpha only from a tensor `transformer.{module}.alpha` (comfy/lora.py), which
diffusers refuses; without it, it silently uses alpha = rank. `write` makes a file for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from flowgrpo_jax.files import read_json
from flowgrpo_jax.models.convert import torch_names
from flowgrpo_jax.models.layers import Linear, LoRAParam, Params, name
from flowgrpo_jax.models.weight_files import open_safetensors

JOINT_ATTENTION = tuple(
    f"attn.{m}"
    for m in (
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
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
COMFYUI_FILE = "lora.safetensors"
UNSUPPORTED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # PEFT's settings


@dataclass(frozen=True)
class LoRASpec:
    """Which linears get an adapter (by the end of their dotted name, as in PEFT), and its size.

    Rank 0 is no adapter: all of the model's weights are trained.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = JOINT_ATTENTION

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


def add(model: nnx.Module, spec: LoRASpec) -> None:
    """Give every targeted linear of an abstract model its factors (shapes only).

    Raises ValueError when a target matches no linear, or the patch projection, which is a linear
    here but a convolution in torch: its adapter would have another shape there.
    """
    unused = set(spec.targets)
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Linear):
            continue
        dotted = "." + name(path).replace("/", ".")
        matched = {t for t in spec.targets if dotted.endswith("." + t)}
        if not matched:
            continue
        if dotted == ".pos_embed.proj":
            raise ValueError(
                f"LoRA targets {sorted(matched)} match pos_embed.proj, a convolution in the"
                " checkpoint: write longer names, such as 'ff.net.0.proj'"
            )
        unused -= matched
        *stacked, n_in, n_out = module.kernel.shape
        a = jax.ShapeDtypeStruct((*stacked, n_in, spec.rank), jnp.float32)
        b = jax.ShapeDtypeStruct((*stacked, spec.rank, n_out), jnp.float32)
        module.lora_a, module.lora_b = LoRAParam(a), LoRAParam(b)
        module.lora_scale = spec.scale
    if unused:
        raise ValueError(f"LoRA targets {sorted(unused)} match no linear of the model")


def split(shapes: Params) -> tuple[Params, Params]:
    """(lora, base) of a flat parameter dict."""
    lora = {k: v for k, v in shapes.items() if k.endswith(("/lora_a", "/lora_b"))}
    return lora, {k: v for k, v in shapes.items() if k not in lora}


def init(key: jax.Array, shapes: Params) -> Params:
    """f32 factors: A ~ N(0, 1/rank^2), B = 0."""
    lora = {}
    for i, (path, leaf) in enumerate(sorted(shapes.items())):
        if path.endswith("lora_a"):
            noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
            lora[path] = noise / leaf.shape[-1]
        else:
            lora[path] = jnp.zeros(leaf.shape, jnp.float32)
    return lora


def reference(lora: Params) -> Params:
    """The adapter that changes nothing: the policy before training."""
    return {k: jnp.zeros_like(v) if k.endswith("lora_b") else v for k, v in lora.items()}


# ------------------------------------------------------------------------------- files


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
    header = {f"transformer.{k}": v for k, v in rank_alpha.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
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
        "base_model_name_or_path": base_model,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **rank_alpha,
    }
    (files[1].parent / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return files


def read_spec(path: str | Path) -> tuple[Path, LoRASpec]:
    """The weight file of an exported LoRA and its rank, alpha and targets.

    Args:
      path: an export directory, one of its folders, or a .safetensors file.
    """
    path = Path(path)
    names = (f"diffusers/{DIFFUSERS_FILE}", DIFFUSERS_FILE, PEFT_FILE, COMFYUI_FILE)
    places = [path, *(path / name for name in names)]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no LoRA at {path}: looked for {', '.join(map(str, places[1:]))}")
    if file.name == PEFT_FILE:
        config = read_json(file.parent / "adapter_config.json")
    else:
        with open_safetensors(file) as handle:
            header = (handle.metadata() or {}).get("lora_adapter_metadata")
        if header is None:
            raise ValueError(
                f"{file} has no lora_adapter_metadata header, so its alpha is unknown:"
                " export it again, or point at the PEFT directory"
            )
        config = {k.removeprefix("transformer."): v for k, v in json.loads(header).items()}
    targets = config["target_modules"]
    unknown = [key for key in UNSUPPORTED if config.get(key)]
    unknown += ["target_modules as a pattern"] if isinstance(targets, str) else []
    if unknown:
        raise ValueError(f"{file} uses {', '.join(unknown)}: not supported")
    return file, LoRASpec(config["r"], config["lora_alpha"], tuple(sorted(targets)))


def read(file: str | Path, shapes: Params) -> Params:
    """The factors in an exported file."""
    prefixes = ("base_model.model.", "transformer.")
    tensors = {}
    with open_safetensors(Path(file)) as handle:
        for key in handle.keys():  # noqa: SIM118 (a file, no dict)
            prefix = next((p for p in prefixes if key.startswith(p)), "")
            if not key.endswith(".alpha"):  # ComfyUI's; the header has it
                tensors[key.removeprefix(prefix)] = handle.get_tensor(key)
    return from_torch(tensors, shapes)
