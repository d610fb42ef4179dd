"""A reward that a server of `serve.py` computes, on one or more machines.

Images whose request failed for good are invalid, and so get weight 0; the run goes on, and stops
when more than `reward.max_failed` of an epoch is lost.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flowgrpo_jax.transport import http_client, wire_format
from flowgrpo_jax.types import SCOPES, Metadata

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Remote:
    """A reward that asks `replicas`, `batch` images at a time; a group or an epoch at once."""

    replicas: http_client.Replicas
    batch: int
    form: str
    scope: str = "image"

    def ready(self) -> None:
        """Raise RuntimeError unless a server of this scope is ready, knows the secret and takes
        the batch."""

        def probe(url: str) -> None:
            url += "/ready"
            answer = http_client.request(
                url, None, self.replicas.headers, timeout=self.replicas.timeout
            )
            try:
                state = json.loads(answer)
                authorised, most = state["authorised"], state["limits"]["images"]
            except (ValueError, KeyError, TypeError) as error:
                raise http_client.Failed(
                    f"{url} is no flowgrpo_jax reward server: give `urls` the addresses at which"
                    " `python -m flowgrpo_jax.serve` runs"
                ) from error
            if not authorised:
                raise http_client.Failed(
                    f"{url} wants another secret: check secret_env on both sides"
                )
            if self.batch > most:
                raise http_client.Failed(
                    f"{url} takes {most} images a request, but batch={self.batch}: lower batch, or"
                    " raise the server's --max_images"
                )
            if (scope := state.get("scope", "image")) != self.scope:
                raise http_client.Failed(
                    f"{url} serves a reward of another scope than scope={self.scope!r}: set"
                    f" scope={scope!r} in reward.options"
                )

        self.replicas.check("remote reward", probe)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The servers' scores f32 [B]; valid where they came and the server called them valid."""
        batch = self.batch if self.scope == "image" else len(images)
        starts = range(0, len(images), batch)

        def ask(start: int) -> tuple[np.ndarray, np.ndarray]:
            rows = slice(start, start + batch)
            n = len(images[rows])
            body = wire_format.encode(images[rows], prompts[rows], metadata[rows], self.form)
            try:
                return wire_format.decode_scores(self.replicas.post("/score", body), n)
            except (http_client.Failed, ValueError) as error:
                log.warning("the remote reward failed on %d images: %s", n, error)
                return np.zeros(n, np.float32), np.zeros(n, bool)

        with ThreadPoolExecutor(2 * len(self.replicas.urls)) as pool:
            answers = list(pool.map(ask, starts))
        scores, valid = zip(*answers)
        return np.concatenate(scores), np.concatenate(valid)


def make(
    urls: str | Sequence[str],
    *,
    secret_env: str | None = None,
    batch: int = 64,
    form: str = "png",
    timeout: float = 120.0,
    retries: int = 3,
    backoff: float = 0.5,
    rest: float = 10.0,
    scope: str = "image",
) -> Remote:
    """Make the reward.

    Args:
      urls: addresses of servers of the same reward, http://host:port.
      secret_env: the environment variable that holds the servers' secret.
      batch: images of a request at most; the servers get two requests each at a time.
      form: "png" or, quicker on a fast network, "npy".
      timeout, retries, backoff, rest: as in `http_client.Replicas`.
      scope: that of the servers' reward. With "group" or "epoch" all images of a prompt or of an
        epoch are one request, whatever `batch` says.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} must be one of {', '.join(SCOPES)}")
    if form not in wire_format.FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(wire_format.FORMS)}")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    headers = http_client.bearer("secret_env", secret_env)
    replicas = http_client.Replicas(
        urls, timeout=timeout, retries=retries, backoff=backoff, rest=rest, headers=headers
    )
    return Remote(replicas, batch, form, scope)
