"""The cut of an epoch's images into parts, updates and micro-batches, from a config."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from ml_collections import ConfigDict

from flowgrpo_jax import algorithms
from flowgrpo_jax.assembly.rollout_settings import branches, check_tape, make_window, window
from flowgrpo_jax.assembly.settings import require
from flowgrpo_jax.regularisation import training_data
from flowgrpo_jax.sampling import branching, tails

# Pixels that a device handles at once. An update of 2.2 G parameters in bfloat16 then takes 9 of
# 16 GB (docs/memory.md).
AT_ONCE = 4 * 512 * 512


@dataclass(frozen=True)
class Plan:
    """The batch arithmetic that follows from the config.

    With `sample.micro_batch=0` the micro-batch depends on the number of devices as well. An update
    is the same, but for rounding, however the batch is cut.
    """

    groups: int
    group_size: int
    updates: int
    micro_batch: int
    parts: int = 1  # of the epoch, in order, each with a window and a tail of its own

    def part(self, micro_batch: int) -> int:
        """Return the part that one of the epoch's micro-batches lies in."""
        return micro_batch * self.micro_batch * self.parts // self.images

    @property
    def images(self) -> int:
        return self.groups * self.group_size

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of one update."""
        return self.images // self.updates // self.micro_batch

    def __str__(self) -> str:
        return (
            f"{self.groups} groups x {self.group_size} images = {self.images} images an epoch,"
            f" {self.updates} updates of {self.micro_batches} micro-batches of {self.micro_batch}"
        )


def make_plan(config: ConfigDict, devices: int) -> Plan:
    """Raises ValueError that names the value, the constraint and the fix.

    Args:
      devices: the equal parts that the batch is cut into, sharding.row_shards.
    """
    s, updates = config.sample, config.train.updates_per_epoch
    require(
        s.group_size >= 2,
        f"sample.group_size={s.group_size}: advantages are relative to the group, so at least 2",
    )
    require(
        updates >= 1 and s.groups >= 1 and s.groups % updates == 0,
        f"sample.groups={s.groups} is not a multiple of train.updates_per_epoch={updates}: every"
        " update needs the same number of whole groups",
    )
    _check_parts(config)
    parts = s.windows * len(s.strides)
    require(
        s.groups % parts == 0,
        f"sample.groups={s.groups} cannot be cut into {parts} equal parts, one for each of"
        f" sample.windows={s.windows} and sample.strides={tuple(s.strides)}: choose a multiple",
    )
    images = s.groups * s.group_size // updates
    require(images % devices == 0, _uneven(config, images, devices))
    if (data := config.data).source:
        training_data.check(data.weight, data.images, data.every, update=images, devices=devices)
    require(
        config.eval.micro_batch % devices == 0,
        f"eval.micro_batch={config.eval.micro_batch} cannot be cut into {devices} equal parts, one"
        f" for each of mesh.data x mesh.fsdp: choose a multiple of {devices}, or 0",
    )
    micro_batch = _micro_batch(config, images, devices)
    return Plan(s.groups, s.group_size, updates, micro_batch, parts)


def _check_parts(config: ConfigDict) -> None:
    """The windows and tails of the epoch's parts, and the nodes of a group."""
    s = config.sample
    algorithm = algorithms.load(config.algorithm.name, config.algorithm.options.to_dict())
    require(s.windows >= 1, f"sample.windows={s.windows}: must be at least 1")
    tails.check(s.strides, s.tail)
    size, low, high = window(config, algorithm)
    branching.check(branches(config), s.group_size, low, high, size)
    check_tape(config, algorithm)
    if algorithm.records == "window":
        make_window(config, algorithm)(jax.random.key(0), 0, s.windows - 1, s.windows)
        return
    for knob, plain in (("windows", 1), ("strides", (1,)), ("branches", 1)):
        require(
            s[knob] == plain,
            f"sample.{knob}={s[knob]}: {config.algorithm.name} draws without a window; set {plain}",
        )


def _micro_batch(config: ConfigDict, images: int, devices: int) -> int:
    """The recipe's own, or one that is derived. The devices divide the images of an update."""
    s, pixels = config.sample, config.model.height * config.model.width
    whole = algorithms.load(config.algorithm.name, config.algorithm.options.to_dict()).whole
    unit, needs = {
        "": (1, ""),
        "group": (s.group_size, f", and {config.algorithm.name} needs whole groups in each"),
        "update": (images, f", and {config.algorithm.name} needs all of them in one"),
    }[whole]
    part = s.groups * s.group_size // (s.windows * len(s.strides))
    whole_cuts = range(devices, images + 1, devices)
    sizes = [m for m in whole_cuts if images % m == part % m == m % unit == 0]
    require(
        bool(sizes),
        f"the {part} images of a part (sample.windows={s.windows}, sample.strides="
        f"{tuple(s.strides)}) and the {images} of an update have no micro-batch in common that is"
        f" cut into {devices} equal parts{needs}: change sample.groups or sample.windows",
    )
    if not s.micro_batch:
        return derived_micro_batch(sizes, max(AT_ONCE // pixels, 1) * devices)
    within = f", each within one of the epoch's parts of {part}" if part < images else ""
    near = sorted(sorted(sizes, key=lambda m: abs(m - s.micro_batch))[:8])
    require(
        s.micro_batch in sizes,
        f"sample.micro_batch={s.micro_batch} does not cut the {images} images of an update"
        f" ({s.groups} groups x {s.group_size} / {config.train.updates_per_epoch} updates) evenly,"
        f" in micro-batches of {devices} equal parts{needs}{within}: choose from"
        f" {', '.join(map(str, near))}, or 0 for one that is derived",
    )
    return s.micro_batch


def _uneven(config: ConfigDict, images: int, devices: int) -> str:
    """Return the message for images of an update that cannot be divided among the devices."""
    s, updates = config.sample, config.train.updates_per_epoch
    groups = updates * devices // math.gcd(s.group_size, devices)
    parts = math.gcd(images, devices)
    return (
        f"the {images} images of an update (sample.groups={s.groups} x sample.group_size="
        f"{s.group_size} / train.updates_per_epoch={updates}) cannot be cut into the {devices}"
        f" equal parts of mesh.data x mesh.fsdp: set sample.groups to a multiple of {groups},"
        " change sample.group_size or train.updates_per_epoch, or put more devices on the same"
        f" images, with mesh.tensor {devices // parts} times as large for {parts} parts"
    )


def derived_micro_batch(sizes: list[int], most: int) -> int:
    """The largest of the sizes up to `most`, or the least where all are larger."""
    return max([m for m in sizes if m <= most] or sizes[:1])
