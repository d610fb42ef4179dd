"""Pages of runs: what one holds, and runs that are small enough to show on one."""

import json
import re

import numpy as np
from etils import epath

from flowgrpo_jax.report import pictures
from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.types import PromptBatch


def data_of(file):
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read_text())
    return json.loads(found[1])


def a_run(folder, epochs=(0,), prompt="a cat", side=8):
    """A work directory of evaluations of two grey pictures."""
    workdir = epath.Path(folder)
    batch = PromptBatch([prompt] * 2, [{}, {}], np.arange(2))
    lines = []
    for epoch in epochs:
        pixels = np.full((2, side, side, 3), 10 * epoch, np.uint8)
        scores = Scores(("own",), np.array([[0.5, np.nan]]), np.ones((1, 2)), np.ones(2, bool))
        pictures.save_evaluation(workdir, epoch, pixels, batch, scores, 2)
        lines.append(json.dumps({"epoch": epoch, "eval/own": 0.5, "reward": 0.5}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    return workdir
