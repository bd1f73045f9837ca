"""The browser that the tests of pages share, and the server that those of `minigpt serve` do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from browser import CHROMIUM, Browser
from minigpt_cli.core.checkpoint import Checkpoint
from served import KEY, Server, scripted_checkpoint, started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here (apt-get install chromium)")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return scripted_checkpoint(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="session")
def server(scripted: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real command with a key, four slots and places for twelve that wait."""
    errors = tmp_path_factory.mktemp("server") / "stderr"
    limits = ("--slots", 4, "--queue", 12, "--max-tokens", 100_000, "--verbose")
    with started(scripted.path, *limits, errors=errors, MINIGPT_API_KEY=KEY) as running:
        yield running
