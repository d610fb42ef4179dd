"""What the reward server and its client send: all else is refused with a reason."""

import json
from pathlib import Path

import pytest
from http_stub import Stub
from malformed import MALFORMED, ONE, coded, file
from reward_server import LIMITS, pictures

from flowgrpo_jax import rewards
from flowgrpo_jax.transport import wire_format


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_request_is_refused_with_a_reason(name):
    body, words = MALFORMED[name]
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValueError, match=words):
        wire_format.decode(body, LIMITS)
    assert not Path("/tmp/a-pickle-was-read").exists()


def test_pictures_of_other_modes_are_read_as_rgb():
    body = json.dumps(ONE | {"images": {"png": [coded(file(mode="RGBA"))]}}).encode()
    assert wire_format.decode(body, LIMITS)[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "answer",
    [
        b"oops",
        b"[]",
        b'{"scores": [1], "valid": [true]}',
        b'{"scores": [1, "2"], "valid": [true, true]}',
        b'{"scores": [1, 2], "valid": [1, 1]}',
        b'{"scores": [1, 2]}',
        b'{"scores": [1, 1%s], "valid": [true, true]}' % (b"0" * 400),
    ],
)
def test_an_answer_that_is_none_makes_its_images_invalid(answer, caplog):
    with Stub(lambda request, body: (200, answer)) as stub:
        reward = rewards.load(["remote"], {"remote": {"urls": stub.url}})["remote"]
        _, valid = reward(pictures(2), ["", ""], [{}, {}])
    assert not valid.any() and "failed on 2 images" in caplog.text
