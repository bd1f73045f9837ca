"""TensorBoard and Weights & Biases, for whoever watches runs with them: they show what metrics.jsonl holds.

A logger is a process of its own that follows metrics.jsonl. Whatever happens to it (its library raises, hangs or is
killed, its disk is full, its network gone), the run goes on and is told so once, and what is learned stays the same.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.metrics import Listener, Record, kept_when_resuming, parse_metrics

NAMES = ("tensorboard", "wandb")  # also the names of the packages
PATIENCE = 30.0  # seconds that a logger has, at the end, to write what it has not written yet
POLL = 0.5  # seconds between two looks into metrics.jsonl


def require(names: Sequence[str]) -> None:
    """Before anything begins: UserError for a logger that is not one of ours or not installed."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"--log {name}: choose {' or '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name}: {name} is not installed: pip install 'minigpt[logging]'")


class Logger(Listener):
    """The run's side of a logger: starts its process when there is something to read, and sees whether it lives."""

    def __init__(
        self, name: str, metrics: Path, logs: Path, note: Callable[[str], None], *,
        config: Mapping[str, Any], resume_at: int | None = None, evaluated: bool = True, tokens_seen: int = 0,
    ) -> None:  # fmt: skip
        """Follow `metrics` and write below `logs`. `resume_at`: the step of the checkpoint that a session goes on from,
        with its `tokens_seen`, and whether that step was `evaluated`; None for a new run."""
        self._name, self._note = name, note
        self._hello = {
            "metrics": str(metrics), "logs": str(logs), "config": config, "resume_at": resume_at,
            "evaluated": evaluated, "tokens_seen": tokens_seen,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 # open until `close`
        self._lost = False

    def log(self, record: Record) -> None:
        if self._lost:
            return
        try:
            if self._process is None:
                self._start()
            elif self._process.poll() is not None:
                self._lose(self._last_words())
        except OSError as error:
            self._lose(str(error))

    def close(self) -> None:
        if self._process is not None and not self._lost:
            assert self._process.stdin is not None
            with suppress(OSError):
                self._process.stdin.close()  # this is how it learns that the run is over
            try:
                if self._wait(2) is None:
                    self._note(f"{self._name}: finishing, for {PATIENCE:.0f} seconds at most")
                if self._wait(PATIENCE - 2) is None:
                    self._process.kill()
                    self._wait(1)
                    self._lose(f"not finished after {PATIENCE:.0f} seconds")
                elif self._process.returncode:
                    self._lose(self._last_words())
            except OSError as error:
                self._lose(str(error))
        self._stderr.close()

    def _start(self) -> None:
        """In a session or, on Windows, a group of its own: a Ctrl-C is for the run, which ends the logger when it has
        saved."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._name],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._hello).encode() + b"\n")
        self._process.stdin.flush()

    def _wait(self, seconds: float) -> int | None:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process was killed"

    def _lose(self, why: str) -> None:
        self._lost = True
        self._note(f"--log {self._name}: {why}; the run goes on without it")


# The logger's side. What follows runs in its process.


class Sink(Protocol):
    def lacks(self, record: Record) -> bool:
        """Whether a line of metrics.jsonl is not in what earlier sessions wrote."""

    def log(self, record: Record) -> None:
        """A line of metrics.jsonl."""

    def flush(self) -> None:
        """There is nothing else to tell just now."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in logs/tensorboard: scalars by step, losses by tokens too, samples and the settings as text.

    A resumed run writes a new file in the same folder, which tells TensorBoard to forget what the old ones say of later
    steps; of the step itself too, if it is yet to be evaluated.
    """

    def __init__(
        self, logs: Path, config: Mapping[str, Any], resume_at: int | None, evaluated: bool, tokens_seen: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = logs / "tensorboard"
        goes_on = resume_at is not None and folder.is_dir()
        self._from = (resume_at or 0) + evaluated if goes_on else None
        self._by_step = cast(Any, SummaryWriter(folder, purge_step=self._from))  # its annotations leave things open
        self._by_tokens = SummaryWriter(folder / "by_tokens", purge_step=tokens_seen + evaluated if goes_on else None)
        self._by_step.add_text("config", _verbatim(json.dumps(config, indent=1)), resume_at or 0)
        settings = {key: value for key, value in _flat(config) if value is not None}
        for summary in hparams(settings, {"val_loss": 0.0}):
            self._by_step.file_writer.add_summary(summary)

    def lacks(self, record: Record) -> bool:
        return self._from is None or bool(record["step"] >= self._from)

    def log(self, record: Record) -> None:
        step = record["step"]
        if isinstance(record.get("sample"), str):
            self._by_step.add_text("sample", _verbatim(record["sample"]), step)
        for key, value in _numbers(record):
            self._by_step.add_scalar(key, value, step)
            if key in ("train_loss", "val_loss") and "tokens_seen" in record:
                self._by_tokens.add_scalar(f"{key}_by_tokens", value, record["tokens_seen"])

    def flush(self) -> None:
        self._by_step.flush()
        self._by_tokens.flush()

    def close(self) -> None:
        self._by_step.close()
        self._by_tokens.close()


class Wandb:
    """A run below logs/wandb: offline, unless the environment's WANDB_MODE says otherwise.

    A run of theirs cannot forget steps, so each session is a run of its own, and all sessions are a group.
    """

    def __init__(
        self, logs: Path, config: Mapping[str, Any], resume_at: int | None, evaluated: bool, tokens_seen: int
    ) -> None:
        mode: Any = os.environ.setdefault("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would go to the network
        import wandb

        before = sorted((logs / "wandb").glob("*run-*-*"), key=lambda path: path.name.split("-")[-2])
        self._resumed = (resume_at, evaluated) if before and resume_at is not None else None
        run_id = secrets.token_hex(4)
        self._html = wandb.Html
        self._run = wandb.init(
            dir=logs, mode=mode, project=os.environ.get("WANDB_PROJECT", "minigpt"), config=dict(config), id=run_id,
            group=before[0].name.split("-")[-1] if before else run_id,
            name=logs.parent.name + (f" from step {resume_at}" if resume_at is not None and before else ""),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_stats_pid=os.getppid()
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def lacks(self, record: Record) -> bool:
        return self._resumed is None or not kept_when_resuming(record, *self._resumed)

    def log(self, record: Record) -> None:
        told: dict[str, Any] = dict(_numbers(record)) | {"step": record["step"]}
        if isinstance(record.get("sample"), str):
            told["sample"] = self._html(f"<pre>{html.escape(record['sample'])}</pre>", inject=False)
        self._run.log(told)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[..., TensorBoard | Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def follow(path: Path, ended: threading.Event) -> Iterator[list[Record]]:
    """The records of metrics.jsonl, those that are there and those to come, until `ended`."""
    waiting = b""
    with path.open("rb") as file:
        while True:
            last = ended.is_set()  # asked before reading: what was written before the end is read
            *lines, waiting = (waiting + file.read()).split(b"\n")
            yield list(parse_metrics(lines))
            if last:
                return
            ended.wait(POLL)


def work(name: str, hello: Mapping[str, Any], ended: threading.Event) -> None:
    """Be the logger `name`. Lines of earlier sessions are left to what they wrote, where that is there."""
    sink = SINKS[name](
        Path(hello["logs"]), hello["config"], hello["resume_at"], hello["evaluated"], hello["tokens_seen"]
    )
    for records in follow(Path(hello["metrics"]), ended):
        for record in records:
            if sink.lacks(record):
                sink.log(record)
        sink.flush()
    sink.close()


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    return ((key, value) for key, value in record.items() if key != "step" and isinstance(value, int | float))


def _verbatim(text: str) -> str:
    """Text as a block of code, in the Markdown that TensorBoard reads."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _main() -> None:
    hello, ended = json.loads(sys.stdin.readline()), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()  # until the run closes it, or is no more
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    threading.excepthook = lambda failed: None  # TensorBoard's own thread: what stops it is raised here again
    try:
        work(sys.argv[1], hello, ended)
    except BaseException as error:
        what = (str(error).strip().splitlines() or ["no message"])[0]
        print(f"{type(error).__name__}: {what}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: a library's own farewell may hang, or hide the line above
    os._exit(0)


if __name__ == "__main__":
    _main()
