"""The progress of a training run on the terminal."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from tqdm import tqdm


class EpochBar(tqdm):
    """A progress bar whose rate and time left do not count the first epoch, which compiles."""

    first_seconds = 0.0  # that the first epoch took, with all before it

    def skip_first(self) -> None:
        """Advance the bar by the first epoch."""
        done = self.format_dict["n"] + 1
        self.n = self.initial = self.last_print_n = done
        self.last_print_t = time.time()
        self.first_seconds = self.last_print_t - self.start_t
        self.refresh()

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's figures; it asks for an overall rate by giving none, at the end of the run."""
        shown = super().format_dict
        done, seconds = shown["n"] - shown["initial"], shown["elapsed"] - self.first_seconds
        if shown["rate"] is None and done and seconds > 0:
            shown["rate"] = done / seconds
        return shown


def progress_bar(name: str, epoch: int, epochs: int, *, active: bool) -> EpochBar:
    """A bar of all epochs, `epoch` of which are done; nothing is shown unless `active`."""
    return EpochBar(
        total=epochs, initial=epoch, desc=name, unit="epoch", smoothing=0.1, disable=not active
    )


def show_epoch(
    bar: EpochBar, figures: dict[str, float], report: dict[str, float], *, first: bool
) -> None:
    """Advance the bar by an epoch, and write the evaluation before it in a line of its own.

    The first epoch of a start also compiles: the rate and the time left do not count it.
    """
    means = {k: v for k, v in report.items() if k.startswith("eval/") and k.count("/") == 1}
    scores = {k.removeprefix("eval/"): v for k, v in means.items()}
    if scores and not bar.disable:
        bar.write(
            f"epoch {bar.n}: held out  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
        )
    reward = f"reward {figures['reward']:.3f}"
    if first and not bar.disable:
        bar.set_postfix_str(reward, refresh=False)
        bar.skip_first()
    else:
        rate = f"{figures['images_per_second']:.0f} img/s"
        if "share_of_peak" in figures:
            rate += f", {figures['share_of_peak']:.0%} of peak"
        bar.set_postfix_str(f"{reward}, {rate}", refresh=False)
        bar.update()


def show_end(bar: EpochBar, epoch: int, last: dict[str, float]) -> None:
    """Close the bar and print the last evaluation, and how to go on after an early end."""
    shown = not bar.disable  # which closing sets
    bar.close()
    if not shown:
        return
    if last:
        means = {k: round(v, 4) for k, v in last.items() if k.startswith("eval/")}
        print(json.dumps({k: v for k, v in means.items() if math.isfinite(v)}))
    if epoch < bar.total:
        print(f"stopped after epoch {epoch}; go on with --resume")
