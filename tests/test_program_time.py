"""The least time of compiled programs, against small ones that are counted by hand."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.costs import cost, program_time
from flowgrpo_jax.models import attention

LOOP = """
%sliced (p0: bf16[6,256,512], p1: s32[]) -> bf16[256,512] {
  %p0 = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), x={1}
  ROOT %same = bf16[256,512]{1,0:T(8,128)(2,1)} bitcast(%part)
}

%product (a: f32[64,256], w: bf16[6,256,512], i: s32[]) -> f32[64,512] {
  %a = f32[64,256]{1,0:T(8,128)} parameter(0)
  %w = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[] parameter(2)
  %own = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  ROOT %y = f32[64,512]{1,0:T(8,128)} dot(%a, %own), lhs_contracting_dims={1}
}

%stored (whole: f32[6,64,512], y: f32[64,512], i: s32[]) -> f32[6,64,512] {
  %whole = f32[6,64,512]{2,1,0:T(8,128)} parameter(0)
  %y.1 = f32[64,512]{1,0:T(8,128)} parameter(1)
  %i.1 = s32[] parameter(2)
  %o = s32[] constant(0)
  %one = f32[1,64,512]{2,1,0:T(8,128)} bitcast(%y.1)
  ROOT %in = f32[6,64,512]{2,1,0:T(8,128)} dynamic-update-slice(%whole, %one, %i.1, %o, %o)
}

%body (t: (s32[], f32[64,256], bf16[6,256,512], f32[6,64,512])) -> (s32[], f32[64,256]) {
  %t = (s32[], f32[64,256]{1,0:T(8,128)S(1)}, bf16[6,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = f32[64,256]{1,0:T(8,128)S(1)} get-tuple-element(%t), index=1
  %ws = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %ys = f32[6,64,512]{2,1,0:T(8,128)} get-tuple-element(%t), index=3
  %f = f32[64,512]{1,0:T(8,128)} fusion(%x, %ws, %n), calls=%product, op_name="f/ff/dot_general"
  %g = f32[6,64,512]{2,1,0:T(8,128)} fusion(%ys, %f, %n), kind=kLoop, calls=%stored
  ROOT %r = (s32[], f32[64,256]) tuple(%n, %x, %ws, %g)
}

%more (t.1: (s32[])) -> pred[] {
  %t.1 = (s32[]) parameter(0)
  %k = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant(6)
  ROOT %lt = pred[] compare(%k, %end), direction=LT
}

ENTRY %main (x.1: f32[64,100]) -> f32[64,100] {
  %x.1 = f32[64,100]{1,0:T(8,128)} parameter(0)
  %double = f32[64,100]{1,0:T(8,128)} add(%x.1, %x.1)
  %start = (s32[], f32[64,256]) tuple(%double)
  %loop = (s32[], f32[64,256]) while(%start), condition=%more, body=%body
  ROOT %copied = f32[64,100]{0,1:T(8,128)} copy(%double)
}
"""


def test_a_program_that_is_counted_by_hand():
    """A loop of 6: a slice of stacked weights, a product from on-chip memory, a result in place."""
    found = {w.name: w for w in program_time.work(LOOP)}
    f, g = found["f"], found["g"]
    assert (f.times, f.operation) == (6, "ff/dot_general")
    assert f.flops == 2 * 64 * 256 * 512
    assert f.bytes == 256 * 512 * 2 + 64 * 512 * 4 + 4  # the slice, the result, the counter
    assert g.bytes == 2 * 64 * 512 * 4 + 4  # the new part is read and written, the rest stays
    # 100 columns are padded to 128; the other way round 64 to 128 and 100 to 104
    assert found["double"].bytes == 3 * 64 * 128 * 4
    assert found["copied"].bytes == (64 * 128 + 104 * 128) * 4
    assert not {"loop", "start", "x", "own", "y"} & set(found)
    slow = f.seconds(peak=1e9, bandwidth=1e12), f.seconds(peak=1e15, bandwidth=1e6)
    np.testing.assert_allclose(slow, (6 * f.flops / 1e9, 6 * f.bytes / 1e6))


RETILED = """
%tiled (whole: s8[6,256,512]) -> s8[6,256,512] {
  %whole = s8[6,256,512]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[6,256,512]{2,1,0:T(8,128)(4,1)} copy(%whole)
}

%product (x: f32[64,256], w: s8[6,256,512], i: s32[]) -> f32[64,512] {
  %x = f32[64,256]{1,0:T(8,128)} parameter(0)
  %w = s8[6,256,512]{2,1,0:T(32,128)(4,1)} parameter(1)
  %i = s32[] parameter(2)
  %o = s32[] constant(0)
  %t = s8[6,256,512]{2,1,0:T(8,128)(4,1)} fusion(%w), kind=kLoop, ALIASED calls=%tiled
  %part = s8[1,256,512]{2,1,0:T(8,128)(4,1)} dynamic-slice(%t, %i, %o, %o)
  %own = s8[256,512]{1,0:T(8,128)(4,1)} bitcast(%part)
  ROOT %y = f32[64,512]{1,0:T(8,128)} dot(%x, %own), lhs_contracting_dims={1}
}

ENTRY %main (a: f32[64,256], ws: s8[6,256,512], n: s32[]) -> f32[64,512] {
  %a = f32[64,256]{1,0:T(8,128)S(1)} parameter(0)
  %ws = s8[6,256,512]{2,1,0:T(32,128)(4,1)} parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = f32[64,512]{1,0:T(8,128)S(1)} fusion(%a, %ws, %n), calls=%product
}
"""


@pytest.mark.parametrize(
    "mark, layers", [("output_to_operand_aliasing={{}: (0, {})},", 1), ("", 6)]
)
def test_another_tiling_of_an_operand_where_it_lies(mark, layers):
    """One layer of int8 is read where the whole is only seen in other tiles; a copy is read all."""
    found = {w.name: w for w in program_time.work(RETILED.replace("ALIASED", mark))}
    assert found["f"].bytes == layers * 256 * 512 + 4


@pytest.mark.parametrize(
    "line, flops",
    [
        # a product of 4 pairs of matrices [8, 16] [16, 32], as XLA writes it for TPUs
        (
            "f32[4,8,32] convolution(%a, %b), window={size=4 pad=0_0 stride=3 lhs_dilate=4},"
            " dim_labels=0bf_0io->0bf",
            2 * 4 * 8 * 16 * 32,
        ),
        ("f32[4,8,32] dot(%a, %b), lhs_contracting_dims={2}", 2 * 4 * 8 * 16 * 32),
    ],
)
def test_products_over_a_batch(line, flops):
    program = "\n".join(
        [
            "ENTRY %main (a: f32[4,8,16], b: f32[4,16,32]) -> f32[4,8,32] {",
            "  %a = f32[4,8,16] parameter(0)",
            "  %b = f32[4,16,32] parameter(1)",
            f"  ROOT %y = {line}",
            "}",
        ]
    )
    (found,) = program_time.work(program)
    assert found.flops == flops


def test_a_convolution_counts_no_padding():
    """A 3 x 3 kernel on 5 x 7 values with a border of zeros: the corners meet 4 taps, and so on."""
    program = "\n".join(
        [
            "ENTRY %main (a: f32[2,5,7,3], b: f32[3,3,3,4]) -> f32[2,5,7,4] {",
            "  %a = f32[2,5,7,3] parameter(0)",
            "  %b = f32[3,3,3,4] parameter(1)",
            "  ROOT %y = f32[2,5,7,4] convolution(%a, %b), window={size=3x3 pad=1_1x1_1},"
            " dim_labels=b01f_01io->b01f",
            "}",
        ]
    )
    (found,) = program_time.work(program)
    ones = jnp.ones((1, 5, 7, 1)), jnp.ones((3, 3, 1, 1))
    taps = jax.lax.conv_general_dilated(
        *ones, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert found.flops == 2 * 2 * 3 * 4 * float(taps.sum())


def test_the_arithmetic_of_a_pallas_kernel():
    """Two products of padded lengths forward; as many again and five more for the gradient."""
    x = jnp.zeros((2, 200, 3, 64))
    one = 2 * 2 * 3 * 256 * 256 * 64

    def loss(q, k, v):
        return attention.flash(q, k, v).sum()

    assert cost.flops(jax.make_jaxpr(attention.flash)(x, x, x)) == 2 * one
    gradient = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x)
    assert cost.flops(gradient) == (2 + 7) * one
    backward = {name.partition("_block")[0]: n for name, n in cost.kernels(gradient).items()}
    assert backward == {"flash_mha_bwd_dkv": 4 * one, "flash_mha_bwd_dq": 3 * one}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'flowgrpo_jax[tpu]'"
)
def test_a_program_compiled_for_a_tpu():
    """A product of matrices that are too large for on-chip memory reads and writes each once; a
    loop of 10 products computes ten times as much."""
    code = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from flowgrpo_jax import sharding
from flowgrpo_jax.costs import program_costs, program_time
mesh = sharding.make_mesh(devices=program_costs.topology("v5e:1x1")[1])
here = NamedSharding(mesh, PartitionSpec())
x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=here)
def ten(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=10)[0]
for f in (jnp.dot, ten):
    work = program_time.work(jax.jit(f).lower(x, x).compile().as_text())
    print(sum(w.times * w.flops for w in work), sum(w.times * w.bytes for w in work))
"""
    several = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **several}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, ten = ([float(n) for n in line.split()] for line in done.stdout.splitlines())
    assert one[0] == 2 * 8192**3 and ten[0] == 10 * one[0]
    matrix = 2 * 8192**2
    assert one[1] == 3 * matrix
    assert 30 * matrix <= ten[1] < 54 * matrix  # the carried matrix may be copied in each


def test_transfers_run_beside_what_leaves_bandwidth():
    """At 1 FLOP/s and 1 byte/s: a product of 10 s reads for 4, so that 6 s of transfers are hidden
    in its loop, and none in another one; what only moves hides nothing."""
    product = program_time.Work("p", "dot", 1, flops=10.0, bytes=4.0, where="loop")
    moved = program_time.Work("m", "add", 2, flops=0.0, bytes=1.0, where="loop")
    fetch = program_time.Work("f", "slice", 1, flops=0.0, bytes=5.0, where="loop", beside=True)

    def seconds(*works):
        return program_time.by_operation(works, peak=1.0, bandwidth=1.0)

    assert seconds(product, moved, fetch) == {"dot": 10, "add": 2, program_time.BESIDE: 0}
    assert seconds(product, moved, fetch, fetch)[program_time.BESIDE] == 4
    elsewhere = fetch._replace(where="main")
    assert seconds(product, moved, elsewhere)[program_time.BESIDE] == 5


def test_a_started_copy_is_such_a_transfer():
    hlo = """
ENTRY %main (x: f32[256,128]) -> f32[256,128] {
  %x = f32[256,128]{1,0:T(8,128)} parameter(0)
  %s = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]) copy-start(%x)
  %d = f32[256,128]{1,0:T(8,128)S(1)} copy-done(%s)
  ROOT %y = f32[256,128]{1,0:T(8,128)} negate(%d)
}
"""
    start, negate = program_time.work(hlo)
    assert (start.name, start.beside, start.bytes) == ("s", True, 4 * 256 * 128)
    assert (negate.name, negate.beside, negate.bytes) == ("y", False, 4 * 256 * 128)
