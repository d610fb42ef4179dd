"""The text encoders and tokenizers against transformers and diffusers, with tiny random weights."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_models import (
    CLIP,
    PROMPTS,
    T5,
    TOLERANCE,
    WORDS,
    abstract,
    diffusers,
    ported,
    torch,
    torch_clip,
    torch_t5,
    worst,
)

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.sd3.networks import encode_prompt
from flowgrpo_jax.models.sd3.tokenizers import Tokenizers
from flowgrpo_jax.models.text import (
    CLIPConfig,
    CLIPText,
    T5Config,
    T5Encoder,
    relative_buckets,
)
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

CLIP_CASES = {
    "L, legacy end": dict(hidden_act="quick_gelu", eos_token_id=2, num_hidden_layers=3),
    "L, end id": dict(hidden_act="quick_gelu", eos_token_id=50, num_hidden_layers=2),
    "bigG, legacy end": dict(hidden_act="gelu", eos_token_id=2, num_hidden_layers=4),
    "bigG, end id": dict(hidden_act="gelu", eos_token_id=50, num_hidden_layers=3),
    "one layer": dict(hidden_act="gelu", eos_token_id=99, num_hidden_layers=1),
    "epsilon": dict(layer_norm_eps=0.1, eos_token_id=99, num_hidden_layers=2),
}
T5_CASES = {
    "square": dict(d_model=32, d_kv=8, num_heads=4, num_layers=3),
    "inner width differs": dict(d_model=24, d_kv=16, num_heads=2, num_layers=2),
    "few buckets": dict(
        d_model=32,
        d_kv=8,
        num_heads=4,
        num_layers=1,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=40,
        layer_norm_epsilon=0.1,
    ),
}


# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize("length", [12, 7])
@pytest.mark.parametrize("case", CLIP_CASES)
def test_clip(case, length):
    options = {**CLIP, "hidden_size": 32, "intermediate_size": 48, **CLIP_CASES[case]}
    theirs = torch_clip(options)
    ours = ported(CLIPText, CLIPConfig(**options), theirs)
    ids = np.random.default_rng(0).integers(0, 100, (4, length))
    # End tokens of both rules at different places and repeated, as when they also pad.
    ids[0, 3:], ids[1, 2:5], ids[2, 5], ids[3, -1] = 99, 50, 99, 50
    ids[0, 2] = 50
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids), output_hidden_states=True)
    hidden, pooled = ours(ids)
    assert worst(hidden, wanted.hidden_states[-2]) <= TOLERANCE
    assert worst(pooled, wanted.text_embeds) <= TOLERANCE


@pytest.mark.parametrize("length", [8, 128, 256])
@pytest.mark.parametrize("case", T5_CASES)
def test_t5(case, length):
    options = {**T5, **T5_CASES[case]}
    theirs = torch_t5(options)
    ours = ported(T5Encoder, T5Config(**options), theirs)
    ids = np.random.default_rng(0).integers(0, 100, (2, length))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids))[0]
    assert worst(ours(ids), wanted) <= TOLERANCE


@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 64), (16, 100), (12, 40), (64, 512)])
def test_relative_buckets_are_exactly_theirs(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    offsets = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    wanted = T5Attention._relative_position_bucket(
        offsets, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_buckets(600, config), wanted.numpy())


def test_bfloat16_stays_close():
    """Both dtypes read the same weights; bf16 carries 8 bits."""
    clip = {**CLIP, "hidden_size": 32, "intermediate_size": 48, **CLIP_CASES["L, end id"]}
    t5 = {**T5, **T5_CASES["square"]}
    ids = np.random.default_rng(0).integers(0, 100, (2, 12))
    ids[:, -1] = 50
    with torch.no_grad():
        theirs = torch_clip(clip)
        wanted = theirs(torch.tensor(ids)).text_embeds
        pooled = ported(CLIPText, CLIPConfig(**clip), theirs, jnp.bfloat16)(ids)[1]
        assert pooled.dtype == jnp.bfloat16 and worst(pooled, wanted) < 0.03
        theirs = torch_t5(t5)
        wanted = theirs(torch.tensor(ids))[0]
        hidden = ported(T5Encoder, T5Config(**t5), theirs, jnp.bfloat16)(ids)
        assert hidden.dtype == jnp.bfloat16 and worst(hidden, wanted) < 0.03


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        CLIPConfig(hidden_act="relu")
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu'"):
        T5Config(feed_forward_proj="relu")


def test_real_sizes():
    """Parameter counts of the published models."""

    def count(model_class, config):
        return sum(int(np.prod(s.shape)) for s in abstract(model_class, config)[1].values())

    big = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20)
    big |= dict(num_hidden_layers=32, hidden_act="gelu", projection_dim=1280)
    assert count(CLIPText, CLIPConfig()) == 123_650_304
    assert count(CLIPText, CLIPConfig(**big)) == 694_659_840
    assert count(T5Encoder, T5Config()) == 4_762_310_656


# ---------------------------------------------------------------- the pipeline and its tokenizers


def read(checkpoint, folder, model_class, config_class):
    """A text encoder from its folder: config.json and safetensors."""
    described = json.loads((checkpoint / folder / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{k: v for k, v in described.items() if k in names})
    apply, shapes = abstract(model_class, config)
    params = convert.load(checkpoint / folder, shapes, ignore=model_class.ignored)
    return jax.jit(lambda ids: apply(params, ids))


def their_prompt(pipeline, prompts, length):
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, None, None, device="cpu", negative_prompt="", max_sequence_length=length
        )
    return tokens, pooled, negative, negative_pooled


@pytest.mark.parametrize("length", [8, 128, 256])
def test_encode_prompt(checkpoint, pipeline, length):
    tokens, pooled, negative, negative_pooled = their_prompt(pipeline, PROMPTS, length)
    tokenize = Tokenizers.load(checkpoint, t5_length=length)
    clip_l = read(checkpoint, "text_encoder", CLIPText, CLIPConfig)
    clip_g = read(checkpoint, "text_encoder_2", CLIPText, CLIPConfig)
    t5 = read(checkpoint, "text_encoder_3", T5Encoder, T5Config)
    empty = [""] * len(PROMPTS)
    for texts, wanted in ((PROMPTS, (tokens, pooled)), (empty, (negative, negative_pooled))):
        ids_l, ids_g, ids_t5 = tokenize(texts)
        ours = encode_prompt(clip_l(ids_l), clip_g(ids_g), t5(ids_t5))
        assert worst(ours[0], wanted[0]) <= TOLERANCE
        assert worst(ours[1], wanted[1]) <= TOLERANCE


def test_encode_prompt_without_t5(checkpoint):
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        checkpoint, text_encoder_3=None, tokenizer_3=None
    )
    tokens, pooled, *_ = their_prompt(pipeline, PROMPTS, 20)
    ids_l, ids_g, _ = Tokenizers.load(checkpoint)(PROMPTS)
    clip_l = read(checkpoint, "text_encoder", CLIPText, CLIPConfig)(ids_l)
    clip_g = read(checkpoint, "text_encoder_2", CLIPText, CLIPConfig)(ids_g)
    ours = encode_prompt(clip_l, clip_g, None, t5_length=20, width=64)
    assert worst(ours[0], tokens) <= TOLERANCE
    assert worst(ours[1], pooled) <= TOLERANCE
    with pytest.raises(ValueError, match="56 wide, do not fit into 50"):
        encode_prompt(clip_l, clip_g, None, t5_length=20, width=50)


def test_known_words_are_one_token(pipeline):
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert tokenizer.model_max_length == LENGTH
        for word in WORDS:
            assert tokenizer.tokenize(word) == [word + "</w>"]
        pieces = tokenizer.tokenize(PROMPTS[0])
        assert pieces == [word + "</w>" for word in PROMPTS[0].split()]
    assert pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id
    assert (pipeline.tokenizer_2.pad_token, pipeline.tokenizer_2.pad_token_id) == ("!", 0)
    t5 = pipeline.tokenizer_3
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert len(t5) == sizes(WORDS)[1] and t5.model_max_length == LENGTH
    assert t5.tokenize(" ".join(WORDS)) == ["▁" + word for word in WORDS]


def test_words_that_cannot_be_one_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['Red', 'x2', '12'\]"):
        write_tokenizers(tmp_path, ["red", "Red", "x2", "12"], LENGTH)


def test_saved_form_reads_the_same(checkpoint, pipeline, tmp_path):
    """`save_pretrained` writes tokenizer.json only."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipeline, name).save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "vocab.json").exists()
    hub, saved = (Tokenizers.load(root, 20)(PROMPTS) for root in (checkpoint, tmp_path))
    for a, b in zip(hub, saved, strict=True):
        np.testing.assert_array_equal(a, b)


def test_settings_files_are_optional(checkpoint, tmp_path):
    """Then SD3's own: tokenizer_2 pads with "!", and CLIP has 77 positions."""
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / name / file).write_bytes((checkpoint / name / file).read_bytes())
    ids_l, ids_g, ids_t5 = Tokenizers.load(tmp_path)(["a cat"])
    end = sizes(WORDS)[0] - 1
    assert ids_l.shape == ids_g.shape == (1, 77) and ids_l.dtype == np.int32
    assert (ids_l[0, 3:] == end).all() and ids_g[0, 3] == end and (ids_g[0, 4:] == 0).all()
    assert ids_t5 is None


def test_missing_files_say_what_to_do(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer does not exist: pass the root"):
        Tokenizers.load(tmp_path)
    write_tokenizers(tmp_path, WORDS, LENGTH)
    (tmp_path / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer_2 holds neither tokenizer"):
        Tokenizers.load(tmp_path)
    write_tokenizers(tmp_path, WORDS, LENGTH)
    (tmp_path / "tokenizer_3" / "tokenizer.json").rename(tmp_path / "tokenizer_3" / "spiece.model")
    blocked = "sys.modules['sentencepiece'] = None"
    result = without_torch(tmp_path, blocked)
    assert "pip install sentencepiece protobuf" in result.stderr
    with pytest.raises(TypeError, match="write \\[text\\]"):
        Tokenizers.load(checkpoint)("a cat")


def test_works_without_torch(checkpoint):
    result = without_torch(checkpoint, "pass")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == Tokenizers.load(checkpoint)(PROMPTS)[2].tolist()


def without_torch(root, first):
    code = f"""
import json, sys
sys.modules["torch"] = None
{first}
from flowgrpo_jax.models.sd3.tokenizers import Tokenizers
print(json.dumps(Tokenizers.load({str(root)!r})({PROMPTS!r})[2].tolist()))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
