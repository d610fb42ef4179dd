"""PEFT's settings of an adapter: which of them are understood, and the `LoRASpec` that they make.

They are in adapter_config.json, and in the header of a file that diffusers or this package wrote.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from flowgrpo_jax.models.lora import LoRASpec

# Settings of PEFT's LoraConfig under which a linear is not W + alpha / rank B A, or under which
# other modules than the targets are adapted.
UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# The values of init_lora_weights that leave the base model as it is. The others (pissa, olora,
# corda, loftq, lora_ga) take a part out of its weights, and PEFT does so again when it loads.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def check(config: Mapping[str, Any], where: object) -> None:
    """Raise ValueError that names all settings under which the adapter would act differently here.

    Args:
      where: the file, for the error.
    """
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise ValueError(f"{where} is an adapter of the type {kind}: only LORA is supported")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{where} uses init_lora_weights={start!r}, which changes the base model's weights as"
            " well: not supported. Save the adapter in PEFT with"
            " path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    unknown = [key for key in UNSUPPORTED if config.get(key)]
    unknown += ["target_modules as a pattern"] if isinstance(_targets(config), str) else []
    unknown += ["bias"] if config.get("bias") not in (None, "none") else []
    if unknown:
        raise ValueError(f"{where} uses {', '.join(unknown)}: not supported")


def spec(config: Mapping[str, Any], where: object, *, modules: Mapping[str, int]) -> LoRASpec:
    """The adapter's rank, alpha and targets.

    Args:
      config: checked settings; rank and targets may be left out, for they show in the factors.
      modules: the rank of each adapted module, by its dotted name in the transformer.
    Raises ValueError for a rank or an alpha that is missing or no number above 0.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None:
        if len(ranks := sorted(set(modules.values()))) != 1:
            raise ValueError(f"{where} has factors of the ranks {ranks}: only one is supported")
        (rank,) = ranks
    if alpha is None:
        raise ValueError(
            f"{where} does not say its alpha, neither in a lora_adapter_metadata header nor as"
            " .alpha tensors: export it again, or point at the PEFT directory, whose"
            " adapter_config.json has lora_alpha"
        )
    for name, value, kind in (("r", rank, int), ("lora_alpha", alpha, (int, float))):
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ValueError(f"{where}: {name} is {value!r}, it must be a number above 0")
    return LoRASpec(rank, alpha, tuple(sorted(_targets(config) or targets_of(modules))))


def _targets(config: Mapping[str, Any]) -> Any:
    return config.get("target_modules")


def targets_of(modules: Collection[str]) -> set[str]:
    """Return LoRA targets: in a block the part of the name after its number, else the full name."""
    ends = set()
    for module in modules:
        _, _, rest = module.partition(".")
        number, _, inside = rest.partition(".")
        ends.add(inside if number.isdigit() else module)
    return ends
