"""Tiny torch reward towers with random weights, to compare ours with.

CLIP is transformers' own. open_clip's CLIP, the aesthetic head and ImageReward are put together
here from torch's and transformers' modules, under the names of their published checkpoints.
"""

from collections import OrderedDict

import numpy as np
from PIL import Image
from torch_models import WORDS, torch, transformers, varied

from flowgrpo_jax.models.towers.preprocess import MEAN, STD
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

TEXT = dict(
    vocab_size=sizes(WORDS)[0],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    bos_token_id=sizes(WORDS)[0] - 2,
    eos_token_id=sizes(WORDS)[0] - 1,
    pad_token_id=1,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
PROJECTION = 20


def dual_config(act="quick_gelu", **text):
    return transformers.CLIPConfig(
        text_config={**TEXT, "hidden_act": act, **text},
        vision_config={**VISION, "hidden_act": act},
        projection_dim=PROJECTION,
    )


def torch_dual(act="quick_gelu", **text):
    return varied(lambda: transformers.CLIPModel(dual_config(act, **text)))


# ------------------------------------------------------------------------------------ open_clip


class Block(torch.nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        fc, proj = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
        self.mlp = torch.nn.Sequential(
            OrderedDict([("c_fc", fc), ("gelu", torch.nn.GELU()), ("c_proj", proj)])
        )

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(torch.nn.Module):
    def __init__(self, width, inner, heads, layers):
        super().__init__()
        blocks = [Block(width, inner, heads) for _ in range(layers)]
        self.resblocks = torch.nn.ModuleList(blocks)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


def sizes_of(config):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return [config[name] for name in names]


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        width, patch = VISION["hidden_size"], VISION["patch_size"]
        tokens = (VISION["image_size"] // patch) ** 2 + 1
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(torch.randn(tokens, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = Transformer(*sizes_of(VISION))
        self.proj = torch.nn.Parameter(torch.randn(width, PROJECTION))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenCLIP(torch.nn.Module):
    """With the names of open_clip's CLIP, on torch's fused attention as there. GELU: ViT-H/14."""

    def __init__(self):
        super().__init__()
        width = TEXT["hidden_size"]
        self.visual = Visual()
        self.transformer = Transformer(*sizes_of(TEXT))
        self.token_embedding = torch.nn.Embedding(TEXT["vocab_size"], width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(LENGTH, width))
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, PROJECTION))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.1))

    def text(self, ids):
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def torch_open_clip():
    return varied(OpenCLIP)


# --------------------------------------------------------------------------------- ImageReward


def torch_head(width):
    """The aesthetic predictor's `layers`."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    torch.manual_seed(1)
    model = torch.nn.Module()
    model.layers = torch.nn.Sequential(
        *(linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2)),
        *(linear(128, 64), dropout(0.1), linear(64, 16), linear(16, 1)),
    )
    return model.eval()


BLIP_TEXT = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    layer_norm_eps=1e-12,
)
BLIP_VISION = dict(vision_width=24, vision_layers=3, vision_heads=2, image_size=32, patch_size=16)
RENAMED = {  # transformers' BlipVisionModel -> BLIP's own, timm-like
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}


class TorchImageReward:
    """transformers' two halves of BLIP and the head, as ImageReward joins them."""

    def __init__(self):
        vision = transformers.BlipVisionConfig(
            hidden_size=BLIP_VISION["vision_width"],
            intermediate_size=4 * BLIP_VISION["vision_width"],
            num_hidden_layers=BLIP_VISION["vision_layers"],
            num_attention_heads=BLIP_VISION["vision_heads"],
            image_size=BLIP_VISION["image_size"],
            patch_size=BLIP_VISION["patch_size"],
            layer_norm_eps=1e-6,
            hidden_act="gelu",
            initializer_range=0.1,  # 1e-10 by default: the text would not see the image
        )
        text = transformers.BlipTextConfig(
            **BLIP_TEXT,
            encoder_hidden_size=BLIP_VISION["vision_width"],
            hidden_act="gelu",
            initializer_range=0.15,
        )
        self.vision = varied(lambda: transformers.BlipVisionModel(vision))
        create = transformers.BlipTextModel
        self.text = varied(lambda: create(text, add_pooling_layer=False))
        self.head = torch_head(BLIP_TEXT["hidden_size"])

    def __call__(self, ids, mask, pixels):
        with torch.no_grad():
            image = self.vision(pixel_values=pixels).last_hidden_state
            seen = dict(
                encoder_hidden_states=image, encoder_attention_mask=torch.ones(image.shape[:2])
            )
            states = self.text(input_ids=ids, attention_mask=mask, is_decoder=False, **seen)
            raw = self.head.layers(states.last_hidden_state[:, 0])
        return ((raw - 0.16717362830052426) / 1.0333394966054072)[:, 0]

    def state_dict(self):
        """With the published names, and with two of the parts that a score does not need."""
        out = {}
        for name, x in self.vision.state_dict().items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            out[f"blip.visual_encoder.{name}"] = x
        out |= {f"blip.text_encoder.{name}": x for name, x in self.text.state_dict().items()}
        out["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
        out |= {f"blip.{name}_proj.weight": torch.zeros(2, 2) for name in ("vision", "text")}
        return out | {f"mlp.{name}": x for name, x in self.head.state_dict().items()}


# -------------------------------------------------------------------------------------- images


def pictures(n=4, height=40, width=56):
    """Noise over gradients, uint8: every pixel counts, and there is something to smooth."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(y / a + i) * np.cos(x / b) for i, (a, b) in enumerate([(5, 9)] * n)]
    noisy = np.stack(waves)[..., None] + rng.normal(0, 40, (n, height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def pil_pixels(images, size):
    """What Pillow and transformers make of them: a torch tensor [B, 3, size, size]."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    read = processor(images=[Image.fromarray(x) for x in images], return_tensors="pt")
    return read["pixel_values"]


def open_clip_pixels(images, size):
    """What torchvision's Resize, CenterCrop and Normalize make of Pillow's pictures."""
    height, width = images.shape[1:3]
    full = [int(size * side / min(height, width)) for side in (width, height)]
    left, top = (round((side - size) / 2.0) for side in full)
    fitted = [Image.fromarray(x).resize(full, Image.Resampling.BICUBIC) for x in images]
    middle = [np.asarray(x.crop((left, top, left + size, top + size))) for x in fitted]
    return torch.tensor((np.stack(middle) / np.float32(255) - MEAN) / STD).permute(0, 3, 1, 2)


def tensor_pixels(images, size):
    """What torchvision's Resize, CenterCrop and Normalize make of float tensors."""
    x = torch.tensor(images).permute(0, 3, 1, 2) / 255.0
    height, width = x.shape[2:]
    short = min(height, width)
    full = (int(size * height / short), int(size * width / short))
    x = torch.nn.functional.interpolate(
        x, full, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (round((side - size) / 2.0) for side in full)
    x = x[:, :, top : top + size, left : left + size]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
