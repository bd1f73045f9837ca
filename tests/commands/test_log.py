"""TensorBoard and wandb: their real files are read back, their real processes are killed, and the run never minds."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from clock import PATIENCE
from commands.conftest import TINY, call, sets, wait_for
from minigpt_cli.commands import app
from minigpt_cli.core.metrics import JsonLines, Record, read_metrics
from minigpt_cli.extras import loggers
from minigpt_cli.extras.loggers import Logger, follow

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
BOTH = ["--log", "tensorboard", "--log", "wandb"]
SHORT = sets(train__checkpoint_interval=10, train__log_interval=5, train__sample_interval=10, train__keep=9)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def events(folder: Path) -> Any:
    """What TensorBoard itself makes of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def texts(folder: Path, tag: str) -> dict[int, str]:
    return {
        event.step: event.tensor_proto.string_val[0].decode() for event in events(folder).Tensors(f"{tag}/text_summary")
    }


def wandb_records(path: Path) -> Iterator[Any]:
    """The protocol buffers in a .wandb file: seven bytes of its own, then LevelDB's log of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too short for the head of a piece: filled up with zeros
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield WandbRecord.FromString(whole)
            whole = b""


def wandb_runs(logs: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """(run, history) of each offline run, oldest first."""
    found = []
    for folder in sorted((logs / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("*.wandb")
        records = list(wandb_records(file))
        (started,) = [record.run for record in records if record.HasField("run")]
        history = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        found.append((started, history))
    return found


def kept(path: Path, key: str) -> list[tuple[int, Any]]:
    return [(record["step"], record[key]) for record in read_metrics(path) if key in record]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer to finish the logs than a user would wait."""
    monkeypatch.setattr(loggers, "PATIENCE", PATIENCE)


@pytest.fixture(scope="module")
def watched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with both loggers in `run`, gone on with from step 10 as after a kill, to step 30; and the same
    without loggers in `plain`."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(loggers, "PATIENCE", PATIENCE)
    try:
        for out, more in (("run", BOTH), ("plain", [])):
            done = call("train", "--config", "gpt", *TINY, *SHORT, "--out", out, *more)
            assert done.code == 0, done.err
            assert "without it" not in done.err, done.err
            for name in ("last", "step-00000020"):
                (folder / out / f"{name}.safetensors").unlink()
            done = call("train", "--resume", "--out", out, *more, *sets(train__max_iters=30))
            assert done.code == 0, done.err
            assert "without it" not in done.err, done.err
    finally:
        monkeypatch.undo()
        os.chdir(before)
    return folder


def test_tensorboard_shows_every_number_once_though_the_run_was_resumed(watched: Path) -> None:
    folder, metrics = watched / "run/logs/tensorboard", watched / "run/metrics.jsonl"
    assert [step for step, _ in kept(metrics, "train_loss")] == [5, 10, 15, 20, 25, 30]
    for key in ("train_loss", "val_loss", "lr", "tokens_per_second", "peak_memory_bytes", "tokens_seen"):
        shown = scalars(folder, key)
        if key == "tokens_seen":  # once with the training loss, once with the validation loss
            shown = sorted(set(shown))
        expected = sorted(set(kept(metrics, key)))
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)
    by_tokens = {r["tokens_seen"]: r["val_loss"] for r in read_metrics(metrics) if "val_loss" in r}
    assert list(by_tokens) == [10 * 64, 20 * 64, 30 * 64]
    assert dict(scalars(folder / "by_tokens", "val_loss_by_tokens")) == pytest.approx(by_tokens, rel=1e-6)
    assert len(scalars(folder / "by_tokens", "train_loss_by_tokens")) == 6


def test_tensorboard_shows_the_samples_and_the_settings(watched: Path) -> None:
    folder = watched / "run/logs/tensorboard"
    samples = {step: text.replace("    ", "").splitlines() for step, text in texts(folder, "sample").items()}
    assert samples == {
        step: text.replace("    ", "").splitlines() for step, text in kept(watched / "run/metrics.jsonl", "sample")
    }
    settings = texts(folder, "config")
    assert {step: json.loads(text)["train"]["max_iters"] for step, text in settings.items()} == {0: 20, 10: 30}
    assert "_hparams_/session_start_info" in events(folder).PluginTagToContent("hparams")
    assert b"model.n_embd" in events(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]


def test_wandb_has_a_run_for_each_session_in_one_group(watched: Path) -> None:
    (first, before), (second, after) = wandb_runs(watched / "run/logs")
    assert (first.project, second.project) == ("minigpt", "minigpt")
    assert first.run_group == second.run_group == first.run_id != second.run_id
    assert second.display_name == "run from step 10"
    config = {update.key: json.loads(update.value_json) for update in first.config.update}
    assert config["model"]["n_embd"] == 16
    records = read_metrics(watched / "run/metrics.jsonl")
    assert [h["step"] for h in before if "train_loss" in h] == [5, 10, 15, 20]
    assert [h["step"] for h in after if "train_loss" in h] == [15, 20, 25, 30]
    for key in ("train_loss", "val_loss", "tokens_seen", "peak_memory_bytes"):
        made = [r for r in records if r["step"] > 10 or (r["step"] == 10 and "val_loss" in r)]  # by the second session
        assert [h[key] for h in after if key in h] == [r[key] for r in made if key in r]
    pages = {page.read_text() for page in (watched / "run/logs/wandb").rglob("sample*.html")}
    assert len([h for h in before + after if "sample" in h]) == 4
    assert pages == {f"<pre>{html.escape(r['sample'])}</pre>" for r in records if "sample" in r}


def test_no_logger_changes_what_is_learned(watched: Path) -> None:
    run, plain = (load_file(watched / name / "last.safetensors") for name in ("run", "plain"))
    assert any(name.startswith("optimizer.") for name in run)
    assert run.keys() == plain.keys()
    assert all(torch.equal(run[name], plain[name]) for name in run)


def test_a_logger_that_comes_late_shows_the_run_from_its_beginning(here: Path) -> None:
    done = call("train", "--resume", "--log", "tensorboard", *sets(train__max_iters=30))
    assert done.code == 0, done.err
    shown = scalars(here / "checkpoints/logs/tensorboard", "train_loss")
    assert [step for step, _ in shown] == [step for step, _ in kept(here / "checkpoints/metrics.jsonl", "train_loss")]
    assert [step for step, _ in shown] == [10, 20, 30]


def test_a_folder_that_cannot_be_written_costs_the_logger_and_not_the_run(here: Path) -> None:
    (here / "checkpoints/logs").mkdir()
    (here / "checkpoints/logs/tensorboard").write_text("a file where the folder should be")
    done = call("train", "--resume", "--log", "tensorboard", *sets(train__max_iters=40, train__log_interval=1))
    assert done.code == 0
    assert done.out.startswith("Best validation loss")
    lost = [line for line in done.err.splitlines() if "without it" in line]
    assert len(lost) == 1
    assert lost[0].startswith("--log tensorboard: FileExistsError: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log", "tensorbord"], "--log tensorbord: choose tensorboard or wandb"),
        (["--log", "wandb"], "--log wandb: wandb is not installed: pip install 'minigpt[logging]'"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_begins(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to say that there is none
    monkeypatch.setattr(sys, "path", [])
    done = call("train", "--config", "gpt", *TINY, "--out", "new", *arguments)
    assert (done.code, done.error) == (2, f"minigpt: error: {message}\n")
    assert not (here / "new").exists()


def test_torchrun_leaves_every_option_of_train_to_train() -> None:
    """It takes any beginning of its own options for one of them, --log too: that is why there is --logger."""
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    parse = get_args_parser().parse_args
    options = [name for param in get_command(app).commands["train"].params for name in param.opts]  # type: ignore[attr-defined]
    assert {"--log", "--logger", "--config"} <= set(options)
    for name in set(options) - {"--log"}:
        words = ["minigpt_cli", "train", name, "x"]
        parsed = parse(["--standalone", "-m", *words])
        assert [parsed.training_script, *parsed.training_script_args] == words
    with pytest.raises(SystemExit):
        parse(["--standalone", "-m", "minigpt_cli", "train", "--log", "x"])


# --- loggers that fail on the way ---


class Watched:
    """metrics.jsonl with a logger beside it, as a run has them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.notes: list[str] = []
        self.logs = folder / "logs"
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.logger = Logger(name, folder / "metrics.jsonl", self.logs, self.notes.append, config={"a": {"b": 1}})
        self.step = 0

    def tell(self) -> None:
        self.step += 1
        record: Record = {"step": self.step, "train_loss": 1.5}
        self.metrics.log(record)
        self.logger.log(record)

    def tell_until(self, condition: Callable[[], object], what: str) -> None:
        def told() -> object:
            self.tell()
            return condition()

        wait_for(told, what)

    def close(self) -> None:
        self.metrics.close()
        self.logger.close()

    @property
    def process(self) -> psutil.Process:
        assert self.logger._process is not None
        return psutil.Process(self.logger._process.pid)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[str], Watched]]:
    made: list[Watched] = []

    def go(name: str) -> Watched:
        made.append(Watched(name, tmp_path))
        made[-1].tell()
        return made[-1]

    yield go
    for one in made:
        process = one.logger._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def test_a_folder_that_vanishes_is_told_once(watch: Callable[[str], Watched]) -> None:
    run = watch("tensorboard")
    folder = run.logs / "tensorboard"
    wait_for(lambda: folder.is_dir() and "train_loss" in events(folder).Tags()["scalars"], "the first event")
    folder.rename(run.logs / "elsewhere")
    folder.write_text("")
    run.tell_until(lambda: run.notes, "a note")
    for _ in range(20):
        run.tell()
    run.close()
    (note,) = run.notes
    assert re.match(r"--log tensorboard: (NotADirectory|FileNotFound)Error: .*; the run goes on without it$", note)


@pytest.mark.parametrize("victim", ["the logger", "the library's own service"])
def test_a_logger_that_is_killed_is_told_once(watch: Callable[[str], Watched], victim: str) -> None:
    run = watch("wandb")
    wait_for(lambda: any("wandb-core" in child.name() for child in run.process.children()), "wandb's service")
    run.metrics.log({"step": 1, "sample": "a model may write anything: <script>alert('&')</script>"})
    wait_for(lambda: any(page.stat().st_size for page in run.logs.rglob("*.html")), "its page")
    (page,) = run.logs.rglob("*.html")
    assert "<script>" not in page.read_text()
    (run.process if victim == "the logger" else run.process.children()[0]).kill()
    run.tell_until(lambda: run.notes, "a note")
    run.tell()
    run.close()  # without waiting for it, of which there would be another note
    (note,) = run.notes
    assert note.startswith("--log wandb: its process was killed; " if victim == "the logger" else "--log wandb: Conn")


def test_a_logger_that_hangs_is_left_behind(watch: Callable[[str], Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "PATIENCE", 2.5)
    run = watch("tensorboard")
    stopped = run.process
    assert os.getpgid(stopped.pid) != os.getpgid(0)  # a Ctrl-C in the terminal is not for it
    stopped.send_signal(signal.SIGSTOP)
    for _ in range(2000):  # a pipe would be full long ago, and this would never end
        run.tell()
    run.close()
    assert run.notes[-1] == "--log tensorboard: not finished after 2 seconds; the run goes on without it"
    assert run.logger._process is not None
    wait_for(lambda: run.logger._process.poll() is not None, "its end")


def test_following_joins_lines_that_come_in_pieces_and_leaves_out_one_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "POLL", 0.01)
    path, ended = tmp_path / "metrics.jsonl", threading.Event()
    path.write_bytes(b'{"step": 1}\n{"st')
    with path.open("ab", buffering=0) as file:
        reader = follow(path, ended)
        assert next(reader) == [{"step": 1}]
        assert next(reader) == []
        file.write(b'ep": 2}\nnoise\n{"step": 3}\n{"step": 4')
        assert next(reader) == [{"step": 2}, {"step": 3}]
        file.write(b"}\n{")
        ended.set()
        assert list(reader) == [[{"step": 4}]]
