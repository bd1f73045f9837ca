"""What a command costs before it does what it was asked for, in CPU time of a process of its own, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands.conftest import TINY, command, environment, on_a_terminal, sets, wait_for
from minigpt_cli.commands import display
from minigpt_cli.commands.display import Display, telling
from minigpt_cli.core.config import Config
from runs import small_config

# Runs a command; at its end, or before the first training step, tells what it cost and which modules it imported.
MEASURED = """
import json, resource, sys

def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

start = spent()
import torch
imported = spent()

def tell(*args):
    heavy = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
    print(json.dumps({"torch": imported - start, "rest": spent() - imported, "heavy": heavy}), file=sys.stderr)
    sys.exit()

if sys.argv[1] == "load":
    from minigpt_cli import load
    next(iter(load(sys.argv[2], device="cpu").tokenizer.token_bytes()))
    tell()
if sys.argv[1] == "train":
    import minigpt_cli.core.train
    minigpt_cli.core.train.TrainStep.__call__ = tell
from minigpt_cli.commands import main
try:
    main()
finally:
    tell()
"""


def measured(*arguments: object) -> dict[str, Any]:
    pytest.importorskip("resource")
    words = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(words, env=environment(), capture_output=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stderr.decode().splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "checkpoints/best.safetensors"],
        ["sample", "--ckpt", "checkpoints/best.safetensors", "--tokens", 1, "--seed", 1, "--device", "cpu"],
        ["load", "checkpoints/best.safetensors"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_reading_a_model_imports_no_compiler_and_takes_no_time_beside_pytorch(
    arguments: list[object], here: Path
) -> None:
    cost = measured(*arguments)
    assert cost["heavy"] == []
    assert cost["rest"] < 0.7 + 0.5 * cost["torch"]  # 0.5 s where importing torch takes 1.4


def test_the_first_step_comes_soon(here: Path) -> None:
    cost = measured("train", "--config", "gpt", "--out", "soon", "--device", "cpu")
    assert cost["rest"] < 5.0


def test_a_slow_first_step_is_not_waited_for_in_silence(here: Path) -> None:
    """Of the main shape, which takes many seconds on a CPU: real output, then the process is ended."""
    child = subprocess.Popen(
        command("train", "--config", "gpt", "--out", "slow", *sets(train__batch_size=64, runtime__device="cpu")),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stderr is not None
        said = next((line for line in child.stderr if line.startswith("step ")), "")
    finally:
        child.kill()
        child.communicate()
    assert said == "step 0/5,000  the first step is running\n"


def test_on_a_terminal_the_bar_is_there_before_the_first_step(here: Path) -> None:
    code, shown = on_a_terminal("train", "--config", "gpt", *TINY, "--out", "bar")
    assert code == 0
    assert "step 0/20" in shown
    assert shown.index("step 0/20") < shown.index("the first step is running") < shown.index("step 20/20")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line after a moment without one."""
    monkeypatch.setattr(display, "PATIENCE", 0.1)
    monkeypatch.setattr(display, "EVERY", 0.2)


def long_run(**changes: Any) -> Config:
    return small_config(max_iters=1_000_000, log_interval=1000, **changes)


def test_between_two_logs_there_are_lines_and_then_the_hours(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, said = Display(long_run(), start=0), list[str]()

    def has_said(what: str) -> bool:
        said.extend(capsys.readouterr().err.splitlines())
        return any(what in line for line in said)

    try:
        wait_for(lambda: has_said("step 0/1,000,000  the first step is running"), "a word in the first step")
        shown.progress(1)
        wait_for(lambda: has_said("step 1/1,000,000  ETA "), "a word after it")
        shown.log({"step": 1, "train_loss": 4.0})
        time.sleep(0.1)
        shown.progress(2)
        wait_for(lambda: has_said("step 2/1,000,000  loss 4.0000  ETA "), "a word with the loss")
    finally:
        shown.close()
    [warning] = [line for line in said if line.startswith("warning")]
    assert warning.startswith("warning: this will take about ")
    assert warning.endswith(" s a step); --config cpu takes minutes")


@pytest.mark.parametrize(
    ("config", "start", "device", "expected"),
    [
        (long_run(), 0, "cpu", "--config cpu takes minutes"), (long_run(), 0, "cuda", "hours on cuda"),
        (long_run(), 7, "cpu", None), (long_run(max_minutes=1), 0, "cpu", None), (small_config(), 0, "cpu", None),
    ],
)  # fmt: skip
def test_hours_are_told_of_a_new_run_that_takes_them(
    config: Config, start: int, device: str, expected: str | None, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Display(config, start, device)
    for step in (1, 2, 3):
        time.sleep(0.15)
        shown.progress(start + step)
    shown.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == (expected is not None)
    assert expected is None or expected in warnings[0]


def test_work_that_takes_a_while_is_told_and_a_moment_is_not(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with telling(lambda: "never said"):
        pass
    lines = list[str]()

    def twice() -> bool:
        lines.extend(capsys.readouterr().err.splitlines())
        return len(lines) >= 2

    with telling(lambda: "reading a large file"):
        wait_for(twice, "two lines")
    assert set(lines) == {"reading a large file"}
