"""Leave out the test files that another environment of `.ci/run` runs: `torch` has the oldest
supported JAX and all extras, `newest` has the newest JAX and no extras."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = ("torch", "newest")
# Files about what JAX itself computes, shards, compiles and restores.
ON_BOTH = {
    "test_advantages",
    "test_clipped_loss",
    "test_compilation",
    "test_compile_cache",
    "test_cost",
    "test_decoupled",
    "test_lora",
    "test_marginals",
    "test_optimiser",
    "test_prompt_statistics",
    "test_replay",
    "test_resume",
    "test_sampler",
    "test_sde",
    "test_several_rewards",
    "test_sharding",
    "test_tpu_chips",
    "test_update",
}
NEEDS_EXTRAS = re.compile(
    r"importorskip|find_spec|torch_models|torch_towers"
    r"|^def \w+\([^)]*\b(?:checkpoint|pipeline)\b",  # fixtures of conftest.py that torch makes
    re.MULTILINE,
)


def is_test(file):
    return file.match("test_*.py")


def environments(file):
    """Where a test file runs: on both if it is listed above, else once, with what it needs."""
    if file.stem in ON_BOTH:
        return ENVIRONMENTS
    return ("torch",) if NEEDS_EXTRAS.search(file.read_text(encoding="utf-8")) else ("newest",)


def runs(file, environment):
    return environment in environments(file)


def left_out(environment):
    """A sentence that names the files which the environment does not run."""
    names = [f.stem for f in sorted(HERE.glob("test_*.py")) if not runs(f, environment)]
    return f"Not run in the environment {environment!r}: {', '.join(names)}."
