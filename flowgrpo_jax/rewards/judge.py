"""A vision-language model as the judge: it is asked for a mark, which is read from its answer.

`unifiedreward` asks as UnifiedReward (Wang et al. 2025, arXiv 2503.05236) was trained to be asked:
agreement with the caption and quality, 1 to 5 after "Final Score:". `vlm_judge` takes the question
from the recipe. The score is mark / best mark, so 0.2 to 1 for marks 1 to 5, as in
yifan123/flow_grpo; unlike there, an answer without a mark is invalid, not 0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowgrpo_jax.transport.chat import Chat
from flowgrpo_jax.types import Metadata

UNIFIEDREWARD = """You see a picture that was generated from a text caption. Judge two things.
1. Alignment with the caption: are its objects, their number, their attributes and relations there?
2. Quality: is the picture sharp, coherent and pleasant, without artefacts?
Weigh both and give one score from 1 (worst) to 5 (best), which may have decimals, after the words
"Final Score:".

Text Caption: {prompt}"""
# "Final Score: 4", "**Score:** 3.5", "<score>4</score>"; not the range in "score (1-5)"
MARK = r"score\W{0,4}[:>=][^\w-]{0,4}(-?\d+(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward that asks `chat` for a mark from `low` to `high` for each image."""

    chat: Chat
    template: str
    pattern: re.Pattern[str]
    low: float
    high: float

    def ready(self) -> None:
        """Raises RuntimeError unless the endpoint is there and has the model."""
        self.chat.ready()

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """mark / high, f32 [B]; valid where a mark was found."""
        questions = [
            (self.template.replace("{prompt}", prompt), [image])
            for image, prompt in zip(images, prompts)
        ]
        marks = self.chat.ask_all(questions, self.mark)
        valid = np.array([mark is not None for mark in marks], bool)
        return np.array([mark or 0.0 for mark in marks], np.float32) / self.high, valid

    def mark(self, answer: str) -> float | None:
        """The last mark in an answer: a model that thinks aloud comes to its verdict at the end."""
        found = self.pattern.findall(answer)
        try:
            mark = float(found[-1]) if found else np.nan
        except ValueError:  # a pattern of one's own may find other things than numbers
            return None
        return mark if self.low <= mark <= self.high else None


def make(
    url: str | Sequence[str],
    model: str,
    template: str,
    *,
    pattern: str = MARK,
    low: float = 1.0,
    high: float = 5.0,
    **endpoint: Any,
) -> Judge:
    """A judge with a question of your own.

    Args:
      url: address of the endpoint, such as http://127.0.0.1:8000/v1, or several of them.
      template: the question; {prompt} in it becomes the image's prompt.
      pattern: a regular expression whose one group is the mark; its last match counts.
      low, high: the marks that the question allows; others make the image invalid.
      endpoint: the options of `chat.Chat`: key_env, side, max_tokens, concurrency, timeout, ...
    """
    compiled = re.compile(pattern, re.IGNORECASE)
    if compiled.groups != 1:
        raise ValueError(f"pattern={pattern!r} must have one group, the mark")
    if not low < high or high <= 0:
        raise ValueError(f"low={low} must be below high={high}, and high above 0")
    return Judge(Chat(url, model, **endpoint), template, compiled, low, high)


def unifiedreward(
    url: str | Sequence[str] = "http://127.0.0.1:17140/v1",
    model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
    template: str = UNIFIEDREWARD,
    **options: Any,
) -> Judge:
    """UnifiedReward behind vLLM or SGLang, at upstream's address. Options as for `make`."""
    return make(url, model, template, **options)
