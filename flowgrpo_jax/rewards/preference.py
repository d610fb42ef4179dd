"""Pairwise preference: the share of its group that a judge likes less than the image.

Pref-GRPO (arXiv 2508.20751): a vision-language model compares the images of a prompt two by two;
an image's reward is its win rate, from 0 to 1. A tie is half a win for both.

A group reward: every call has all images of one prompt. An image that is alone with its prompt has
nobody to win against and is invalid.

Deviation: upstream gives both images half a win when a comparison fails. Here it counts for
neither, and an image without any comparison is invalid.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flowgrpo_jax.rewards import answers
from flowgrpo_jax.transport.chat import Chat, Question, blank
from flowgrpo_jax.types import Metadata

TEMPLATE = """You see two pictures that were generated from the same text caption: the first is
Image 1, the second Image 2. Compare how well each shows what the caption says, then its quality.
Reason briefly, and end with your verdict in exactly one of these forms:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>
<answer>Tie</answer>

Text Caption: {prompt}"""
# This matches the last <answer> if it says no more than which picture is better, or that it is a
# tie. The picture that is named first does not win in "Image 1 is worse".
VERDICT = (
    r"<answer>\W*(?:(?:the\s+)?(?:image|picture)\s*|(?:it\s+is|it's)?\s*(?:a\s+)?)(1|2|tie)"
    r"(?:\W+wins|\W+is\s+(?:(?:clearly|slightly|much|far|the)\s+)*better"
    r"(?:\s+(?:one|image|picture))?(?:\s+than\s+(?:the\s+other|(?:image\s*|picture\s*)?[12]))?)?"
    r"\W*</answer>(?!(?s:.*)<answer>)"
)
WINS = {"1": 1.0, "2": 0.0, "tie": 0.5}  # of the image that is shown first


@dataclasses.dataclass(frozen=True)
class Preference:
    """A reward that asks `chat` which of two images of a prompt is better."""

    chat: Chat
    template: str
    pattern: re.Pattern[str]
    opponents: int | None
    scope: str = "group"

    def ready(self) -> None:
        """Ask a question. Raises RuntimeError unless an endpoint has the model and answers it."""
        self.chat.ready(self.question("a grey square", blank(), blank()), self.verdict)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Win rates f32 [B]; valid where at least one comparison succeeded.

        Raises ValueError for images of several prompts.
        """
        if len(set(prompts)) > 1:
            raise ValueError(
                f"images of {len(set(prompts))} prompts: each prompt's need a call of their own"
            )
        pairs = list(duels(len(images), self.opponents))
        questions = [self.question(prompts[0], images[i], images[k]) for i, k in pairs]
        wins, fought = np.zeros(len(images)), np.zeros(len(images))
        for (first, second), won in zip(pairs, self.chat.ask_all(questions, self.verdict)):
            if won is not None:
                wins[[first, second]] += won, 1.0 - won
                fought[[first, second]] += 1
        return (wins / np.maximum(fought, 1)).astype(np.float32), fought > 0

    def question(self, prompt: str, first: np.ndarray, second: np.ndarray) -> Question:
        """Return the question about two images uint8 [H, W, 3] of this prompt."""
        return self.template.replace("{prompt}", prompt), [first, second]

    def verdict(self, answer: str) -> float:
        """Return the win of the image that is shown first: 1, 0, or 0.5 for a tie.

        Raises ValueError for an answer that does not clearly say it.
        """
        found = answers.verdict(answer, self.pattern).lower()
        if found not in WINS:
            raise answers.Unclear(f"the verdict is {found!r}, not one of {', '.join(WINS)}")
        return WINS[found]


def duels(n: int, opponents: int | None) -> Iterator[tuple[int, int]]:
    """Pairs (shown first, shown second) of n images, each pair once.

    With `opponents` = k each image meets about k others: its neighbours in the group, taken as a
    ring. Judges favour a place, so an image is shown first and second about equally often.
    """
    reach = n // 2 if opponents is None else min((opponents + 1) // 2, n // 2)
    for step in range(1, reach + 1):
        # At half of an even ring the pair (i, i + n/2) comes round again from its other end.
        for i in range(n // 2 if 2 * step == n else n):
            yield i, (i + step) % n


def make(
    url: str | Sequence[str],
    model: str,
    *,
    template: str = TEMPLATE,
    pattern: str = VERDICT,
    opponents: int | None = None,
    **endpoint: Any,
) -> Preference:
    """Make the reward.

    Args:
      url: address of the endpoint, such as http://127.0.0.1:8000/v1, or several of them.
      template: the question about two pictures; {prompt} in it becomes their prompt.
      pattern: a regular expression whose one group is 1, 2 or tie; its last match counts.
      opponents: others that each image is compared with, about; None: all, as in the paper, which
        for a group of 24 is 276 questions.
      endpoint: the options of `chat.Chat`: key_env, side, max_tokens, concurrency, timeout, ...
    """
    compiled = re.compile(pattern, re.IGNORECASE)
    if compiled.groups != 1:
        raise ValueError(f"pattern={pattern!r} must have one group: 1, 2 or tie")
    if opponents is not None and opponents < 1:
        raise ValueError(f"opponents={opponents} must be at least 1, or None for all")
    return Preference(Chat(url, model, **endpoint), template, compiled, opponents)
