"""metrics.jsonl, loss.png and the run folder that holds them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minigpt_cli.core.checkpoint import load
from minigpt_cli.core.errors import CheckpointError, UserError
from minigpt_cli.core.files import TEMPORARY
from minigpt_cli.core.metrics import JsonLines, plot_losses, read_metrics
from minigpt_cli.core.run import open_run
from runs import RunTraining, small_config


def test_lines_are_on_the_disk_as_they_come(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    metrics.log({"step": 1, "train_loss": 2.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train_loss": 2.5}\n'
    metrics.close()


def test_resuming_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "trai')
    metrics = JsonLines(path, resume_at=2)
    metrics.log({"step": 3, "again": True})
    metrics.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_samples_are_kept_beside_the_numbers_also_when_a_run_is_resumed(run_training: RunTraining) -> None:
    config = small_config(sample_interval=4, max_iters=12)
    whole, told, _ = run_training("whole", config)
    run_training("parts", config, stop_at=9)
    parts, _, _ = run_training("parts", config, resume=True)
    for folder in (whole, parts):
        kept = [(r["step"], r["sample"]) for r in read_metrics(folder.metrics) if "sample" in r]
        assert kept == list(zip((4, 8, 12), told.samples, strict=True))


def test_a_line_nested_too_deeply_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": ' + "[" * 100_000 + '\n{"step": 2, "train_loss": 1.0}\n')
    assert [record["step"] for record in read_metrics(path)] == [2]


def test_the_picture_shows_both_curves(tmp_path: Path) -> None:
    lines = [{"step": i, "train_loss": 4 - i / 50} for i in range(100)] + [{"step": 50, "val_loss": 3.1}]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)))
    plot_losses(tmp_path / "m", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    plot_losses(tmp_path / "none", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_second_trainer_is_refused_and_told_whom_it_would_disturb(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from minigpt_cli.core.run import open_run
        with open_run(Path({str(tmp_path)!r})):
            print("in", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .* is training here"), open_run(tmp_path):
            pass
        other.kill()
    with open_run(tmp_path):  # a dead owner holds nothing
        pass


def test_what_a_killed_trainer_left_half_written_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}last.safetensors.123").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    with open_run(tmp_path):
        assert not list(tmp_path.glob(f"{TEMPORARY}*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_the_users_mistake(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path):
        pass


@pytest.mark.parametrize("form", ["file", "sharded"])
def test_a_run_that_is_to_be_replaced_waits_until_the_new_one_has_a_checkpoint(
    run_training: RunTraining, form: str
) -> None:
    folder, _, _ = run_training("run", small_config(keep=1, checkpoints=form))
    (folder.path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    folder.set_aside()
    assert not folder.holds_run()
    assert [path.name for path in folder.path.iterdir() if not path.name.startswith(".")] == ["notes.txt"]
    folder.metrics.write_text("of a run that came to nothing")
    with open_run(folder.path):  # as after a kill
        assert folder.holds_run()
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    folder.set_aside()
    folder.last.write_bytes(b"new")
    folder.drop_old()
    assert sorted(path.name for path in folder.path.iterdir() if path.name != ".lock") == [
        "last.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize("call", ["replace", "unlink", "rename"])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize(
    ("form", "lost"), [("file", ()), ("file", ("last.safetensors",)), ("sharded", ())],
    ids=["whole run", "only best and snapshots", "in shards"],
)  # fmt: skip
def test_setting_aside_and_taking_back_may_be_killed_at_any_point(
    run_training: RunTraining, call: str, number: int, form: str, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = run_training("run", small_config(keep=2, checkpoints=form))
    for name in lost:
        (folder.path / name).unlink()
    (folder.logs / "tensorboard").mkdir(parents=True)
    (folder.logs / "tensorboard" / "events").write_bytes(b"old")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    real, count = getattr(Path, call), 0

    def dies(path: Path, *arguments: object, **keywords: object) -> object:
        nonlocal count
        count += 1
        if count == number:
            raise SystemExit("killed")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, call, dies)
    with contextlib.suppress(SystemExit):
        folder.set_aside()
        folder.best.write_bytes(b"of a run that came to nothing")
        (folder.logs / "wandb").mkdir(parents=True)
        (folder.logs / "wandb" / "run").write_bytes(b"of a run that came to nothing")
        folder.settle()
    monkeypatch.undo()
    with open_run(folder.path):
        pass
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert after == before
    folders = [path for path in folder.path.iterdir() if path.is_dir()]
    assert set(folders) == {folder.logs, *folder.shards()}


def test_numbered_snapshots_alone_are_a_run(run_training: RunTraining) -> None:
    folder, _, _ = run_training("run", small_config(keep=1))
    for path in (folder.last, folder.best, folder.metrics):
        path.unlink()
    assert folder.holds_run()


def test_resuming_falls_back_to_the_newest_checkpoint_that_verifies(run_training: RunTraining) -> None:
    folder, _, _ = run_training("run", small_config(keep=2, checkpoint_interval=4))
    found, problems = folder.newest()
    assert (found.path, problems) == (folder.last, [])
    damaged = [folder.last, *reversed(folder.snapshots()), folder.best]
    for path, fallback in itertools.pairwise(damaged):
        path.write_bytes(path.read_bytes()[:-10])
        found, problems = folder.newest()
        assert found.path == fallback
        assert str(path) in problems[-2 if fallback != folder.best else -3]
        assert f"going on from {fallback.name}, step {load(fallback).header.step}" in problems
    assert "no optimizer state" in problems[-1]
    folder.best.write_bytes(b"")
    with pytest.raises(CheckpointError):
        folder.newest()


@pytest.mark.parametrize(("older", "newer"), [("file", "sharded"), ("sharded", "file")])
def test_of_two_forms_the_newer_checkpoint_goes_on(run_training: RunTraining, older: str, newer: str) -> None:
    """As where a run that changed the form is killed between a save and the removal of what it replaces."""
    folder, _, _ = run_training("run", small_config(max_iters=6, checkpoints=older))
    old = folder.newest_of("last")
    assert old is not None
    kept = folder.path.parent / old.name
    old.rename(kept)
    folder.path.rename(folder.path.parent / "gone")
    folder, _, _ = run_training("run", small_config(checkpoints=newer))
    kept.rename(old)
    found, problems = folder.newest()
    assert (found.header.step, problems) == (12, [])


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    with open_run(tmp_path) as folder, pytest.raises(UserError, match="without --resume"):
        folder.newest()
