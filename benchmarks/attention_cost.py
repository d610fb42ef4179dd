"""What an attention of SD3.5-medium costs with each kernel, by the compiler for a TPU alone.

    python -m benchmarks.attention_cost --out benchmarks/results/attention-v6e.json [--chip v6e:1x1]

Compiles one joint attention with its linears (1,024 tokens of an image and 205 of a text, 24 heads
of 64 channels, bfloat16) with the kernels "flash" and "joint", forward and with the gradient to its
input, and writes how long their instructions take at least and what they move
(flowgrpo_jax/costs/program_time.py). Needs `pip install -e '.[tpu]'`, no TPU and no weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import machine
from flowgrpo_jax import sharding
from flowgrpo_jax.costs import cost, program_costs, program_time
from flowgrpo_jax.models import attention, products
from flowgrpo_jax.models.sd3.blocks import Attention, Maker, MMDiTConfig

TOKENS = (1024, 205)
CONFIG = MMDiTConfig(qk_norm="rms_norm")
KERNELS = ("flash", "joint")


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of the report")
    parser.add_argument("--chip", default="v6e:1x1", help="a topology of one chip")
    parser.add_argument("--images", type=int, default=8, help="at once")
    args = parser.parse_args()
    chip, devices = program_costs.topology(args.chip)
    mesh = sharding.make_mesh(devices=devices)
    rows = [
        {"kernel": name, "gradient": gradient, **measure(mesh, chip, name, gradient, args.images)}
        for name in KERNELS
        for gradient in (False, True)
    ]
    for row in rows:
        print(row)
    report = {"chip": args.chip, "images": args.images, "tokens": TOKENS, "rows": rows}
    report["machine"] = machine.described("tpu")
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(mesh: Mesh, chip: Any, name: str, gradient: bool, images: int) -> dict[str, Any]:
    """Seconds at least, of its products alone, and bytes moved."""
    layer, *given = described(mesh, name, images)

    def total(x: jax.Array, c: jax.Array, weights: Any) -> jax.Array:
        values = layer(x, c, weights)
        return sum((jnp.sum(y.astype(jnp.float32)) for y in values), jnp.float32(0))

    traced = jax.jit(jax.grad(total, (0, 1)) if gradient else layer).trace(*given)
    text = traced.lower().compile().as_text()
    works = program_time.work(text, cost.kernels(traced.jaxpr))
    seconds = program_time.by_operation(works, chip.peak, chip.bandwidth)
    return {
        "seconds": sum(seconds.values()),
        "products": sum(w.times * w.flops for w in works) / chip.peak,
        "bytes": sum(w.times * w.bytes for w in works),
        "dearest": sorted(seconds.items(), key=lambda item: -item[1])[:5],
    }


def described(mesh: Mesh, name: str, images: int) -> tuple[Any, ...]:
    """The layer with a kernel as a function, and what describes its inputs and its weights."""
    kernel = attention.load(name, mesh, jnp.bfloat16)
    product = products.load("", mesh, "bfloat16")

    def made() -> Attention:
        return Attention("full", Maker(CONFIG, jnp.bfloat16, kernel, product, nnx.Rngs(0)))

    graph, weights = nnx.split(nnx.eval_shape(made))
    here = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)

    def layer(x: jax.Array, c: jax.Array, weights: Any) -> Any:
        return nnx.merge(graph, weights)(x, c)

    streams = (array(images, tokens, CONFIG.width) for tokens in TOKENS)
    return layer, *streams, jax.tree.map(lambda x: array(*x.shape), weights)


if __name__ == "__main__":
    main()
