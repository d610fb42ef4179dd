"""What devices send to each other, against counts by hand."""

import pytest
from counted_layers import check, run, run_code

from flowgrpo_jax.costs import cost


def test_collectives_in_loops():
    out = run(
        "print([tuple(c) for c in collectives(jax.devices())])",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    check(eval(out))


def test_started_collectives_count_their_results():
    """Combined ones have several; all but all-reduce name operands before, and contexts after."""
    groups = "replica_groups=[1,4]<=[4]"
    lines = [
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %a = ((f32[2,4]{1,0}, bf16[6]{0}), (f32[8,4]{1,0}, bf16[24]{0}))"
        f" all-gather-start(%x, %y), channel_id=1, {groups}",
        f"  %b = (f32[10]{{0}}, f32[]) all-reduce-start(%x, %y), channel_id=2, {groups}",
        "  %c = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3",
        "}",
    ]
    found = {c.kind: (c.times, c.bytes) for c in cost.collectives("\n".join(lines))}
    assert found == {
        "all-gather": (1, (8 * 4 * 4 + 24 * 2) * 3 / 4),
        "all-reduce": (1, (10 + 1) * 4 * 2 * 3 / 4),
        "collective-permute": (1, 6 * 4),
    }


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        "replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([4,2]T(1,0)) {'a','c'}",
    ],
)
def test_groups_in_every_notation(groups):
    """Four chips gather 64 values of 4 bytes: three quarters come from the others."""
    lines = ["ENTRY %main (x: f32[16]) -> f32[64] {"]
    lines += [f"  %a = f32[64]{{0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}", "}"]
    assert cost.collectives("\n".join(lines)) == [("all-gather", 1, 64 * 4 * 3 / 4)]
    with pytest.raises(ValueError, match="notation that is not known"):
        cost.collectives("\n".join(lines).replace(groups, "replica_groups=everyone"))


SHARDED = """
import jax
from flowgrpo_jax.configs import shapes
from flowgrpo_jax import compile, sharding
from flowgrpo_jax.assembly import batch_plan, parts
from flowgrpo_jax.costs import cost

config = shapes.get_config()
config.mesh.data, config.sample.guidance_scale = 1, 2.0
config.mesh[AXIS] = 4
mesh = sharding.make_mesh(**config.mesh)
plan = batch_plan.make_plan(config, sharding.row_shards(mesh))
model = parts.describe_model(config, mesh)
for program in compile.programs(config, model, mesh, plan)[0]:
    if program.name in ("sample", "accumulate"):
        text = program.run.trace(*program.args).lower().compile().as_text()
        print(program.name, {c.kind: c.bytes for c in cost.collectives(text)}, sep=" = ")
weights = sum(x.size * x.dtype.itemsize for x in model.base.values())
print("weights", weights, sep=" = ")
"""


def test_fsdp_fetches_weights_and_moves_no_activations():
    """Sampling fetches the three quarters that a device lacks once a step, and does nothing else;
    the update does so there and back, and sums the adapter's gradient."""
    found = {}
    flag = "--xla_force_host_platform_device_count=4"
    exec(run_code(SHARDED.replace("AXIS", "'fsdp'"), XLA_FLAGS=flag), {}, found)
    once = 3 / 4 * found["weights"]
    steps, window = 20, 3
    assert set(found["sample"]) == {"all-gather"}
    assert 0.5 * steps * once < found["sample"]["all-gather"] <= steps * once
    assert set(found["accumulate"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert 0.5 * window * once < found["accumulate"]["all-gather"] <= 3 * window * once
    assert found["accumulate"]["all-reduce"] < 0.5 * window * once


def test_tensor_sums_activations_behind_every_second_linear():
    """Megatron's two sums a layer and stream: behind its attentions and behind its MLP. With dual
    attention in three of six blocks, and no text behind the last one, these are 15 sums of 16 image
    tokens and 10 of 20 text tokens, 128 wide; of 144 images in both branches of guidance. Nothing
    else is sent: adapters of so small layers are merged, and sum nothing of their own."""
    found = {}
    flag = "--xla_force_host_platform_device_count=4"
    exec(run_code(SHARDED.replace("AXIS", "'tensor'"), XLA_FLAGS=flag), {}, found)
    image, text = 16, 20
    sums = 128 * (15 * image + 10 * text)
    sent = 2 * 3 / 4 * 4 * sums * 144 * 2 * 20
    assert set(found["sample"]) == {"all-reduce"}
    assert found["sample"]["all-reduce"] == pytest.approx(sent, rel=1e-3)
