"""Programs compiled for TPU chips that need not be there, and what these chips would send."""

import importlib.util
import json
import subprocess
import sys

import pytest
from counted_layers import check, run

from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.lora import LoRASpec

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
