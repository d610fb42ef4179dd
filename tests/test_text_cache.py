"""Encoded prompts on disk: what comes back is what was encoded, and nothing is encoded twice."""

import os
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import load

from flowgrpo_jax.assembly import batch_plan, parts
from flowgrpo_jax.encode import needed
from flowgrpo_jax.models import sd3
from flowgrpo_jax.monitors import true_loss
from flowgrpo_jax.storage import text_cache
from flowgrpo_jax.storage.text_cache import encode_cached, fingerprint
from flowgrpo_jax.training import data_loss


class Encoder:
    """States that tell their text; remembers what it was asked."""

    def __init__(self, dtype=jnp.float32):
        self.dtype, self.asked = dtype, []

    def __call__(self, texts):
        self.asked.append(list(texts))
        rows = jnp.array([[len(t), sum(map(ord, t)) / 7] for t in texts], self.dtype)
        return {"tokens": rows[:, None, :] * jnp.ones((1, 3, 1), self.dtype), "pooled": -rows}


def same(ours, theirs):
    for name in ("tokens", "pooled"):
        a, b = ours[name], theirs[name]
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_comes_back_is_what_was_encoded(tmp_path, dtype):
    texts = ["a cat", "", "ein Käse", "a cat"]
    wanted = Encoder(dtype)(texts)
    encode = Encoder(dtype)
    for _ in range(2):
        same(encode_cached(encode, texts, tmp_path / "new" / "folder", "x"), wanted)
    assert len(encode.asked) == 1
    again = Encoder(dtype)  # another process
    same(
        encode_cached(again, texts[::-1], tmp_path / "new" / "folder", "x"),
        Encoder(dtype)(texts[::-1]),
    )
    assert again.asked == []


def test_only_what_is_missing_is_encoded_and_in_one_shape(tmp_path):
    encode = Encoder()
    encode_cached(encode, ["a", "b", "c"], tmp_path, "x")
    same(encode_cached(encode, ["d", "b", "e"], tmp_path, "x"), Encoder()(["d", "b", "e"]))
    assert encode.asked[1] == ["d", "e", "e"]  # a jitted encoder compiles once for three texts
    assert len(list(tmp_path.iterdir())) == 5


def test_processes_encode_what_one_of_them_lacks(tmp_path):
    """The encoders may be spread over all: each has to take part, with the same texts."""
    encode = Encoder()
    encode_cached(encode, ["a", "b"], tmp_path, "x")

    def allgather(lacking):
        assert not lacking.any()  # we have them all; the other one lacks "b"
        return np.stack([lacking, [False, True]])

    ours = encode_cached(encode, ["a", "b"], tmp_path, "x", allgather=allgather)
    same(ours, Encoder()(["a", "b"]))
    assert encode.asked[1] == ["b", "b"]


def test_other_encoders_have_other_states(tmp_path):
    encode_cached(Encoder(), ["a"], tmp_path, "x")
    other = Encoder(jnp.bfloat16)
    assert encode_cached(other, ["a"], tmp_path, "y")["pooled"].dtype == jnp.bfloat16
    assert other.asked == [["a"]]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_written_again(tmp_path, damage):
    encode = Encoder()
    encode_cached(encode, ["a"], tmp_path, "x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    for _ in range(2):
        same(encode_cached(encode, ["a"], tmp_path, "x"), Encoder()(["a"]))
    assert encode.asked == [["a"], ["a"]]


def test_a_cache_that_cannot_be_read_or_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    """The states are there: a full disk or another's directory must not end a run."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    encode = Encoder()
    monkeypatch.setattr(text_cache, "save_file", full)
    same(encode_cached(encode, ["a", "b"], tmp_path / "x", "x"), Encoder()(["a", "b"]))
    assert "No space left" in caplog.text and list((tmp_path / "x").iterdir()) == []
    with pytest.raises(OSError, match="No space left"):  # to fill it is what `encode` is for
        encode_cached(encode, ["a"], tmp_path / "x", "x", strict=True)
    monkeypatch.undo()
    (tmp_path / "file").write_text("no directory")
    same(encode_cached(encode, ["a"], tmp_path / "file", "x"), Encoder()(["a"]))
    encode_cached(encode, ["a"], tmp_path / "y", "x")
    monkeypatch.setattr(text_cache, "load_file", full)  # as a network's disk that does not answer
    same(encode_cached(encode, ["a"], tmp_path / "y", "x"), Encoder()(["a"]))


def mark(directory, **settings):
    return fingerprint(directory, sd3.text_files(directory, t5=settings["t5"]), **settings)


def test_the_fingerprint_tells_models_and_settings_apart(tmp_path):
    def model(name, content):
        (tmp_path / name / "text_encoder").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "text_encoder" / "model.safetensors").write_bytes(content)
        (tmp_path / name / "text_encoder" / "config.json").write_text("{}")
        return tmp_path / name

    small, large = b"1" * 100, b"1" * 10_000_000  # the second is not read whole
    one = model("one", small)
    marks = [mark(one, t5_length=n, t5=t) for n in (8, 9) for t in (True, False)]
    others = (small[:-1] + b"2", small + b"1", large, large[:-1] + b"2", b"2" + large[1:])
    marks += [mark(model("two", c), t5_length=8, t5=True) for c in others]
    assert len(set(marks)) == 9
    (one / "text_encoder" / "model.fp16.safetensors").write_bytes(small)  # which nobody reads
    assert marks[0] == mark(one, t5_length=8, t5=True)
    (one / "tokenizer_3").mkdir()
    (one / "tokenizer_3" / "spiece.model").write_bytes(b"words")
    assert marks[0] != mark(one, t5_length=8, t5=True)
    assert marks[1] == mark(one, t5_length=8, t5=False)


def test_the_fingerprint_does_not_depend_on_where_and_when_files_were_written(tmp_path):
    """Or a cache that one worker filled would be empty to all others."""
    marks = set()
    for i, name in enumerate(("here", "there")):
        (tmp_path / name / "tokenizer_3").mkdir(parents=True)
        file = tmp_path / name / "tokenizer_3" / "spiece.model"
        file.write_bytes(b"words")
        os.utime(file, (i, i))
        marks.add(mark(tmp_path / name, t5_length=8, t5=True))
    assert len(marks) == 1


def captions_of(config, epoch):
    """The captions that a run encodes for its loss on data in an epoch."""
    asked = []

    def encode(texts):
        asked.extend(texts)
        raise InterruptedError

    plan = batch_plan.make_plan(config, 1)
    data = parts.make_data(config, plan, 1)
    run = SimpleNamespace(data=data, plan=plan, config=config, encode=encode)
    batch = SimpleNamespace(ids=np.arange(plan.groups))
    with pytest.raises(InterruptedError):
        data_loss.of_epoch(run, None, {}, batch, [], epoch)
    return asked


@pytest.mark.parametrize("own_step", [False, True])
def test_the_captions_of_a_loss_on_data_are_encoded_ahead(runs, own_step):
    config = load(runs, eval__every=0, data__source="shapes", data__images=4, data__every=2)
    config.data.own_step = own_step
    captions = set(captions_of(config, 1)) | set(captions_of(config, 3))
    plain = {*needed(load(runs, eval__every=0), 4)}
    assert {*needed(config, 4)} == plain | captions != plain
    for weight, source in ((0.0, "shapes"), (0.1, "base")):  # without captions
        config.data.weight, config.data.source = weight, source
        assert {*needed(config, 4)} == plain


def test_the_captions_of_the_true_pictures_are_encoded_ahead(runs):
    source = "flowgrpo_jax.worlds.shapes.world:true_pictures"
    _, captions = true_loss.load(source, 32, 32)
    assert {*captions} <= {*needed(load(runs, eval__images=1, monitor__pictures=source), 1)}
    unseen = needed(load(runs, eval__every=0, monitor__pictures=source), 1)
    assert not {*captions} & {*unseen}
