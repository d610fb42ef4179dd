"""Weights of a small transformer in files, as diffusers lays them out."""

import json

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.layers import functional
from flowgrpo_jax.models.sd3.mmdit import MMDiTConfig

SMALL = MMDiTConfig(
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=8,
    caption_projection_dim=16,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=3,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def shapes_of(model_class, config):
    return functional(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))[1]


def random_tensors(shapes):
    """A random state dict for them."""
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
    return convert.to_torch_names(params)


def write(directory, tensors, count=1):
    """As one file, or dealt out to `count` shards with an index, so that stacks are torn apart."""
    directory.mkdir(exist_ok=True)
    if count == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map = {k: f"model-{i % count}.safetensors" for i, k in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_equal(ours, wanted):
    assert set(ours) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name, strict=True)
