"""A local server that imitates a judge behind an OpenAI-compatible endpoint."""

import base64
import io
import json

import numpy as np
from PIL import Image

from flowgrpo_jax import rewards

MODEL = "a-judge"


def pictures(body):
    """The pictures and the text of a request, as the interface defines it."""
    (message,) = json.loads(body)["messages"]
    assert message["role"] == "user"
    images, text = [], ""
    for part in message["content"]:
        if part["type"] == "image_url":
            kind, _, data = part["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        else:
            text += part["text"]
    return images, text


def completion(text, **choice):
    message = {"role": "assistant", "content": text}
    return 200, json.dumps({"choices": [{"message": message, **choice}]}).encode()


def serving(answer):
    """A server that has the model, and to questions says what `answer` does."""

    def both(request, body):
        if request.path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "other"}, {"id": MODEL}]}).encode()
        return answer(request, body)

    return both


def gray(*levels, side=8):
    """Uniform images uint8 [B, side, side, 3]."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def load(name, stub, **options):
    options = {"model": MODEL, "retries": 1, "backoff": 0, "timeout": 10, **options}
    url = stub if isinstance(stub, str) else stub.url + "/v1"
    return rewards.load([name], {name: {"url": url, **options}})[name]


def brighter(request, body):
    """Prefers the brighter picture; refuses to compare black ones."""
    (first, second), _ = pictures(body)
    a, b = first.mean(), second.mean()
    if min(a, b) == 0:
        return 500, b"too dark"
    verdict = "Tie" if a == b else f"Image {1 if a > b else 2} is better"
    return completion(f"Image 1 is fine, Image 2 as well. <answer>{verdict}</answer>")
