"""A reward as a server, for rewards that need another machine, another environment, or a GPU.

    python -m flowgrpo_jax.serve --reward ocr --port 18090 --secret_env REWARD_SECRET

`rewards/remote.py` is the client and `transport/wire_format.py` the format; docs/rewards.md
shows both.

    GET  /health   200 while the process lives
    GET  /ready    200 with {"reward", "scope", "authorised", "limits"} once the reward is loaded,
                   else 503
    POST /score    in the wire format; 400 malformed, 401 wrong secret, 413 too large,
                   500 the reward failed, 503 loading or too many waiting

The reward runs in one thread. Requests that come in meanwhile wait, and are scored together as the
next batch; those whose client has gone by then are dropped. A request is never split. One to a
group or epoch reward holds all images of a prompt or of an epoch, and is scored by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from flowgrpo_jax import rewards
from flowgrpo_jax.command_line import user_errors
from flowgrpo_jax.transport import http_client, wire_format
from flowgrpo_jax.transport.worker import Worker

LOADING = "the reward is being loaded"


def app(name: str, worker: Worker, secret: str | None, limits: wire_format.Limits) -> Any:
    """The web application: a Starlette object."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    def authorised(request: Request) -> bool:
        given = request.headers.get("authorization", "").encode()
        return secret is None or hmac.compare_digest(given, f"Bearer {secret}".encode())

    def response(status: int, body: bytes) -> Response:
        return Response(body, status, media_type="application/json")

    async def health(request: Request) -> Response:
        return response(200, b'{"alive": true}')

    async def ready(request: Request) -> Response:
        if not worker.ready:
            return response(*_no(503, LOADING))
        state = {
            "reward": name,
            "scope": worker.scope,
            "authorised": authorised(request),
            "limits": limits._asdict(),
        }
        return response(200, json.dumps(state).encode())

    async def score(request: Request) -> Response:
        if not authorised(request):
            return response(*_no(401, "the secret is missing or wrong"))
        return response(*await _score(request.stream(), worker, limits, request.is_disconnected))

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/score", score, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def _no(status: int, why: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": why}).encode()


async def _score(
    stream: AsyncIterator[bytes],
    worker: Worker,
    limits: wire_format.Limits,
    gone: Callable[[], Awaitable[bool]],
) -> tuple[int, bytes]:
    """Status and body of the answer to a request, unless its client has `gone`."""
    if not worker.ready:
        return _no(503, LOADING)
    body = await _body(stream, limits.bytes)
    if body is None:
        return _no(413, f"a request may have {limits.bytes} bytes")
    try:
        job = await asyncio.to_thread(wire_format.decode, body, limits)
    except ValueError as error:
        return _no(400, str(error))
    future = worker.submit(*job)
    if future is None:
        return _no(503, f"{worker.waiting} requests are waiting already")
    scores = asyncio.wrap_future(future)
    while not (await asyncio.wait({scores}, timeout=1.0))[0]:
        if await gone():  # it asks again, or another server: not twice for one batch
            future.cancel()
            return _no(503, "the client has gone")
    try:
        return 200, wire_format.encode_scores(*scores.result())
    except Exception as error:
        return _no(500, f"the reward failed: {error!r}")


async def _body(stream: AsyncIterator[bytes], limit: int) -> bytes | None:
    """The request's body, or None if it is too long.

    Up to twice the limit is read and dropped: a client that is still sending when the connection
    closes would never see the answer.
    """
    parts, size = [], 0
    async for part in stream:
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
    try:
        secret = http_client.secret("--secret_env", args.secret_env) if args.secret_env else None
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if not secret and args.host not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"--host {args.host} can be reached from outside: give --secret_env")

    options = {args.reward: args.options}
    worker = Worker(
        lambda: rewards.load([args.reward], options)[args.reward], args.batch, args.waiting
    )
    limits = wire_format.Limits(args.max_images, args.max_side, args.max_bytes)
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
    """Read the command line. Exits with status 2 and a line that says what is wrong with it."""
    parser = argparse.ArgumentParser(
        "python -m flowgrpo_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, limits = parser.add_argument, wire_format.Limits()
    names = sorted(rewards.TABLE)
    add("--reward", required=True, choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    add("--options", type=json_object, default={}, help="JSON object, as reward.options.NAME")
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0, for all, needs a secret")
    add("--port", type=port, default=18090, help="port to serve at (%(default)s)")
    add("--secret_env", help="environment variable that holds the secret which clients must know")
    add("--batch", type=positive, default=64, help="images scored together at most (%(default)s)")
    add("--waiting", type=positive, default=64, help="requests that may wait (%(default)s)")
    most = limits.images, limits.side, limits.bytes
    says = "images in a request", "pixels of an image's longer side", "bytes of a request"
    for name, value, what in zip(("images", "side", "bytes"), most, says):
        add(f"--max_{name}", type=positive, default=value, help=f"most {what} (%(default)s)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def port(text: str) -> int:
    if (value := int(text)) not in range(2**16):
        raise argparse.ArgumentTypeError(f"{text} must be from 0, for any free one, to 65535")
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object such as {{"strict": true}}')
    return value


if __name__ == "__main__":
    with user_errors.in_one_line():
        main()
