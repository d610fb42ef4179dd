"""The table of rules, the mesh, and where the processes meet."""

import jax
import pytest
import tiny_model
from flax import nnx

from flowgrpo_jax import sharding
from flowgrpo_jax.command_line import connection
from flowgrpo_jax.models import layers, lora, sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.models.text import CLIPText, T5Encoder


def shapes_of(create, targets=()):
    def build():
        model = create(nnx.Rngs(0))
        if targets:
            lora.add(model, LoRASpec(32, 64.0, targets))
        return model

    return layers.functional(nnx.eval_shape(build))[1]


def test_every_parameter_meets_one_rule():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    large = MMDiTConfig(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
    everywhere = ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
    for shapes in (
        shapes_of(lambda rngs: MMDiT(tiny_model.MMDIT, rngs=rngs), everywhere),
        shapes_of(lambda rngs: MMDiT(large, rngs=rngs)),
        shapes_of(lambda rngs: CLIPText(tiny_model.clip(100, "gelu"), rngs=rngs)),
        shapes_of(lambda rngs: T5Encoder(tiny_model.T5, rngs=rngs)),
    ):
        for path, leaf in shapes.items():
            assert len(sharding.spec(path, leaf.shape, mesh, sd3.RULES)) == len(leaf.shape)
    with pytest.raises(ValueError, match=r"'blocks/new_layer/kernel' meets 0 sharding rules.*add"):
        sharding.spec("blocks/new_layer/kernel", (2, 2), mesh, sd3.RULES)


def test_a_mesh_that_does_not_fit_names_the_sizes():
    with pytest.raises(ValueError, match=r"'fsdp': 3.* does not fit 1 devices"):
        sharding.make_mesh(data=-1, fsdp=3)
    with pytest.raises(ValueError, match=r"at most one size may be -1"):
        sharding.make_mesh(data=-1, fsdp=-1)


def test_an_incomplete_address_is_an_error(monkeypatch):
    monkeypatch.setenv("FLOWGRPO_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("FLOWGRPO_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"also set FLOWGRPO_PROCESS$"):
        connection.connect()
