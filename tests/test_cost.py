"""Arithmetic and communication against counts by hand, and a recipe compiled for TPU chips."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flowgrpo_jax import compile, rewards, sharding
from flowgrpo_jax.configs import pickscore, shapes
from flowgrpo_jax.costs import cost
from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.rewards import towers
from flowgrpo_jax.types import Described, GraphReward

ROOT = Path(__file__).parent.parent
LAYERS, ROWS, WIDTH = 6, 64, 32


def layers_loss(w, x):
    """LAYERS products [ROWS, WIDTH] x [WIDTH, WIDTH] in a loop."""
    return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).sum()


W = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
ONCE = 2 * LAYERS * ROWS * WIDTH * WIDTH


def count(f, *args):
    return cost.flops(jax.jit(f).trace(*args).jaxpr)


def test_products_in_loops_gradients_and_recomputation():
    """A gradient costs three forwards: with respect to the weights and to what came before.
    Recomputing the layers costs one more."""
    assert count(layers_loss, W, X) == ONCE
    assert count(jax.grad(layers_loss), W, X) == 3 * ONCE

    def recomputed(w, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.square(jax.lax.scan(body, x, w)[0]).sum()

    assert count(jax.grad(recomputed), W, X) == 4 * ONCE


@pytest.mark.parametrize(
    "name, parameters, work",
    [
        # open_clip's own profile of ViT-H-14 and ViT-L-14: millions of parameters, GFLOP a pair
        ("pickscore", 986.11e6, 381.68e9),
        ("clipscore", 427.62e6, 175.33e9),
    ],
)
def test_described_towers_are_the_published_ones(name, parameters, work):
    reward, wanted = rewards.describe([name, "ocr"], {})[name]
    assert sum(x.size for x in jax.tree.leaves(reward.weights)) == pytest.approx(
        parameters, rel=1e-4
    )
    images = jax.ShapeDtypeStruct((4, 512, 512, 3), jnp.uint8)
    prepared = {key: jax.ShapeDtypeStruct((4, *x.shape), x.dtype) for key, x in wanted.items()}
    # Ours resizes the picture as well, with two products: (224 x 512 + 224 x 224) x 512 x 3.
    resizing = 2 * 224 * 512 * 3 * (512 + 224)
    counted = count(reward.score, reward.weights, images, prepared)
    assert counted == pytest.approx(4 * (work + resizing), rel=2e-2)


def test_rewards_on_the_same_weights_are_described_once():
    """Of the recipe's towers three are CLIPs, one of them serves two rewards, and one is a BLIP."""
    config = pickscore.get_config("full")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.uint8)
    batch = 1, images, jax.ShapeDtypeStruct((2,), jnp.int32)
    scoring, judging = compile.score(config, mesh, batch, batch)
    ((_, (trained, *_)),), ((_, (judged, *_)),) = scoring, judging
    assert set(trained) == {"pickscore"} and set(judged) == set(config.eval.rewards)

    def arrays(*weights):
        return {id(x) for x in jax.tree.leaves(weights)}

    assert arrays(trained) == arrays(judged["pickscore"])
    assert arrays(judged["clipscore"]) < arrays(judged["aesthetic"])
    assert not arrays(judged["pickscore"]) & arrays(judged["hpsv2"])
    no_towers = shapes.get_config()
    assert compile.score(no_towers, mesh, batch, batch) == ([], [])
    assert compile.undescribed(no_towers) == ["shapes", "shapes_strict", "shapes_unknown"]
    config.eval.every = 0  # training then loads no rewards for it
    assert len(compile.score(config, mesh, batch, batch)[0]) == 1
    assert compile.score(config, mesh, batch, batch)[1] == []


def tower(weights):
    prepare, score = towers.unprepared, lambda weights, images, rows: images @ weights
    return GraphReward(weights, prepare, score)


def on_host(images, prompts, metadata):
    raise AssertionError("called")


DESCRIBED = {"tower": lambda dtype: Described(tower(jax.ShapeDtypeStruct((3,), dtype)), {})}


def test_a_reward_of_the_user_s_own_is_described_by_its_module():
    name = f"{__name__}:tower()"
    options = {name: {"dtype": "bfloat16"}}
    found = rewards.describe([name, f"{__name__}:on_host", "ocr"], options)
    assert set(found) == {name} and found[name].reward.weights.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="only described"):
        found[name].reward.prepare(["a"], [{}])


def test_convolutions_and_conditions():
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    work = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    assert count(conv, image, kernel) == work

    def either(flag, x, k):
        return jax.lax.cond(flag, lambda: conv(conv(x, k)[..., :3], k), lambda: conv(x, k))

    assert count(either, jax.ShapeDtypeStruct((), bool), image, kernel) == 2 * work


def test_a_loop_of_unknown_length_is_an_error():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="length is not known"):
        count(f, jax.ShapeDtypeStruct((4, 4), jnp.float32))


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flowgrpo_jax.configs import pickscore, shapes
from flowgrpo_jax import compile, sharding
from flowgrpo_jax.costs import cost
from test_cost import W, X, layers_loss

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


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install 'flowgrpo_jax[tpu]'"
)


@needs_libtpu
def test_collectives_of_tpu_chips():
    out = run("""
from jax.experimental import topologies
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
print([tuple(c) for c in collectives(devices)])
""")
    check(eval(out))


@needs_libtpu
@pytest.mark.parametrize("name, chips", [("v5e:1x1", 1), ("v5p:1x1x1", 1), ("v6e:2x4", 8)])
def test_topologies_of_one_chip_and_more(name, chips):
    out = run(f"""
from flowgrpo_jax.costs import program_costs

print(len(program_costs.topology({name!r})[1]))
""")
    assert int(out) == chips


@needs_libtpu
def test_the_recipe_in_the_box_compiles_for_a_pod(tmp_path):
    """Every program; and data parallelism moves the gradient of the adapter, not activations."""
    out = tmp_path / "report.json"
    command = ["--config", "configs/shapes.py", "--topology", "v5e:2x2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "flowgrpo_jax.compile", *command],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout
    report = json.loads(out.read_text())
    programs = {p["program"]: p for p in report["programs"]}
    assert set(programs) == {"text", "sample", "accumulate", "apply", "evaluate"}
    assert 0 < report["resident"] < 1e9
    for name in ("sample", "evaluate", "text", "apply"):
        assert programs[name]["links"] < 1e5, programs[name]
    c = report["config"]["lora"]
    spec = LoRASpec(c["rank"], c["alpha"], sd3.JOINT_ATTENTION)
    adapted = sd3.describe(sd3.find_architecture("shapes"), lora_spec=spec).trained_shapes
    adapter = 4 * sum(x.size for x in adapted.values())  # bytes
    # Summed over 4 chips once for each of the window's transitions, and next to nothing else. Small
    # adapters are merged into their kernels, whose gradient has four times their size.
    summed = 2 * 3 / 4 * report["config"]["sample"]["window"] * adapter
    assert summed <= programs["accumulate"]["links"] <= 4.001 * summed
    assert set(programs["accumulate"]["collectives"]) == {"all-reduce"}


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
