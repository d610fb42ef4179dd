"""Tokenizers of text encoders: CLIP's and T5's, read from the folders of a checkpoint.

They come in the form of the hub (`vocab.json` and `merges.txt`; `tokenizer.json` or `spiece.model`
for T5) or as `save_pretrained` writes them (`tokenizer.json`). Needs transformers, not torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # where no settings file says


def padded(tokenizer: Any, texts: list[str], length: int) -> np.ndarray:
    """Ids i32 [B, length]: start and end tokens added, cut before the end token, padded."""
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of strings, not the string {texts!r}: write [text]")
    rows = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(rows["input_ids"], np.int32).reshape(len(texts), length)


def load_clip(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    require(folder, {"tokenizer.json"}, {"vocab.json", "merges.txt"})
    settings = ("tokenizer_config.json", "special_tokens_map.json")
    described = any((folder / file).exists() for file in settings)
    options: dict[str, Any] = {} if described else {"pad_token": PADS[folder.name]}
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)


def load_t5(folder: Path) -> Any:
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    found = require(folder, {"tokenizer.json"}, {"spiece.model"})
    missing = [p for p in ("sentencepiece", "google.protobuf") if not importable(p)]
    if found == {"spiece.model"} and missing:
        raise ImportError(
            f"{folder} has no tokenizer.json, and reading its spiece.model needs {missing}: "
            "`pip install sentencepiece protobuf`, or add the tokenizer.json of the repository"
        )
    return T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def require(folder: Path, *choices: set[str]) -> set[str]:
    """The first set of files that is complete; transformers would go on without a vocabulary."""
    for files in choices:
        if all((folder / file).is_file() for file in files):
            return files
    names = ", or ".join(" and ".join(sorted(files)) for files in choices)
    problem = f"holds neither {names}" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{folder} {problem}: pass the root of a checkpoint in diffusers layout, downloaded with "
        f"its {folder.name} folder ({names})"
    )
