"""Tokenizers for a small closed vocabulary, in the three folders of an SD3 checkpoint.

Every known word is one token, so a prompt of the shapes world fits into ten tokens. Other text is
spelled out: in bytes by the CLIP tokenizers, which know no capitals and join bytes that also follow
each other in a known word, unless that is forbidden (`spelled`); in ASCII characters by the T5
tokenizer, whose last resort is `<unk>`. The files are those of the hub's repositories, so
transformers, diffusers and `models.sd3.tokenizers` read them like any other checkpoint's.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
KNOWABLE = re.compile(r"[a-z]+|[0-9]|[!-/:-@\[-`{-~]")  # what CLIP's pattern keeps in one piece


def write_tokenizers(
    directory: str | Path, words: Sequence[str], length: int, spelled: Iterable[str] = ()
) -> None:
    """Write tokenizer, tokenizer_2 and tokenizer_3 into `directory`.

    Args:
      words: lower-case words of a to z, single digits or single punctuation marks.
      length: tokens of the longest prompt, start and end included.
      spelled: texts of which every letter must be one token.
    """
    words = list(dict.fromkeys(words))
    odd = [word for word in words if not KNOWABLE.fullmatch(word)]
    if odd:
        raise ValueError(
            f"words {odd} cannot be one token in CLIP: use lower-case letters only, or one digit, "
            "or one punctuation mark"
        )
    merges = clip_merges(words, spelled)
    write_clip(Path(directory) / "tokenizer", merges, length, pad=END)
    write_clip(Path(directory) / "tokenizer_2", merges, length, pad="!")
    write_t5(Path(directory) / "tokenizer_3", words, length)


def sizes(words: Sequence[str], spelled: Iterable[str] = ()) -> tuple[int, int]:
    """Vocabulary sizes of the CLIP and the T5 text encoder for these words."""
    words = list(dict.fromkeys(words))
    return len(clip_vocabulary(clip_merges(words, spelled))), len(t5_pieces(words))


# ---------------------------------------------------------------------------------------- CLIP


def write_clip(folder: Path, merges: list[tuple[str, str]], length: int, pad: str) -> None:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    write_json(folder / "vocab.json", clip_vocabulary(merges))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merged pieces, start, end.

    So "!" is 0, and the end token has the highest id, which the text encoder's pooling may use.
    """
    bytes_ = byte_characters()
    pieces = [*bytes_, *(b + WORD_END for b in bytes_), *(a + b for a, b in merges), START, END]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def clip_merges(words: Iterable[str], spelled: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Merges that make every word one piece, and no two letters of the texts to be spelled.

    A word is split by the merges so far, then its first two pieces are made a merge (the first two
    that no spelled text has beside each other), until one piece is left. New merges rank behind all
    older ones, so words finished earlier stay whole.
    """
    apart = {pair for text in spelled for pair in pairwise(letters(text.lower()))}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := split(word, ranks)) > 1:
            pair = next((pair for pair in pairwise(pieces) if pair not in apart), None)
            if pair is None:
                raise ValueError(
                    f"word {word!r} cannot be one token in CLIP while any two of its letters that"
                    " follow each other also do in a text to be spelled: leave out such texts, or"
                    " the word"
                )
            ranks[pair] = len(ranks)
    return list(ranks)


def letters(word: str) -> list[str]:
    """The pieces of a word that nothing has merged."""
    return [*word[:-1], word[-1] + WORD_END]


def split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of an ASCII word: merge the pair of the lowest rank until none is left."""
    pieces = letters(word)
    while True:
        known = [pair for pair in pairwise(pieces) if pair in ranks]
        if not known:
            return pieces
        best = min(known, key=ranks.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            # A piece that was itself just merged cannot be the left half of this merge again.
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of GPT-2 and CLIP."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


# ------------------------------------------------------------------------------------------ T5


def write_t5(folder: Path, words: Sequence[str], length: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(t5_pieces(words), unk_id=2, byte_fallback=False))
    metaspace: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**config, **special})
    tokenizer.save(str(folder / "tokenizer.json"))


def t5_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces and their log-probabilities; one word always beats any spelling of it."""
    special = ["<pad>", "</s>", "<unk>"]
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    scores = [(piece, 0.0) for piece in special]
    scores += [("▁" + word, -1.0) for word in words]
    return scores + [(character, -10.0) for character in characters]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
