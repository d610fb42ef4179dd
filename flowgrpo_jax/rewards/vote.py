"""A human's vote: which pictures of a prompt are liked.

The reward writes the pictures of a prompt to a folder and waits. `python -m flowgrpo_jax.report
--serve` shows them and writes the answer beside them. A picture that is chosen scores 1, another 0;
where nobody votes in time the whole group is invalid. Of a larger group the first `pictures.MOST`
are shown, and the others are invalid. Answers, also those that did not come, are
kept by the pictures' content: a run that draws the same pictures again needs no human.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from flowgrpo_jax.report import pictures, votes
from flowgrpo_jax.storage import outputs
from flowgrpo_jax.types import Metadata


class Vote:
    """See the module. `pause`: seconds between looks for an answer."""

    scope = "group"

    def __init__(self, folder: epath.Path, seconds: float, pause: float = 0.5):
        self.folder, self.seconds, self.pause = folder, seconds, pause

    def ready(self) -> None:
        """Raise OSError where nothing can be written to the folder."""
        outputs.check_directory(self.folder, "--config.reward.options.vote.folder")

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        n = len(images)
        name = hashlib.sha256(images.tobytes() + prompts[0].encode()).hexdigest()[:16]
        answer = votes.answer(self.folder, name)
        if not answer.exists():
            about = [{"prompt": prompt, "scores": {}} for prompt in prompts]
            pictures.save_sheet(self.folder, name, {"asked": time.time()}, images, about)
            deadline = time.monotonic() + self.seconds
            while not answer.exists() and time.monotonic() < deadline:
                time.sleep(self.pause)
            if not answer.exists():
                votes.give(self.folder, name, None)
        chosen = votes.given(self.folder, name)
        scores = np.zeros(n, np.float32)
        scores[chosen or []] = 1.0
        return scores, (np.arange(n) < pictures.MOST) & (chosen is not None)


def make(folder: str = "votes", seconds: float = 600.0) -> Vote:
    """
    Args:
      folder: where the pictures and the answers go, which the page's server must be told as well.
      seconds: how long a group waits for a vote.
    """
    if not seconds > 0:
        raise ValueError(f"reward.options.vote.seconds={seconds}: must be above 0")
    return Vote(epath.Path(folder), seconds)
