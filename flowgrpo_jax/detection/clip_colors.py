"""GenEval's colour classifier: CLIP ViT-L/14, zero-shot, through transformers. Needs torch.

Source: djghosh13/geneval `evaluate_images.py`: ten colours, three sentences each, the text states
normalised, averaged and normalised again; the object cut out on grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.detection.colors import COLORS, Classifier, Crop, on_grey
from flowgrpo_jax.models.towers.preprocess import MEAN, STD, to_even

WEIGHTS = "openai/clip-vit-large-patch14"
SENTENCES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def load(path: str | None = None, device: str | None = None) -> Classifier:
    """Load the classifier.

    Args:
      path: a local directory or a hub id of a transformers CLIP; None for ViT-L/14 of OpenAI.
      device: a torch device; None is CUDA where present, else the CPU.

    Raises ImportError where torch is missing, FileNotFoundError where the weights are.
    """
    try:
        import torch
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "colors='clip' needs torch: `pip install 'flowgrpo_jax[torch]'`, or set"
            " reward.options.geneval.colors=pixels, an approximation without a network"
        ) from error
    try:
        model: Any = CLIPModel.from_pretrained(path or WEIGHTS)
        tokenizer = CLIPTokenizer.from_pretrained(path or WEIGHTS)
    except OSError as error:
        raise FileNotFoundError(
            f"CLIP weights {path or WEIGHTS!r} are neither a local directory nor could they be"
            f" downloaded ({error}). Set reward.options.geneval.clip_path to a local copy"
        ) from error
    return classifier(
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer
    )


def classifier(model: Any, tokenizer: Any) -> Classifier:
    """The classifier around a torch `CLIPModel`, where that lies, and its tokenizer."""
    compare = similarities(model, tokenizer)

    def classify(crops: Sequence[Crop]) -> list[str]:
        return [COLORS[i] for i in compare(crops).argmax(1)] if crops else []

    return classify


def similarities(model: Any, tokenizer: Any) -> Any:
    """compare(N crops) -> cosine with each colour of its class, f32 [N, 10]."""
    import torch

    model = model.eval()
    side = model.config.vision_config.image_size

    @cache
    def texts(cls: str) -> Any:
        """The colours' states, [10, E]; the same for every picture."""
        written = [s.format(color, cls) for color in COLORS for s in SENTENCES]
        tokens = tokenizer(written, padding=True, return_tensors="pt").to(model.device)
        states = model.get_text_features(**tokens).pooler_output
        states = torch.nn.functional.normalize(states, dim=-1)
        states = states.reshape(len(COLORS), len(SENTENCES), -1).mean(1)
        return torch.nn.functional.normalize(states, dim=-1)

    def compare(crops: Sequence[Crop]) -> np.ndarray:
        with torch.inference_mode():
            pixels = np.stack([pixel_values(on_grey(crop), side) for crop in crops])
            features = model.get_image_features(torch.tensor(pixels, device=model.device))
            states = torch.nn.functional.normalize(features.pooler_output, dim=-1)
            with_colors = torch.stack([texts(crop.cls) for crop in crops])
            return (with_colors @ states[..., None])[..., 0].float().cpu().numpy()

    return compare


def pixel_values(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [h, w, 3] -> f32 [3, side, side]: shorter edge to `side`, the middle, normalised.

    Sizes and places are those of open_clip, that is of torchvision's Resize and CenterCrop.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    fitted = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (to_even(n - side) for n in size)
    middle = np.asarray(fitted.crop((left, top, left + side, top + side)), np.float32)
    return ((middle / 255 - MEAN) / STD).transpose(2, 0, 1)
