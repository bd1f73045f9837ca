"""A model that knows one text by heart, servers of it, and plain requests to them: for the tests of `minigpt serve`."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands.conftest import command, environment

from clock import PATIENCE, wait_for
from inspected import made_checkpoint
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import ByteTokenizer
from minigpt_cli.extras.serve.api import Completions
from minigpt_cli.extras.serve.engine import Engine
from minigpt_cli.extras.serve.server import Served, listen, make_app, run

SCRIPT = "Grüße, <img src=x onerror=alert(1)> aus 東京!\n\x1b[31m😀\u202e END. And then it goes on and on, to the end."
KEY = "a-key-of-letters"


def scripted_checkpoint(folder: Path) -> Checkpoint:
    """Bytes; one block. What comes at the t-th place is the t-th byte of SCRIPT, almost surely; the tail is noise."""
    torch.manual_seed(3)
    width = 128
    config = ModelConfig(n_layer=1, n_head=2, n_embd=width, block_size=width, norm="none", bias_head=False)
    model = GPT(config, 256)
    with torch.no_grad():
        assert model.position_embedding is not None
        model.position_embedding.weight.copy_(6 * torch.eye(width))
        model.token_embedding.weight.normal_(std=0.25)
        model.head.weight.normal_(std=0.3)
        for place, byte in enumerate(SCRIPT.encode()):
            model.head.weight[byte, place] = 3.0
    return made_checkpoint(folder, model, ByteTokenizer())


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """That of an answer that kept OpenAI's form."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


@dataclass
class Server:
    port: int
    key: str | None = None
    process: subprocess.Popen[bytes] | None = None
    errors: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def fetch(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A request with the key and, where the body is no bytes, as JSON."""
        connection = self.connection()
        try:
            connection.request(method, path, *self._sent(body, headers))
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def complete(self, **request: Any) -> Reply:
        return self.fetch("POST", "/v1/completions", request)

    def begin(self, **request: Any) -> http.client.HTTPConnection:
        """Ask, and do not wait. Closing the connection is what a client does that goes away."""
        connection = self.connection()
        connection.request("POST", "/v1/completions", *self._sent(request, {}))
        return connection

    def _sent(self, body: Any, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return content, {"Content-Type": "application/json"} | key | more

    def until(self, **state: int) -> None:
        """Wait until /health says so."""
        wait_for(lambda: state.items() <= self.fetch("GET", "/health").json.items(), f"/health to say {state}")


@contextmanager
def started(ckpt: Path, *arguments: object, errors: Path, **changes: str) -> Iterator[Server]:
    """The real command, in a process of its own. What it says on stderr goes to a file."""
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command("serve", "--ckpt", ckpt, "--port", 0, *arguments), env=environment(**changes), stderr=file
        )
    try:
        wait_for(lambda: "serving on http://" in errors.read_text() or process.poll() is not None, "the server")
        said = errors.read_text()
        assert process.poll() is None, said
        port = int(said.split("serving on http://")[1].split()[0].rpartition(":")[2])
        yield Server(port, changes.get("MINIGPT_API_KEY"), process, errors)
    finally:
        process.kill()
        process.wait()


@contextmanager
def in_this_process(
    checkpoint: Checkpoint, *, seconds: float = PATIENCE, slots: int = 2, log: Any = lambda line: None, **more: Any
) -> Iterator[tuple[Server, Engine, threading.Event]]:
    """The same server in a thread; setting the event stops it."""
    engine = Engine(checkpoint.model(), checkpoint.tokenizer.token_bytes(), slots=slots, queue=4)
    completions = Completions(engine, checkpoint.tokenizer, "best", max_tokens=10**6, seconds=seconds)
    app = make_app(engine, completions, Served("best", 0, 128, 256, 1), log=log, **more)
    stop, listening = threading.Event(), listen("127.0.0.1", 0)
    thread = threading.Thread(target=run, args=(app, engine, listening, stop.is_set))
    port = listening.getsockname()[1]
    thread.start()
    try:
        yield Server(port, more.get("key")), engine, stop
    finally:
        stop.set()
        thread.join()
