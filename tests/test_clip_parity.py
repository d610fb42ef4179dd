"""CLIP against transformers, open_clip's layout against torch's fused attention, `.pt` files."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from torch_models import TOLERANCE, abstract, channels_last, ported, torch, transformers, worst
from torch_towers import VISION, dual_config, pictures, tensor_pixels, torch_dual, torch_open_clip

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.towers.clip import (
    CLIP,
    VIT_H_14,
    VIT_L_14,
    DualConfig,
    from_open_clip,
    is_open_clip,
)
from flowgrpo_jax.models.weight_files import Tensor, open_file

IDS = np.random.default_rng(0).integers(0, 40, (3, 10))


def ids(end):
    """Texts that end at different places."""
    out = IDS.copy()
    for row, position in zip(out, (3, 9, 6)):
        row[position:] = end
    return out


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip(act):
    theirs = torch_dual(act)
    config = DualConfig.read(theirs.config.to_dict())
    pixels = tensor_pixels(pictures(3), VISION["image_size"])
    texts = ids(theirs.config.text_config.eos_token_id)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(texts), pixel_values=pixels)
        image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
    seen = ported(CLIP, config, theirs, method="embed_image")(channels_last(pixels).numpy())
    read = ported(CLIP, config, theirs, method="embed_text")(texts)
    assert worst(seen, image) <= TOLERANCE
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    assert worst(unit(read), wanted.text_embeds) <= TOLERANCE
    scale = ported(CLIP, config, theirs, method="scale")()
    assert worst(unit(seen) @ unit(read).T * scale, wanted.logits_per_image) <= TOLERANCE


@pytest.mark.parametrize("method", ["embed_image", "embed_text"])
def test_each_layer_counts(method):
    """The stack holds every layer once: a change of any is a change of the result."""
    theirs = torch_dual()
    config = DualConfig.read(theirs.config.to_dict())
    pixels = channels_last(tensor_pixels(pictures(1), VISION["image_size"])).numpy()
    given = pixels if method == "embed_image" else ids(40)
    before = np.asarray(ported(CLIP, config, theirs, method=method)(given))
    tower = theirs.vision_model if method == "embed_image" else theirs.text_model
    for layer in tower.encoder.layers:
        layer.mlp.fc1.weight.data *= 1.5
        after = np.asarray(ported(CLIP, config, theirs, method=method)(given))
        assert np.abs(after - before).max() > 1e-3
        before = after


# ---------------------------------------------------------------------------------------- configs


def compare(config, theirs):
    for ours, wanted in ((config.text, theirs.text_config), (config.vision, theirs.vision_config)):
        for field in dataclasses.fields(ours):
            if field.name != "projection_dim":
                assert getattr(ours, field.name) == getattr(wanted, field.name), field.name
        assert ours.projection_dim == theirs.projection_dim


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"projection_dim": 20, "text_config": {"hidden_act": "gelu"}},
        {"text_config_dict": {"hidden_size": 768}, "text_config": {"hidden_size": 768}},
        {"vision_config_dict": {"num_hidden_layers": 3}, "vision_config": None},
    ],
)
def test_a_config_means_what_it_means_to_transformers(raw):
    compare(DualConfig.read(raw), transformers.CLIPConfig(**raw))


def test_a_whole_config_is_read():
    theirs = dual_config("gelu")
    compare(DualConfig.read(theirs.to_dict()), theirs)


@pytest.mark.parametrize("config, millions", [(VIT_L_14, 427.6), (VIT_H_14, 986.1)])
def test_the_published_sizes(config, millions):
    """As many parameters as the model cards of ViT-L/14 and ViT-H/14 give."""
    shapes = abstract(CLIP, config)[1]
    assert sum(np.prod(x.shape) for x in shapes.values()) == pytest.approx(millions * 1e6, rel=1e-4)


def test_impossible_configs_are_errors():
    with pytest.raises(ValueError, match="'relu', known are"):
        DualConfig.read({"vision_config": {"hidden_act": "relu"}})
    with pytest.raises(ValueError, match="image_size is 30: it must be a multiple of patch_size"):
        DualConfig.read({"vision_config": {"image_size": 30, "patch_size": 14}})


# ----------------------------------------------------------------------- open_clip and its files


def in_memory(theirs, prefix=""):
    return {
        prefix + name: Tensor(tuple(x.shape), lambda x=x: x.numpy())
        for name, x in theirs.state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_open_clip(prefix):
    theirs = torch_open_clip()
    config = DualConfig.read(dual_config("gelu").to_dict())
    apply, shapes = abstract(CLIP, config)
    tensors = in_memory(theirs, prefix)
    assert is_open_clip(tensors) and not is_open_clip(in_memory(torch_dual()))
    params = convert.from_tensors(from_open_clip(tensors), shapes, where="here")
    pixels = tensor_pixels(pictures(3), VISION["image_size"])
    texts = ids(config.text.eos_token_id)
    with torch.no_grad():
        image, text = theirs.visual(pixels), theirs.text(torch.tensor(texts))
    run = jax.jit(apply, static_argnames="method")
    seen = run(params, channels_last(pixels).numpy(), method="embed_image")
    assert worst(seen, image) <= TOLERANCE
    assert worst(run(params, texts, method="embed_text"), text) <= TOLERANCE
    assert apply(params, method="scale") == pytest.approx(np.exp(3.1))


def test_what_open_clip_names_and_we_do_not_know_is_listed():
    tensors = in_memory(torch_open_clip())
    tensors["visual.attn_pool.query"] = tensors.pop("visual.proj")
    tensors["transformer.resblocks.0.ls_1.weight"] = tensors.pop("ln_final.bias")
    shapes = abstract(CLIP, DualConfig.read(dual_config("gelu").to_dict()))[1]
    with pytest.raises(ValueError, match="do not fit") as error:
        convert.from_tensors(from_open_clip(tensors), shapes, where="here")
    for name in ("visual.attn_pool.query", "visual_projection.weight", "layers.0.ls_1.weight"):
        assert name in str(error.value)


DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"]


def test_torch_files_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {name: (base % 2).to(getattr(torch, name)) for name in DTYPES}
    saved |= {"turned": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(2.5)}
    saved |= {"parameter": torch.nn.Parameter(base), "none": base[:0]}
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": saved, "epoch": 3, "name": "run"}, file)
    ours, theirs = open_file(file), torch.load(file)["state_dict"]
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        found = ours[name].read()
        assert found.shape == ours[name].shape == tuple(wanted.shape)
        assert str(found.dtype) == str(wanted.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(float), wanted.detach().double().numpy())


def test_a_bare_state_dict_and_a_module_inside_read_alike(tmp_path):
    theirs = torch_open_clip().state_dict()
    for i, content in enumerate([theirs, {"state_dict": theirs}, {"model": theirs}]):
        torch.save(content, tmp_path / f"{i}.pt")
        assert {k: x.shape for k, x in open_file(tmp_path / f"{i}.pt").items()} == {
            k: tuple(x.shape) for k, x in theirs.items()
        }


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_torch_file_is_run(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(2)}, "more": Evil(tmp_path / "ran")}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"refers to .*mkdir.*save its state dict alone"):
        open_file(tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_state_dict_are_errors(tmp_path):
    (tmp_path / "old.pt").write_bytes(b"\x80\x02 not a zip archive")
    with pytest.raises(ValueError, match=r"torch before 1\.6"):
        open_file(tmp_path / "old.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        open_file(tmp_path / "list.pt")
