"""`minigpt serve` as a user meets it: how it begins, how it ends, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from clock import PATIENCE
from commands.conftest import call
from served import started

BEST = "checkpoints/best.safetensors"


def serve(*arguments: object) -> Any:
    return call("serve", "--ckpt", BEST, "--port", 0, *arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--ckpt", "none.safetensors"], 2, "no such checkpoint"),
        (["--ckpt", "input.txt"], 1, "not a checkpoint"),
        (["--device", "tpu"], 2, "auto, cpu, cuda"),
        (["--host", "no.such.host.invalid"], 2, "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], 2, "192.0.2.1"),
        (["--api-key", "two words"], 2, "without spaces"),
        (["--slots", "0"], 2, "--slots"),
        (["--port", "70000"], 2, "--port"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_said_in_one_line(here: Path, arguments: list[str], code: int, says: str) -> None:
    done = serve(*arguments)
    assert done.code == code
    assert says in done.error


def test_a_port_in_use_is_said_with_the_remedy(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", port)
    assert done.code == 2
    assert f"port {port}" in done.error
    assert "choose another with --port" in done.error


def test_without_the_libraries_it_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else found(name, *a))
    done = serve()
    assert done.code == 1
    assert "pip install 'minigpt[serve]'" in done.error


def test_a_run_folder_is_served_by_its_best_checkpoint(finished: Path, tmp_path: Path) -> None:
    with started(finished / "checkpoints", errors=tmp_path / "stderr") as server:
        assert server.fetch("GET", "/v1/models").json["data"][0]["id"] == "best"
    assert f"{finished / 'checkpoints'}: using best.safetensors\n" in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_finishes_what_runs_and_then_ends(
    finished: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Open to other machines on the way, without a key: which it warns of."""
    host = ["--host", "0.0.0.0", "--slots", 2] if number == signal.SIGTERM else []
    with started(finished / BEST, *host, errors=tmp_path / "stderr") as server:
        assert server.process is not None
        # Short enough for the five seconds that it has to finish, on a slow machine too.
        options = {"stream": True, "stream_options": {"include_usage": True}}
        connection = server.begin(prompt="the", max_tokens=500, **options)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        server.process.send_signal(number)
        *_, usage, end = response.read().strip().split(b"\n\n")
        connection.close()
        assert server.process.wait(timeout=PATIENCE) == code
        said = (tmp_path / "stderr").read_text().splitlines()
    assert end == b"data: [DONE]"
    assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == 500
    assert said[-1] == "stopped"
    assert ("lets other machines in" in said[0]) == bool(host)
    assert f"; {2 if host else 32} texts at a time" in said[-3]
    assert len(said) == 3 + bool(host)  # and no line for a request
