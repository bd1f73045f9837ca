"""The fixtures of the engine's tests: a small dataset, and a way to train on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.metrics import JsonLines
from minigpt_cli.core.run import RunFolder, open_run
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.train import Result, train
from runs import CPU, Recorder, RunTraining, write_dataset


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
        recorder = Recorder(stop_at, events)
        with open_run(tmp_path / name) as folder:
            saved = folder.newest()[0] if resume else None
            evaluated = saved is not None and saved.header.val_loss is not None
            metrics = JsonLines(folder.metrics, resume_at=saved.header.step if saved else None, evaluated=evaluated)
            try:
                result = train(config, dataset, folder, runtime, [metrics, recorder], resume=saved, stop=recorder.stop)
            finally:
                metrics.close()
        return folder, recorder, result

    return go
