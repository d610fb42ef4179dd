"""A reward as a server, for rewards that need another machine, another environment, or a GPU.

    python -m flowgrpo_jax.rewards.serve --reward ocr --port 18090 --secret_env REWARD_SECRET

`rewards/remote.py` is the client and `rewards/message.py` the format; docs/extending.md shows both.

    GET  /health   200 while the process lives
    GET  /ready    200 with {"reward", "authorised", "limits"} once the reward is loaded, else 503
    POST /score    a request of `message`; 400 malformed, 401 wrong secret, 413 too large,
                   500 the reward failed, 503 loading or too many waiting

The reward runs in one thread. Requests that come in meanwhile wait, and are scored together as the
next batch. A request is never split, so that rewards which compare images see them all.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax import rewards
from flowgrpo_jax.rewards import message
from flowgrpo_jax.types import GraphReward, Metadata, Reward

log = logging.getLogger(__name__)

Scores = tuple[np.ndarray, np.ndarray]


class Job(NamedTuple):
    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    result: Future[Scores]


class Worker(threading.Thread):
    """Loads the reward, then scores what is submitted, one batch at a time."""

    def __init__(self, load: Callable[[], Reward | GraphReward], batch: int, waiting: int):
        """
        Args:
          batch: images of requests that are scored together at most.
          waiting: requests that may wait.
        """
        super().__init__(daemon=True)
        self.load, self.batch, self.waiting = load, batch, waiting
        self.ready = False
        self.on_error: Callable[[BaseException], None] = lambda error: None
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Future[Scores] | None:
        """The scores to come; None if too many wait already."""
        with self._changed:
            if len(self._jobs) >= self.waiting:
                return None
            job = Job(images, prompts, metadata, Future())
            self._jobs.append(job)
            self._changed.notify()
        return job.result

    def run(self) -> None:
        try:
            loaded = self.load()
            reward = on_host(loaded) if isinstance(loaded, GraphReward) else loaded
            self.ready = True
            while True:
                self._score(reward, self._next())
        except BaseException as error:  # a server without its worker would accept and never answer
            self.ready = False
            self.on_error(error)

    def _next(self) -> list[Job]:
        """The first request that waits, and those after it of the same size that fit."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs)
            jobs = [self._jobs.popleft()]
            size = len(jobs[0].images)
            while self._jobs and self._jobs[0].images.shape[1:] == jobs[0].images.shape[1:]:
                size += len(self._jobs[0].images)
                if size > self.batch:
                    break
                jobs.append(self._jobs.popleft())
        return jobs

    def _score(self, reward: Reward, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.result.cancelled()]
        if not jobs:
            return
        images = np.concatenate([job.images for job in jobs])
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = [record for job in jobs for record in job.metadata]
        try:
            scores, valid = (np.asarray(part) for part in reward(images, prompts, metadata))
            if scores.shape != (len(images),) or valid.shape != (len(images),):
                raise ValueError(f"the reward returned shapes {scores.shape} and {valid.shape}")
        except Exception as error:
            if len(jobs) > 1:  # one of them may be at fault: the others should not pay for it
                for job in jobs:
                    self._score(reward, [job])
                return
            log.warning("the reward failed on %d images", len(images), exc_info=True)
            _settle(jobs[0].result, error)
            return
        ends = np.cumsum([len(job.images) for job in jobs])[:-1]
        for job, *result in zip(jobs, np.split(scores, ends), np.split(valid, ends)):
            _settle(job.result, tuple(result))


def _settle(future: Future[Scores], outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def on_host(reward: GraphReward) -> Reward:
    """An in-graph reward as one that takes any number of images.

    Batches are filled up to a power of two, so that few sizes are compiled.
    """
    score = jax.jit(reward.score)
    weights = jax.device_put(reward.weights)

    def call(
        images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        n = len(images)
        rows = np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)
        prepared = reward.prepare([prompts[i] for i in rows], [metadata[i] for i in rows])
        scores = np.asarray(score(weights, images[rows], prepared), np.float32)[:n]
        return scores, np.isfinite(scores)

    return call


def app(name: str, worker: Worker, secret: str | None, limits: message.Limits) -> Any:
    """The web application: a Starlette object."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def no(status: int, why: str) -> Response:
        return JSONResponse({"error": why}, status)

    def authorised(request: Request) -> bool:
        given = request.headers.get("authorization", "").encode()
        return secret is None or hmac.compare_digest(given, f"Bearer {secret}".encode())

    async def health(request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def ready(request: Request) -> Response:
        if not worker.ready:
            return no(503, "the reward is being loaded")
        answer = {"reward": name, "authorised": authorised(request), "limits": limits._asdict()}
        return JSONResponse(answer)

    async def score(request: Request) -> Response:
        if not authorised(request):
            return no(401, "the secret is missing or wrong")
        if not worker.ready:
            return no(503, "the reward is being loaded")
        body = await _body(request, limits.bytes)
        if body is None:
            return no(413, f"a request may have {limits.bytes} bytes")
        try:
            job = await asyncio.to_thread(message.decode, body, limits)
        except ValueError as error:
            return no(400, str(error))
        future = worker.submit(*job)
        if future is None:
            return no(503, f"{worker.waiting} requests are waiting already")
        try:
            scores, valid = await asyncio.wrap_future(future)
        except Exception as error:
            return no(500, f"the reward failed: {error!r}")
        return Response(message.encode_scores(scores, valid), media_type="application/json")

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/score", score, methods=["POST"]),
    ]
    return Starlette(routes=routes)


async def _body(request: Any, limit: int) -> bytes | None:
    """The request's body, or None if it is too long.

    Up to twice the limit is read and dropped: a client that is still sending when the connection
    closes would never see the answer.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > 2 * limit:
            break
        if size <= limit:
            parts.append(part)
    return b"".join(parts) if size <= limit else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes. Raises what the loading of the reward raises."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            "the reward server needs Starlette and uvicorn: pip install 'flowgrpo_jax[serve]'"
        ) from error
    args = parse(arguments)
    secret = os.environ.get(args.secret_env) if args.secret_env else None
    if args.secret_env and not secret:
        raise SystemExit(f"--secret_env {args.secret_env}: this environment variable is empty")
    if not secret and args.host not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"--host {args.host} can be reached from outside: give --secret_env")

    options = {args.reward: args.options}
    worker = Worker(
        lambda: rewards.load([args.reward], options)[args.reward], args.batch, args.waiting
    )
    limits = message.Limits(args.max_images, args.max_side, args.max_bytes)
    config = uvicorn.Config(
        app(args.reward, worker, secret, limits),
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
    )
    server, failures = uvicorn.Server(config), []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    worker.on_error = stop
    worker.start()
    server.run()
    if failures:
        raise failures[0]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("flowgrpo_jax.rewards.serve", description="Serve a reward.")
    add, limits = parser.add_argument, message.Limits()
    add("--reward", required=True, choices=sorted(rewards.TABLE), metavar="NAME")
    add("--options", type=json.loads, default={}, help="JSON object, as reward.options.NAME")
    add("--host", default="127.0.0.1", help="0.0.0.0 for all; needs --secret_env")
    add("--port", type=int, default=18090)
    add("--secret_env", help="environment variable that holds the secret which clients must know")
    add("--batch", type=int, default=64, help="images scored together at most")
    add("--waiting", type=int, default=64, help="requests that may wait")
    add("--max_images", type=int, default=limits.images, help="in a request")
    add("--max_side", type=int, default=limits.side, help="of an image, px")
    add("--max_bytes", type=int, default=limits.bytes, help="of a request")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
