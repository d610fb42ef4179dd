"""Kernels of softmax attention: one row each in `TABLE`, and the choice of one for the devices.

"xla", "cudnn" and "flash" are products of queries, keys and values in heads, before which all
streams of tokens are put behind each other. "joint" takes the streams as they are.

A fused kernel never writes the scores [B, N, S, T] to memory. With 24 heads of 64 channels and the
1,229 tokens of SD3.5 at 512 px, the scores are four fifths of all that a plain attention moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from flowgrpo_jax import sharding
from flowgrpo_jax.models import joint_attention, kernel_check
from flowgrpo_jax.models.streams import Kernel, Stream, joined

LANES = 128  # a TPU's vector; blocks are multiples of it
LARGEST_BLOCK = 640  # tokens: scores of a block are 1.6 MB in f32, of 16 MB that a kernel may use
CUDNN_FROM = 8.0  # compute capability


def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention by two products, with scores in f32; for any device and dtype."""
    # Heads first, before anything else: left to itself XLA on the CPU takes 1.6 times as long.
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    scores = jnp.einsum("bnsd,bntd->bnst", q, k, preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.moveaxis(jnp.einsum("bnst,bntd->bnsd", shares, v), 1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's fused attention, for half precision on NVIDIA's GPUs."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """FlashAttention (arXiv 2205.14135) by the Pallas kernel for TPUs that comes with jax.

    Sequences are padded to a multiple of a TPU's vector, and the padding is masked. Outside of a
    TPU it runs in Pallas' interpreter alone (`pltpu.force_tpu_interpret_mode`).
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    def padded(x: jax.Array) -> jax.Array:
        batch, tokens, *head = x.shape
        if missing := -tokens % LANES:
            # As `jnp.pad` this would be a pass of its own. XLA joins it with the concatenation of
            # two streams, which x mostly is.
            x = jnp.concatenate([x, jnp.zeros((batch, missing, *head), x.dtype)], axis=1)
        return jnp.moveaxis(x, 2, 1)

    def segments(x: jax.Array) -> jax.Array:  # 1 for a token, 0 for padding
        real = jnp.arange(x.shape[1] + -x.shape[1] % LANES) < x.shape[1]
        return jnp.broadcast_to(real.astype(jnp.int32), (x.shape[0], len(real)))

    exact = q.shape[1] % LANES == k.shape[1] % LANES == 0
    y = pallas.flash_attention(
        *map(padded, (q, k, v)),
        segment_ids=None if exact else pallas.SegmentIds(segments(q), segments(k)),
        sm_scale=q.shape[-1] ** -0.5,
        block_sizes=_blocks(q.shape[1], k.shape[1], pallas.BlockSizes),
    )
    return jnp.moveaxis(y[:, :, : q.shape[1]], 1, 2)


def _blocks(queries: int, keys: int, make: Any) -> Any:
    """Return the kernel's blocks, as large as its memory allows.

    The gradient to the queries takes keys by the vector: a number for each query is written to
    memory as many times as its block has keys.
    """
    q, k = (_block(n) for n in (queries, keys))
    forward = dict(block_q=q, block_k_major=k, block_k=k, block_b=1)
    to_keys = dict(block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q)
    to_queries = dict(block_q_dq=q, block_k_major_dq=LANES, block_k_dq=LANES)
    return make(**forward, **to_keys, **to_queries)


def _block(tokens: int) -> int:
    vectors = -(-tokens // LANES)
    most = LARGEST_BLOCK // LANES
    return LANES * max(n for n in range(1, most + 1) if vectors % n == 0)


def joint(streams: Sequence[Stream], heads: int) -> list[jax.Array]:
    """The Pallas kernel of joint_attention.py, or `flash` for what does not fit it."""
    kernel = joint_attention.attend if joint_attention.fits(streams, heads) else joined(flash)
    return kernel(streams, heads)


PLAIN = joined(plain)
TABLE: dict[str, Kernel] = {
    "xla": PLAIN,
    "cudnn": joined(cudnn),
    "flash": joined(flash),
    "joint": joint,
}
PALLAS = ("joint", "flash")
CHOICES = ("auto", *TABLE)


def load(name: str, mesh: Mesh | AbstractMesh, dtype: Any) -> Kernel:
    """Return the attention of a row on the devices of a mesh; "auto" is the fastest that they have.

    That is "cudnn" on NVIDIA's GPUs in half precision, "joint" on TPUs, and "xla" elsewhere.
    Raises ValueError for a kernel that the devices do not have, and RuntimeError for one that is
    wrong on them.
    """
    if isinstance(mesh, AbstractMesh):  # a layout alone, without devices
        return PLAIN
    device = mesh.devices.flat[0]
    runs = suited(device, jnp.dtype(dtype))
    if name == "auto":
        name = runs[0]
    if name not in runs:
        raise ValueError(
            f"model.attention={name!r} does not run on {device.device_kind!r} in"
            f" {jnp.dtype(dtype)}: 'cudnn' needs an NVIDIA GPU of compute capability"
            f" {CUDNN_FROM:g} and half precision, 'joint' and 'flash' a TPU; choose {runs[0]!r}, or"
            " 'auto'"
        )
    if name != "xla" and device in jax.devices():  # not one of a topology that is compiled for
        own = next(d for d in mesh.devices.flat if d in jax.local_devices())
        kernel_check.check(name, TABLE[name], PLAIN, own, jnp.dtype(dtype))
    return _on(mesh, name)


def suited(device: Any, dtype: Any) -> tuple[str, ...]:
    """Return the rows that run on a device, the fastest first."""
    if device.platform == "tpu":
        return (*PALLAS, "xla")
    capability = getattr(device, "compute_capability", "")  # "9.0"; of AMD's GPUs "gfx942"
    nvidia = device.platform == "gpu" and capability.replace(".", "").isdigit()
    half = dtype in (jnp.bfloat16, jnp.float16)
    return ("cudnn", "xla") if nvidia and half and float(capability) >= CUDNN_FROM else ("xla",)


@lru_cache(maxsize=16)  # one function a mesh, by which models and their programs are cached
def _on(mesh: Mesh, name: str) -> Kernel:
    return by_rows_and_heads(mesh, TABLE[name]) if name in PALLAS else TABLE[name]


def by_rows_and_heads(mesh: Mesh, kernel: Kernel) -> Kernel:
    """Return the kernel with each device at work on its own images and heads.

    For kernels of Pallas', which XLA cannot cut: it would bring all images to every chip. An axis
    whose size is no multiple of its devices stays whole on each, as the scales of norms do.
    """
    if mesh.size == 1:
        return kernel

    def cut(streams: Sequence[Stream], heads: int) -> list[jax.Array]:
        by_rows = streams[0].q.shape[0] % sharding.row_shards(mesh) == 0
        by_heads = heads % sharding.head_shards(mesh) == 0
        rows, axis = sharding.ROWS[0] if by_rows else None, "tensor" if by_heads else None
        own, parts = PartitionSpec(rows, None, axis), sharding.head_shards(mesh) if by_heads else 1
        specs = jax.tree.map(lambda x: own if x.ndim == 3 else PartitionSpec(), streams)
        mapped = jax.shard_map(
            lambda part: kernel(part, heads // parts),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=own,
            check_vma=False,
        )
        return mapped(streams)

    return cut
