"""The cut of an epoch's images into updates and micro-batches, from a config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from flowgrpo_jax import algorithms, training_data
from flowgrpo_jax.settings import require

AT_ONCE = (
    4 * 512 * 512
)  # px a device: an update of 2.2 G parameters takes 12 of 16 GB (docs/scaling.md)


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
    images = s.groups * s.group_size // updates
    require(images % devices == 0, _uneven(config, images, devices))
    if (data := config.data).source:
        training_data.check(data.weight, data.images, data.every, update=images, devices=devices)
    require(
        config.eval.micro_batch % devices == 0,
        f"eval.micro_batch={config.eval.micro_batch} cannot be cut into {devices} equal parts, one"
        f" for each of mesh.data x mesh.fsdp: choose a multiple of {devices}, or 0",
    )
    return Plan(s.groups, s.group_size, updates, _micro_batch(config, images, devices))


def _micro_batch(config: ConfigDict, images: int, devices: int) -> int:
    """The recipe's own, or one that is derived. The devices divide the images of an update."""
    s, pixels = config.sample, config.model.height * config.model.width
    whole = algorithms.load(config.algorithm.name, config.algorithm.options.to_dict()).whole
    unit, needs = {
        "": (1, ""),
        "group": (s.group_size, f", and {config.algorithm.name} needs whole groups in each"),
        "update": (images, f", and {config.algorithm.name} needs all of them in one"),
    }[whole]
    sizes = [m for m in range(devices, images + 1, devices) if images % m == m % unit == 0]
    if not s.micro_batch:
        return derived_micro_batch(sizes, max(AT_ONCE // pixels, 1) * devices)
    near = sorted(sorted(sizes, key=lambda m: abs(m - s.micro_batch))[:8])
    require(
        s.micro_batch in sizes,
        f"sample.micro_batch={s.micro_batch} does not cut the {images} images of an update"
        f" ({s.groups} groups x {s.group_size} / {config.train.updates_per_epoch} updates) evenly,"
        f" in micro-batches of {devices} equal parts{needs}: choose from"
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
