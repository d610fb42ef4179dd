"""Rendered text: how much of the text that a prompt quotes can be read in its picture.

PP-OCR (the detector and recogniser of PaddleOCR) through RapidOCR, whose wheel brings the models,
on the host's CPU. The rule is that of yifan123/flow_grpo `ocr.py`: the target is what stands
between the first two double quotes of the prompt; target and recognised text lose their spaces,
their case, and differences between code points that look alike (`normalised`); the score is
1 - distance / length of the target, from 0 to 1.

Deviations:

1. Upstream calls the distance 0 when the target occurs anywhere in the recognised text, so that
   pictures full of repeated text score 1. Here what is too much counts; `strict=False` is upstream.
2. A picture that the recogniser fails on is invalid, not 0. A prompt without a quoted text is an
   error when the run starts (`check`).
3. Upstream reads boxes in PaddleOCR's order, which swaps words whose line is not level, and
   compares code points as they are.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.rewards.batch_cache import BatchCache
from flowgrpo_jax.rewards.reading_order import reading_order
from flowgrpo_jax.types import Metadata, Reward

log = logging.getLogger(__name__)

# Signs that look like one of ASCII, which recognisers read in their place.
LOOKALIKES = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\u0060", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\uff0d", "-")
    | dict.fromkeys("\u2044\u2215", "/")
)


def make(
    *,
    strict: bool = True,
    exact: bool = False,
    confidence: float = 0.0,
    upscale: int = 1,
    detector_side: int = 736,
    workers: int | None = None,
) -> Reward:
    """Make the reward.

    Args:
      strict: text that was not asked for costs as much as text that is missing.
      exact: 1 for the wanted text and nothing else, 0 for all others.
      confidence: boxes that are recognised with this confidence or less are not read; 0 to 1.
      upscale: how many times larger, either way, pictures are made first (bicubic).
      detector_side: px, by default RapidOCR's own; pictures whose shorter side is less are enlarged
        to it for the text detector, which takes most of the time, in proportion to its square.
      workers: pictures read at a time, one core each; None: as many as there are cores.

    Raises ImportError without the extra `ocr`.
    """
    if upscale < 1:
        raise ValueError(f"upscale={upscale} must be at least 1, which leaves pictures as they are")
    count = os.cpu_count() or 1 if workers is None else workers
    if count < 1:
        raise ValueError(f"workers={workers} must be at least 1, or None for one a core")
    read = reader(recogniser, confidence, upscale, detector_side, count)

    def reward(
        images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        targets = [target(prompt) for prompt in prompts]
        asked = [i for i, wanted in enumerate(targets) if wanted]
        if len(asked) < len(prompts):
            log.warning(
                "%d of %d prompts have no text in double quotes, such as %r: their images get"
                " weight 0",
                len(prompts) - len(asked),
                len(prompts),
                next(p for p, wanted in zip(prompts, targets) if not wanted),
            )
        scores, valid = np.zeros(len(prompts), np.float32), np.zeros(len(prompts), bool)
        for i, text in zip(asked, read(np.asarray(images)[asked])):
            if text is not None:
                score = similarity(targets[i], normalised(text), strict=strict)
                scores[i] = float(score == 1) if exact else score
                valid[i] = True
        return scores, valid

    reward.check = check  # type: ignore[attr-defined]  # of every prompt, before training
    return reward


def check(record: Metadata) -> None:
    """Raise ValueError for a prompt that does not say in double quotes which text is wanted."""
    prompt = record["prompt"]
    if target(prompt):
        return
    other = next((quote for quote in "\u201c\u201d\u201e\u00ab\u00bb" if quote in prompt), None)
    fix = f'replace {other} by "' if other else 'write it like a sign that says "STOP"'
    raise ValueError(
        f"the prompt {prompt!r} has no text between two straight double quotes, which the reward"
        f" `ocr` looks for in the picture: {fix}"
    )


@functools.cache
def reader(
    recogniser: Callable[..., Callable[[np.ndarray], str]],
    confidence: float,
    upscale: int,
    detector_side: int,
    workers: int,
) -> Callable[[np.ndarray], list[str | None]]:
    """A function from pictures uint8 [B, H, W, 3] to their texts, None where reading failed.

    Rewards with these options share one reader, so that each batch is read only once.
    """
    recogniser(confidence, upscale, detector_side)  # says at once what is missing
    local = threading.local()  # engines keep state between their stages: one for each thread
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")
    kept: BatchCache[list[str | None]] = BatchCache()

    def one(image: np.ndarray) -> str | None:
        if not hasattr(local, "read"):
            local.read = recogniser(confidence, upscale, detector_side)
        try:
            return local.read(image)
        except Exception:
            log.warning("reading a picture failed", exc_info=True)
            return None

    return lambda images: kept(images, "", lambda: list(pool.map(one, images)))


def recogniser(confidence: float, upscale: int, detector_side: int) -> Callable[[np.ndarray], str]:
    """A function from a picture uint8 [H, W, 3] to its text, boxes in reading order."""
    try:
        import onnxruntime  # noqa: F401 - RapidOCR asks for it only when it reads
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            "the reward 'ocr' needs RapidOCR: pip install 'flowgrpo_jax[ocr]'"
        ) from error
    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # filtered below, where equality is excluded as upstream
            "Global.use_cls": False,  # no text is upside down, as upstream
            "Det.limit_side_len": detector_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image: np.ndarray) -> str:
        large = enlarged(image, upscale)
        found: Any = engine(np.ascontiguousarray(large[..., ::-1]))  # RapidOCR takes BGR
        if not found.txts:
            return ""
        order = [i for i in reading_order(found.boxes) if found.scores[i] > confidence]
        return " ".join(found.txts[i] for i in order)

    return read


def enlarged(image: np.ndarray, times: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] -> [times H, times W, 3], bicubic."""
    if times == 1:
        return image
    height, width, _ = image.shape
    size = width * times, height * times
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def target(prompt: str) -> str:
    """Return the text between the first two double quotes, normalised; "" if there is none."""
    parts = prompt.split('"')
    return normalised(parts[1]) if len(parts) > 2 else ""


def normalised(text: str) -> str:
    """Return the text without spaces and case, with one code point for those that look alike.

    Recognisers are unreliable on spaces and case. Compatible forms become one (Unicode's NFKC): a
    letter and its combining accent, ligatures, full width, an ellipsis and three points, a fraction
    and its digits. So do quotes and dashes that look alike. Invisible signs, such as soft hyphens,
    are dropped.
    """
    seen = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    folded = unicodedata.normalize("NFKC", seen.translate(LOOKALIKES)).casefold()
    return "".join(unicodedata.normalize("NFKC", folded).translate(LOOKALIKES).split())


def similarity(wanted: str, found: str, *, strict: bool) -> float:
    """1 - edit distance / length of `wanted`, at least 0. Both are normalised."""
    if not strict and wanted in found:
        return 1.0
    return 1.0 - min(edit_distance(wanted, found), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and replacements of a letter that make a into b."""
    row = list(range(len(b) + 1))  # distances from the part of a before i to every beginning of b
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            kept = diagonal + (letter != other)
            diagonal, row[j] = row[j], min(kept, row[j] + 1, row[j - 1] + 1)
    return row[-1]
