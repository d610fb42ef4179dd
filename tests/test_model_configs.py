"""A model's configs, without its weights: what they may say, and what is refused by name."""

import dataclasses
import json
import shutil

import pytest

from flowgrpo_jax.models import directories
from flowgrpo_jax.models.sd3 import architecture
from flowgrpo_jax.models.sd3.tokenizers import Tokenizers

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def copy(tmp_path):
    """The configs of a bundled model."""
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


@pytest.mark.parametrize("value", [None, 0, -1.0, "3.0", True, float("nan"), float("inf")])
def test_a_shift_that_is_no_number_above_zero_is_refused(copy, value):
    change(copy, "scheduler", shift=value)
    with pytest.raises(ValueError, match=r"scheduler_config.json: shift is .* above 0; the SD3"):
        architecture.read(copy)


def test_a_scheduler_without_a_shift_has_that_of_diffusers(copy):
    diffusers = pytest.importorskip("diffusers")
    (file,) = (copy / "scheduler").glob("*config.json")
    fields = json.loads(file.read_text())
    del fields["shift"]
    file.write_text(json.dumps(fields))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(copy / "scheduler")
    assert architecture.read(copy).shift == theirs.shift


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("vae", "latent_channels", None),
        ("vae", "block_out_channels", None),
        ("vae", "block_out_channels", [16, "16", 32, 64]),
        ("vae", "scaling_factor", "1.5"),
        ("vae", "use_quant_conv", 1),
        ("transformer", "num_layers", 6.0),
        ("transformer", "num_layers", True),
        ("transformer", "dual_attention_layers", None),
        ("text_encoder", "eos_token_id", None),
        ("text_encoder_3", "d_model", None),
    ],
)
def test_a_field_of_another_type_is_named(copy, part, field, value):
    change(copy, part, **{field: value})
    with pytest.raises(ValueError, match=f"{part}/config.json: {field} is .*, it must be of the"):
        architecture.read(copy)


def test_fields_may_be_null_where_the_libraries_say_so(copy):
    change(copy, "vae", shift_factor=None, scaling_factor=1)
    change(copy, "transformer", qk_norm=None, out_channels=None)
    parts = architecture.read(copy)
    assert parts.vae.shift_factor is None and parts.transformer.qk_norm is None


@pytest.mark.parametrize("file", ["vae/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_no_object_is_named(copy, file):
    (copy / file).write_text("[]")
    with pytest.raises(ValueError, match=f"{file} holds a JSON list, it must hold an object"):
        architecture.read(copy)


@pytest.mark.parametrize(
    "part, field, value, message",
    [
        ("transformer", "in_channels", 4, "in_channels of the transformer is 4, but latent_chan"),
        ("transformer", "out_channels", 32, "is 16, but its out_channels is 32"),
        ("vae", "latent_channels", 4, "latent_channels of the vae is 4"),
        ("vae", "in_channels", 4, "in_channels of the vae is 4, but the channels of a picture is"),
        ("vae", "out_channels", 1, "out_channels of the vae is 1, but the channels of a picture"),
        ("text_encoder", "projection_dim", 96, "is 128, but the sum of the projection_dim of"),
        ("text_encoder_2", "projection_dim", 96, "text_encoder and text_encoder_2 is 160"),
        ("text_encoder_2", "hidden_size", 96, "is 128, but the hidden_size of .* sum up to 160"),
        ("text_encoder_3", "d_model", 64, "is 128, but d_model of text_encoder_3 is 64"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(copy, part, field, value, message):
    change(copy, part, **{field: value})
    with pytest.raises(ValueError, match=f"the parts of {copy} do not fit each other: .*{message}"):
        architecture.read(copy)
    if part == "text_encoder_3":  # which is not read
        assert architecture.read(copy, t5=False).text_encoder_3 is None


@pytest.mark.parametrize("name", architecture.PUBLISHED)
def test_the_parts_of_the_published_models_fit(name):
    assert not architecture.contradictions(architecture.PUBLISHED[name])


@pytest.mark.parametrize(
    "part, field, value, message",
    [
        ("text_encoder", "eos_token_id", 7, "of tokenizer is 610, but eos_token_id of its"),
        ("text_encoder_2", "vocab_size", 600, "tokenizer_2 has 611 tokens, but vocab_size of .*60"),
        ("text_encoder_3", "vocab_size", 100, "tokenizer_3 has 129 tokens, but vocab_size of .*10"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_encoder_is_refused(part, field, value, message):
    directory = directories.resolve("shapes")
    tokenizers, parts = Tokenizers.load(directory), architecture.read(directory)
    encoders = {name: getattr(parts, name) for name in ENCODERS}
    tokenizers.check(*encoders.values(), directory)
    encoders[part] = dataclasses.replace(encoders[part], **{field: value})
    with pytest.raises(ValueError, match=f"do not fit each other: .*{message}"):
        tokenizers.check(*encoders.values(), directory)
    if field == "eos_token_id":  # the wrong id of older files is none
        encoders[part] = dataclasses.replace(encoders[part], eos_token_id=2)
        tokenizers.check(*encoders.values(), directory)


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
