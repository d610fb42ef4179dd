"""What a benchmark ran on, and the flags' parser that all benchmarks share."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft", "numpy")
ROOT = Path(__file__).parent.parent


def parser(description: str | None, **more: Any) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )


def described(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "gpu": gpu() if device == "gpu" else None,
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
        **{name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit of the checkout; that of its wheels/ (wheels.sh) where git knows of none."""
    noted = ROOT / "wheels" / "commit"
    said = printed("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return said or (noted.read_text().strip() if noted.exists() else "")


def gpu() -> str:
    """Name, memory and driver."""
    query = "--query-gpu=name,memory.total,driver_version"
    return printed("nvidia-smi", query, "--format=csv,noheader")


def printed(*command: str) -> str:
    """What a command prints; "" where it fails, or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(name: str) -> str | None:
    """None where it is not installed: JAX can be measured alone."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
