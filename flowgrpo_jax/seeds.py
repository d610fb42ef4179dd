"""Seeds: the range of those that are different from each other."""

from __future__ import annotations

MOST = 2**32 - 1  # JAX makes a key of the last 32 bits of a seed


def check(name: str, seed: int) -> None:
    """Raise ValueError that names the setting unless the seed is one of 0 to `MOST`."""
    if not 0 <= seed <= MOST:
        raise ValueError(
            f"{name}={seed}: must be at least 0 and at most {MOST}, for another seed would give"
            " the same numbers"
        )
