"""The benchmark runs, and its engines compute the same before they are timed."""

import ast
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, engine, epoch, random_model
from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.sd3.architecture import PUBLISHED
from flowgrpo_jax.models.sd3.mmdit import MMDiTConfig
from flowgrpo_jax.models.vae import VAEConfig

ROOT = Path(__file__).parent.parent


def test_a_small_epoch(tmp_path):
    """The command itself refuses engines whose velocity, gradient or images differ."""
    engines = ["jax", "jax-tape"] + ["torch"] * bool(importlib.util.find_spec("peft"))
    sizes = ["--groups=2", "--group_size=2", "--micro_batch=4", "--steps=4", "--window=2"]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch", f"--engines={','.join(engines)}", *sizes,
         "--repeats=1", "--warmup=0", f"--out={out}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(engines) <= set(found["medians"])
    for name in engines:
        assert 0 < found["medians"][name]["sample"] < found["medians"][name]["epoch"]


def test_an_engine_that_dies_is_an_error_with_its_last_words(tmp_path, monkeypatch):
    """It was stopped while it ended, and waited for without an end."""
    (tmp_path / "dying.py").write_text("import sys; sys.stdin.readline(); sys.exit('no memory')")
    monkeypatch.setitem(engine.ENGINES, "dying", "dying")
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    for _ in range(10):
        worker = engine.Worker("dying", tmp_path, dict(os.environ))
        with pytest.raises(RuntimeError, match="dying ended with 1:\nno memory"):
            worker.ask("probe")


def test_an_engine_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    monkeypatch.setitem(engine.ENGINES, "hanging", "hanging")
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    given = ["hanging"], tmp_path, dict(os.environ)
    ((name, worker, found),) = epoch.start(*given, warmup=1, patience=0.5)
    assert (name, worker) == ("hanging", None)
    assert found == {"epochs": [], "failure": "hanging has not answered 'probe' in 0.5 s"}


def test_engines_that_differ_are_told_and_measured_all_the_same(tmp_path, monkeypatch):
    one = {"velocity": np.ones(4), "images": np.zeros(4, np.uint8), "lora.a": np.ones(2)}
    np.savez(tmp_path / "jax.npz", **one)
    np.savez(tmp_path / "torch.npz", **one | {"velocity": np.array([1, 1, 1, 2.0])})
    found, (problem,) = agreement.check(tmp_path, ["jax", "torch"], "cpu")
    assert found["torch"] == {"velocity": 0.5, "gradient": 0.0, "images": 0.0}
    assert problem.startswith("torch and jax do not compute the same velocity: 0.5 is above 0.0001")


def test_a_published_model_with_random_weights_loads_and_keeps_its_scale(tmp_path, monkeypatch):
    """A smaller one under the same name: the published ones take gigabytes."""
    name = "stabilityai/stable-diffusion-3.5-medium"
    transformer = MMDiTConfig(
        num_layers=3, num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64,
        joint_attention_dim=256, pos_embed_max_size=8, sample_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    vae = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    small = dataclasses.replace(PUBLISHED[name], transformer=transformer, vae=vae)
    monkeypatch.setitem(random_model.PUBLISHED, name, small)
    model = sd3.load(random_model.find("random:sd3.5-medium", tmp_path), t5_length=16)
    cond = model.encode(["a red circle"])
    assert cond["tokens"].shape == (1, 77 + 16, 256) and cond["pooled"].shape == (1, 768 + 1280)
    x, sigma = jax.random.normal(jax.random.key(0), (1, 8, 8, 16)), jnp.full(1, 0.5)
    adapter = model.init_trained(jax.random.key(1))
    velocity = model.velocity(adapter, model.base, x, sigma, cond)
    assert 0.1 < float(velocity.std()) < 10
    assert random_model.find("shapes", tmp_path) is None
    monkeypatch.setattr(random_model, "write", None)  # it is there already
    random_model.find("random:sd3.5-medium", tmp_path)
    with pytest.raises(ValueError, match=r"random:sd4.*choose random: and one of .*sd3\.5-medium"):
        random_model.find("random:sd4", tmp_path)


def test_every_benchmark_explains_its_options_and_shows_an_example():
    for file in (ROOT / "benchmarks").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        named = [(ast.unparse(call.func).rpartition(".")[2], call) for call in calls]
        options = [call for name, call in named if name == "add_argument"]
        unsaid = [o for o in options if "help" not in {k.arg for k in o.keywords}]
        assert not unsaid, f"{file.name}: {ast.unparse(unsaid[0])} has no help"
        for name, call in named:
            if name == "parser":
                assert ast.unparse(call.args[0]) in ("__doc__", "description"), file.name
                assert f"python -m benchmarks.{file.stem}" in ast.get_docstring(tree)
        if file.stem != "machine":  # whose parser the others take
            assert "ArgumentParser" not in {name for name, _ in named}, file.name
