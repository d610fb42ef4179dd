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
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.transport import http_client

log = logging.getLogger(__name__)

Question = tuple[str, Sequence[np.ndarray]]  # text, pictures uint8 [H, W, 3]
# Values of `finish_reason` with which an answer is whole: those of OpenAI and vLLM, of TGI and of
# gateways to other interfaces; None where a server does not say it.
WHOLE = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")


class Chat:
    """A model at one or more addresses. Answers that could be read are remembered."""

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str,
        *,
        key_env: str | None = None,
        side: int | None = 512,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
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
          max_tokens: length limit of an answer, its reasoning included; an answer that reaches it
            is no verdict. None: the field is not sent.
          temperature: of the sampling; None: the field is not sent.
          extra: further fields of the request, such as {"seed": 0}, or in place of those that a
            server does not take, {"max_completion_tokens": 2048}.
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
        limit = {"max_tokens": max_tokens, "temperature": temperature}
        sent = {name: value for name, value in limit.items() if value is not None}
        self.fields = {**sent, **(extra or {})}
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Any] = OrderedDict()

    def ask_all(self, questions: Sequence[Question], parse: Callable[[str], Any]) -> list[Any]:
        """Return what `parse` reads in each answer; None where no answer came or it is unclear.

        Args:
          parse: raises ValueError, with the reason, for an answer that it cannot read.
        """

        def ask(question: Question) -> tuple[Any, str]:
            try:
                return self._ask(question, parse), ""
            except http_client.Failed as error:
                return None, str(error)

        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(ask, questions))
        if failures := Counter(why for found, why in results if found is None):
            (reason, times), *_ = failures.most_common(1)
            log.warning(
                "%s: %d of %d questions failed, %d of them so: %s",
                self.model,
                failures.total(),
                len(results),
                times,
                reason,
            )
        return [found for found, _ in results]

    def _ask(self, question: Question, parse: Callable[[str], Any]) -> Any:
        key = _digest(question)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        answer = self._content(self.replicas.post("/chat/completions", self._body(question)))
        try:
            found = parse(answer)
        except ValueError as error:
            raise http_client.Failed(str(error)) from error
        with self._lock:
            self._known[key] = found
            while len(self._known) > self.size:
                self._known.popitem(last=False)
        return found

    def _content(self, answer: bytes) -> str:
        """The text of a chat completion. Raises Failed for one that is not whole or is no text."""
        try:
            choice = json.loads(answer)["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content, refusal = message["content"], message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise http_client.Failed(f"no chat completion: {answer[:200]!r}") from error
        if reason == "length":
            limits = {k: v for k, v in self.fields.items() if "max" in k and "tokens" in k}
            raise http_client.Failed(
                f"the answer was cut off (finish_reason 'length'; {limits or 'no max_tokens'}):"
                " raise max_tokens, or the context length of the server"
            )
        if reason not in WHOLE:
            raise http_client.Failed(f"the answer is not whole: finish_reason is {reason!r}")
        if not isinstance(content, str):
            said = f", with the refusal {refusal!r}" if refusal else ""
            raise http_client.Failed(f"the answer's content is {content!r}, not text{said}")
        return content

    def _body(self, question: Question) -> bytes:
        text, pictures = question
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture, self.side)}}
            for picture in pictures
        ]
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        request = {"model": self.model, "messages": messages} | self.fields
        return json.dumps(request).encode()

    def ready(self, question: Question, parse: Callable[[str], Any]) -> None:
        """Ask every server a question.

        Raises RuntimeError unless one takes the key, has the model and gives a whole answer. An
        answer that `parse` cannot read is a warning: another picture may get a better one.
        """
        body = self._body(question)

        def probe(url: str) -> None:
            try:
                answer = http_client.request(
                    url + "/models", None, self.replicas.headers, timeout=self.replicas.timeout
                )
                served = [model["id"] for model in json.loads(answer)["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise http_client.Failed(
                    f"{url}/models is not what OpenAI's interface says: give `url` up to its /v1"
                ) from error
            if self.model not in served:
                raise http_client.Failed(
                    f"{url} serves {served}, not model={self.model!r}: set `model` to one of them"
                )
            try:
                self._try(url, body, parse)
            except http_client.Refused as error:
                raise http_client.Refused(
                    f"{error}. The question was sent with {self.fields}: a field that the server"
                    " does not take is left out with max_tokens=None or temperature=None, and"
                    " others are given in extra"
                ) from error

        self.replicas.check(f"model {self.model!r}", probe)

    def _try(self, url: str, body: bytes, parse: Callable[[str], Any]) -> None:
        headers = self.replicas.headers | {"Content-Type": "application/json"}
        answer = http_client.request(
            url + "/chat/completions", body, headers, timeout=self.replicas.timeout
        )
        try:
            content = self._content(answer)
        except http_client.Failed as error:
            raise http_client.Failed(f"{url}: {error}") from error
        try:
            parse(content)
        except ValueError as error:
            log.warning("%s: the answer to a first question is not clear: %s", url, error)


def blank() -> np.ndarray:
    """A grey picture uint8 [512, 512, 3], to ask a first question about."""
    return np.full((512, 512, 3), 128, np.uint8)


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
