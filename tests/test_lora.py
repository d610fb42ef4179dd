"""The adapter: its start, its targets, its files, and what PEFT and diffusers make of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scipy import stats

from flowgrpo_jax.models import lora, lora_files, peft_config, sd3
from flowgrpo_jax.models.layers import Linear, LoRAParam, functional
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3 import JOINT_ATTENTION
from flowgrpo_jax.models.sd3.architecture import PUBLISHED
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig

SMALL = MMDiTConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    caption_projection_dim=16,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=3,
)
SPECS = {
    "SD3's": LoRASpec(4, 8.0, JOINT_ATTENTION),
    "chosen": LoRASpec(3, 7.0, ("attn2.to_v", "ff.net.0.proj", "ff_context.net.2", "proj_out")),
}
FILES = {
    "diffusers": lora_files.DIFFUSERS_FILE,
    "peft": lora_files.PEFT_FILE,
    "comfyui": lora_files.COMFYUI_FILE,
}


def shapes_of(spec, config=SMALL):
    """Shapes of the adapter, and of the model without it."""
    module = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    lora.add(module, spec)
    return lora.split(functional(module)[1])


def random_factors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(0.5 * rng.normal(size=v.shape), jnp.float32) for k, v in shapes.items()}


def assert_same(ours, wanted):
    assert set(ours) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name, strict=True)


# ---------------------------------------------------------------------------- start


def test_start_is_drawn_as_pefts_gaussian():
    """A ~ N(0, 1 / rank^2), each factor its own draw; B = 0."""
    factors = lora.init(jax.random.key(0), shapes_of(LoRASpec(8, 16.0, JOINT_ATTENTION))[0])
    a = [np.asarray(v).reshape(-1, 8) for k, v in factors.items() if k.endswith("lora_a")]
    b = [v for k, v in factors.items() if k.endswith("lora_b")]
    assert len(a) == len(b) and not any(np.any(x) for x in b)
    drawn = np.concatenate(a)
    assert stats.kstest(8 * drawn.ravel(), "norm").pvalue > 0.01
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # no two factors or layers alike


def test_start_is_what_peft_starts_with(checkpoint):
    _, theirs = torch_adapter(checkpoint, LoRASpec(8, 8.0, JOINT_ATTENTION))
    a = np.concatenate([np.ravel(v) for k, v in theirs.items() if "lora_A" in k])
    assert stats.kstest(8 * a, "norm").pvalue > 0.01
    assert not any(v.any() for k, v in theirs.items() if "lora_B" in k)


def test_published_sizes():
    """Rank 32 on the joint attention of the two full-size models."""
    for name, linears, parameters in (("medium", 191, 18_776_064), ("large", 303, 47_161_344)):
        config = PUBLISHED[f"stabilityai/stable-diffusion-3.5-{name}"].transformer
        shapes = shapes_of(LoRASpec(32, 64.0, JOINT_ATTENTION), config)[0]
        names = lora_files.to_torch({k: np.broadcast_to(0, v.shape) for k, v in shapes.items()})
        assert len(names) == 2 * linears
        assert sum(x.size for x in names.values()) == parameters


# -------------------------------------------------------------------------- targets


def torch_adapter(checkpoint, spec):
    """A torch transformer with PEFT's own adapter, and that adapter's factors."""
    from torch_models import diffusers, torch

    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        init_lora_weights="gaussian",
    )
    model = peft.get_peft_model(transformer, config)
    factors = peft.get_peft_model_state_dict(model)
    return model, {k.removeprefix("base_model.model."): v for k, v in factors.items()}


@pytest.mark.parametrize(
    "targets",
    [JOINT_ATTENTION, ("to_q", "linear"), ("0.proj", "proj_out", "norm1.linear")],
    ids=str,
)
def test_targets_are_the_modules_that_peft_picks(checkpoint, targets):
    spec = LoRASpec(2, 2.0, targets)
    _, theirs = torch_adapter(checkpoint, spec)
    model = sd3.load(checkpoint, lora_spec=spec)
    ours = lora_files.to_torch(random_factors(model.trained_shapes))
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("padded", [4, 16])
def test_a_merged_adapter_acts_as_one_beside_its_kernel(padded):
    """Rank 1 stays beside these kernels; the same filled up with zeros to more is merged."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 3, 12)), jnp.float32)
    kernel, bias, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((12, 20), (20,), (12, 1), (1, 20))
    )

    def linear(rank, a, b, dtype=jnp.float32):
        module = nnx.eval_shape(lambda: Linear(12, 20, dtype=dtype, rngs=nnx.Rngs(0)))
        module.kernel, module.bias = nnx.Param(kernel), nnx.Param(bias)
        fill = rank - a.shape[1]
        module.lora_a = LoRAParam(jnp.pad(a, ((0, 0), (0, fill))))
        module.lora_b = LoRAParam(jnp.pad(b, ((0, fill), (0, 0))))
        module.lora_scale = 0.7
        return module

    assert not linear(1, a, b).merges() and linear(padded, a, b).merges()
    wanted = np.asarray(x) @ (np.asarray(kernel) + 0.7 * np.asarray(a) @ np.asarray(b)) + bias
    for rank in (1, padded):
        np.testing.assert_allclose(linear(rank, a, b)(x), wanted, rtol=1e-5, atol=1e-5)
    gradients = [
        jax.grad(lambda f, r=rank: jnp.sin(linear(r, *f)(x)).sum())((a, b)) for rank in (1, padded)
    ]
    for one, other in zip(*gradients):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # In half precision 1 + 0.0007 is 1: what is learned must not be added to the kernel.
    first = jnp.zeros((12, 1)).at[0].set(1.0)
    module = linear(padded, first, jnp.full((1, 20), 1e-3), jnp.bfloat16)
    module.kernel, module.bias = nnx.Param(jnp.ones((12, 20))), nnx.Param(jnp.zeros(20))
    learned = module((first - first[::-1]).T)  # rows of the kernel cancel, those of the adapter not
    np.testing.assert_allclose(learned.astype(jnp.float32), 0.7e-3, rtol=0.01)


def test_impossible_targets_are_refused():
    with pytest.raises(ValueError, match=r"LoRA targets \['attn.to_x', 'to_'\] match no linear"):
        shapes_of(LoRASpec(32, 64.0, ("to_", "attn.to_q", "attn.to_x")))
    with pytest.raises(ValueError, match=r"\['proj'\] match pos_embed.proj, a convolution in the"):
        shapes_of(LoRASpec(32, 64.0, ("proj",)))


# ---------------------------------------------------------------------------- files


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
    "start, plain", [("gaussian", True), ("orthogonal", True), ("pissa", False), ("olora", False)]
)
def test_the_starts_that_are_read_are_those_that_leave_peft_its_base(start, plain):
    """In PEFT itself: the weights of a linear before and after it gets an adapter."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
    after = peft.get_peft_model(model, config).base_model.model[0].base_layer.weight
    assert torch.equal(before, after) == plain == (start in peft_config.PLAIN_STARTS)


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


# ---------------------------------------------------------------- what others make of them


def inputs(model):
    """For one call of the transformer: latents, sigma and text."""
    rng = np.random.default_rng(0)
    channels = model.latent_shape(model.default_size, model.default_size)[-1]
    shapes = ((2, 6, 8, channels), (2,), (2, 5, 64), (2, 40))
    x, _, tokens, pooled = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x, np.array([0.9, 0.2], np.float32), {"tokens": tokens, "pooled": pooled}


def their_velocity(transformer, x, sigma, text):
    from torch_models import channels_first, channels_last, torch

    with torch.no_grad():
        v = transformer(
            channels_first(x),
            torch.tensor(text["tokens"]),
            torch.tensor(text["pooled"]),
            torch.tensor(1000 * sigma),
        )
    return channels_last(v[0])


@pytest.mark.parametrize("case", SPECS)
def test_exports_act_in_diffusers_and_peft_as_here(checkpoint, pipeline, tmp_path, case):
    from torch_models import TOLERANCE, diffusers, worst

    peft = pytest.importorskip("peft")
    spec = SPECS[case]
    model = sd3.load(checkpoint, lora_spec=spec)
    given, factors = inputs(model), random_factors(model.trained_shapes)
    velocity = jax.jit(model.velocity)
    ours = velocity(factors, model.base, *given)
    base = their_velocity(pipeline.transformer, *given)
    assert worst(velocity(lora.reference(factors), model.base, *given), base) <= TOLERANCE
    assert worst(ours, base) > 0.01
    lora_files.write(factors, spec, tmp_path, str(checkpoint))

    def fresh():
        return diffusers.SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")

    in_peft = peft.PeftModel.from_pretrained(fresh(), tmp_path / "peft")
    assert worst(ours, their_velocity(in_peft, *given)) <= TOLERANCE
    parts = {**pipeline.components, "transformer": fresh()}
    in_diffusers = diffusers.StableDiffusion3Pipeline(**parts)
    in_diffusers.load_lora_weights(tmp_path / "diffusers")
    assert worst(ours, their_velocity(in_diffusers.transformer, *given)) <= TOLERANCE
    patched = fresh()
    patch_as_comfyui(patched, load_file(tmp_path / "comfyui" / lora_files.COMFYUI_FILE))
    assert worst(ours, their_velocity(patched, *given)) <= TOLERANCE


def patch_as_comfyui(transformer, tensors):
    """What comfy/lora.py and comfy/weight_adapter/lora.py do, of the names that are diffusers':
    W += alpha / rank B A where `MODULE.alpha` is a number, and B A where it is missing."""
    from torch_models import torch

    left = set(tensors)
    for name, weight in transformer.named_parameters():
        module = f"transformer.{name.removesuffix('.weight')}"
        if f"{module}.lora_B.weight" not in tensors:
            continue
        mine = [f"{module}.{part}" for part in ("lora_B.weight", "lora_A.weight", "alpha")]
        b, a = (torch.from_numpy(tensors[key]) for key in mine[:2])
        scale = tensors[mine[2]].item() / len(a) if mine[2] in tensors else 1.0
        with torch.no_grad():
            weight += scale * (b @ a)
        left -= set(mine)
    assert not left  # ComfyUI only warns of "lora key not loaded"


def test_their_files_act_here_as_there(checkpoint, pipeline, tmp_path):
    """Adapters trained elsewhere, saved by PEFT and by diffusers."""
    from torch_models import TOLERANCE, torch, worst

    spec = LoRASpec(3, 7.0, ("attn.to_q", "ff.net.0.proj"))
    theirs, layers = torch_adapter(checkpoint, spec)
    for name, x in layers.items():
        if "lora_B" in name:
            x.copy_(0.5 * torch.randn_like(x))
    theirs.save_pretrained(tmp_path / "peft")
    pipeline.save_lora_weights(
        tmp_path / "diffusers",
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    model = sd3.load(checkpoint, lora_spec=spec)
    given = inputs(model)
    wanted = their_velocity(theirs, *given)
    for folder in ("peft", "diffusers"):
        file, found, _ = lora_files.read_spec(tmp_path / folder)
        assert (found.rank, found.scale) == (3, 7 / 3)
        factors = lora_files.read(file, model.trained_shapes)
        assert worst(jax.jit(model.velocity)(factors, model.base, *given), wanted) <= TOLERANCE
