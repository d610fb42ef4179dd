"""This file lists the limits of accelerators, from their makers' data sheets."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One chip of a TPU generation (jax-ml.github.io/scaling-book, cloud.google.com/tpu/docs)."""

    memory: float  # bytes of HBM
    peak: float  # bf16 FLOP/s
    links: float  # bytes/s along one axis of the torus, both directions
    bandwidth: float  # bytes/s of HBM


TPUS = {
    "v4": Chip(32e9, 275e12, 90e9, 1.2e12),
    "v5e": Chip(16e9, 197e12, 90e9, 0.819e12),
    "v5p": Chip(95e9, 459e12, 180e9, 2.765e12),
    "v6e": Chip(32e9, 918e12, 180e9, 1.64e12),
}
# What a device calls itself (`Device.device_kind`) -> its dense bf16 FLOP/s. The longest name whose
# words it begins with counts.
PEAKS = {
    "TPU v4": TPUS["v4"].peak,
    "TPU v5 lite": TPUS["v5e"].peak,
    "TPU v5": TPUS["v5p"].peak,
    "TPU v5e": TPUS["v5e"].peak,
    "TPU v5p": TPUS["v5p"].peak,
    "TPU v6 lite": TPUS["v6e"].peak,
    "TPU v6e": TPUS["v6e"].peak,
    "NVIDIA A10G": 70e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209e12,
}


def peak(device: Any) -> float | None:
    """Return the bf16 FLOP/s of a device at most, or None where they are not known."""
    known = [kind for kind in PEAKS if re.match(rf"{kind}\b", device.device_kind)]
    return PEAKS[max(known, key=len)] if known else None


def peak_memory(device: Any) -> float | None:
    """Return the most bytes of a device's memory in use so far, or None where it does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
