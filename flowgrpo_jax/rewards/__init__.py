"""Reward functions: images in, scores out.

A reward is any callable `(images uint8 [B, H, W, 3], prompts, metadata) -> (scores f32 [B], valid
bool [B])`, on the host, or a `types.GraphReward`, whose scores are computed where the images are.
A host reward may have a method `ready()`: it is called before training starts, and raises when the
reward cannot work; a method `check(record)`, called then with the metadata of every prompt that it
is for, which raises ValueError for what it cannot judge; and a `scope`: "image" (the default),
"group" for a reward that is to be given all images of a prompt in one call, or "epoch" for one that
is to be given all images of an epoch. To add a reward: write it in a file of this folder, give it a
row in `TABLE`, test it. A reward of the user's own needs no row: its name in the recipe is
"package.module:function", or "package.module:make()" for one that takes options.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from flowgrpo_jax import tables
from flowgrpo_jax.types import Described, GraphReward, Reward

# "module:function" is a reward itself; "module:make()" makes one from the recipe's options.
TABLE = {
    "shapes": "flowgrpo_jax.rewards.shapes:graded",
    "shapes_strict": "flowgrpo_jax.rewards.shapes:strict",
    "shapes_unknown": "flowgrpo_jax.rewards.shapes:unknown",
    "shapes_colors": "flowgrpo_jax.rewards.shapes_colors:REWARD",
    "shapes_wins": "flowgrpo_jax.rewards.shapes_groups:wins",
    "shapes_balance": "flowgrpo_jax.rewards.shapes_groups:balance",
    "shapes_fairness": "flowgrpo_jax.rewards.shapes_groups:fairness",
    "geneval": "flowgrpo_jax.rewards.geneval:graded()",
    "geneval_strict": "flowgrpo_jax.rewards.geneval:strict()",
    "geneval_official": "flowgrpo_jax.rewards.geneval:official()",
    "jpeg_compressibility": "flowgrpo_jax.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowgrpo_jax.rewards.jpeg:incompressibility",
    "pickscore": "flowgrpo_jax.rewards.clip:pickscore()",
    "clipscore": "flowgrpo_jax.rewards.clip:clipscore()",
    "hpsv2": "flowgrpo_jax.rewards.clip:hpsv2()",
    "aesthetic": "flowgrpo_jax.rewards.clip:aesthetic()",
    "image_similarity": "flowgrpo_jax.rewards.clip:image_similarity()",
    "imagereward": "flowgrpo_jax.rewards.imagereward:make()",
    "ocr": "flowgrpo_jax.rewards.ocr:make()",
    "ocr_exact": "flowgrpo_jax.rewards.ocr:make()",
    "ocr_lenient": "flowgrpo_jax.rewards.ocr:make()",
    "unifiedreward": "flowgrpo_jax.rewards.judge:unifiedreward()",
    "vlm_judge": "flowgrpo_jax.rewards.judge:make()",
    "vote": "flowgrpo_jax.rewards.vote:make()",
    "preference": "flowgrpo_jax.rewards.preference:make()",
    "remote": "flowgrpo_jax.rewards.remote:make()",
    "geneval_upstream": "flowgrpo_jax.rewards.upstream:geneval()",
    "deqa_upstream": "flowgrpo_jax.rewards.upstream:deqa()",
}

# Rows that read the same detections as another row and judge them by another rule: {row: (the other
# row, options)}. They take the other row's options, changed by these, so that one detector serves
# all of them. Options under a row's own name override both.
VIEWS: dict[str, tuple[str, dict[str, Any]]] = {
    "geneval_strict": ("geneval", {}),
    "geneval_official": ("geneval", {}),
    "ocr_exact": ("ocr", {"strict": True, "exact": True}),
    "ocr_lenient": ("ocr", {"strict": False, "exact": False}),
}


def load(
    names: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Reward | GraphReward]:
    """Load the rewards of these names; only the modules of these rewards are imported.

    Args:
      names: of rows; "remote:deqa" is the row `remote` once more, under a name of its own.
      options: {name: keyword arguments of the row's `make()`}. A name of its own adds to the row's;
        for rows of `VIEWS` see there.
    """
    rewards = {}
    for name in names:
        target, chosen = _target(name), _options(name, options or {})
        found = tables.find({}, target.removesuffix("()"), "reward")
        if target.endswith("()"):
            try:
                found = found(**chosen)
            except TypeError as error:
                if "unexpected keyword" not in str(error):
                    raise
                raise ValueError(f"reward.options of {name}, {chosen}: {error}") from error
        elif chosen:
            raise ValueError(f"reward.options.{name}={chosen}: {name} takes no options")
        rewards[name] = found
    return rewards


def describe(
    names: Iterable[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Described]:
    """Describe those of the named rewards that run in the graph, without reading any weights.

    A module says in `DESCRIBED` how its rewards are described: {function: dtype -> Described}.
    Shapes are those of the published weights, wherever the options point.
    """
    found = {}
    for name in names:
        target = _target(name).removesuffix("()")
        tables.find({}, target, "reward")  # imports its module
        module, _, function = target.partition(":")
        described = getattr(sys.modules[module], "DESCRIBED", {})
        if function in described:
            found[name] = described[function](_options(name, options).get("dtype", "float32"))
    return found


def _target(name: str) -> str:
    """Return "module:function", or "module:make()" for a function that makes the reward."""
    row = row_of(name)
    return TABLE.get(row, row)


def _options(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a reward's options: those of the row that it is a view of, of its row, and its own."""
    row = row_of(name)
    base, changes = VIEWS.get(row, (row, {}))
    return {**given.get(base, {}), **changes, **given.get(row, {}), **given.get(name, {})}


def row_of(name: str) -> str:
    """Return the row of `TABLE` that a name means, or the name itself for a reward of the user's
    own. Raises ValueError where there is no such row."""
    row, _, own = name.partition(":")
    if row in TABLE:
        return row
    if not own:
        raise ValueError(
            f"reward {name!r} is unknown: choose from {', '.join(sorted(TABLE))}, or give one of"
            " your own as 'package.module:function' or 'package.module:make()'"
        )
    return name
