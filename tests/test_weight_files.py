"""Which files of a checkpoint are read, among shards and strays, and which are refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_on_disk import COMPONENTS, assert_equal, write

from flowgrpo_jax.models import convert, sd3
from flowgrpo_jax.models.weight_files import component_files


def test_shards(shapes, tensors, tmp_path):
    write(tmp_path, tensors, count=3)
    save_file({"of another download": np.zeros(1)}, tmp_path / "old.safetensors")
    assert_equal(convert.to_torch_names(convert.load(tmp_path, shapes)), tensors)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-1.safetensors: download the comp"):
        convert.load(tmp_path, shapes)


def test_half_precision_twin_is_second_choice(shapes, tensors, tmp_path):
    """Hub repositories hold model.safetensors and model.fp16.safetensors side by side."""
    write(tmp_path, tensors)
    save_file({k: v * 0 for k, v in tensors.items()}, tmp_path / "model.fp16.safetensors")
    assert_equal(convert.to_torch_names(convert.load(tmp_path, shapes)), tensors)
    (tmp_path / "model.safetensors").unlink()
    assert not any(np.any(x) for x in convert.load(tmp_path, shapes).values())


STRAYS = ("{}.v2", "{}_old", "{}-old", "{}.ema", "{}.fp16-00001-of-00002", "{}-00001-of-00002", "z")


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_files_beside_the_named_one_are_not_read(tensors, tmp_path, stem, stray):
    folder = tmp_path / ("text_encoder" if stem == "model" else "vae")
    folder.mkdir()
    for name in (stray.format(stem), "model" if stem != "model" else "diffusion_pytorch_model"):
        save_file({"of another download": np.zeros(1)}, folder / f"{name}.safetensors")
    save_file(tensors, folder / f"{stem}.safetensors")
    assert component_files(folder) == [folder / f"{stem}.safetensors"]


def test_every_component_is_read_beside_strays_as_torch_reads_it(checkpoint, tmp_path):
    from torch_models import diffusers, transformers

    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    for name in COMPONENTS:
        (file,) = (tmp_path / name).glob("*.safetensors")
        zeros = {k: 0 * v for k, v in load_file(file).items()}
        for stray in STRAYS:
            save_file(zeros, file.with_stem(stray.format(file.stem)), metadata={"format": "pt"})
    ours, wanted = sd3.load(tmp_path), sd3.load(checkpoint)
    read = ours.params | ours.read_text()
    for name, params in (wanted.params | wanted.read_text()).items():
        assert_equal(read[name], params)
    kinds = {"transformer": diffusers.SD3Transformer2DModel, "vae": diffusers.AutoencoderKL}
    kinds |= {"text_encoder_3": transformers.T5EncoderModel}
    for name, kind in kinds.items():
        theirs = [kind.from_pretrained(root / name).state_dict() for root in (tmp_path, checkpoint)]
        assert_equal(*({k: v.numpy() for k, v in state.items()} for state in theirs))


def test_of_a_file_and_an_index_the_library_decides(tensors, tmp_path):
    """transformers looks for the file first, diffusers for the index."""
    for folder, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / f"{stem}.safetensors")
        save_file(tensors, tmp_path / folder / "part.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
        file = tmp_path / folder / f"{stem}.safetensors.index.json"
        file.write_text(json.dumps(index))
    assert [f.name for f in component_files(tmp_path / "text_encoder")] == ["model.safetensors"]
    assert [f.name for f in component_files(tmp_path / "vae")] == ["part.safetensors"]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"safetensors.index.json has no weight_map"):
        component_files(tmp_path / "vae")


def test_shards_of_half_precision_are_found_by_their_index(shapes, tensors, tmp_path):
    write(tmp_path, tensors, count=2)
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / "model.safetensors.index.fp16.json")
    assert_equal(convert.to_torch_names(convert.load(tmp_path, shapes)), tensors)


def test_weights_of_another_name_alone_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "final.safetensors")
    wanted = r"lacks diffusion_pytorch_model.safetensors, .*\(final.safetensors\). Rename"
    with pytest.raises(FileNotFoundError, match=wanted):
        component_files(tmp_path)


def test_a_tensor_in_two_shards_is_refused(shapes, tensors, tmp_path):
    write(tmp_path, tensors, count=2)
    file = tmp_path / "model-1.safetensors"
    save_file(load_file(file) | {next(iter(tensors)): np.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"is in .*model-0.safetensors and in model-1.safetensors"):
        convert.load(tmp_path, shapes)


def test_absent_files(shapes, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a model directory in dif"):
        convert.load(tmp_path / "nowhere", shapes)
    with pytest.raises(FileNotFoundError, match=r"lacks any .safetensors file: download the comp"):
        convert.load(tmp_path, shapes)


def test_a_file_that_was_cut_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": np.zeros((8, 8), np.float32)}, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*again"):
        convert.load(tmp_path, {})
