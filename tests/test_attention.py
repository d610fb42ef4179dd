"""The attention kernels against jax's own attention, and the choice of one for the devices."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flowgrpo_jax import sharding, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.algorithms import load as load_algorithm
from flowgrpo_jax.models import attention
from flowgrpo_jax.models.streams import Stream
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit

INTERPRETED = pltpu.force_tpu_interpret_mode
KERNELS = {"xla": contextlib.nullcontext, "flash": INTERPRETED, "joint": INTERPRETED}
PRODUCTS = {"xla": attention.plain, "flash": attention.flash}


def inputs(queries, keys, heads=2, channels=64, rows=2):
    rng = np.random.default_rng(0)
    shapes = [(rows, n, heads, channels) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("queries, keys", [(128, 128), (200, 200), (72, 301)])
def test_values_and_gradients_are_those_of_jax(name, queries, keys):
    """Also for lengths that are no multiple of a kernel's block, which are padded and masked."""
    *qkv, cotangent = inputs(queries, keys)

    def both(kernel):
        return jax.jit(lambda *x: (*jax.vjp(kernel, *x)[1](cotangent), kernel(*x)))(*qkv)

    with KERNELS[name]():
        found = both(PRODUCTS[name])
    wanted = both(jax.nn.dot_product_attention)
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_the_update_replays_the_kernel_exactly(name):
    """The gradient runs another form of a kernel, which keeps what its backward pass needs."""
    sigmas = tuple(map(float, sde.sigma_schedule(4, 3.0)))
    process = Process(sigmas, sde.load("cps"), 0.7, window=2)
    kernel = attention.TABLE[name]
    weights = jnp.asarray(np.random.default_rng(1).normal(scale=0.1, size=(3, 64, 64)), jnp.float32)

    def v(weights, x, sigma):
        qkv = (jnp.einsum("mhwc,cd->mhwd", x, w).reshape(2, 8, 128) for w in weights)
        (y,) = kernel([Stream(*qkv)], 2)
        return y.reshape(x.shape) + sigma

    @jax.jit
    def gap(weights):
        keys = jax.random.split(jax.random.key(2), 2)
        x = sampler.normal(keys, sampler.ODE_KEY, (4, 4, 64))
        zeros = jnp.zeros(2, int)
        drawn = sampler.rollout(lambda *a: v(weights, *a), process, x, keys, 0, zeros)
        algorithm = load_algorithm("grpo", {"clip_range": 1e-4})
        empty = update.empty(algorithm, Setup(process, 2), weights)
        args = (algorithm, Setup(process, 2), v, weights, {}, drawn, Credit(jnp.array([1.0, -1.0])))
        return update.accumulate(*args, jnp.arange(2), 2, empty)[1]["ratio_gap"]

    with KERNELS[name]():
        assert gap(weights) < 1e-6


def test_devices_share_rows_and_heads():
    """On 2 x 1 x 2 devices, and where they do not divide the heads or the rows. The gradient to a
    scale, which is whole on each device, is the sum over them."""
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from flowgrpo_jax import sharding
from flowgrpo_jax.models import attention
from flowgrpo_jax.models.attention import PLAIN
from token_streams import streams
mesh = sharding.make_mesh(2, 1, 2)
for rows, heads in ((4, 2), (3, 2), (4, 3)):
    given = jax.tree.map(lambda x: jnp.tile(x, (rows // 2 + 1, 1, 1))[:rows] if x.ndim == 3 else x,
        streams((8, 3), heads, 4, True))
    shapes = []
    def seen(streams, heads):
        shapes.append((*streams[0].q.shape, heads))
        return PLAIN(streams, heads)
    def both(f):
        loss = lambda given: sum(jnp.square(y).sum() for y in f(given, heads))
        return f(given, heads), jax.grad(loss)(given)
    found = jax.jit(lambda: both(attention.by_rows_and_heads(mesh, seen)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, both(PLAIN))
    print(*shapes[0])
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 8 4 1", "3 8 4 1", "2 8 12 3"]


def mesh(platform, **device):
    device = SimpleNamespace(platform=platform, device_kind=f"a {platform}", **device)
    return SimpleNamespace(devices=np.array([device], object), size=1)


@pytest.mark.parametrize(
    "where, dtype, chosen",
    [
        (mesh("cpu"), "float32", "xla"),
        (mesh("cpu"), "bfloat16", "xla"),
        (mesh("tpu"), "float32", "joint"),
        (mesh("tpu"), "bfloat16", "joint"),
        (mesh("gpu", compute_capability="9.0"), "bfloat16", "cudnn"),
        (mesh("gpu", compute_capability="8.0"), "bfloat16", "cudnn"),
        (mesh("gpu", compute_capability="9.0"), "float32", "xla"),
        (mesh("gpu", compute_capability="7.5"), "bfloat16", "xla"),
        (mesh("gpu", compute_capability="gfx942"), "bfloat16", "xla"),
    ],
)
def test_auto_is_the_fastest_kernel_that_runs(monkeypatch, where, dtype, chosen):
    monkeypatch.setattr(attention, "_on", lambda mesh, name: name)
    assert attention.load("auto", where, dtype) == attention.load(chosen, where, dtype) == chosen
    assert attention.load("xla", where, dtype) == "xla"
    runs = {"joint", "flash"} if chosen == "joint" else {chosen}
    for name in {"joint", "flash", "cudnn"} - runs:
        with pytest.raises(ValueError, match=f"attention='{name}' does not run .*'{chosen}', or"):
            attention.load(name, where, dtype)


def test_one_function_for_one_mesh():
    """Programs are cached by it."""
    here = sharding.make_mesh(devices=jax.devices()[:1])
    assert attention.load("auto", here, "float32") is attention.load("auto", here, jnp.float32)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'flowgrpo_jax[tpu]'"
)
def test_no_scores_in_a_program_for_tpus():
    """In the gradient of an attention compiled for four chips, nothing is as large as the scores.
    By the joint kernel nothing is larger than the tokens that it is given, by the flash kernel at
    most 256 numbers a query, and the plain one holds all scores."""
    code = """
import re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from flowgrpo_jax import sharding
from flowgrpo_jax.costs import program_costs
from flowgrpo_jax.costs import cost
from flowgrpo_jax.models import attention, joint_attention, joint_kernel, kernel_check
from flowgrpo_jax.models.streams import Stream
from flowgrpo_jax.types import Credit
mesh = sharding.make_mesh(devices=program_costs.topology("v5e:2x2")[1])
rows = NamedSharding(mesh, sharding.ROWS)
def stream(tokens):
    return Stream(*[jax.ShapeDtypeStruct((8, tokens, 256), jnp.bfloat16, sharding=rows)] * 3)
for name in ("auto", "flash", "xla"):
    kernel = attention.load(name, mesh, jnp.bfloat16)
    loss = lambda streams: sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in kernel(streams, 4))
    given = [stream(1024), stream(205)]
    hlo = jax.jit(jax.grad(loss)).lower(given).compile().as_text()
    sizes = re.findall(r"(?:f32|bf16)\\[([0-9,]+)\\]", hlo)
    print(max(jnp.prod(jnp.array([int(n) for n in s.split(",")])) for s in set(sizes)))
"""
    several = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **several}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    joint, flash, plain = map(int, done.stdout.split())
    heads, tokens = 2 * 4, 1229  # of a chip
    assert joint <= 8 * 1024 * 256
    assert flash < heads * tokens * 2 * 128 < heads * tokens**2 <= plain
