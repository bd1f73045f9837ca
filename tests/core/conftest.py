"""The fixtures of the engine's tests: a small dataset, and a way to train on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.run import RunFolder
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.train import Result
from runs import CPU, Recorder, RunTraining, run_in, write_dataset


@pytest.fixture
def dataset(tmp_path: Path, verse: str) -> Dataset:
    return write_dataset(tmp_path / "data", verse)


@pytest.fixture
def run_training(tmp_path: Path, dataset: Dataset) -> RunTraining:
    """`run_training("name", config, resume=False, stop_at=None)` -> (run folder, what it told, result)."""

    def go(
        name: str, config: Config, *, resume: bool = False, stop_at: int | None = None, runtime: Runtime = CPU,
        events: dict[int, Callable[[], object]] | None = None,
    ) -> tuple[RunFolder, Recorder, Result]:  # fmt: skip
        return run_in(tmp_path / name, dataset, config, runtime, Recorder(stop_at, events), resume=resume)

    return go
