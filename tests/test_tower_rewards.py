"""Preprocessing against Pillow, transformers and torch; rewards in the graph against torch.

Every reward is made from a tiny random checkpoint on disk, with a real tokenizer, and compared with
torch doing what the reward's paper and upstream say.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from torch_models import PROMPTS, WORDS, torch
from torch_towers import (
    BLIP_TEXT,
    BLIP_VISION,
    PROJECTION,
    VISION,
    TorchImageReward,
    dual_config,
    open_clip_pixels,
    pictures,
    pil_pixels,
    tensor_pixels,
    torch_dual,
    torch_head,
    torch_open_clip,
)

from flowgrpo_jax import rewards
from flowgrpo_jax.models.towers.preprocess import MEAN, STD, as_pil, as_tensor, down, to_even
from flowgrpo_jax.types import GraphReward
from flowgrpo_jax.worlds.pretraining.tokenizers import END, clip_merges, write_clip, write_json
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

IMAGES = pictures(3)
SIZE = VISION["image_size"]
SHAPES = [(40, 56), (57, 40), (64, 64), (28, 28), (20, 24), (28, 35), (513, 300)]

# ---------------------------------------------------------------------------------- preprocessing


def levels(pixels):
    """Normalised pixels back to levels of 0 to 255."""
    return (np.asarray(pixels, np.float64) * STD + MEAN) * 255


@pytest.mark.parametrize("height, width", SHAPES)
def test_as_pil(height, width):
    """The same 8-bit levels as Pillow. Its weights have 22 bits, ours 24 and other roundings: where
    a sum falls on the border between two levels (here less than 1 in 1000), they may differ by 1.
    """
    images = pictures(2, height, width)
    wanted = pil_pixels(images, SIZE).permute(0, 2, 3, 1).numpy()
    for ours in (as_pil(images, SIZE), jax.jit(as_pil, static_argnums=1)(images, SIZE)):
        assert ours.shape == wanted.shape and ours.dtype == np.float32
        off = np.abs(levels(ours) - levels(wanted))
        assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3
        same = off < 0.01
        np.testing.assert_allclose(np.asarray(ours)[same], wanted[same], atol=1e-6)


@pytest.mark.parametrize("height, width", [(28, 31), (28, 30), (33, 28), (28, 35), (40, 57)])
@pytest.mark.parametrize("begin", [down, to_even])
def test_a_crop_begins_where_its_library_has_it(height, width, begin):
    """An odd number of pixels is left of most of these: transformers drops the half, torchvision
    rounds it to the even number, as numpy does."""
    (picture,) = pictures(1, height, width)
    full = [SIZE * side // min(height, width) for side in (width, height)]
    fitted = Image.fromarray(picture).resize(full, Image.Resampling.BICUBIC)
    round_half = np.floor if begin is down else np.rint
    left, top = (int(round_half((side - SIZE) / 2)) for side in full)
    wanted = np.asarray(fitted)[top : top + SIZE, left : left + SIZE]
    np.testing.assert_allclose(levels(as_pil(picture, SIZE, begin)), wanted, atol=1.01)


@pytest.mark.parametrize("height, width", SHAPES)
def test_as_tensor(height, width):
    """Torch's antialiased bilinear resize in float32; both sum up to 40 terms per pass."""
    images = pictures(2, height, width)
    wanted = tensor_pixels(images, SIZE).permute(0, 2, 3, 1).numpy()
    for ours in (as_tensor(images, SIZE), jax.jit(as_tensor, static_argnums=1)(images, SIZE)):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_numpy_stays_on_the_host_and_leading_axes_are_free():
    assert isinstance(as_pil(IMAGES, SIZE), np.ndarray)
    np.testing.assert_array_equal(as_pil(IMAGES[1], SIZE), as_pil(IMAGES, SIZE)[1])


# -------------------------------------------------------------------------------- the checkpoints


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP as transformers writes it, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch_dual("quick_gelu").save_pretrained(folder)
    write_clip(folder, clip_merges(WORDS), LENGTH, pad=END)
    return folder


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    """open_clip's names in torch's format, as HPSv2.1 is published, and a config of its size."""
    folder = tmp_path_factory.mktemp("hps")
    torch.save({"state_dict": torch_open_clip().state_dict()}, folder / "HPS_v2.1_compressed.pt")
    dual_config("gelu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(torch_head(PROJECTION).state_dict(), file)
    return file


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(WORDS), "##s", "zebra", "an"]


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(TorchImageReward().state_dict(), folder / "ImageReward.pt")
    write_json(folder / "med_config.json", {**BLIP_TEXT, **BLIP_VISION})
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def make(name, **options) -> GraphReward:
    options = {key: str(value) for key, value in options.items()}
    reward = rewards.load([name], {name: options})[name]
    assert isinstance(reward, GraphReward)
    return reward


# One pixel may be one level off (test_as_pil), which moves a score of these small towers by 2e-5.
PIXEL = dict(rtol=1e-4, atol=1e-4)


def scored(reward, images=IMAGES, prompts=PROMPTS, metadata=None):
    rows = reward.prepare(prompts, metadata or [{}] * len(prompts))
    assert all(len(x) == len(prompts) for x in jax.tree.leaves(rows))
    scores = jax.jit(reward.score)(reward.weights, jnp.asarray(images), rows)
    assert scores.shape == (len(images),) and scores.dtype == jnp.float32
    return np.asarray(scores)


def torch_logits(folder, pixels):
    """transformers' own logits of PROMPTS and pixels, text tokenised by transformers."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    read = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**read, pixel_values=pixels).logits_per_image.diagonal().numpy()


def torch_looks(folder, pixels):
    """transformers' unit image embeddings."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        x = model.visual_projection(model.vision_model(pixels).pooler_output)
    return x / x.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------ the rewards


def test_pickscore(clip_folder):
    wanted = torch_logits(clip_folder, pil_pixels(IMAGES, SIZE)) / 26
    ours = scored(make("pickscore", path=clip_folder))
    np.testing.assert_allclose(ours, wanted, **PIXEL)
    assert np.ptp(wanted) > 1e-2  # the cases are not all alike


def test_clipscore(clip_folder):
    wanted = torch_logits(clip_folder, tensor_pixels(IMAGES, SIZE)) / 30
    ours = scored(make("clipscore", path=clip_folder))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_hpsv2(hps_folder, clip_folder):
    from transformers import CLIPTokenizer

    reward = make("hpsv2", path=hps_folder, tokenizer=clip_folder)
    read = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    theirs = torch_open_clip()
    with torch.no_grad():
        image = theirs.visual(open_clip_pixels(IMAGES, SIZE))
        text = theirs.text(read["input_ids"])
    wanted = torch.nn.functional.cosine_similarity(image, text).numpy()
    np.testing.assert_allclose(scored(reward), wanted, **PIXEL)


def test_aesthetic(clip_folder, head_file):
    with torch.no_grad():
        looks = torch_looks(clip_folder, pil_pixels(IMAGES, SIZE))
        wanted = torch_head(PROJECTION).layers(looks)[:, 0].numpy()
    for head in (head_file, head_file.parent):
        ours = scored(make("aesthetic", path=clip_folder, head=head))
        np.testing.assert_allclose(ours, wanted, **PIXEL)


def test_image_similarity(clip_folder, tmp_path):
    other = pictures(1, 70, 33)[0]
    Image.fromarray(other).save(tmp_path / "other.png")
    Image.fromarray(IMAGES[1]).convert("L").save(tmp_path / "grey.png")
    metadata = [{"image": "other.png"}, {"image": str(tmp_path / "grey.png")}]
    reward = make("image_similarity", path=clip_folder, root=tmp_path)
    grey = np.asarray(Image.open(tmp_path / "grey.png").convert("RGB"))
    pixels = [tensor_pixels(x[None], SIZE) for x in (*IMAGES[:2], other, grey)]
    looks = torch_looks(clip_folder, torch.cat(pixels))
    wanted = (looks[:2] * looks[2:]).sum(-1).numpy()
    np.testing.assert_allclose(scored(reward, IMAGES[:2], ["", ""], metadata), wanted, rtol=1e-4)


def test_an_image_is_most_similar_to_itself(clip_folder, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    metadata = [{"image": str(tmp_path / "0.png")}] * 3
    ours = scored(make("image_similarity", path=clip_folder), metadata=metadata)
    assert ours[0] == pytest.approx(1, abs=1e-6) and (ours[1:] < 0.9999).all()


def test_without_a_readable_reference_only_that_image_has_no_score(clip_folder, tmp_path, caplog):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    paths = [{"image": tmp_path / "broken.png"}, {"image": tmp_path / "0.png"}, {"image": None}]
    ours = scored(make("image_similarity", path=clip_folder), metadata=paths)
    np.testing.assert_array_equal(np.isfinite(ours), [False, True, False])
    ours = scored(make("image_similarity", path=clip_folder), metadata=[{}, *paths[1:]])
    np.testing.assert_array_equal(np.isfinite(ours), [False, True, False])
    assert "broken.png is not readable" in caplog.text


def test_prompts_without_a_reference_are_judged_when_loading(clip_folder, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    check = make("image_similarity", path=clip_folder, root=tmp_path).check
    check({"prompt": "a", "image": "0.png"})
    for record in ({"prompt": "a cat"}, {"prompt": "a cat", "image": None}):
        with pytest.raises(ValueError, match="'a cat' has no reference picture"):
            check(record)
    for file in ("broken.png", "absent.png", 7):
        with pytest.raises(ValueError, match=f"{file!r} of the prompt 'a cat' cannot be read"):
            check({"prompt": "a cat", "image": file})


def test_a_reference_is_seen_as_people_see_it(clip_folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left of upright
    Image.fromarray(np.rot90(IMAGES[0]).copy()).save(tmp_path / "0.png", exif=exif)
    ours = scored(
        make("image_similarity", path=clip_folder),
        IMAGES[:1],
        [""],
        [{"image": tmp_path / "0.png"}],
    )
    assert ours[0] == pytest.approx(1, abs=1e-6)


def test_imagereward(image_reward_folder):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(image_reward_folder)
    read = tokenizer(
        PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    )
    assert len({int(x) for x in read["attention_mask"].sum(1)}) == 3  # three lengths, one cut
    pixels = open_clip_pixels(IMAGES, BLIP_VISION["image_size"])
    wanted = TorchImageReward()(read["input_ids"], read["attention_mask"], pixels).numpy()
    ours = scored(make("imagereward", path=image_reward_folder))
    np.testing.assert_allclose(ours, wanted, **PIXEL)


# ------------------------------------------------------------------------------- what all promise


@pytest.fixture(scope="module")
def all_rewards(clip_folder, hps_folder, head_file, image_reward_folder):
    return {
        "pickscore": dict(path=clip_folder),
        "clipscore": dict(path=clip_folder),
        "hpsv2": dict(path=hps_folder, tokenizer=clip_folder),
        "aesthetic": dict(path=clip_folder, head=head_file),
        "image_similarity": dict(path=clip_folder),
        "imagereward": dict(path=image_reward_folder),
    }


NAMES = ["pickscore", "clipscore", "hpsv2", "aesthetic", "image_similarity", "imagereward"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_scores_the_same_in_any_batch(name, all_rewards, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    reward = make(name, **all_rewards[name])
    metadata = [{"image": str(tmp_path / "0.png")}] * 3
    together = scored(reward, metadata=metadata)
    for i in range(3):
        one = slice(i, i + 1)
        alone = scored(reward, IMAGES[one], PROMPTS[one], metadata[one])
        np.testing.assert_allclose(alone, together[one], rtol=1e-5, atol=1e-6)


def test_of_floats_no_level_is_rounded():
    whole, halves = (as_pil(x, SIZE) for x in (IMAGES, IMAGES.astype(np.float32)))
    off = np.abs(levels(whole) - levels(halves))
    assert 0.3 < off.max() < 1.01 and off.mean() < 0.4
    np.testing.assert_array_equal(as_tensor(IMAGES, SIZE), as_tensor(IMAGES * np.float32(1), SIZE))


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "imagereward"])
def test_the_gradient_is_that_of_finite_differences(name, all_rewards):
    reward = make(name, **all_rewards[name])
    inputs = reward.prepare(PROMPTS[:1], [{}])
    pixels = IMAGES[1:2] // 2 + np.float32(64)  # where resizing cuts nothing off

    @jax.jit
    @jax.value_and_grad
    def score(x):
        return reward.score(reward.weights, x, inputs)[0]

    slope = np.asarray(score(pixels)[1])
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0
    along = slope / np.abs(slope).max()
    up, down = (float(score(pixels + s * along)[0]) for s in (0.5, -0.5))
    np.testing.assert_allclose(up - down, (slope * along).sum(), rtol=0.05)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "aesthetic", "image_similarity"])
def test_an_embedding_is_what_the_tower_sees(name, all_rewards, clip_folder):
    """Of unit length, as transformers' and open_clip's image tower has it."""
    reward = make(name, **all_rewards[name])
    ours = np.asarray(jax.jit(reward.embed)(reward.weights, IMAGES))
    with torch.no_grad():
        if name == "hpsv2":
            theirs = torch_open_clip().visual(open_clip_pixels(IMAGES, SIZE))
            theirs = theirs / theirs.norm(dim=-1, keepdim=True)
        else:
            read = tensor_pixels if name == "image_similarity" else pil_pixels
            theirs = torch_looks(clip_folder, read(IMAGES, SIZE))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-3, atol=2e-3)


def test_all_have_a_gradient(all_rewards):
    assert all(make(name, **all_rewards[name]).differentiable for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(name, all_rewards, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    metadata = [{"image": str(tmp_path / "0.png")}] * 3
    full = scored(make(name, **all_rewards[name]), metadata=metadata)
    reward = make(name, **all_rewards[name], dtype="bfloat16")
    half = scored(reward, metadata=metadata)
    assert 0 < np.abs(half - full).max() < 0.05 * max(1, np.abs(full).max())
    low, kept = (
        [x.dtype for x in jax.tree.leaves(reward.weights)],
        ("logit_scale", "mlp/", "layers"),
    )
    assert low.count(jnp.bfloat16) > 20
    flat = {"/".join(k.key for k in path): x for path, x in named(reward.weights)}
    wide = {path for path, x in flat.items() if x.dtype == np.float32}
    assert wide and all(any(part in path for part in kept) for path in wide)


def named(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_towers_of_the_same_weights_are_shared(all_rewards):
    a, b = (make(name, **all_rewards[name]).weights["clip"] for name in ("clipscore", "aesthetic"))
    other = make("pickscore", **all_rewards["pickscore"], dtype="bfloat16").weights["clip"]
    assert a is b and other is not a
    assert all(isinstance(x, np.ndarray | np.generic) for x in a.values())


def test_a_folder_and_the_file_in_it_are_the_same_tower(clip_folder):
    paths = (clip_folder, clip_folder / "model.safetensors")
    a, b = (make("clipscore", path=path).weights["clip"] for path in paths)
    assert a is b


# ------------------------------------------------------------------------------------------ errors


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


PUBLISHED = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clipscore": "openai/clip-vit-large-patch14",
    "hpsv2": "xswu/HPSv2",
    "aesthetic": "openai/clip-vit-large-patch14",
    "image_similarity": "openai/clip-vit-large-patch14",
    "imagereward": "THUDM/ImageReward",
}


@pytest.mark.parametrize("name", NAMES)
def test_absent_weights_say_which_and_what_to_do(name, offline):
    with pytest.raises(FileNotFoundError) as error:
        rewards.load([name])
    text = str(error.value)
    assert f"reward.options.{name}.path={PUBLISHED[name]!r}" in text
    assert f"hf download {PUBLISHED[name]}" in text and "to the folder or to the file" in text


def test_an_absent_tokenizer_says_where_to_put_it(hps_folder, offline):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.*reward\.options\.hpsv2\.tokenizer"):
        make("hpsv2", path=hps_folder)


def test_an_empty_folder_and_a_wrong_path_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        make("clipscore", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        make("clipscore", path=tmp_path / "absent")


def test_weights_of_another_shape_are_listed(clip_folder, tmp_path):
    (tmp_path / "config.json").write_text(dual_config(num_hidden_layers=1).to_json_string())
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"not in the model .*text_model\.encoder\.layers\.1"):
        make("clipscore", path=tmp_path)


def test_an_unknown_dtype_is_an_error(clip_folder):
    with pytest.raises(ValueError, match="dtype is 'int8': choose from float32"):
        make("clipscore", path=clip_folder, dtype="int8")
