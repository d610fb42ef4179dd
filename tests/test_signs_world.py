"""The signs world: splits, pictures, wrong captions, tokens, and whether PP-OCR reads the signs."""

import re
from itertools import product

import numpy as np
import pytest

from flowgrpo_jax import prompts, rewards
from flowgrpo_jax.configs import signs
from flowgrpo_jax.models import directories
from flowgrpo_jax.models.sd3.tokenizers import Tokenizers, t5_limit
from flowgrpo_jax.rewards import ocr
from flowgrpo_jax.worlds.pretraining.tokenizers import clip_merges, sizes, write_tokenizers
from flowgrpo_jax.worlds.signs import grammar
from flowgrpo_jax.worlds.signs.render import BOARDS, WALLS, Sign, render
from flowgrpo_jax.worlds.signs.world import WORLD

TEXTS = ("CAT", "WMW", "QJG", "II", "X", "MWQM")  # of every length that a garbled caption can have


# -------------------------------------------------------------------------------- the prompts


def test_no_held_out_word_is_trained_on():
    train, test = prompts.load("signs:train"), prompts.load("signs:test")
    words = {r["text"] for r in test}
    assert len(train) >= 200 and len(words) == len(test) >= 50
    assert words.isdisjoint(r["text"] for r in train)
    assert words.isdisjoint(r["text"] for r in grammar.captions())


def test_every_letter_of_a_held_out_word_is_trained_in_its_place():
    train, test = (grammar.prompts(split) for split in ("train", "test"))
    for place in range(3):
        trained, tested = ({r["text"][place] for r in records} for records in (train, test))
        assert tested <= trained


def test_captions_are_the_words_to_train_on_and_all_other_letters():
    records = grammar.captions()
    texts = [r["text"] for r in records]
    assert len(set(texts)) == len(texts)
    assert [r for r in records if r["tag"] == "word"] == grammar.prompts("train")
    assert {r["tag"] for r in records} == set(WORLD.tag_weights)
    absent = {"".join(x) for x in product(grammar.LETTERS, repeat=3)} - {*texts, *grammar.HELD_OUT}
    assert all(text.startswith(grammar.JOINED) for text in absent)


def test_the_prompt_asks_for_the_text_as_the_reward_reads_it():
    assert grammar.prompts("train")[0]["prompt"] == 'a sign that says "ACE"'
    for record in grammar.captions():
        assert ocr.target(record["prompt"]) == record["text"].lower()


def test_no_such_split():
    with pytest.raises(ValueError, match="signs:all"):
        prompts.load("signs:all")


# ------------------------------------------------------------------------------- the pictures


def corners(text):
    """Signs with this text as far from the middle as they come, of the largest letters."""
    across, down = grammar.PLACE
    for x, y in product((32 - across, 32 + across), (32 - down, 32 + down)):
        yield Sign(text, "white", WALLS[0], x, y, max(grammar.HEIGHTS))


@pytest.mark.parametrize("text", TEXTS)
def test_a_sign_lies_in_the_picture_and_its_letters_on_the_board(text):
    for sign in corners(text):
        image = render(sign)
        on_wall = (image == WALLS[0]).all(-1)
        rows, columns = (np.flatnonzero(~on_wall.all(axis)) for axis in (1, 0))
        assert on_wall[[0, -1]].all() and on_wall[:, [0, -1]].all()
        board = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        rim = np.concatenate([board[0], board[-1], board[:, 0], board[:, -1]])
        assert (rim == BOARDS["white"][0]).all()
        assert (board != BOARDS["white"][0]).any()


def test_letters_do_not_move_each_other():
    def letters(text):
        return render(Sign(text, "blue", WALLS[1], 32, 32, 18))

    for place, text in enumerate(("IAT", "CIT", "CAI")):
        columns = np.flatnonzero((letters(text) != letters("CAT")).any((0, 2)))
        assert 0 < columns[-1] - columns[0] < 18
        assert (columns[0] + columns[-1]) / 2 == pytest.approx(32 + 18 * (place - 1), abs=2)


def test_pictures_are_random_and_repeatable():
    one, same, other = (WORLD.picture({"text": "CAT"}, np.random.default_rng(i)) for i in (0, 0, 1))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_careless_caption_is_one_letter_off():
    rng = np.random.default_rng(0)
    lengths = []
    for record in grammar.captions()[:2_000]:
        wrong = grammar.garble(record, rng)
        assert ocr.edit_distance(record["text"], wrong["text"]) == 1
        assert wrong == grammar.metadata("letters", wrong["text"])
        lengths.append(len(wrong["text"]))
        if lengths[-1] == 4:  # one is there twice
            assert re.search(r"(.)\1", wrong["text"])
    shares = np.bincount(lengths) / len(lengths)
    np.testing.assert_allclose(shares[2:], 1 / 3, atol=0.05)


# --------------------------------------------------------------------------------- the tokens


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(root, WORLD.words, WORLD.length, WORLD.spelled)
    return Tokenizers.load(root, WORLD.length)


def test_every_letter_is_a_token(tokenizers):
    assert (len(tokenizers.clip_g), len(tokenizers.t5)) == sizes(WORLD.words, WORLD.spelled)
    for text in ("CAT", "HAT", "SIT", "SAY", "GNU", *grammar.HELD_OUT):
        prompt, (a, b, c) = grammar.PROMPT.format(text), text
        words = [f"{w}</w>" for w in WORLD.words]
        spelled = [*words, a.lower(), b.lower(), f"{c.lower()}</w>", '"</w>']
        assert tokenizers.clip_l.tokenize(prompt) == spelled
        assert tokenizers.clip_g.tokenize(prompt) == spelled
        words = [f"▁{w}" for w in WORLD.words]
        assert tokenizers.t5.tokenize(prompt) == [*words, a, b, c, '"']


def test_no_caption_is_cut_or_equal_to_another(tokenizers):
    asked = [r["prompt"] for r in grammar.captions()[::17]]
    ends = tokenizers.clip_l.eos_token_id, tokenizers.clip_g.eos_token_id
    clip_l, clip_g, t5 = tokenizers(asked)
    assert clip_l.shape[1] == WORLD.length
    for ids, end in zip((clip_l, clip_g), ends):
        assert (ids[:, -1] == end).all() and (ids[:, :-1] != end).all()
    assert (t5 == tokenizers.t5.eos_token_id).any(1).all()
    for ids in (clip_l, clip_g, t5):
        assert len(np.unique(ids, axis=0)) == len(asked)


def test_a_word_of_letters_that_must_stay_apart_is_refused():
    with pytest.raises(ValueError, match="'that' cannot be one token"):
        clip_merges(["that"], ["THE", "HAD", "CAT"])
    assert clip_merges(["that"], ["HAD", "CAT"])[0] == ("t", "h")


# ------------------------------------------------------------------- the reward and the recipe


def test_the_reward_reads_the_signs():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    config = signs.get_config()
    read = rewards.load(config.reward.weights, config.reward.options.to_dict())["ocr"]
    rng = np.random.default_rng(0)
    records = grammar.prompts("test")
    right = np.stack([WORLD.picture(r, rng) for r in records])
    wrong = np.stack([WORLD.picture(grammar.garble(r, rng), rng) for r in records])
    asked = [r["prompt"] for r in records]
    for images, scores in ((right, (0.97, 1)), (wrong, (0.6, 0.72))):  # wrong: 1 of 3 letters
        found, valid = read(images, asked, records)
        assert valid.all() and scores[0] <= found.mean() <= scores[1]


def test_the_recipes_prompts_fit_the_model():
    config = signs.get_config()
    assert t5_limit(directories.resolve("signs")) == WORLD.length
    assert (config.model.height, config.model.width) == (64, 64)


def test_a_model_that_has_not_been_made_says_how(monkeypatch):
    monkeypatch.setattr(directories, "BUNDLED", ("shapes", "planets"))
    with pytest.raises(
        FileNotFoundError, match=r"'planets'.*flowgrpo_jax\.worlds\.planets\.pretrain"
    ):
        directories.resolve("planets")
