"""A vision-language model as the judge: it is asked for a mark, which is read from its answer.

`unifiedreward` asks as UnifiedReward (Wang et al. 2025, arXiv 2503.05236) was trained to be asked:
agreement with the caption and quality, 1 to 5 after "Final Score:". `vlm_judge` takes the question
from the recipe. The score is mark / best mark, so 0.2 to 1 for marks 1 to 5, as in
yifan123/flow_grpo; unlike there, an answer without a clear mark is invalid, not 0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowgrpo_jax.rewards import answers
from flowgrpo_jax.transport.chat import Chat, Question, blank
from flowgrpo_jax.types import Metadata

UNIFIEDREWARD = """You see a picture that was generated from a text caption. Judge two things.
1. Alignment with the caption: are its objects, their number, their attributes and relations there?
2. Quality: is the picture sharp, coherent and pleasant, without artefacts?
Weigh both and give one score from 1 (worst) to 5 (best), which may have decimals, after the words
"Final Score:".

Text Caption: {prompt}"""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward that asks `chat` for a mark from `low` to `high` for each image."""

    chat: Chat
    template: str
    pattern: re.Pattern[str] | None
    low: float
    high: float

    def ready(self) -> None:
        """Ask a question. Raises RuntimeError unless an endpoint has the model and answers it."""
        self.chat.ready(self.question("a grey square", blank()), self.mark)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """mark / high, f32 [B]; valid where a mark was found."""
        questions = [self.question(prompt, image) for image, prompt in zip(images, prompts)]
        marks = self.chat.ask_all(questions, self.mark)
        valid = np.array([mark is not None for mark in marks], bool)
        return np.array([mark or 0.0 for mark in marks], np.float32) / self.high, valid

    def question(self, prompt: str, image: np.ndarray) -> Question:
        """Return the question about an image uint8 [H, W, 3] of this prompt."""
        return self.template.replace("{prompt}", prompt), [image]

    def mark(self, answer: str) -> float:
        """The mark that an answer gives, as `answers.mark` reads it. Raises ValueError without."""
        return answers.mark(answer, self.pattern, self.low, self.high)


def make(
    url: str | Sequence[str],
    model: str,
    template: str,
    *,
    pattern: str | None = None,
    low: float = 1.0,
    high: float = 5.0,
    **endpoint: Any,
) -> Judge:
    """A judge with a question of your own.

    Args:
      url: address of the endpoint, such as http://127.0.0.1:8000/v1, or several of them.
      template: the question; {prompt} in it becomes the image's prompt.
      pattern: a regular expression whose one group is the mark; its last match counts. None: what
        follows "Final Score:" or "Score:", as `answers.mark` says.
      low, high: the marks that the question allows; others make the image invalid.
      endpoint: the options of `chat.Chat`: key_env, side, max_tokens, concurrency, timeout, ...
    """
    compiled = None if pattern is None else re.compile(pattern, re.IGNORECASE)
    if compiled and compiled.groups != 1:
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
