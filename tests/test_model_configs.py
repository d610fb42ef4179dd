"""A model's configs, without its weights: what they may say, and what is refused by name."""

import json
import shutil

import pytest

from flowgrpo_jax.models import architecture, directories


@pytest.fixture
def copy(tmp_path):
    """The configs of a model in the box."""
    for file in directories.resolve("shapes").rglob("*config.json"):
        target = tmp_path / file.parent.name / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return tmp_path


def change(directory, part, **fields):
    (file,) = (directory / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", directories.BUNDLED)
def test_the_models_in_the_box_are_read(name):
    assert architecture.read(directories.resolve(name)).shift == 3.0


# As diffusers 0.42 saves FlowMatchEulerDiscreteScheduler(shift=3.0).
SAVED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.42.1",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def test_a_scheduler_that_leaves_the_fields_unset(copy):
    change(copy, "scheduler", **SAVED | {"shift": 5})
    assert architecture.read(copy).shift == 5.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dynamic_shifting", True),
        ("shift_terminal", 0.1),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("num_train_timesteps", 500),
        ("_class_name", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_of_another_schedule_is_refused(copy, field, value):
    change(copy, "scheduler", **{field: value})
    with pytest.raises(ValueError, match=f"scheduler_config.json: {field}={value!r} .*only"):
        architecture.read(copy)


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3),
    ],
)
def test_an_autoencoder_of_other_layers_is_refused(copy, field, value):
    change(copy, "vae", **{field: value})
    with pytest.raises(ValueError, match=rf"vae/config.json: {field}=.* is not supported, only"):
        architecture.read(copy)


def test_an_autoencoder_may_leave_them_out(copy):
    file = copy / "vae" / "config.json"
    fields = json.loads(file.read_text())
    for name in ("act_fn", "down_block_types", "up_block_types"):
        del fields[name]
    file.write_text(json.dumps(fields))
    assert architecture.read(copy) == architecture.read(directories.resolve("shapes"))
