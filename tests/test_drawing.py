"""Export and generation as a user calls them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from short_runs import call, load

from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.evaluate import evaluate
from flowgrpo_jax.export import export
from flowgrpo_jax.generate import generate
from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.worlds.shapes import grammar


def test_an_exported_lora_draws_what_the_checkpoint_draws(runs, whole):
    prompt = "a red circle"
    (record,) = (m for m in grammar.prompts("all") if m["prompt"] == prompt)
    (runs / "one.jsonl").write_text(json.dumps(record))
    changes = {"prompts__test": str(runs / "one.jsonl"), "eval__seed": 5}
    config = load(runs, eval__images=1, eval__micro_batch=1, eval__steps=3, **changes)
    run = build_run(config, training=False)
    ema = policies.load(whole.workdir, run.model)
    jax.tree.map(np.testing.assert_array_equal, ema, whole.state.copies["ema"])
    _, expected, _ = evaluate(run, ema)

    printed = call(runs, "export", "--workdir=whole", "--out=lora").split()
    assert len(printed) == 3 and all(Path(runs, file).is_file() for file in printed)
    for lora in ("lora", *printed):
        again = policies.load(runs / lora, run.model)
        jax.tree.map(np.testing.assert_array_equal, again, whole.state.copies["ema"])

    settings = ["--steps=3", "--guidance=1", "--seed=5", "--out=drawn/one.png"]
    call(runs, "generate", "--model=model", f"--prompt={prompt}", "--lora=lora", *settings)
    np.testing.assert_array_equal(np.asarray(Image.open(runs / "drawn" / "one.png")), expected[0])


def test_a_run_that_kept_no_best_says_so(whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(FileNotFoundError, match=r"no best checkpoint: train with checkpoint\.best"):
        export(tmp_path / "run", tmp_path / "lora", best=True)


def test_generating_with_the_base(runs, monkeypatch):
    model = sd3.load("shapes", lora_spec=LoRASpec(2, 4.0, sd3.JOINT_ATTENTION))
    base = policies.load("base", model)
    two = ["a red circle", "three stars"]

    def draw(prompts, **settings):
        return generate(model, base, prompts, steps=2, guidance=2.0, **settings)

    images = draw(two)
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(draw(two), images)
    np.testing.assert_allclose(draw(two[:1])[0], images[0], atol=1)
    assert (draw(two, seed=1) != images).mean() > 0.1
    assert draw(two[:1], height=32, width=96).shape == (1, 32, 96, 3)
    # In parts of two, the last one filled up: a hundred prompts must not need the memory for all.
    three = draw([*two, "a star"])
    monkeypatch.setattr("flowgrpo_jax.assembly.batch_plan.AT_ONCE", 2 * 64 * 64)
    np.testing.assert_allclose(draw([*two, "a star"]).astype(int), three.astype(int), atol=1)


@pytest.mark.parametrize(
    "source, problem, message",
    [
        ("runs/none", FileNotFoundError, "'runs/none' does not exist: give base, a work directory"),
        ("empty", FileNotFoundError, "no LoRA at .*empty"),
        ("whole/checkpoints/7", FileNotFoundError, r"no checkpoint 7 .*\[1, 2, 3, 4\]"),
    ],
)
def test_a_policy_that_is_not_there(runs, whole, source, problem, message, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir(exist_ok=True)
    model = SimpleNamespace(trained_shapes={k: v for k, v in whole.state.copies["ema"].items()})
    with pytest.raises(problem, match=message):
        policies.load(source, model)
