"""Full fine-tuning: all of the transformer's weights are trained, and there is no adapter."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
from short_runs import rows

from flowgrpo_jax import export
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.evaluate import evaluate
from flowgrpo_jax.models import convert, sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.train import one_epoch, train

FULL = {
    "lora__rank": 0,
    "epochs": 2,
    "sample__micro_batch": 4,
    "train__updates_per_epoch": 1,
    "train__learning_rate": 1e-4,
    "train__ema_decay": 0.5,
    "eval__images": 6,
    "eval__micro_batch": 6,
    "log__tensorboard": False,
}


def load(runs, **changes):
    return short_runs.load(runs, **FULL | changes)


@pytest.fixture(scope="module")
def run(runs):
    """(work directory, final state) of two epochs without a KL."""
    return runs / "full", train(load(runs), runs / "full")


def test_every_weight_is_trained(runs, run):
    workdir, state = run
    model = sd3.load(runs / "model")
    assert set(model.base) - set(state.policy) == {"pos_embed/pos_embed"}
    still = {k for k, x in state.policy.items() if np.array_equal(x, model.base[k])}
    # The last block drops the text tokens' output, so their queries there have no effect.
    last = "transformer_blocks/2:3/attn"
    idle = ("add_q_proj/kernel", "add_q_proj/bias", "norm_added_q/scale")
    assert still == {f"{last}/{name}" for name in idle}
    first, *_ = rows(workdir)
    assert first["ratio_gap"] < 1e-5 and first["grad_norm"] > 0


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_trained_is_float32_whatever_computes(rank):
    parts = sd3.find_architecture("shapes")
    model = sd3.describe(
        parts, lora_spec=LoRASpec(rank, 2.0 * rank, sd3.JOINT_ATTENTION), dtype=jnp.bfloat16
    )
    assert {x.dtype for x in model.trained_shapes.values()} == {np.dtype("float32")}
    assert {x.dtype for x in model.base.values()} == {jnp.dtype("bfloat16")}


def test_before_training_it_is_the_base(runs):
    trained = build_run(load(runs), training=False)
    adapted = build_run(load(runs, lora__rank=2), training=False)
    everything = trained.model.init_trained(jax.random.key(0))
    ours, *_ = evaluate(trained, everything)
    theirs, *_ = evaluate(adapted, policies.load("base", adapted.model))
    base, *_ = evaluate(trained, policies.load("base", trained.model))
    assert ours["metrics"] == base["metrics"] == pytest.approx(theirs["metrics"])


def test_the_export_is_the_trained_transformer(runs, run, tmp_path):
    workdir, state = run
    (file,) = export.export(workdir, tmp_path)
    shapes = sd3.describe(sd3.find_architecture(runs / "model")).base
    exported = convert.load(file.parent, shapes)
    for path, x in state.copies["ema"].items():
        np.testing.assert_array_equal(exported[path], x)
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    rng = np.random.default_rng(0)
    x, tokens, pooled = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 4, 4, 16), (2, 20, 32), (2, 32))
    )
    sigma = np.array([0.3, 0.8], np.float32)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(x.transpose(0, 3, 1, 2)),
            encoder_hidden_states=torch.from_numpy(tokens),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * sigma),
        ).sample.numpy()
    model = build_run(load(runs), training=False).model
    ours = model.velocity(
        state.copies["ema"], model.base, x, sigma, {"tokens": tokens, "pooled": pooled}
    )
    expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_it_resumes_bit_for_bit(runs, run, tmp_path):
    _, state = run
    train(load(runs, epochs=1), tmp_path / "resumed")
    again = train(load(runs), tmp_path / "resumed", resume=True)
    for path, x in state.policy.items():
        np.testing.assert_array_equal(again.policy[path], x)


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_frozen_weights_are_kept_for_the_kl_alone(runs, tmp_path, monkeypatch, kl_beta):
    kernels, first = [], []

    def build(config):
        built = real(config)
        kernels.append(weakref.ref(built.model.base["proj_out/kernel"]))
        return built

    def epoch(run, state, number, *rest):
        gc.collect()
        assert (kernels[0]() is None) == (kl_beta == 0)
        if first:  # nor are the weights that training began with
            assert first[0]() is None
        first.append(weakref.ref(state.policy["proj_out/kernel"]))
        return one_epoch(run, state, number, *rest)

    real = build_run
    monkeypatch.setattr("flowgrpo_jax.train.build_run", build)
    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", epoch)
    train(
        load(runs, epochs=2, eval__every=0, algorithm__options__kl_beta=kl_beta), tmp_path / "run"
    )
    first, second = rows(tmp_path / "run")
    assert first["kl"] == 0 and (second["kl"] > 0) == (kl_beta > 0)
