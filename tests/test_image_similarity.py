"""The similarity to a reference picture: against torch, and references that cannot be read."""

import numpy as np
import pytest
from PIL import Image
from torch_models import torch
from torch_towers import pictures, tensor_pixels
from tower_scores import IMAGES, SIZE, make, scored, torch_looks


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
