"""Rewards in the graph against torch.

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
    TorchImageReward,
    dual_config,
    open_clip_pixels,
    pil_pixels,
    tensor_pixels,
    torch_head,
    torch_open_clip,
)
from tower_scores import IMAGES, PIXEL, SIZE, make, scored, torch_looks

from flowgrpo_jax import rewards
from flowgrpo_jax.worlds.pretraining.tokenizers import write_json
from flowgrpo_jax.worlds.shapes.grammar import LENGTH

# ---------------------------------------------------------------------------------- the checkpoints


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


# -------------------------------------------------------------------------------------- the rewards


def torch_logits(folder, pixels):
    """transformers' own logits of PROMPTS and pixels, text tokenised by transformers."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    read = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**read, pixel_values=pixels).logits_per_image.diagonal().numpy()


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


# --------------------------------------------------------------------------------- what all promise


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


# ------------------------------------------------------------------------------------------- errors


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
