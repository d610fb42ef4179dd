"""Tiny torch models with random weights, and a whole pipeline of them, to compare ours with.

Importing this skips the importing test where torch or diffusers is absent.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.layers import functional
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
TEXT = "a an three red blue circle circles square squares left of above at cat scatter , 3"
WORDS = TEXT.split()
PROMPTS = ["three red circles left of a blue square", "An UNKNOWN zebra, ö 3!", "a cat " * 90]

CLIP = dict(vocab_size=100, num_attention_heads=4, max_position_embeddings=12, projection_dim=20)
T5 = dict(vocab_size=100, d_ff=48, feed_forward_proj="gated-gelu")
MMDIT = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_projection_dim=16,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=9,
)
VAE = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)


# ------------------------------------------------------------------------------------ the models


def varied(create):
    """A seeded model. Norms and biases would start at 1 and 0, where a mix-up does not show."""
    torch.manual_seed(0)
    model = create()
    for name, x in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            x.data += 0.3 * torch.randn_like(x)
        elif "relative_attention_bias" in name:
            x.data = torch.randn_like(x)
    return model.eval()


def torch_clip(options):
    config = transformers.CLIPTextConfig(bos_token_id=0, pad_token_id=1, **options)
    return varied(lambda: transformers.CLIPTextModelWithProjection(config))


def torch_t5(options):
    return varied(lambda: transformers.T5EncoderModel(transformers.T5Config(**options)))


def torch_mmdit(options):
    return varied(lambda: diffusers.SD3Transformer2DModel(**options))


def torch_vae(options):
    levels = len(options["block_out_channels"])
    blocks = dict(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    return varied(lambda: diffusers.AutoencoderKL(**blocks, **options))


# -------------------------------------------------------------------------------- and ours of them


def worst(ours, theirs) -> float:
    """Largest difference, relative to the largest value (absolute where all are 0)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs.detach().double())
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0)


def abstract(model_class, config, dtype=jnp.float32, **options):
    """(apply, shapes) of one of our models."""
    model = nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0), **options))
    return functional(model)


def port(model_class, config, theirs, dtype=jnp.float32, **options):
    """(apply, params): our model with their weights."""
    apply, shapes = abstract(model_class, config, dtype, **options)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    settings = dict(
        dtype=dtype,
        patch_size=getattr(config, "patch_size", 2),
        ignore=getattr(model_class, "ignored", ()),
    )
    return apply, convert.from_torch_names(tensors, shapes, **settings)


def ported(*args, method="__call__", **options):
    """The same as one function of the model's inputs."""
    apply, params = port(*args, **options)
    return jax.jit(lambda *inputs: apply(params, *inputs, method=method))


def channels_first(x):
    """Our [B, H, W, C] as a torch tensor [B, C, H, W]."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def channels_last(x):
    return x.permute(0, 2, 3, 1)


# --------------------------------------------------------------------------------- the pipeline


def write_pipeline(root: Path) -> None:
    """A tiny StableDiffusion3Pipeline on disk, in diffusers layout: images of 16 pixels."""
    write_tokenizers(root, WORDS, LENGTH)
    clip_size, t5_size = sizes(WORDS)
    clip = {**CLIP, "vocab_size": clip_size, "max_position_embeddings": LENGTH}
    small = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2)
    large = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, hidden_act="gelu")
    clip_l = {**clip, **small, "eos_token_id": clip_size - 1}
    torch_clip(clip_l).save_pretrained(root / "text_encoder")
    torch_clip({**clip, **large, "eos_token_id": 2}).save_pretrained(root / "text_encoder_2")
    t5 = dict(d_model=64, d_kv=8, num_heads=4, num_layers=2)
    torch_t5({**T5, "vocab_size": t5_size, **t5}).save_pretrained(root / "text_encoder_3")
    blocks = dict(num_layers=4, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    widths = dict(joint_attention_dim=64, pooled_projection_dim=40)
    torch_mmdit({**MMDIT, **blocks, **widths}).save_pretrained(root / "transformer")
    torch_vae(VAE).save_pretrained(root / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "scheduler")
    clip_classes = ["CLIPTextModelWithProjection", "CLIPTokenizer"]
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for i, (encoder, tokenizer) in enumerate(
        [clip_classes, clip_classes, ["T5EncoderModel", "T5TokenizerFast"]]
    ):
        suffix = f"_{i + 1}" if i else ""
        components["text_encoder" + suffix] = ["transformers", encoder]
        components["tokenizer" + suffix] = ["transformers", tokenizer]
    index = {"_class_name": "StableDiffusion3Pipeline", **components}
    (root / "model_index.json").write_text(json.dumps(index))
