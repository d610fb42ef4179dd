"""The adapter: its start, its targets, its files, and what PEFT and diffusers make of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scipy import stats

from flowgrpo_jax.models import lora, sd3
from flowgrpo_jax.models.architecture import PUBLISHED
from flowgrpo_jax.models.layers import Linear, LoRAParam, functional
from flowgrpo_jax.models.lora import JOINT_ATTENTION, LoRASpec
from flowgrpo_jax.models.mmdit import MMDiT, MMDiTConfig

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
    "SD3's": LoRASpec(rank=4, alpha=8.0),
    "chosen": LoRASpec(3, 7.0, ("attn2.to_v", "ff.net.0.proj", "ff_context.net.2", "proj_out")),
}
FILES = {
    "diffusers": lora.DIFFUSERS_FILE,
    "peft": lora.PEFT_FILE,
    "comfyui": lora.COMFYUI_FILE,
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
    factors = lora.init(jax.random.key(0), shapes_of(LoRASpec(rank=8))[0])
    a = [np.asarray(v).reshape(-1, 8) for k, v in factors.items() if k.endswith("lora_a")]
    b = [v for k, v in factors.items() if k.endswith("lora_b")]
    assert len(a) == len(b) and not any(np.any(x) for x in b)
    drawn = np.concatenate(a)
    assert stats.kstest(8 * drawn.ravel(), "norm").pvalue > 0.01
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # no two factors or layers alike


def test_start_is_what_peft_starts_with(checkpoint):
    _, theirs = torch_adapter(checkpoint, LoRASpec(8, 8.0))
    a = np.concatenate([np.ravel(v) for k, v in theirs.items() if "lora_A" in k])
    assert stats.kstest(8 * a, "norm").pvalue > 0.01
    assert not any(v.any() for k, v in theirs.items() if "lora_B" in k)


def test_published_sizes():
    """Rank 32 on the joint attention of the two full-size models."""
    for name, linears, parameters in (("medium", 191, 18_776_064), ("large", 303, 47_161_344)):
        config = PUBLISHED[f"stabilityai/stable-diffusion-3.5-{name}"].transformer
        shapes = shapes_of(LoRASpec(), config)[0]
        names = lora.to_torch({k: np.broadcast_to(0, v.shape) for k, v in shapes.items()})
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
    ours = lora.to_torch(random_factors(model.lora_shapes))
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
        shapes_of(LoRASpec(targets=("to_", "attn.to_q", "attn.to_x")))
    with pytest.raises(ValueError, match=r"\['proj'\] match pos_embed.proj, a convolution in the"):
        shapes_of(LoRASpec(targets=("proj",)))


# ---------------------------------------------------------------------------- files


def test_files_read_back_as_written(tmp_path):
    for spec in (LoRASpec(4, 8.0), LoRASpec(3, 7.0, ("ff.net.0.proj", "proj_out"))):
        shapes, _ = shapes_of(spec)
        factors = random_factors(shapes)
        written = lora.write(factors, spec, tmp_path, "somewhere/model")
        assert written == [tmp_path / folder / name for folder, name in FILES.items()]
        for path in (tmp_path, *(tmp_path / folder for folder in FILES), *written):
            file, found = lora.read_spec(path)
            assert (found.rank, found.alpha) == (spec.rank, spec.alpha)
            assert set(found.targets) == set(spec.targets)
            assert_same(lora.read(file, shapes), factors)


def test_files_without_what_they_need_are_refused(tmp_path):
    spec = LoRASpec(4, 8.0)
    shapes, _ = shapes_of(spec)
    with pytest.raises(FileNotFoundError, match=f"no LoRA at {tmp_path}: looked for "):
        lora.read_spec(tmp_path)
    file, *_ = lora.write(random_factors(shapes), spec, tmp_path, "model")
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match="has no lora_adapter_metadata header, so its alpha is unk"
    ):
        lora.read_spec(file)

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
            lora.read_spec(file)


def test_factors_that_do_not_fit_are_one_error(tmp_path):
    shapes, _ = shapes_of(LoRASpec(4, 8.0, ("ff.net.0.proj", "proj_out")))
    file, *_ = lora.write(random_factors(shapes), LoRASpec(4, 8.0), tmp_path, "model")
    wrong_rank, _ = shapes_of(LoRASpec(2, 8.0, ("ff.net.2", "proj_out")))
    with pytest.raises(ValueError) as caught:
        lora.read(file, wrong_rank)
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
    """For one call of the transformer: latents, sigma, text states, pooled states."""
    rng = np.random.default_rng(0)
    channels = model.latent_shape(model.default_size, model.default_size)[-1]
    shapes = ((2, 6, 8, channels), (2,), (2, 5, 64), (2, 40))
    x, _, tokens, pooled = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x, np.array([0.9, 0.2], np.float32), tokens, pooled


def their_velocity(transformer, x, sigma, tokens, pooled):
    from torch_models import channels_first, channels_last, torch

    with torch.no_grad():
        v = transformer(
            channels_first(x),
            torch.tensor(tokens),
            torch.tensor(pooled),
            torch.tensor(1000 * sigma),
        )
    return channels_last(v[0])


@pytest.mark.parametrize("case", SPECS)
def test_exports_act_in_diffusers_and_peft_as_here(checkpoint, pipeline, tmp_path, case):
    from torch_models import TOLERANCE, diffusers, worst

    peft = pytest.importorskip("peft")
    spec = SPECS[case]
    model = sd3.load(checkpoint, lora_spec=spec)
    given, factors = inputs(model), random_factors(model.lora_shapes)
    velocity = jax.jit(model.velocity)
    ours = velocity(factors, model.base, *given)
    base = their_velocity(pipeline.transformer, *given)
    assert worst(velocity(lora.reference(factors), model.base, *given), base) <= TOLERANCE
    assert worst(ours, base) > 0.01
    lora.write(factors, spec, tmp_path, str(checkpoint))

    def fresh():
        return diffusers.SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")

    in_peft = peft.PeftModel.from_pretrained(fresh(), tmp_path / "peft")
    assert worst(ours, their_velocity(in_peft, *given)) <= TOLERANCE
    parts = {**pipeline.components, "transformer": fresh()}
    in_diffusers = diffusers.StableDiffusion3Pipeline(**parts)
    in_diffusers.load_lora_weights(tmp_path / "diffusers")
    assert worst(ours, their_velocity(in_diffusers.transformer, *given)) <= TOLERANCE
    patched = fresh()
    patch_as_comfyui(patched, load_file(tmp_path / "comfyui" / lora.COMFYUI_FILE))
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
        file, found = lora.read_spec(tmp_path / folder)
        assert (found.rank, found.scale) == (3, 7 / 3)
        factors = lora.read(file, model.lora_shapes)
        assert worst(jax.jit(model.velocity)(factors, model.base, *given), wanted) <= TOLERANCE
