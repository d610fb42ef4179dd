"""Evaluation: figures repeat, means are right, and the best checkpoint is kept."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from short_runs import call, load, rows

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies, run_checkpoints
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.evaluate import evaluate
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.storage import logs
from flowgrpo_jax.train import initial_state
from flowgrpo_jax.training.run_evaluation import evaluate_into
from flowgrpo_jax.training.run_output import RunOutput
from flowgrpo_jax.types import GraphReward, Pictures


@pytest.mark.parametrize(
    "best, other, broken, offered",
    [
        (0.0, 0.0, 0.0, [7]),
        (0.0, 1.0, 0.0, [7]),
        (0.9, 0.0, 0.0, []),
        (0.9, 1.0, 0.0, []),
        (0.1, 0.1, 0.1, []),
    ],
)
def test_an_evaluation_whose_reward_failed_is_not_the_best(
    runs, tmp_path, monkeypatch, caplog, best, other, broken, offered
):
    """That of `checkpoint.best` alone: a monitor that fails costs nothing but its own figure.
    With a picture that is not finite a state is never the best."""
    failures = {"jpeg_incompressibility": best, "shapes": other}
    result = {"metrics": {"shapes": 1.0}, "per_tag": {}, "failed": 1.0, "failures": failures}
    result["broken"] = broken
    result |= {"errors": {}, "errors_per_tag": {}}
    for name, value in {
        "draw_balanced": (None, None, None),
        "summarise": result,
        "monitored": {},
        "show": None,
    }.items():
        monkeypatch.setattr(
            f"flowgrpo_jax.training.run_evaluation.{name}", lambda *_, value=value: value
        )
    run, state = SimpleNamespace(config=load(runs)), SimpleNamespace(copies={"ema": {}})
    epochs: list[int] = []
    kept = SimpleNamespace(offer=lambda epoch, *_: epochs.append(epoch))
    output = RunOutput(tmp_path, kept, logs.Metrics(tmp_path))
    evaluate_into(output, run, state, 7, Stop())
    assert epochs == offered
    assert ("jpeg_incompressibility failed on 90% and cannot be the best" in caplog.text) == (
        best == 0.9
    )
    assert ("pixels that are not finite" in caplog.text) == (broken > 0)


def test_the_best_evaluation_is_kept(runs, whole):
    """Of the evaluations after 0, 2 and 4 epochs, whatever the last checkpoints are."""
    scores = {r["epoch"]: r.get("eval/jpeg_incompressibility", -1) for r in rows(whole.workdir)}
    epoch = max(scores, key=scores.get)
    best = Checkpoints(whole.workdir / "best")
    assert best.steps() == [epoch]
    assert best.record(epoch)["eval/jpeg_incompressibility"] == scores[epoch]
    run = build_run(load(runs), training=False)
    result, *_ = evaluate(run, policies.load(whole.workdir / "best", run.model))
    assert result["metrics"]["jpeg_incompressibility"] == pytest.approx(scores[epoch], rel=1e-6)


def test_the_best_may_be_older_than_one_of_before(runs, tmp_path):
    """A run that goes on from an earlier checkpoint with another reward begins anew."""
    state = initial_state(build_run(load(runs)))
    run_checkpoints.Best(tmp_path, "shapes", {}, BaseModel()).offer(4, state, {"eval/shapes": 0.75})
    strict = run_checkpoints.Best(tmp_path, "shapes_strict", {}, BaseModel())
    strict.offer(2, state, {"eval/shapes_strict": 0.25})
    assert Checkpoints(tmp_path).steps() == [2]
    again = run_checkpoints.Best(tmp_path, "shapes_strict", {}, BaseModel())
    assert again.value == 0.25
    again.offer(6, state, {"eval/shapes_strict": 0.25})  # not better
    assert Checkpoints(tmp_path).steps() == [2]


@pytest.mark.parametrize("reward, weights", [("shapes_unknown", {}), ("shapes", {"shapes": -1.0})])
def test_the_best_of_a_reward_that_should_fall_is_the_lowest(runs, tmp_path, reward, weights):
    state = initial_state(build_run(load(runs)))
    arguments = tmp_path, reward, {"reward": {"weights": weights}}, BaseModel()
    best = run_checkpoints.Best(*arguments)
    for epoch, value in enumerate((0.5, 0.75, 0.25)):
        best.offer(epoch, state, {f"eval/{reward}": value})
    assert Checkpoints(tmp_path).steps() == [2]
    again = run_checkpoints.Best(*arguments)
    assert again.value == 0.25
    again.offer(3, state, {f"eval/{reward}": 0.5})
    assert Checkpoints(tmp_path).steps() == [2]


def test_evaluating_a_checkpoint_repeats_what_training_logged(runs, whole):
    out = call(runs, "evaluate", "--config=tiny.py", "--checkpoint=whole", "--out=results/rl.json")
    result = json.loads((runs / "results" / "rl.json").read_text())
    logged = {k: v for k, v in rows(whole.workdir)[-1].items() if k.startswith("eval/")}
    flat = {f"eval/{name}": value for name, value in result["metrics"].items()}
    for tag, values in result["per_tag"].items():
        flat |= {f"eval/{tag}/{name}": value for name, value in values.items()}
    assert flat == pytest.approx(logged, rel=1e-6)
    assert set(result["metrics"]) == {"jpeg_incompressibility", "shapes_strict"}
    assert set(result["per_tag"]) == set(out.split()) & set(result["per_tag"])
    assert len(result["per_tag"]) == 6 and (result["images"], result["failed"]) == (12, 0)
    assert Image.open(runs / "results" / "rl.png").size[0] > 64


def test_the_base_is_the_policy_before_training(runs, whole):
    run = build_run(load(runs), training=False)
    base = policies.load("base", run.model)
    result, images, batch = evaluate(run, base)
    assert images.shape == (12, 32, 32, 3) and len(batch.prompts) == 12
    logged = rows(whole.workdir)[0]
    for name, value in result["metrics"].items():
        assert value == pytest.approx(logged[f"eval/{name}"], rel=1e-6)


def test_a_mean_is_over_the_images_whose_reward_did_not_fail():
    """Five images in micro-batches of two: the last one is padded, and the padding counts not."""
    records = [{"prompt": str(i), "tag": "even" if i % 2 == 0 else "odd"} for i in range(5)]

    def number(images, prompts, metadata):
        assert [int(p) for p in prompts] == images[:, 0, 0, 0].tolist()
        return images[:, 0, 0, 0], [p not in "03" for p in prompts]

    same = GraphReward(  # is the picture that of its prompt?
        weights=(),
        prepare=lambda prompts, metadata: np.array([int(p) for p in prompts]),
        score=lambda weights, images, prompt: (images[:, 0, 0, 0] == prompt) * 1.0,
    )
    run = SimpleNamespace(
        config=load_eval(images=5, micro_batch=2),
        mesh=sharding.make_mesh(),
        test_prompts=records,
        encode=lambda texts: np.array([int(t) for t in texts]),
        weights=None,
        empty=None,
        programs=SimpleNamespace(
            generate=lambda policy, weights, cond, empty, prompt, keys: Pictures(
                jnp.tile(cond[prompt][:, None, None, None], (1, 8, 8, 3)).astype(jnp.uint8),
                jnp.ones(len(prompt), bool),
            )
        ),
        test_scorer=Scorer(
            RewardWeights({"number": 1.0, "same": 0.0}),
            {"number": number, "same": same},
            records,
            sharding.make_mesh(),
        ),
    )
    result, images, _ = evaluate(run, {})
    assert len(images) == 5
    assert result["metrics"] == {"number": pytest.approx((1 + 2 + 4) / 3), "same": 1.0}
    assert result["per_tag"] == {
        "even": {"number": 3.0, "same": 1.0},
        "odd": {"number": 1.0, "same": 1.0},
    }
    assert result["failed"] == pytest.approx(2 / 5)
    assert result["failures"] == {"number": pytest.approx(2 / 5), "same": 0.0}


def load_eval(**settings):
    return SimpleNamespace(eval=SimpleNamespace(seed=0, **settings))
