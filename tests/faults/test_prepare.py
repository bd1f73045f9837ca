"""A `prepare` that is killed goes on from what its journal says, and gives what it would have given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clock import PATIENCE
from minigpt_cli.core.corpus import prepare

# Records everything at once, works in small units, and stops in the middle of something for the test to kill it.
CHILD = """
import json, sys, time
from pathlib import Path
from minigpt_cli.core import corpus, documents, textfiles, textstream, unfinished
from minigpt_cli.core.encoder import MakeEncoder
unfinished.COMMIT_SECONDS = 0
documents.UNIT = textfiles.BLOCK = textstream.CHUNK = 5000
options = json.loads(sys.argv[3])
stop_in, stop_at = options.pop("stop_in"), options.pop("stop_at")
calls = 0
def stop_before(owner, name):
    work = getattr(owner, name)
    def counted(*arguments):
        global calls
        calls += 1
        if calls == stop_at:
            print("here", flush=True)
            time.sleep(3600)
        return work(*arguments)
    setattr(owner, name, counted)
if stop_in == "write":
    stop_before(unfinished.SplitWriter, "write")
elif stop_in == "publish":
    stop_before(unfinished.Unfinished, "publish")
report = corpus.prepare([Path(sys.argv[1])], Path(sys.argv[2]), **options)
print(json.dumps(report.notes))
"""


def start(source: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = json.dumps({"stop_in": None, "stop_at": 0, **options})
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(out), arguments], stdout=subprocess.PIPE, text=True
    )


def killed(source: Path, out: Path, **options: Any) -> list[psutil.Process]:
    """Start, and kill at the given place; the processes that it had started."""
    with start(source, out, **options) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        others = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
    assert not out.exists(), "a half-written folder is never taken for a whole one"
    return others


def finished(source: Path, out: Path, **options: Any) -> list[str]:
    """Run to the end; the notes."""
    with start(source, out, **options) as child:
        notes: list[str] = json.loads(child.communicate(timeout=PATIENCE)[0])
    assert child.returncode == 0
    return notes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text and a file of documents, of 200 kB each."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(1)
    texts = ["".join(map(chr, rng.integers(97, 105, rng.integers(5, 800)))) + " é\n" for _ in range(500)]
    (folder / "text.txt").write_text("".join(texts))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"text": folder / "text.txt", "documents": folder / "documents.jsonl"}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "documents in shards": ("documents", {"tokenizer": "bpe", "vocab_size": 300, "shard_tokens": 9000, "workers": 2}),
    "a text in one file": ("text", {"tokenizer": "bpe", "vocab_size": 300, "workers": 2}),
    "characters of a text in shards": ("text", {"tokenizer": "char", "shard_tokens": 30_000}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_prepare_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path: Path, sources: dict[str, Path], case: str
) -> None:
    kind, options = CASES[case]
    source, out = sources[kind], tmp_path / "out"
    assert finished(source, tmp_path / "expected", **options) == []
    others = killed(source, out, stop_in="write", stop_at=17, **options)
    assert len(others) >= options.get("workers", 0)
    first = json.loads((tmp_path / ".out.part" / "journal.json").read_bytes())
    assert 5 < first["done"] < 17
    killed(source, out, stop_in="write", stop_at=9, **options)
    second = json.loads((tmp_path / ".out.part" / "journal.json").read_bytes())
    assert second["done"] > first["done"]
    killed(source, out, stop_in="publish", stop_at=1, **options)
    notes = finished(source, out, stop_in="write", stop_at=1, **options)  # nothing is left to be written
    [note] = [note for note in notes if "were made before" in note]
    assert contents(out) == contents(tmp_path / "expected")
    meta = json.loads((out / "meta.json").read_bytes())
    assert note.startswith(f"{meta['train']['tokens'] + meta['val']['tokens']:,} of the tokens")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out"]
    assert not psutil.wait_procs(others, timeout=PATIENCE)[1], "no process outlives the one that started it"


@pytest.mark.parametrize("change", ["options", "file", "journal"])
def test_what_is_left_of_another_prepare_is_not_taken_over(
    tmp_path: Path, sources: dict[str, Path], change: str
) -> None:
    options: dict[str, Any] = {"tokenizer": "byte", "shard_tokens": 20_000}
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(sources["documents"].read_bytes())
    killed(source, out, stop_in="write", stop_at=30, **options)
    if change == "options":
        options["val_fraction"] = 0.2
    elif change == "file":
        status = source.stat()
        source.write_bytes(source.read_bytes().replace(b"a", b"b"))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        (tmp_path / ".out.part" / "journal.json").write_bytes(b'{"key"')
    assert finished(source, out, **options) == []
    prepare([source], tmp_path / "expected", **options)
    assert contents(out) == contents(tmp_path / "expected")


def test_an_interrupt_keeps_what_the_journal_has_and_says_where(tmp_path: Path, sources: dict[str, Path]) -> None:
    out, kept = tmp_path / "out", list[Path]()

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("unfinished.COMMIT_SECONDS", 0), ("documents.UNIT", 5000), ("textfiles.BLOCK", 5000)):
            patch.setattr(f"minigpt_cli.core.{name}", value)
        with pytest.raises(KeyboardInterrupt):
            prepare([sources["documents"]], out, tokenizer="byte", progress=interrupt, kept=kept.append)
        assert kept == [tmp_path / ".out.part"]
        assert "were made before" in prepare([sources["documents"]], out, tokenizer="byte").notes[0]


def test_a_part_that_is_shorter_than_its_journal_says_is_refused(tmp_path: Path, sources: dict[str, Path]) -> None:
    killed(sources["documents"], tmp_path / "out", stop_in="write", stop_at=30, tokenizer="byte")
    os.truncate(tmp_path / ".out.part" / "dataset" / "train-00000.bin", 10)
    with start(sources["documents"], tmp_path / "out", tokenizer="byte") as child:
        pass
    assert child.returncode == 1
    assert not (tmp_path / "out").exists()
