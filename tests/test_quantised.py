"""The frozen base in int8: its error and bytes, and that all else works as without it."""

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
from PIL import Image

from flowgrpo_jax import generate, sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.export import export
from flowgrpo_jax.models import quantised, sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.train import train

qwix = pytest.importorskip("qwix")
SPEC = LoRASpec(2, 4.0, sd3.JOINT_ATTENTION)


def relative(x, wanted):
    return float(jnp.linalg.norm(x - wanted) / jnp.linalg.norm(wanted))


def noise(model, size, images=4):
    return jax.random.normal(jax.random.key(1), (images, *model.latent_shape(size, size)))


def velocity(model, size, texts):
    """At a high and at a low noise level."""
    trained, cond = model.init_trained(jax.random.key(0)), model.encode(texts)
    x = noise(model, size, len(texts))
    given, run = (trained, model.base, x), jax.jit(model.velocity)
    return [run(*given, jnp.full(len(x), sigma), cond) for sigma in (0.95, 0.3)]


def test_numbers_by_hand():
    """The largest weight of an output is 127.5 scales, and rounds to the last step below it."""
    kernel = np.array([[127.5, 0.51, 0], [-63.6, 1.0, 0], [0.4, -0.1961, 0]], np.float32)
    stored, scale = quantised.quantise(kernel)
    assert stored.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_array_equal(stored, [[127, 65, 0], [-64, 127, 0], [0, -25, 0]])
    np.testing.assert_allclose(scale, [[1, 1 / 127.5, 1]], rtol=1e-6)
    back = quantised.dequantise(stored, scale, jnp.float32)
    wanted = [[127, 65 / 127.5, 0], [-64, 127 / 127.5, 0], [0, -25 / 127.5, 0]]
    np.testing.assert_allclose(back, wanted, rtol=1e-6)


def test_no_weight_is_off_by_more_than_half_a_step():
    kernel = np.random.default_rng(0).standard_t(3, (200, 30)).astype(np.float32)  # with outliers
    stored, scale = quantised.quantise(kernel)
    off = np.abs(quantised.dequantise(stored, scale, jnp.float32) - kernel)
    assert (off <= 0.5001 * np.asarray(scale)).all() and off.max() > 0.45 * np.max(scale)


@pytest.mark.parametrize("name, size", [("shapes", 64), ("tiny", 32)])
def test_error_of_the_velocity_and_bytes(tiny_model, name, size):
    """As small as that of computing in bfloat16, which is 1 %, at a quarter of the bytes of f32."""
    path = tiny_model if name == "tiny" else name
    exact, small = (sd3.load(path, lora_spec=SPEC, base_dtype=x, remat=True) for x in ("", "int8"))
    texts = ["a red circle above a blue square", "two green triangles"]
    found, wanted = (velocity(model, size, texts) for model in (small, exact))
    assert all(1e-3 < relative(*pair) < 0.015 for pair in zip(found, wanted))
    kept = set(exact.base) - quantised.paths(small.base)
    assert all(np.array_equal(exact.base[k], small.base[k]) for k in kept)
    kernels = [k for k in exact.base if ":" in k and k.endswith("kernel")]
    assert quantised.paths(small.base) == {*kernels, *(k + "_scale" for k in kernels)}
    for k in kernels:
        assert small.base[k].nbytes * 4 == exact.base[k].nbytes
        assert small.base[k + "_scale"].size * exact.base[k].shape[-2] == exact.base[k].size
    assert small.trained_shapes == exact.trained_shapes and small.text_shapes == exact.text_shapes


def test_the_gradient_keeps_no_copy_of_a_kernel(tiny_model):
    """What the backward pass is given has the integers, and no float array of a kernel's shape."""
    model = sd3.load(tiny_model, lora_spec=SPEC, base_dtype="int8", dtype=jnp.bfloat16)
    trained, cond = model.init_trained(jax.random.key(0)), model.encode(["a red circle"])
    given = model.base, noise(model, 32, 1), jnp.full(1, 0.5), cond
    kept = jax.eval_shape(lambda p: jax.vjp(lambda p: model.velocity(p, *given), p)[1], trained)
    kept = jax.tree.leaves(kept)
    layers = {x.shape[1:] for k, x in model.base.items() if k in quantised.paths(model.base)}
    layers = {shape for shape in layers if len(shape) == 2 and 1 not in shape}
    of_kernels = [x for x in kept if x.ndim == 3 and x.shape[1:] in layers]
    assert of_kernels and {x.dtype for x in of_kernels} == {jnp.dtype(jnp.int8)}


SHARDED = """
import jax, jax.numpy as jnp, json, sys
from flowgrpo_jax import sharding
from flowgrpo_jax.models import sd3
from test_quantised import SPEC, noise, relative

def gradient(devices, **sizes):
    mesh = sharding.make_mesh(**sizes, devices=devices)
    model = sd3.load(
        sys.argv[1], lora_spec=SPEC, base_dtype="int8", remat=True,
        place=sharding.place(mesh, sd3.FAMILY.rules),
        gather=sharding.gather_weights(mesh, sd3.FAMILY.rules),
    )
    trained = {k: jax.random.normal(jax.random.key(3), x.shape) for k, x in
               model.trained_shapes.items()}
    cond = sharding.replicate(mesh, model.encode(["a red circle", "a blue square"]))
    x = sharding.split_rows(mesh, noise(model, 32, 2))
    loss = lambda p: jnp.square(model.velocity(p, model.base, x, jnp.full(2, 0.5), cond)).mean()
    value, found = jax.jit(jax.value_and_grad(loss))(trained)
    sizes = [x.addressable_shards[0].data.nbytes for k, x in model.base.items() if ":" in k]
    return value, jax.device_get(found), sum(sizes)

one, one_gradient, all_bytes = gradient(jax.devices()[:1], data=1)
four, four_gradient, part = gradient(jax.devices(), data=1, fsdp=2, tensor=2)
worst = max(relative(four_gradient[k], x) for k, x in one_gradient.items() if abs(x).max() > 1e-9)
print(json.dumps([float(abs(four / one - 1)), worst, part / all_bytes]))
"""


def test_sharded_as_on_one_device(tiny_model):
    """And each of fsdp=2 x tensor=2 devices has little more than a quarter of the bytes."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    python = [sys.executable, "-c", SHARDED, str(tiny_model)]
    paths = os.pathsep.join([str(short_runs.ROOT), str(short_runs.ROOT / "tests")])
    env = {**os.environ, **flags, "PYTHONPATH": paths}
    done = subprocess.run(python, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, worst, share = json.loads(done.stdout.splitlines()[-1])
    assert value < 1e-5 and worst < 1e-4 and 0.25 < share < 0.5


def test_a_run_and_its_export(runs):
    """Sampler and update compute the same function, so that their ratio is as near to 1; the LoRA
    is one of the base in floats as well."""
    config = short_runs.load(
        runs, model__base_dtype="int8", epochs=1, eval__every=0, log__tensorboard=False
    )
    state = train(config, runs / "int8")
    (row,) = (r for r in short_runs.rows(runs / "int8") if "ratio_gap" in r)
    assert row["ratio_gap"] < 1e-5 and row["grad_norm"] > 0
    resumed = train(config, runs / "int8", resume=True)  # nothing is left to do
    for ours, theirs in zip(*map(jax.tree.leaves, (state.policy, resumed.policy))):
        np.testing.assert_array_equal(ours, theirs)
    exact = short_runs.load(runs)
    model = parts.load_model(exact, sharding.make_mesh(devices=jax.devices()[:1]))
    export(runs / "int8", runs / "int8-lora")
    again = policies.load(runs / "int8-lora", model)
    for path, x in state.copies["ema"].items():
        np.testing.assert_array_equal(again[path], x)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__base_dtype": "nf4"}, r"base_dtype='nf4': .*takes '' or 'int8'"),
        ({"model__base_dtype": "int8", "lora__rank": 0}, r"base_dtype='int8' with lora.rank=0"),
    ],
)
def test_what_cannot_be(runs, changes, message):
    with pytest.raises(ValueError, match=message):
        build_run(short_runs.load(runs, **changes), training=False)


def test_generate_draws_with_it(tmp_path, monkeypatch):
    """Nearly the picture of the base as it is: it differs by a few levels of 255."""
    given = dict(prompt=["a red circle"], lora=None, model="shapes", option=[], dtype="float32")
    given |= dict(
        steps=8,
        solver="euler",
        guidance=1.0,
        seed=0,
        height=None,
        width=None,
    )
    monkeypatch.setattr(generate.cli, "compiling", contextlib.nullcontext)
    drawn = []
    for base_dtype in ("", "int8"):
        out = tmp_path / f"picture{base_dtype}.png"
        args = SimpleNamespace(**given, base_dtype=base_dtype, out=str(out))
        monkeypatch.setattr(generate.flags, "FLAGS", args)
        generate.main([])
        drawn.append(np.asarray(Image.open(out)).astype(int))
    off = np.abs(drawn[0] - drawn[1])
    assert 0 < off.mean() < 8


def test_without_qwix(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'flowgrpo_jax\[int8\]'"):
        quantised.setting("int8", 4, ("int8",))
    assert quantised.setting("", 0, ()) == {}


def test_a_model_that_has_no_other_form():
    with pytest.raises(ValueError, match=r"^model.base_dtype='int8': .* takes '', where"):
        quantised.setting("int8", 4, ())
