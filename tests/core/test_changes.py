"""A run that is resumed with other data or another batch size: what starts again, and what goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt_cli.core.checkpoint import Progress
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Dataset, windows_per_epoch
from minigpt_cli.core.metrics import read_metrics
from minigpt_cli.core.run import RunFolder
from minigpt_cli.core.train import Result
from minigpt_cli.core.verdict import verdict
from runs import CPU, Recorder, run_in, saved, small_config, write_dataset

FORMS = ["file", "sharded"]
HEADINGS = ("val_loss", "train_loss")


@pytest.fixture
def old(tmp_path: Path) -> Dataset:
    """A text that is soon learned, to the last letter."""
    return write_dataset(tmp_path / "old", "the king and queen of winter " * 120)


@pytest.fixture
def new(tmp_path: Path) -> Dataset:
    """The same letters in an order that cannot be learned."""
    letters = sorted(set("the king and queen of winter "))
    drawn = np.random.default_rng(7).integers(0, len(letters), 4000)
    return write_dataset(tmp_path / "new", "".join(letters) + "".join(letters[i] for i in drawn))


def go_on(folder: Path, dataset: Dataset, config: Config, stop_at: int | None = None) -> tuple[Recorder, Result]:
    recorder = Recorder(stop_at)
    recorder.step = 60 if stop_at == 60 else 0  # where these runs are resumed: asked to stop from the first
    _, told, result = run_in(folder, dataset, config, CPU, recorder, resume=True)
    return told, result


def settings(max_iters: int, form: str = "file", **more: Any) -> Config:
    return small_config(**{"max_iters": max_iters, "eval_interval": 20, "checkpoint_interval": 20, "dropout": 0.0,
                           "checkpoints": form, "sampling": "epoch", **more})  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [60, 67], ids=["at an evaluation", "between two"])
def test_best_and_patience_belong_to_the_new_data(
    tmp_path: Path, old: Dataset, new: Dataset, form: str, end: int
) -> None:
    run = RunFolder(tmp_path / "run")
    _, _, first = run_in(run.path, old, settings(end, form, patience=2), CPU, Recorder())
    assert first.progress.best_loss is not None
    assert first.progress.best_loss < 2.2, "the old text should be easier than any other"
    told, result = go_on(run.path, new, settings(160, form, patience=2))
    losses = told.losses("val_loss")
    assert next(iter(losses)) == end, "the loss to beat is measured before the first step"
    assert min(losses.values()) > first.progress.best_loss
    header, _ = saved(run, "best")
    best_step = min(losses, key=losses.__getitem__)
    assert (header.step, header.val_loss) == (best_step, losses[best_step])
    assert header.dataset_fingerprint == new.meta.fingerprint
    assert (result.progress.best_step, result.progress.best_loss) == (best_step, losses[best_step])
    assert result.progress.data_step == end
    assert result.epochs == pytest.approx((result.progress.step - end) * 4 * 8 / len(new.train))
    scheduled = [losses[step] for step in losses if step > end and step % 20 == 0]
    if result.reason == "patience":
        assert min(scheduled[:-2]) <= min(scheduled[-2:]), "patience looks at the new data only"
    else:
        assert result.progress.step == 160


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stops", [[60], [61], [70, 80, 81]], ids=str)
def test_a_change_of_data_survives_more_stops(
    tmp_path: Path, old: Dataset, new: Dataset, form: str, stops: list[int]
) -> None:
    """60: in the evaluation that the change asks for."""
    for name in ("whole", "parts"):
        run_in(tmp_path / name, old, settings(60, form), CPU, Recorder())
    go_on(tmp_path / "whole", new, settings(120, form))
    for stop in stops:
        assert go_on(tmp_path / "parts", new, settings(120, form), stop_at=stop)[1].reason == "stopped"
    go_on(tmp_path / "parts", new, settings(120, form))
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    for kind in ("last", "best"):
        (expected, tensors), (header, others) = saved(whole, kind), saved(parts, kind)
        assert all(torch.equal(tensors[name], other) for name, other in others.items())
        assert header.progress.model_dump(exclude={"seconds"}) == expected.progress.model_dump(exclude={"seconds"})
    figures = [
        [{key: r.get(key) for key in ("step", "tokens_seen", *HEADINGS)} for r in read_metrics(run.metrics)]
        for run in (whole, parts)
    ]
    assert figures[0] == figures[1]


def test_the_first_run_on_new_data_marks_last_before_it_evaluates(tmp_path: Path, old: Dataset, new: Dataset) -> None:
    """So that a `best` of the new data never stands beside a `last` of the old."""
    run = RunFolder(tmp_path / "run")
    run_in(run.path, old, settings(60), CPU, Recorder())
    told, _ = go_on(run.path, new, settings(120), stop_at=60)
    assert told.saves[0] == ("last.safetensors", 60)
    header, _ = saved(run)
    assert (header.dataset_fingerprint, header.val_loss) == (new.meta.fingerprint, None)
    assert header.progress.best_loss is None


def test_old_checkpoints_know_of_no_change() -> None:
    document = Progress(step=7, tokens_seen=99).model_dump(exclude={"data_step", "data_tokens"})
    assert Progress.model_validate(document) == Progress(step=7, tokens_seen=99)


def test_the_verdict_looks_only_at_the_new_data() -> None:
    """On the old it had fallen to 1.0; on the new it fell from 4.0 to 2.5."""
    progress = Progress(step=600, best_loss=2.5, best_step=600, data_step=300, data_tokens=100)
    records: list[dict[str, Any]] = [
        {"step": 100 * (i + 1), "val_loss": loss} for i, loss in enumerate([2.0, 1.5, 1.0])
    ]
    records += [{"step": 100 * (i + 3), "val_loss": loss} for i, loss in enumerate([4.0, 3.2, 2.8, 2.5])]
    records += [{"step": 100 * (i + 1), "train_loss": loss} for i, loss in enumerate([2.0, 1.0, 0.5, 3.0, 2.9, 2.6])]
    for record in [*records[3:7], *records[-3:]]:
        record["data_step"] = 300
    said = "\n".join(verdict(Result("finished", progress, 6.0, None, Path("last")), records, Config(), 10**6, 10**6))
    assert said.startswith("Best validation loss 2.5000 at step 600, after 6.0 passes over the training text.")
    assert "still learning at the end" in said
    progress = progress.model_copy(update={"best_step": 450})
    assert (
        "after 3.0 passes"
        in verdict(Result("finished", progress, 6.0, None, Path("last")), records, Config(), 10**6, 10**6)[0]
    )


# ----------------------------------------------------------------------------------------------------- the batch size


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Step -> where its windows began, of every run from here on."""
    from minigpt_cli.core import dataset

    asked, real = {}, dataset.window_offsets

    def watched(*arguments: Any, step: int, **options: Any) -> Any:
        offsets = real(*arguments, step=step, **options)
        asked[step] = offsets.tolist()
        return offsets

    monkeypatch.setattr(dataset, "window_offsets", watched)
    return asked


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_size_that_changes_skips_and_repeats_no_window(
    tmp_path: Path, old: Dataset, seen: dict[int, list[int]], form: str
) -> None:
    windows = windows_per_epoch(len(old.train), 8)
    sizes = [(4, 30), (16, 5), (3, 17)]  # batch size and steps of each session
    first, rest = windows - sum(size * steps for size, steps in sizes), 0
    sizes.append((first, 1))  # to the end of the epoch
    step = 0
    for number, (size, steps) in enumerate(sizes):
        for part in (steps // 2, steps - steps // 2):  # each session is stopped once
            rest, step = step, step + part
            if part:
                config = settings(step, form, batch_size=size)
                run_in(tmp_path / "run", old, config, CPU, Recorder(), resume=rest > 0)
        assert len({offset for at in range(step) for offset in seen[at]}) == sum(s * n for s, n in sizes[: number + 1])
    drawn = [offset for at in range(step) for offset in seen[at]]
    assert len(drawn) == len(set(drawn)) == windows


def test_new_data_is_read_from_its_beginning(
    tmp_path: Path, old: Dataset, new: Dataset, seen: dict[int, list[int]]
) -> None:
    """Every window of it once, whatever was seen of the old data."""
    run_in(tmp_path / "run", old, settings(50), CPU, Recorder())
    windows = windows_per_epoch(len(new.train), 8)
    go_on(tmp_path / "run", new, settings(60))
    go_on(tmp_path / "run", new, settings(60 + (windows - 40) // 8, batch_size=8))
    drawn = [offset for at in range(50, 60 + (windows - 40) // 8) for offset in seen[at]]
    assert len(drawn) == len(set(drawn)) == 40 + (windows - 40) // 8 * 8
