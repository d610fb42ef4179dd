"""The files of an adapter: what is read back, and what is refused by name."""

import json

import numpy as np
import pytest
from lora_factors import random_factors, shapes_of
from safetensors.numpy import load_file, save_file

from flowgrpo_jax.models import lora_files
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3 import JOINT_ATTENTION

FILES = {
    "diffusers": lora_files.DIFFUSERS_FILE,
    "peft": lora_files.PEFT_FILE,
    "comfyui": lora_files.COMFYUI_FILE,
}


def assert_same(ours, wanted):
    assert set(ours) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name, strict=True)


def test_files_read_back_as_written(tmp_path):
    for spec in (
        LoRASpec(4, 8.0, JOINT_ATTENTION),
        LoRASpec(3, 7.0, ("ff.net.0.proj", "proj_out")),
    ):
        shapes, _ = shapes_of(spec)
        factors = random_factors(shapes)
        written = lora_files.write(factors, spec, tmp_path, "somewhere/model")
        assert written == [tmp_path / folder / name for folder, name in FILES.items()]
        for path in (tmp_path, *(tmp_path / folder for folder in FILES), *written):
            file, found, _ = lora_files.read_spec(path)
            assert (found.rank, found.alpha) == (spec.rank, spec.alpha)
            assert set(found.targets) == set(spec.targets)
            assert_same(lora_files.read(file, shapes), factors)


def test_files_without_what_they_need_are_refused(tmp_path):
    spec = LoRASpec(4, 8.0, JOINT_ATTENTION)
    shapes, _ = shapes_of(spec)
    with pytest.raises(FileNotFoundError, match=f"no LoRA at {tmp_path}: looked for "):
        lora_files.read_spec(tmp_path)
    file, *_ = lora_files.write(random_factors(shapes), spec, tmp_path, "model")
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match="does not say its alpha, neither in a lora_adapter_metadata header nor"
    ):
        lora_files.read_spec(file)

    def rewrite(**changes):
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["attn.to_q"], **changes}
        header = json.dumps({f"transformer.{k}": v for k, v in config.items()})
        save_file(tensors, file, metadata={"lora_adapter_metadata": header})

    for changes, named in (
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"to_q": 4}, "use_dora": True}, "use_dora, alpha_pattern"),
        ({"target_modules": "all-linear"}, "target_modules as a pattern"),
    ):
        rewrite(**changes)
        with pytest.raises(ValueError, match=f"uses {named}: not supported"):
            lora_files.read_spec(file)


@pytest.fixture
def written(tmp_path):
    """An export, and the shapes and factors that it was made of."""
    spec = LoRASpec(4, 8.0, JOINT_ATTENTION)
    shapes, _ = shapes_of(spec)
    factors = random_factors(shapes)
    lora_files.write(factors, spec, tmp_path, "somewhere/model")
    return tmp_path, shapes, factors


def change_settings(root, **changes):
    """Change PEFT's settings and the header of the diffusers file; None takes one out."""
    settings = root / "peft" / "adapter_config.json"
    config = {**json.loads(settings.read_text()), **changes}
    config = {k: v for k, v in config.items() if v is not None}
    settings.write_text(json.dumps(config))
    file = root / "diffusers" / lora_files.DIFFUSERS_FILE
    header = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    save_file(load_file(file), file, metadata={"format": "pt", lora_files.HEADER: header})


CHANGING = ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of another year")


@pytest.mark.parametrize("start", CHANGING)
@pytest.mark.parametrize("folder", ["peft", "diffusers"])
def test_adapters_that_change_the_base_are_refused_by_name(written, start, folder):
    root, *_ = written
    change_settings(root, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base"):
        lora_files.read_spec(root / folder)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_adapters_of_another_start_are_read(written, start):
    root, shapes, factors = written
    change_settings(root, init_lora_weights=start)
    assert_same(lora_files.read(lora_files.read_spec(root / "peft").file, shapes), factors)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "of the type LOHA: only LORA is supported"),
        ({"bias": "lora_only"}, "uses bias: not supported"),
        ({"lora_bias": True, "modules_to_save": ["proj_out"]}, "uses lora_bias, modules_to_save"),
        ({"layers_to_transform": [0]}, "uses layers_to_transform: not supported"),
        ({"lora_alpha": None}, "does not say its alpha"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', it must be a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0, it must be a number above 0"),
        ({"r": 2.5}, "r is 2.5, it must be a number above 0"),
    ],
)
def test_settings_that_are_not_understood_are_named(written, changes, message):
    root, *_ = written
    change_settings(root, **changes)
    for folder in ("peft", "diffusers"):
        with pytest.raises(ValueError, match=message):
            lora_files.read_spec(root / folder)


def test_rank_and_targets_that_are_not_said_are_those_of_the_factors(written):
    root, shapes, factors = written
    change_settings(root, r=None, target_modules=None)
    for folder in ("peft", "diffusers"):
        file, spec, _ = lora_files.read_spec(root / folder)
        assert spec == LoRASpec(4, 8.0, tuple(sorted(JOINT_ATTENTION)))
        assert shapes_of(spec)[0] == shapes
        assert_same(lora_files.read(file, shapes), factors)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_alpha_is_read_from_its_tensors_where_no_header_says_it(written, metadata):
    """As ComfyUI has it, and what is converted from kohya's files."""
    root, shapes, factors = written
    file = root / "comfyui" / lora_files.COMFYUI_FILE
    tensors = load_file(file)
    save_file(tensors, file, metadata=metadata)
    found = lora_files.read_spec(file)
    assert found.spec == LoRASpec(4, 8.0, tuple(sorted(JOINT_ATTENTION)))
    assert_same(lora_files.read(file, shapes), factors)
    key = next(k for k in tensors if k.endswith(".alpha"))
    save_file(tensors | {key: np.array(4.0, np.float32)}, file)
    with pytest.raises(ValueError, match=r"has .alpha tensors of \[4.0, 8.0\]: only one alpha is"):
        lora_files.read_spec(file)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match=r"lacks the \.alpha tensors of "):
        lora_files.read_spec(file)


def test_a_header_and_tensors_that_say_different_alphas_are_refused(written):
    root, *_ = written
    file = root / "comfyui" / lora_files.COMFYUI_FILE
    header = json.dumps({"transformer.lora_alpha": 4.0, "transformer.r": 4})
    save_file(load_file(file), file, metadata={lora_files.HEADER: header})
    with pytest.raises(ValueError, match=r"has lora_alpha=4.0 and .alpha tensors of 8.0"):
        lora_files.read_spec(file)


@pytest.mark.parametrize("header", ["", "{", "[1]", "null"])
def test_a_damaged_header_is_named(written, header):
    root, *_ = written
    file = root / "diffusers" / lora_files.DIFFUSERS_FILE
    save_file(load_file(file), file, metadata={lora_files.HEADER: header})
    with pytest.raises(ValueError, match=f"the lora_adapter_metadata header of {file} is "):
        lora_files.read_spec(file)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings_of_peft_are_named(written, content):
    root, *_ = written
    settings = root / "peft" / "adapter_config.json"
    settings.write_text(content)
    with pytest.raises(ValueError, match=f"{settings} (is damaged|holds a JSON list)"):
        lora_files.read_spec(root / "peft")
    settings.unlink()
    with pytest.raises(FileNotFoundError, match=f"{settings} does not exist, which has the alpha"):
        lora_files.read_spec(root / "peft")


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
            "names of kohya's sd-scripts",
        ),
        ("transformer.proj_out.lora.up.weight", "names of kohya's sd-scripts .*lora.up"),
        ("base_model.model.proj_out.hada_w1_a", "is a LoHa adapter .*hada_w1_a"),
        ("lycoris_proj_out.lokr_w1", "is a LoKr adapter"),
        ("transformer.proj_out.lora_magnitude_vector", "is a DoRA adapter"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "adapts a text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "adapts a text encoder"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, message):
    file = tmp_path / "lora.safetensors"
    save_file({name: np.zeros((4, 8), np.float32), "x.alpha": np.array(4.0)}, file)
    with pytest.raises(ValueError, match=message):
        lora_files.read_spec(file)


def test_every_file_names_its_base(written):
    root, *_ = written
    for folder in FILES:
        assert lora_files.read_spec(root / folder).base == "somewhere/model"
    file = root / "diffusers" / lora_files.DIFFUSERS_FILE
    header = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8.0})
    save_file(load_file(file), file, metadata={lora_files.HEADER: header})
    assert lora_files.read_spec(file).base == "somewhere/model"  # as PEFT's beside it says
    (root / "peft" / "adapter_config.json").unlink()
    assert lora_files.read_spec(file).base == ""


def test_factors_that_do_not_fit_are_one_error(tmp_path):
    shapes, _ = shapes_of(LoRASpec(4, 8.0, ("ff.net.0.proj", "proj_out")))
    file, *_ = lora_files.write(
        random_factors(shapes), LoRASpec(4, 8.0, JOINT_ATTENTION), tmp_path, "model"
    )
    wrong_rank, _ = shapes_of(LoRASpec(2, 8.0, ("ff.net.2", "proj_out")))
    with pytest.raises(ValueError) as caught:
        lora_files.read(file, wrong_rank)
    message = str(caught.value)
    for row in range(3):
        for factor in "AB":
            module = f"transformer_blocks.{row}.ff.net"
            assert f"'{module}.0.proj.lora_{factor}.weight'" in message.split("not in it")[1]
            assert f"'{module}.2.lora_{factor}.weight'" in message.split("not in it")[0]
    misshapen = message.split("misshapen")[1]
    assert "proj_out.lora_A.weight: file (4, 16), model (2, 16)" in misshapen
    assert "proj_out.lora_B.weight: file (64, 4), model (64, 2)" in misshapen
    assert "Set lora.rank and lora.targets" in misshapen
