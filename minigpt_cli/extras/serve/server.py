"""The server around the endpoint: who is let in, what else there is to fetch, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.runtime import first_line
from minigpt_cli.extras.serve.api import Completions
from minigpt_cli.extras.serve.engine import Engine
from minigpt_cli.extras.serve.request import ApiError

STATIC = Path(__file__).parent / "static"
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
MAX_CONNECTIONS = 500
GRACE_SECONDS = 5.0  # for texts that are being written when the server is told to stop


@dataclass(frozen=True)
class Served:
    """What /v1/models says of the model."""

    name: str
    created: int  # seconds since 1970
    context: int  # tokens
    vocabulary: int
    parameters: int

    def document(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "minigpt",
            "context_window": self.context, "vocab_size": self.vocabulary, "parameters": self.parameters,
        }  # fmt: skip


def make_app(
    engine: Engine, completions: Completions, served: Served, *, names: tuple[str, ...] = (), key: str | None = None,
    log: Callable[[str], None] = lambda line: None, verbose: bool = False,
) -> ASGIApp:  # fmt: skip
    """The application. `names` are those, besides IP addresses and localhost, that it answers to without a key."""

    async def models(http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served.document()]})

    async def model(http: Request) -> Response:
        if http.path_params["name"] != served.name:
            raise ApiError(404, f"no such model: {http.path_params['name'][:100]!r}; there is {served.name!r}", "model")
        return JSONResponse(served.document())

    async def health(http: Request) -> Response:
        state = {"status": "stopping" if engine.stopping else "ok", "running": engine.running}
        return JSONResponse(state | {"waiting": engine.waiting, "slots": engine.slots}, 503 if engine.stopping else 200)

    async def error(http: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # Starlette's own: no such path, or not with this method
            error = ApiError(error.status_code, f"{http.method} {http.url.path[:100]}: {error.detail}")
        if not isinstance(error, ApiError):  # the guard says in the log what it was
            error = ApiError(500, "internal error", kind="server_error")
        return error.response()

    routes = [
        Route("/v1/completions", completions.__call__, methods=["POST"]), Route("/v1/models", models),
        Route("/v1/models/{name:path}", model), Route("/health", health),
        *(Route(path, _file(name, kind)) for path, (name, kind) in PAGES.items()),
    ]  # fmt: skip
    app = Starlette(routes=routes, exception_handlers={ApiError: error, HTTPException: error, Exception: error})
    return Guard(app, names=names, key=key, log=log, verbose=verbose)


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = (STATIC / name).read_bytes()
    return lambda http: Response(content, media_type=f"{kind}; charset=utf-8")


class Guard:
    """Before and after everything: may this request come in? Headers for every answer, a line in the log, a last catch.

    A page from elsewhere can make a browser send requests to this machine, even under a name of its own that it lets
    point here (DNS rebinding). So a request must come from our own page or from no page, and must name this server by
    an IP address, by localhost or by a name that it was given. There are no CORS headers. Where there is a key, /v1/
    needs it, and any name will do.
    """

    def __init__(
        self, app: ASGIApp, *, names: tuple[str, ...], key: str | None, log: Callable[[str], None], verbose: bool
    ) -> None:
        self.app, self.names, self.key, self.log, self.verbose = app, names, key, log, verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begin, status = time.perf_counter(), 0
        path = scope["raw_path"].decode("ascii", "backslashreplace")  # as it came: %0A stays %0A in a line of the log

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            self._let_in(Request(scope))
            await self.app(scope, receive, sent)
        except ApiError as error:
            await error.response()(scope, receive, sent)
        except Exception as error:
            self.log(f"{path}: internal error: {type(error).__name__}: {first_line(error)}")
        finally:
            if self.verbose:
                client = (scope.get("client") or ["?"])[0]
                took = time.perf_counter() - begin
                self.log(f"{client} {scope['method']} {path} {status or 'aborted'} {took:.3f} s")

    def _let_in(self, http: Request) -> None:
        host, origin = http.headers.get("host"), http.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != (host or "").lower():
            raise ApiError(403, "requests from other web pages are refused")
        if self.key is None and host is not None and not _is_local_name(host, self.names):
            raise ApiError(
                403, f"this server is not known as {host[:100]!r}: use its IP address, or start it with a key"
            )
        if self.key is not None and http.url.path.startswith("/v1/"):
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401, "this server wants an API key: Authorization: Bearer KEY", kind="authentication_error",
                    www_authenticate="Bearer",
                )  # fmt: skip


def _is_local_name(host: str, names: tuple[str, ...]) -> bool:
    """Whether nobody else can have pointed this name (with or without a port) here."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name in names:
            return True
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. UserError where that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where the other option lets two programs have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UserError(f"{host}, port {port}: {error.strerror}; choose another with --port") from None
    return listening


class _Server(uvicorn.Server):
    """uvicorn, without its signal handlers: ours are there already."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(app: ASGIApp, engine: Engine, listening: socket.socket, stop: Callable[[], object]) -> None:
    """Serve until `stop()`; then nothing new is taken, and what runs has GRACE_SECONDS to finish."""
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", loop="asyncio", log_config=None, log_level="critical",
        access_log=False, server_header=False, limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2,
    )  # fmt: skip
    asyncio.run(_serve(_Server(config), engine, listening, stop))


async def _serve(server: _Server, engine: Engine, listening: socket.socket, stop: Callable[[], object]) -> None:
    serving = asyncio.ensure_future(server.serve([listening]))
    while not stop() and not serving.done():
        await asyncio.sleep(0.1)
    engine.refuse()
    deadline = time.monotonic() + GRACE_SECONDS
    while (engine.running or engine.waiting) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(engine.close)
    server.should_exit = True
    await serving
