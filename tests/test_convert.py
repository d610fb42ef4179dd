"""Checkpoints in diffusers layout: names and shapes there and back, and what reading them costs."""

import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weights_on_disk import COMPONENTS, assert_equal, shapes_of, write

from flowgrpo_jax.models import convert, sd3
from flowgrpo_jax.models.sd3.architecture import PUBLISHED
from flowgrpo_jax.models.sd3.mmdit import MMDiT
from flowgrpo_jax.models.vae import VAE, VAEConfig

MEDIUM = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"].transformer
LARGE = PUBLISHED["stabilityai/stable-diffusion-3.5-large"].transformer


def test_every_component_goes_in_and_out_unchanged(checkpoint):
    """What torch wrote, read by us and named back."""
    model = sd3.load(checkpoint)
    for name in COMPONENTS:
        (file,) = (checkpoint / name).glob("*.safetensors")
        params = (model.params | model.read_text())[name]
        assert_equal(convert.to_torch_names(params), load_file(file))


def test_what_we_save_loads_in_diffusers(checkpoint, tmp_path):
    from torch_models import diffusers

    model = sd3.load(checkpoint)
    classes = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    for name, kind in classes.items():
        (tmp_path / name).mkdir()
        shutil.copy(checkpoint / name / "config.json", tmp_path / name)
        convert.save(model.params[name], tmp_path / name / "diffusion_pytorch_model.safetensors")
        ours, theirs = (
            getattr(diffusers, kind).from_pretrained(root / name).state_dict()
            for root in (tmp_path, checkpoint)
        )
        assert_equal(
            {k: v.numpy() for k, v in ours.items()}, {k: v.numpy() for k, v in theirs.items()}
        )


def test_names_and_back(shapes, tensors):
    params = convert.from_torch_names(tensors, shapes)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in shapes.items()}
    assert_equal(convert.to_torch_names(params), tensors)
    row = params["transformer_blocks/2:3/attn/to_add_out/kernel"][0, 5]  # one input, all outputs
    np.testing.assert_array_equal(row, tensors["transformer_blocks.2.attn.to_add_out.weight"][:, 5])


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",), None])
def test_a_tied_table_is_read_under_either_name(checkpoint, tmp_path, names):
    """T5's, as transformers does: `shared.weight` counts where both are there."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "text_encoder_3").glob("*.safetensors")
    tensors = load_file(file)
    table = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    both = {"shared.weight": table, "encoder.embed_tokens.weight": 0 * table}
    tensors |= both if names is None else dict.fromkeys(names, table)
    save_file(tensors, file, metadata={"format": "pt"})
    read = sd3.load(tmp_path).read_text()["text_encoder_3"]
    np.testing.assert_array_equal(read["shared/embedding"], table)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_precision(shapes, tensors, tmp_path, stored, dtype):
    """Whatever the file holds, the asked dtype arrives, rounded once."""
    on_disk = {k: v.astype(stored) for k, v in tensors.items()}
    write(tmp_path, on_disk)
    params = convert.load(tmp_path, shapes, dtype=dtype)
    assert_equal(convert.to_torch_names(params), {k: v.astype(dtype) for k, v in on_disk.items()})


def test_parameters_live_where_they_are_told_to(shapes, tensors, tmp_path):
    """Stacked ones too, which are filled layer by layer."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def place(path, leaf):
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "d"))

    write(tmp_path, tensors)
    params = convert.load(tmp_path, shapes, place=place)
    assert {k: v.sharding for k, v in params.items()} == {k: place(k, shapes[k]) for k in shapes}


def test_save_casts(shapes, tensors, tmp_path):
    convert.save(convert.from_torch_names(tensors, shapes), tmp_path / "x", dtype=np.float16)
    assert_equal(load_file(tmp_path / "x"), {k: v.astype(np.float16) for k, v in tensors.items()})
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # without it diffusers refuses the file


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("source", ["state dict", "folder"])
def test_all_that_does_not_fit_is_one_error(shapes, tensors, tmp_path, source):
    broken = dict(tensors)
    del broken["proj_out.bias"], broken["transformer_blocks.1.attn2.to_q.weight"]
    broken["transformer_blocks.2.attn2.to_q.weight"] = np.zeros((16, 16), np.float32)
    broken["context_embedder.weight"] = broken["context_embedder.weight"].T.copy()
    broken["pos_embed.proj.weight"] = np.zeros((16, 16, 4, 4), np.float32)
    broken["allowed"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as caught:
        if source == "folder":
            write(tmp_path, broken, count=2)
            convert.load(tmp_path, shapes, ignore=["allowed"])
        else:
            convert.from_torch_names(broken, shapes, ignore=["allowed"])
    head, missing, extra, misshapen = str(caught.value).splitlines()
    assert head.startswith(str(tmp_path) if source == "folder" else "state dict")
    wanted = "missing (2): proj_out.bias, transformer_blocks.1.attn2.to_q.weight"
    assert missing.strip() == wanted
    assert extra.strip() == "not in the model (1): transformer_blocks.2.attn2.to_q.weight"
    assert misshapen.strip() == (
        "misshapen (2): context_embedder.weight: file (20, 16), model (16, 20), "
        "pos_embed.proj.weight: file (16, 16, 4, 4), model (16, 16, 2, 2)"
    )


# ------------------------------------------------------------------------------------ what it costs


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    """numpy's own count for the host; JAX's for the device, where only the result may pile up."""
    layers, tensor = 24, 4 * 256 * 512
    shapes = {"a/0:24/kernel": jax.ShapeDtypeStruct((layers, 256, 512), jnp.float32)}
    write(tmp_path, {f"a.{i}.weight": np.zeros((512, 256), np.float32) for i in range(layers)})
    before, on_device = sum(x.nbytes for x in jax.live_arrays()), []

    def place(path, leaf):  # asked before each tensor is read
        on_device.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    tracemalloc.start()
    params = convert.load(tmp_path, shapes, dtype=jnp.bfloat16, place=place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = sum(x.nbytes for x in params.values())
    assert result == layers * tensor / 2 and len(on_device) == layers
    assert peak < 3 * tensor
    assert max(on_device) <= result + tensor


# --------------------------------------------------------------------------------------- real sizes


@pytest.mark.parametrize(
    "config, parameters, keys",
    [(MEDIUM, 2_243_171_520, 909), (LARGE, 8_056_627_520, 1227)],
    ids=["medium", "large"],
)
def test_published_sizes(config, parameters, keys):
    """Parameter counts leave out the position grid, which torch keeps as a buffer."""
    shapes = shapes_of(MMDiT, config)
    assert sum(len(convert.torch_names(path)) for path in shapes) == keys
    del shapes["pos_embed/pos_embed"]
    assert sum(int(np.prod(s.shape)) for s in shapes.values()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_encoders(name):
    """Parameter counts of CLIP-L and bigG with their projections, and of T5 v1.1-XXL's encoder."""
    model = sd3.describe(PUBLISHED[name], dtype=jnp.bfloat16)
    params = model.params | model.text_shapes
    counts = {part: sum(x.size for x in shapes.values()) for part, shapes in params.items()}
    assert counts["text_encoder"] == 123_650_304
    assert counts["text_encoder_2"] == 694_659_840
    assert counts["text_encoder_3"] == 4_762_310_656
    assert {x.dtype for x in params["text_encoder_3"].values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in params["vae"].values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "config, model_class, kind",
    [
        (MEDIUM, MMDiT, "SD3Transformer2DModel"),
        (LARGE, MMDiT, "SD3Transformer2DModel"),
        (VAEConfig(), VAE, "AutoencoderKL"),
    ],
    ids=["medium", "large", "vae"],
)
def test_published_names_and_shapes(config, model_class, kind):
    """Every name and shape of the full-size models, which torch builds here without memory."""
    from torch_models import diffusers, torch

    options = dict(vars(config))
    if kind == "AutoencoderKL":
        options |= dict(down_block_types=["DownEncoderBlock2D"] * 4)
        options |= dict(up_block_types=["UpDecoderBlock2D"] * 4)
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**options).state_dict()
    expected = convert._expected(shapes_of(model_class, config), patch_size=2)
    assert {k: v[-1] for k, v in expected.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
