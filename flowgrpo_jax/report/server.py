"""The page while a run goes on, at an address of this machine, and votes between its pictures.

    GET  /             the page, which reloads itself when there is something new
    GET  /version      a text that changes when there is
    GET  /votes        the group of pictures that waits for a vote, {} without one
    POST /votes/NAME   {"chosen": [0, 3]}: the pictures of that group that are liked

Only requests that name this machine as the host are answered, and votes only as JSON: a page from
elsewhere that is open in the same browser can send neither.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from typing import Any

from etils import epath

from flowgrpo_jax.report import page, run_data, votes
from flowgrpo_jax.report.pictures import FOLDER

NAME = re.compile(r"[0-9a-f]{16}")


def app(workdirs: Sequence[epath.Path], folder: epath.Path, hosts: Sequence[str]) -> Any:
    """The web application: a Starlette object. It answers to the names in `hosts`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def shown(request: Request) -> Response:
        budget = run_data.BYTES // len(workdirs)
        try:
            runs = [run_data.read(place, bytes_of_pictures=budget) for place in workdirs]
        except FileNotFoundError as error:  # it has not begun yet
            return PlainTextResponse(str(error), 503, {"refresh": "5"})
        return HTMLResponse(page.html(runs, live=True))

    def newest(request: Request) -> PlainTextResponse:
        return PlainTextResponse(version(workdirs))

    def waiting(request: Request) -> JSONResponse:
        return JSONResponse(group(folder))

    async def give(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "a vote is JSON"}, 415)
        try:
            record(folder, name, await request.json())
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({})

    routes = [
        Route("/", shown),
        Route("/version", newest),
        Route("/votes", waiting),
        Route("/votes/{name}", give, methods=["POST"]),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return Starlette(routes=routes, middleware=[trusted])


def version(workdirs: Sequence[epath.Path]) -> str:
    """Return a text that changes with the metrics and evaluations of the runs."""
    newest = f"{FOLDER}/{run_data.NEWEST}"
    files = [place / name for place in workdirs for name in ("metrics.jsonl", newest)]
    found = [file.stat() for file in files if file.exists()]
    return ",".join(f"{stat.length}-{stat.mtime}" for stat in found)


def group(folder: epath.Path) -> dict[str, Any]:
    """Return the group that has waited longest for a vote, as a sheet with its name; {} if none."""
    for name in votes.waiting(folder):
        if sheet := run_data.sheet(folder / f"{name}.json"):
            return sheet | {"name": name}
    return {}


def record(folder: epath.Path, name: str, given: Any) -> None:
    """Record a vote. Raises ValueError where no such group waits, or has no such pictures."""
    if not NAME.fullmatch(name) or name not in votes.waiting(folder):
        raise ValueError(f"no group {name!r} waits for a vote")
    count = len(json.loads((folder / f"{name}.json").read_text())["pictures"])
    chosen = given["chosen"]
    if not all(type(i) is int and 0 <= i < count for i in chosen):
        raise ValueError(f"chosen={chosen}: must be places from 0 to {count - 1}")
    votes.give(folder, name, chosen)


def serve(workdirs: Sequence[epath.Path], folder: epath.Path, host: str, port: int) -> None:
    """Serve until a signal comes."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            "the live page needs Starlette and uvicorn: pip install 'flowgrpo_jax[serve]'"
        ) from error
    hosts = ("127.0.0.1", "localhost") if host == "127.0.0.1" else ("*",)
    made = app(workdirs, folder, hosts)
    settings = uvicorn.Config(made, log_level="warning", access_log=False)
    with listening(host, port) as opened:
        print(f"http://{host}:{port}", flush=True)
        uvicorn.Server(settings).run(sockets=[opened])


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises ValueError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: nothing can be served there ({error}); give another"
            " --port, such as 18092"
        ) from error
