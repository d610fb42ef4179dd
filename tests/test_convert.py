"""Checkpoints in diffusers layout: what is read, what is refused, and what it costs."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flowgrpo_jax.models import convert, sd3
from flowgrpo_jax.models.layers import functional
from flowgrpo_jax.models.sd3.architecture import PUBLISHED
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.models.vae import VAE, VAEConfig
from flowgrpo_jax.models.weight_files import component_files

MEDIUM = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"].transformer
LARGE = PUBLISHED["stabilityai/stable-diffusion-3.5-large"].transformer
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


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(MMDiT, SMALL)


@pytest.fixture(scope="module")
def tensors(shapes):
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


# ------------------------------------------------------------------------------------- what is read


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


def test_absent_files(shapes, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a model directory in dif"):
        convert.load(tmp_path / "nowhere", shapes)
    with pytest.raises(FileNotFoundError, match=r"lacks any .safetensors file: download the comp"):
        convert.load(tmp_path, shapes)


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


def test_a_file_that_was_cut_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": np.zeros((8, 8), np.float32)}, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*again"):
        convert.load(tmp_path, {})
