"""Runs of the algorithms other than GRPO: they train, and go on bit for bit after a stop."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from short_runs import load, rows, timeless

from flowgrpo_jax.train import train

CASES = {
    "nft": {"name": "nft", "options": {}},
    "awm": {"name": "awm", "options": {"levels": 2}},
    "awm_with_a_clip": {"name": "awm", "options": {"levels": 2, "clip_range": 0.1}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit(runs, tmp_path, case):
    """With copies of the policy, and with advantages that remember the prompts' rewards."""

    def config(epochs):
        c = load(runs, epochs=epochs, eval__every=0)
        c.algorithm = ConfigDict(CASES[case])
        c.advantage = ConfigDict(
            {"name": "per_prompt", "clip": 5.0, "options": {"buffer_size": 8, "min_count": 2}}
        )
        return c

    whole = train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "halves")
    resumed = train(config(2), tmp_path / "halves", resume=True)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "halves"), strict=True):
        assert timeless(a) == timeless(b)
        assert a["grad_norm"] > 0 and a["failed"] == a["skipped"] == a["broken"] == 0
    plain = [state.replace(key=0) for state in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *plain)
    assert np.isfinite(whole.memory["rewards"]).any()
    copies = {"nft": {"old"}, "awm": {"anchor"}, "awm_with_a_clip": {"anchor", "old"}}[case]
    assert set(whole.copies) == {"ema"} | copies
