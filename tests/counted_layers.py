"""A loss of a few layers, and programs that count what its devices send to each other."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parent.parent
LAYERS, ROWS, WIDTH = 6, 64, 32


def layers_loss(w, x):
    """LAYERS products [ROWS, WIDTH] x [WIDTH, WIDTH] in a loop."""
    return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).sum()


W = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flowgrpo_jax.configs import pickscore, shapes
from flowgrpo_jax import compile, sharding
from flowgrpo_jax.costs import cost
from counted_layers import W, X, layers_loss

def laid_out(mesh, x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

def collectives(devices):
    mesh = Mesh(devices, ("fsdp",))
    w, x = laid_out(mesh, W, P(None, "fsdp")), laid_out(mesh, X, P("fsdp"))
    out = NamedSharding(mesh, P()), NamedSharding(mesh, P())
    compiled = jax.jit(jax.value_and_grad(layers_loss), out_shardings=out).lower(w, x).compile()
    return cost.collectives(compiled.as_text())
"""


def run(code, **env):
    return run_code(PROGRAM + code, **env)


def run_code(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # for tests side by side
            "PYTHONPATH": str(ROOT),
            **env,
        },
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    ).stdout


def check(found):
    """Rows and weights cut over 4: each layer gathers its weights on the way there and back and
    sums their gradient; the loss is summed once. A chip sends 3/4 of what it gathers and twice 3/4
    of what it sums; the TPU multiplies in bfloat16 and gathers as much."""
    size = WIDTH * WIDTH * 4
    kinds = {kind: (times, sent) for kind, times, sent in found}
    gathered, summed = kinds["all-gather"], kinds["all-reduce"]
    assert gathered[0] == 2 * LAYERS
    assert gathered[1] in (2 * LAYERS * size * 3 / 4, LAYERS * size * 3 / 4)
    assert summed == (LAYERS + 1, (LAYERS * size + 4) * 2 * 3 / 4)
