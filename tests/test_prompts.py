"""Prompt sources and the choice of an epoch's prompts, against counting and binomial bounds."""

import json
from collections import Counter

import numpy as np
import pytest

from flowgrpo_jax import prompts

RECORDS = [{"prompt": f"{tag} {i}", "tag": tag} for tag in ("a", "b", "c") for i in range(40)]


def draw(n=10, seed=0, epoch=0, **kwargs):
    return prompts.sample(RECORDS, n, seed=seed, epoch=epoch, **kwargs)


# ----------------------------------------------------------------------------------- sample


def test_an_epochs_prompts_depend_on_seed_and_epoch_alone():
    first = draw(seed=3, epoch=7)
    np.random.seed(1)
    draw(seed=3, epoch=8)
    again = draw(seed=3, epoch=7)
    assert first.prompts == again.prompts and (first.ids == again.ids).all()
    others = {tuple(draw(seed=s, epoch=e).prompts) for s in range(5) for e in range(5)}
    assert len(others) == 25


def test_a_batch_is_of_distinct_records_that_belong_together():
    batch = draw(n=len(RECORDS))
    assert sorted(batch.ids) == list(range(len(RECORDS))) and batch.ids.dtype == np.int32
    assert batch.metadata == [RECORDS[i] for i in batch.ids]
    assert batch.prompts == [m["prompt"] for m in batch.metadata]


def test_tags_are_as_frequent_as_their_weights_however_many_prompts_they_have():
    records = RECORDS + [{"prompt": f"more {i}", "tag": "a"} for i in range(400)]
    weights = {"a": 1.0, "b": 3.0, "c": 0.0}
    drawn = Counter()
    for epoch in range(2000):
        batch = prompts.sample(records, 1, seed=0, epoch=epoch, tag_weights=weights)
        drawn[batch.metadata[0]["tag"]] += 1
    assert drawn["c"] == 0
    sigma = np.sqrt(2000 * 0.25 * 0.75)
    assert abs(drawn["a"] - 500) < 4 * sigma


def test_without_weights_every_record_is_as_frequent():
    ids = np.concatenate([draw(n=12, epoch=e).ids for e in range(500)])
    counts = np.bincount(ids, minlength=len(RECORDS))  # 6000 draws, 50 of each
    assert abs(counts - 50).max() < 5 * np.sqrt(50)


@pytest.mark.parametrize("n, weights, available", [(121, None, 120), (41, {"b": 1.0}, 40)])
def test_too_few_prompts(n, weights, available):
    with pytest.raises(ValueError, match=rf"sample.groups={n}.* has {available}.*lower"):
        draw(n=n, tag_weights=weights)


def test_a_weight_for_a_tag_that_no_prompt_has():
    with pytest.raises(ValueError, match=r"tag_weights names \['d'\].*\['a', 'b', 'c'\]: correct"):
        draw(tag_weights={"a": 1.0, "d": 1.0})


# --------------------------------------------------------------------------------- balanced


def test_balanced_gives_equal_shares_and_repeats_only_what_ran_out():
    records = [*RECORDS[:3], *RECORDS[40:]]  # 3 of a, 40 of b and c each
    batch, repeats = prompts.balanced(records, 30)
    assert Counter(m["tag"] for m in batch.metadata) == {"a": 10, "b": 10, "c": 10}
    pairs = Counter(zip(batch.ids.tolist(), repeats.tolist()))
    assert set(pairs.values()) == {1}  # the same prompt never gets the same noise
    of_a = sorted(int(r) for m, r in zip(batch.metadata, repeats) if m["tag"] == "a")
    assert of_a == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert not any(r for m, r in zip(batch.metadata, repeats) if m["tag"] != "a")


def test_balanced_is_always_the_same_and_a_longer_one_begins_with_a_shorter():
    long, repeats = prompts.balanced(RECORDS, 50)
    short, _ = prompts.balanced(RECORDS, 20)
    again, again_repeats = prompts.balanced(list(RECORDS), 50)
    assert long.prompts == again.prompts and (repeats == again_repeats).all()
    assert long.prompts[:20] == short.prompts
    assert short.prompts != [r["prompt"] for r in RECORDS[:20]]  # shuffled


def test_balanced_without_prompts():
    with pytest.raises(ValueError, match=r"prompts\.test"):
        prompts.balanced([], 12)


# ------------------------------------------------------------------------------------- load


def test_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \na cat\nein Käse\n", encoding="utf-8")
    expected = [{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "ein Käse"}]
    assert prompts.load(str(file)) == expected


def test_jsonl_file_keeps_metadata_and_drops_equal_records(tmp_path):
    """Records of one prompt that differ in anything else are asked for, as with several images."""
    rows = [
        {"prompt": "a cat", "tag": "one", "include": [{"class": "cat", "count": 1}]},
        {"prompt": "a dog", "tag": "two"},
        {"prompt": "a cat", "tag": "three"},
        *({"prompt": "paint it red", "image": f"{i}.png"} for i in range(5)),
    ]
    file = tmp_path / "prompts.jsonl"
    again = [{"tag": "two", "prompt": "a dog", "image": None}, rows[0]]
    file.write_text("\n".join(map(json.dumps, rows + again)))
    records = prompts.load(str(file))
    assert records == rows
    batch = prompts.sample(records, 8, seed=0, epoch=0)
    assert batch.metadata == [rows[i] for i in batch.ids] and len(set(batch.ids.tolist())) == 8


def test_the_bundled_world():
    train, test = prompts.load("shapes:train"), prompts.load("shapes:test")
    texts = {r["prompt"] for r in train}
    assert len(texts) == len(train) and not texts & {r["prompt"] for r in test}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', r'p\.jsonl: line 3 .*"prompt"'),
        ("p.jsonl", "[1]\n", r'p\.jsonl: line 1 .*"prompt"'),
        ("p.jsonl", '{"prompt": null}\n', r'p\.jsonl: line 1: "prompt" is no text'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}', r"p\.jsonl: line 2: .* is no text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"p\.jsonl: line 2 .*JSON"),
        ("p.jsonl", '{"prompt": 3}', r'p\.jsonl: line 1: "prompt" is no text: it is 3'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "tag": ["x"]}', r"line 2: \"tag\" .*\['x'\]"),
        ("p.jsonl", '{"prompt": "a", "tag": 1}', r'line 1: "tag" is no text: it is 1'),
        ("p.jsonl", '{"prompt": "a", "tag": {}}', r'line 1: "tag" is no text: it is \{\}'),
        ("p.jsonl", '{"prompt": "a", "tag": false}', r'line 1: "tag" is no text: it is False'),
        ("p.csv", "a,b\n", r"p\.csv.*\.txt or \.jsonl"),
        ("p.txt", "\n \n", r"p\.txt.*no prompt"),
    ],
)
def test_a_file_that_is_no_prompt_source(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        prompts.load(str(file))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize(
    "encoding, line, converter",
    [
        ("cp1252", 3, "iconv -f CP1252 -t UTF-8"),
        ("utf-16", 1, "iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", 1, "iconv -f UTF-16 -t UTF-8"),  # without a byte order mark
    ],
)
def test_a_prompt_file_in_another_encoding(tmp_path, suffix, encoding, line, converter):
    texts = ["one", "two", "a café", "naïve"]
    lines = texts if suffix == "txt" else [f'{{"prompt": "{text}"}}' for text in texts]
    file = tmp_path / f"p.{suffix}"
    file.write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(ValueError, match=rf"p\.{suffix}: line {line} is not UTF-8.*`{converter} "):
        prompts.load(str(file))
    file.write_bytes("\n".join(lines).encode("utf-8-sig"))  # what Windows' editors write
    assert [r["prompt"] for r in prompts.load(str(file))] == texts


def test_null_is_absent(tmp_path):
    """Arrow and pandas write null, or NaN, for every key that a record lacks and another has."""
    rows = [
        '{"tag": null, "prompt": "a", "include": [{"class": "cup", "color": null}], "more": null}',
        '{"tag": NaN, "prompt": "b", "include": [{"class": "cup", "position": ["left of", 0]}]}',
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(rows))
    assert prompts.load(str(file)) == [
        {"prompt": "a", "include": [{"class": "cup"}]},
        {"prompt": "b", "include": [{"class": "cup", "position": ["left of", 0]}]},
    ]


def test_where_a_record_is(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = ['{"prompt": "a"}', "", '{"prompt": "b", "n": 1}', '{"prompt": "b", "n": 2}']
    file.write_text("\n".join(lines))
    assert prompts.place({"prompt": "b", "n": 1}, str(file)) == f"{file}: line 3"
    of_a_task = {"prompt": "b", "n": 2, "tag": "write", "task": "write"}
    assert prompts.place(of_a_task, str(file)) == f"{file}: line 4"
    file.write_text('{"prompt": "b"}\n{"prompt": "b", "n": 2}')  # the first is a part of the second
    assert prompts.place({"prompt": "b"}, str(file)) == f"{file}: line 1"
    assert prompts.place({"prompt": "b", "n": 2}, str(file)) == f"{file}: line 2"
    assert prompts.place({"prompt": "a dog"}, "geneval:train") == "geneval:train: 'a dog'"


@pytest.mark.parametrize("source", ["", "nowhere.txt", "triangles:train"])
def test_no_such_source(source):
    with pytest.raises(FileNotFoundError, match=rf"{source!r}.*\.txt.*\.jsonl.*shapes:train"):
        prompts.load(source)


def test_no_such_split():
    with pytest.raises(ValueError, match="'validation'"):
        prompts.load("shapes:validation")
