"""The three tokenizers of the SD3 family, called as `StableDiffusion3Pipeline` calls them.

They are in the folders `tokenizer`, `tokenizer_2` and `tokenizer_3` of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_jax.models.text import LEGACY_EOS, CLIPConfig, T5Config
from flowgrpo_jax.models.tokenizers import load_clip, load_t5, padded
from flowgrpo_jax.storage.files import read_object

CLIP_LENGTH = 77  # positions of both CLIP text models; a tokenizer's own limit may be lower
MOST_T5 = 128  # tokens of a prompt: the paper's


@dataclass(frozen=True)
class Tokenizers:
    """Prompts to the token ids that the three text encoders read."""

    clip_l: Any
    clip_g: Any
    t5: Any | None
    t5_length: int

    @classmethod
    def load(cls, directory: str | Path, t5_length: int = 256, t5: bool = True) -> Tokenizers:
        """Load the tokenizers of a model directory; `tokenizer_3` is optional, and needs `t5`.

        Raises:
          FileNotFoundError: no checkpoint, no tokenizer folder, or a folder without vocabulary.
          ImportError: T5's vocabulary is only there as `spiece.model`, and sentencepiece is not.
        """
        if t5_length < 1:
            raise ValueError(f"t5_length is {t5_length}, it must be at least 1 token")
        root = Path(directory)
        third = load_t5(root / "tokenizer_3") if t5 and (root / "tokenizer_3").is_dir() else None
        return cls(load_clip(root / "tokenizer"), load_clip(root / "tokenizer_2"), third, t5_length)

    def check(
        self, clip_l: CLIPConfig, clip_g: CLIPConfig, t5: T5Config | None, directory: Path
    ) -> None:
        """Raise ValueError where a tokenizer does not fit the text encoder that reads its ids.

        Such an id would be taken for another word's without an error, and an end token that the
        encoder does not know would make the pooled state that of the first token.
        """
        pairs = [("tokenizer", self.clip_l, clip_l), ("tokenizer_2", self.clip_g, clip_g)]
        problems = [
            f"the end token of {name} is {tokens.eos_token_id}, but eos_token_id of its encoder is"
            f" {encoder.eos_token_id}"
            for name, tokens, encoder in pairs
            if encoder.eos_token_id not in (LEGACY_EOS, tokens.eos_token_id)
        ]
        readers: list[tuple[str, Any, CLIPConfig | T5Config]] = list(pairs)
        readers += [("tokenizer_3", self.t5, t5)] if t5 and self.t5 is not None else []
        for name, tokens, reader in readers:
            if len(tokens) > reader.vocab_size:
                problems.append(
                    f"{name} has {len(tokens)} tokens, but vocab_size of its encoder is"
                    f" {reader.vocab_size}"
                )
        if problems:
            raise ValueError(
                f"the parts of {directory} do not fit each other: {'; '.join(problems)}. Take all"
                " of them from one model"
            )

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Texts -> ids of CLIP-L and bigG, i32 [B, 77], and of T5, i32 [B, t5_length] or None."""
        # The pipeline cuts both CLIP inputs to the first tokenizer's limit.
        length = min(self.clip_l.model_max_length, CLIP_LENGTH)
        ids_t5 = None if self.t5 is None else padded(self.t5, texts, self.t5_length)
        return padded(self.clip_l, texts, length), padded(self.clip_g, texts, length), ids_t5


def t5_limit(directory: Path) -> int:
    """Return how many T5 tokens a prompt has: as many as the tokenizer says, at most 128."""
    file = directory / "tokenizer_3" / "tokenizer_config.json"
    settings = read_object(file) if file.exists() else {}
    return int(min(settings.get("model_max_length", MOST_T5), MOST_T5))


def require_t5(directory: Path) -> None:
    """Raise FileNotFoundError where the tokenizer of a model's T5 is missing."""
    if not (directory / "tokenizer_3").is_dir():
        raise FileNotFoundError(
            f"{directory}/tokenizer_3 does not exist, though text_encoder_3 does: download it as"
            " well, or set config.model.options.t5=False (of generate: --option t5=false)"
        )
