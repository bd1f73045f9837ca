"""What a run says of its time and its speed, by a clock of the test and a device that computes behind the host."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.core import train as train_module
from minigpt_cli.core.checkpoint import Progress, load
from minigpt_cli.core.dataset import Batches, Dataset
from minigpt_cli.core.evaluate import Score
from minigpt_cli.core.metrics import read_metrics
from minigpt_cli.core.model import lm_loss
from minigpt_cli.core.run import open_run
from minigpt_cli.core.runtime import Runtime, _choose_compile
from minigpt_cli.core.train import make_model, progress_of, train
from minigpt_cli.core.world import World
from runs import CPU, Recorder, run_in, small_config, write_dataset

STEP, EVALUATION = 2.0, 50.0  # seconds


@pytest.fixture
def dataset(tmp_path: Path, verse: str) -> Dataset:
    return write_dataset(tmp_path / "data", verse)


class Device:
    """A clock, and work that the host has asked for and the device has not done yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.queued = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Runtime, "synchronize", lambda runtime: self.wait())
        monkeypatch.setattr(train_module.TrainStep, "__call__", lambda *_: self.ask(STEP))
        monkeypatch.setattr(train_module, "evaluate", lambda *_, **__: self.evaluate())
        loss_sum = train_module.Trainer._loss_sum
        monkeypatch.setattr(train_module.Trainer, "_loss_sum", lambda trainer: (self.wait(), loss_sum(trainer))[1])

    def ask(self, seconds: float) -> None:
        self.queued += seconds

    def wait(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def evaluate(self) -> Score:
        self.ask(EVALUATION)
        self.wait()
        return Score(3.0, 0.1, 0.2, 100)


def test_tokens_per_second_are_those_of_the_steps_whatever_is_evaluated_between_two_logs(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    config = small_config(log_interval=4, eval_interval=6, checkpoint_interval=3, max_iters=16)
    _, recorder, result = run_in(tmp_path / "run", dataset, config, CPU, Recorder())
    speeds = [record["tokens_per_second"] for record in recorder.records if "train_loss" in record]
    assert speeds == pytest.approx([4 * 8 / STEP] * 4)
    assert device.now == pytest.approx(16 * STEP + 3 * EVALUATION)
    assert result.progress.seconds == pytest.approx(device.now)


def test_a_runs_time_begins_with_the_commands_work(tmp_path: Path, dataset: Dataset) -> None:
    """Reading data, building and compiling count: here they have taken 100 seconds when training begins."""
    config = small_config(max_iters=6)
    for minutes, reason in ((None, "finished"), (1.5, "time")):
        with open_run(tmp_path / reason) as folder:
            limited = config.model_copy(update={"train": config.train.model_copy(update={"max_minutes": minutes})})
            began = time.perf_counter() - 100
            result = train(limited, dataset, folder, CPU, [Recorder()], began=began)
        assert result.reason == reason
        assert result.progress.seconds >= 100
        assert load(folder.last).header.progress.seconds >= 100
    assert result.progress.step == 1  # but never less


def test_the_gradients_norm_is_logged_as_autograd_gives_it(tmp_path: Path, dataset: Dataset) -> None:
    config = small_config(dropout=0.0, log_interval=1, max_iters=1, grad_clip=1e-3)
    folder, _, _ = run_in(tmp_path / "run", dataset, config, CPU, Recorder())
    model = make_model(config, len(dataset.meta.tokenizer["chars"]), CPU)
    batches = Batches(dataset.train, 8, 4, seed=config.train.seed, sampling="random", device=CPU.device)
    x_BT, y_BT = batches.at(0)
    lm_loss(model(x_BT), y_BT).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    (record,) = (record for record in read_metrics(folder.metrics) if "train_loss" in record)
    assert record["grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)  # before clipping
    assert "mfu" not in record  # of a CPU the peak is not known


def test_utilisation_is_logged_where_the_peak_is_known(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "peak_flops", lambda device: 1e12)
    config = small_config(max_iters=3)
    _, recorder, _ = run_in(tmp_path / "run", dataset, config, CPU, Recorder())
    flops = make_model(config, len(dataset.meta.tokenizer["chars"]), CPU).flops_per_token()
    (record,) = (record for record in recorder.records if "train_loss" in record)
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / 1e12)


def test_a_run_that_is_resumed_compiles_if_it_did_before() -> None:
    """Fewer steps are left then, which alone would not be worth compiling for; or more, which would."""
    cuda = torch.device("cuda")
    assert _choose_compile("auto", cuda, 5.0, True) == (True, "compile: on, as before")
    assert _choose_compile("auto", cuda, 600.0, False) == (False, "compile: off, as before")
    assert _choose_compile(True, cuda, 5.0, False) == (True, None)  # what the config says
    assert _choose_compile("auto", torch.device("cpu"), 600.0, True)[0] is False
    assert Progress.model_validate(Progress().model_dump(exclude={"compile"})).compile is None  # an older checkpoint


@pytest.mark.parametrize("compiled", [True, False])
def test_a_checkpoint_holds_whether_blocks_were_compiled(compiled: bool, dataset: Dataset) -> None:
    assert progress_of(None, dataset, Runtime(torch.device("cuda"), "bf16", compile=compiled)).compile is compiled
    assert progress_of(None, dataset, replace(CPU, compile=compiled)).compile is None


class Two(World):
    """One of two ranks, of which the other says and counts the same."""

    asked: list[Any]

    def largest(self, number: int) -> int:
        self.asked.append(number)
        return number

    def any(self, mine: bool) -> bool:
        return mine


def test_ranks_agree_on_stopping_about_twice_a_second_and_not_at_every_step(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    Two.asked = []
    device = Device(monkeypatch)
    monkeypatch.setattr(train_module.TrainStep, "__call__", lambda *_: device.ask(0.01))
    trainer_world = Two(0, 2)
    monkeypatch.setattr(Two, "total", lambda world, values: values)
    runtime = replace(CPU, world=trainer_world)
    config = small_config(batch_size=8, log_interval=20, max_iters=200, eval_interval=1000, checkpoint_interval=1000)
    with open_run(tmp_path / "run") as folder:
        result = train(config, dataset, folder, runtime, [Recorder()], stop=lambda: None)
    assert result.reason == "finished"
    # One in each of 20 steps until the first log says how long they take, then one in 20; and a few at each log.
    assert len(Two.asked) < 20 + 200 / 20 + 3 * 200 / 20 + 10
