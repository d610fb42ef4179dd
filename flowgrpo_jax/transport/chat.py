"""Questions about pictures to a vision-language model behind an OpenAI-compatible endpoint.

vLLM, SGLang, llama.cpp and the hosted ones all speak `POST {url}/chat/completions` with pictures as
PNG in data URLs.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.transport import http_client

log = logging.getLogger(__name__)

Question = tuple[str, Sequence[np.ndarray]]  # text, pictures uint8 [H, W, 3]


class Chat:
    """A model at one or more addresses. Answers that could be read are remembered."""

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str,
        *,
        key_env: str | None = None,
        side: int | None = 512,
        max_tokens: int = 512,
        temperature: float = 0.0,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        cache: int = 65536,
        timeout: float = 60.0,
        retries: int = 2,
        backoff: float = 0.5,
        rest: float = 10.0,
    ):
        """
        Args:
          urls: addresses with their version, http://127.0.0.1:17140/v1.
          model: the name under which the servers know it.
          key_env: the environment variable that holds the key, if they want one.
          side: pictures are resized to side x side px; None: sent as they are.
          max_tokens: length limit of an answer.
          extra: further fields of the request, such as {"seed": 0}.
          concurrency: questions on the way at a time.
          cache: answers remembered at most; 0: none.
          timeout, retries, backoff, rest: as in `http_client.Replicas`.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} must be at least 1")
        headers = http_client.bearer("key_env", key_env)
        limits = {"timeout": timeout, "retries": retries, "backoff": backoff, "rest": rest}
        self.replicas = http_client.Replicas(urls, headers=headers, **limits)  # type: ignore[arg-type]
        self.model, self.side, self.concurrency, self.size = model, side, concurrency, cache
        self.fields = {"max_tokens": max_tokens, "temperature": temperature, **(extra or {})}
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Any] = OrderedDict()

    def ask_all(self, questions: Sequence[Question], parse: Callable[[str], Any]) -> list[Any]:
        """What `parse` reads in each answer; None where it reads nothing, or no answer came."""

        def ask(question: Question) -> tuple[Any, str]:
            try:
                return self._ask(question, parse), ""
            except http_client.Failed as error:
                return None, str(error)

        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(ask, questions))
        failures = [why for found, why in results if found is None]
        if failures:
            log.warning(
                "%s: %d of %d questions failed, the first: %s",
                self.model,
                len(failures),
                len(results),
                failures[0],
            )
        return [found for found, _ in results]

    def _ask(self, question: Question, parse: Callable[[str], Any]) -> Any:
        key = _digest(question)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        body = json.dumps(self._request(question)).encode()
        answer = _content(self.replicas.post("/chat/completions", body))
        found = parse(answer)
        if found is None:
            raise http_client.Failed(f"no verdict in the answer {answer[-200:]!r}")
        with self._lock:
            self._known[key] = found
            while len(self._known) > self.size:
                self._known.popitem(last=False)
        return found

    def _request(self, question: Question) -> dict[str, Any]:
        text, pictures = question
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture, self.side)}}
            for picture in pictures
        ]
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages} | self.fields

    def ready(self) -> None:
        """Raises RuntimeError unless a server answers, takes the key and has the model."""

        def probe(url: str) -> None:
            try:
                answer = http_client.request(
                    url + "/models", None, self.replicas.headers, timeout=self.replicas.timeout
                )
                served = [model["id"] for model in json.loads(answer)["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise http_client.Failed(
                    f"{url}/models is not what OpenAI's interface says"
                ) from error
            if self.model not in served:
                raise http_client.Failed(f"{url} serves {served}, not model={self.model!r}")

        self.replicas.check(f"model {self.model!r}", probe)


def _content(answer: bytes) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise http_client.Failed(f"no chat completion: {answer[:200]!r}") from error
    if not isinstance(content, str):
        raise http_client.Failed(f"the answer's content is {content!r}, not text")
    return content


def _data_url(picture: np.ndarray, side: int | None) -> str:
    image = Image.fromarray(np.asarray(picture))
    if side and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _digest(question: Question) -> bytes:
    text, pictures = question
    digest = hashlib.sha256(json.dumps([text, [p.shape for p in pictures]]).encode())
    for picture in pictures:
        digest.update(picture.tobytes())
    return digest.digest()
