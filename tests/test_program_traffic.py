"""What instructions of compiled programs move, written by hand as XLA writes them for TPUs."""

import pytest

from flowgrpo_jax.costs import cost, program_time

ONE = 64 * 512 * 4  # bytes of a part of the stack


def moved(hlo):
    return {w.name: w.bytes * w.times for w in program_time.work(hlo)}


def test_stacks_that_are_written_in_place_by_a_fusion_of_several_results():
    """A scan stacks what it keeps: each time a part of each stack is written, and not all of it."""
    found = moved("""
%both (whole: f32[24,64,512], y: f32[64,512], i: s32[]) -> (f32[24,64,512], f32[64,512]) {
  %whole = f32[24,64,512]{2,1,0:T(8,128)} parameter(0)
  %y.1 = f32[64,512]{1,0:T(8,128)} parameter(1)
  %i.1 = s32[] parameter(2)
  %o = s32[] constant(0)
  %one = f32[1,64,512]{2,1,0:T(8,128)} bitcast(%y.1)
  %in = f32[24,64,512]{2,1,0:T(8,128)} dynamic-update-slice(%whole, %one, %i.1, %o, %o)
  %neg = f32[64,512]{1,0:T(8,128)} negate(%y.1)
  ROOT %t = (f32[24,64,512]{2,1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) tuple(%in, %neg)
}

ENTRY %main (w: f32[24,64,512], y: f32[64,512], i: s32[]) -> f32[64,512] {
  %w = f32[24,64,512]{2,1,0:T(8,128)} parameter(0)
  %y = f32[64,512]{1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  %f = (f32[24,64,512]{2,1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) fusion(%w, %y, %i), calls=%both
  ROOT %g = f32[64,512]{1,0:T(8,128)} get-tuple-element(%f), index=1
}
""")
    assert found == {"f": 3 * ONE + 4}  # y is read, its part and its negative written; the counter


def test_a_slice_that_is_fetched_beside_is_that_of_its_size():
    found = moved("""
ENTRY %main (w: f32[24,64,512], i: s32[]) -> f32[1,64,512] {
  %w = f32[24,64,512]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %o = s32[] constant(0)
  %s = ((f32[24,64,512]{2,1,0:T(8,128)}, s32[], s32[], s32[]), f32[1,64,512]{2,1,0:T(8,128)S(1)}, \
u32[]) dynamic-slice-start(%w, %i, %o, %o), dynamic_slice_sizes={1,64,512}
  ROOT %d = f32[1,64,512]{2,1,0:T(8,128)S(1)} dynamic-slice-done(%s)
}
""")
    assert found == {"s": ONE}


def test_a_computation_that_runs_beside_is_counted_once():
    works = program_time.work("""
%wrapped (p: f32[24,64,512]) -> f32[1,64,512] {
  %p = f32[24,64,512]{2,1,0:T(8,128)} parameter(0)
  ROOT %sl = f32[1,64,512]{2,1,0:T(8,128)S(1)} slice(%p), slice={[0:1],[0:64],[0:512]}
}

ENTRY %main (w: f32[24,64,512]) -> f32[1,64,512] {
  %w = f32[24,64,512]{2,1,0:T(8,128)} parameter(0)
  %s = ((f32[24,64,512]{2,1,0:T(8,128)}), f32[1,64,512]{2,1,0:T(8,128)S(1)}, u32[]) \
async-start(%w), calls=%wrapped
  ROOT %d = f32[1,64,512]{2,1,0:T(8,128)S(1)} async-done(%s)
}
""")
    assert [(w.name, w.beside, w.bytes) for w in works] == [("s", True, ONE)]


def test_a_place_for_results_moves_nothing():
    found = moved("""
ENTRY %main () -> f32[24,64,512] {
  %a = f32[24,64,512]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %n = f32[24,64,512]{2,1,0:T(8,128)} negate(%a)
}
""")
    assert found == {"n": 2 * 24 * ONE}


def test_a_loop_runs_as_often_as_the_compiler_knows():
    """Though its bound lies in a computation that its condition calls."""
    found = moved("""
%compared (k: s32[]) -> pred[] {
  %k = s32[] parameter(0)
  %end = s32[] constant(24)
  ROOT %lt = pred[] compare(%k, %end), direction=LT
}

%more (t: (s32[], f32[64,512])) -> pred[] {
  %t = (s32[], f32[64,512]{1,0:T(8,128)}) parameter(0)
  %k1 = s32[] get-tuple-element(%t), index=0
  ROOT %r = pred[] fusion(%k1), kind=kLoop, calls=%compared
}

%body (t.1: (s32[], f32[64,512])) -> (s32[], f32[64,512]) {
  %t.1 = (s32[], f32[64,512]{1,0:T(8,128)}) parameter(0)
  %k2 = s32[] get-tuple-element(%t.1), index=0
  %x = f32[64,512]{1,0:T(8,128)} get-tuple-element(%t.1), index=1
  %y = f32[64,512]{1,0:T(8,128)} negate(%x)
  ROOT %o = (s32[], f32[64,512]{1,0:T(8,128)}) tuple(%k2, %y)
}

ENTRY %main (a: (s32[], f32[64,512])) -> (s32[], f32[64,512]) {
  %a = (s32[], f32[64,512]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[], f32[64,512]{1,0:T(8,128)}) while(%a), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"24"}}
}
""")
    assert found["y"] == 24 * 2 * ONE


@pytest.mark.parametrize(
    "kind, size", [("pred", 1), ("s4", 0.5), ("u8", 1), ("bf16", 2), ("f8e4m3b11fnuz", 1),
                   ("f32", 4), ("c64", 8), ("token", 0), ("opaque", 0)]
)  # fmt: skip
def test_bytes_by_the_name_of_a_type(kind, size):
    assert cost.bytes_of(kind) == size
