"""The adapter in torch: what PEFT, diffusers and ComfyUI make of it, and what they start with."""

import jax
import numpy as np
import pytest
from lora_factors import random_factors
from safetensors.numpy import load_file
from scipy import stats

from flowgrpo_jax.models import lora, lora_files, peft_config, sd3
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.sd3 import JOINT_ATTENTION

SPECS = {
    "SD3's": LoRASpec(4, 8.0, JOINT_ATTENTION),
    "chosen": LoRASpec(3, 7.0, ("attn2.to_v", "ff.net.0.proj", "ff_context.net.2", "proj_out")),
}


# -------------------------------------------------------------------------------- start and targets


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


def test_start_is_what_peft_starts_with(checkpoint):
    _, theirs = torch_adapter(checkpoint, LoRASpec(8, 8.0, JOINT_ATTENTION))
    a = np.concatenate([np.ravel(v) for k, v in theirs.items() if "lora_A" in k])
    assert stats.kstest(8 * a, "norm").pvalue > 0.01
    assert not any(v.any() for k, v in theirs.items() if "lora_B" in k)


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


# ------------------------------------------------------------------------ what others make of files


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
