"""The engine's promises: exact resume, one batch however it is split, nothing learned from a bad step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt_cli.core.checkpoint import load, save
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Batches, Dataset
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.evaluate import evaluate
from minigpt_cli.core.files import TEMPORARY
from minigpt_cli.core.metrics import read_metrics
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import make_optimizer
from minigpt_cli.core.run import RunFolder, check_resumable
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.step import Statistics, train_step
from runs import CPU, Recorder, RunTraining, run_in, saved, small_config, write_dataset


def assert_same_tensors(a: RunFolder, b: RunFolder) -> None:
    left, right = saved(a)[1], saved(b)[1]
    assert left.keys() == right.keys()
    assert any(name.startswith("optimizer.") for name in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")} for r in records
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "accumulation": {"micro_batch_size": 2},
    "epoch sampling": {"sampling": "epoch"},
    "schedule and clipping": {"lr_schedule": "cosine", "warmup_iters": 4, "lr_decay_iters": 12, "grad_clip": 0.5},
    "patience": {"patience": 50, "eval_interval": 2},
    "the modern recipe": {
        "optimizer": "muon",
        "lr_schedule": "wsd",
        "cooldown": 0.5,
        "warmup_iters": 2,
        "sampling": "epoch",
        "position": "rope",
        "norm": "rmsnorm",
        "qk_norm": True,
        "mlp": "relu2",
        "n_kv_head": 1,
        "zero_init": True,
        "logit_softcap": 15.0,
    },
    "weight average": {"ema": 0.9},
    "weight average and accumulation": {"ema": 0.5, "optimizer": "muon", "micro_batch_size": 1, "tie_weights": True},
    "samples": {"sample_interval": 5},
    "in shards": {"checkpoints": "sharded", "eval_interval": 3},
    "in shards, averaged and tied": {"checkpoints": "sharded", "ema": 0.5, "tie_weights": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("stops", [[6], [5], [1, 7, 8]], ids=str)
def test_stopped_and_resumed_is_never_stopped(
    run_training: RunTraining, changes: dict[str, Any], stops: list[int]
) -> None:
    config = small_config(**changes)
    whole, _, _ = run_training("whole", config)
    assert run_training("parts", config, stop_at=stops[0])[2].reason == "stopped"
    for stop in [*stops[1:], None]:
        parts, _, _ = run_training("parts", config, resume=True, stop_at=stop)
    assert_same_tensors(whole, parts)
    (_, best), (_, resumed_best) = saved(whole, "best"), saved(parts, "best")
    assert all(torch.equal(best[name], tensor) for name, tensor in resumed_best.items())
    assert without_time(read_metrics(parts.metrics)) == without_time(read_metrics(whole.metrics))
    headers = [saved(folder)[0] for folder in (whole, parts)]
    assert headers[0].val_loss == headers[1].val_loss is not None
    assert headers[0].progress.model_dump(exclude={"seconds"}) == headers[1].progress.model_dump(exclude={"seconds"})


@pytest.mark.parametrize("end", [12, 10], ids=["at a log", "between two logs"])
def test_a_longer_run_goes_on_from_a_finished_one(run_training: RunTraining, end: int) -> None:
    whole, told, _ = run_training("whole", small_config(max_iters=24))
    run_training("parts", small_config(max_iters=end))
    parts, told_later, _ = run_training("parts", small_config(max_iters=24), resume=True)
    assert_same_tensors(whole, parts)
    later = [record for record in without_time(told.records) if record["step"] > end]
    assert without_time(told_later.records) == later


def test_fp16_loss_scaling_resumes_exactly(run_training: RunTraining) -> None:
    runtime = Runtime(torch.device("cpu"), "fp16", compile=False)
    whole, told, _ = run_training("whole", small_config(), runtime=runtime)
    run_training("parts", small_config(), stop_at=5, runtime=runtime)
    parts, _, _ = run_training("parts", small_config(), resume=True, runtime=runtime)
    assert_same_tensors(whole, parts)
    scaler = load(whole.last).header.progress.scaler
    assert scaler == load(parts.last).header.progress.scaler
    assert scaler["scale"] > 1
    assert told.losses("val_loss")


def test_an_overflow_that_the_scaler_skips_is_no_failure(run_training: RunTraining) -> None:
    """A loss scale of 2^31 overflows half precision at once; scaling backs off until steps count again."""
    runtime = Runtime(torch.device("cpu"), "fp16", compile=False)
    folder, _, _ = run_training("run", small_config(max_iters=6), runtime=runtime)
    last = load(folder.last)
    progress = last.header.progress.model_copy(update={"scaler": {**last.header.progress.scaler, "scale": 2.0**31}})
    fields = last.header.model_dump(exclude={"versions", "checksums"}) | {"progress": progress}
    save(folder.last, last.tensors, fields)
    _, told, result = run_training("run", small_config(max_iters=40), resume=True, runtime=runtime)
    assert result.reason == "finished"
    assert load(folder.last).header.progress.scaler["scale"] < 2.0**31
    assert told.losses("val_loss")[36] < told.losses("val_loss")[12]


@pytest.mark.parametrize("end", [13, 17, 23, 33])
def test_ending_early_and_going_on_does_not_move_patience(run_training: RunTraining, end: int) -> None:
    changes = {"patience": 2, "eval_interval": 10, "learning_rate": 0.3}
    _, _, whole = run_training("whole", small_config(max_iters=200, **changes))
    assert run_training("parts", small_config(max_iters=end, **changes))[2].reason == "finished"
    _, _, parts = run_training("parts", small_config(max_iters=200, **changes), resume=True)
    assert whole.reason == parts.reason == "patience"
    assert whole.progress.step == parts.progress.step < 200


def test_last_knows_the_evaluation_that_ended_the_run(run_training: RunTraining) -> None:
    """Else a resumed run would replace `best` by something worse."""
    folder, told, result = run_training("run", small_config(max_iters=12, eval_interval=9, checkpoint_interval=6))
    assert result.progress.best_step == 12
    last = load(folder.last).header
    assert last.val_loss == last.progress.best_loss == told.losses("val_loss")[12]


def test_an_evaluation_that_a_stop_put_off_is_made_up_for_once(run_training: RunTraining) -> None:
    run_training("run", small_config(), stop_at=6)  # step 6 is due for evaluation
    folder, _, _ = run_training("run", small_config(), resume=True, stop_at=7)
    last = load(folder.last)
    undone = last.header.model_dump(exclude={"versions", "checksums"}) | {"step": 6, "val_loss": None}
    undone["progress"] |= {"step": 6, "evaluated_at": 0}
    save(folder.last, last.tensors, undone)  # as if killed between the evaluation and the next save
    folder, _, _ = run_training("run", small_config(), resume=True)
    assert [r["step"] for r in read_metrics(folder.metrics) if "val_loss" in r] == [6, 12]


def test_a_stop_during_the_last_evaluation_is_a_stop_and_resuming_makes_up_for_it(run_training: RunTraining) -> None:
    config = small_config(max_iters=10, eval_interval=100)
    assert run_training("run", config, stop_at=10)[2].reason == "stopped"
    folder, told, result = run_training("run", config, resume=True)
    assert result.reason == "finished"
    assert load(folder.last).header.val_loss == told.losses("val_loss")[10]
    assert folder.best.exists()


def test_tokens_seen_are_counted_as_they_were_seen(run_training: RunTraining) -> None:
    run_training("run", small_config())
    folder, _, _ = run_training("run", small_config(max_iters=14, batch_size=16), resume=True)
    assert load(folder.last).header.tokens_seen == 12 * 4 * 8 + 2 * 16 * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_interval": 1},
        {"log_interval": 1},
        {"sample_interval": 2},
        {"checkpoint_interval": 1},
        {"keep": 2},
        {"checkpoint_minutes": 1e-9},
        {"checkpoint_minutes": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_looking_does_not_change_what_is_learned(run_training: RunTraining, changes: dict[str, Any]) -> None:
    plain, _, _ = run_training("plain", small_config())
    looked, _, _ = run_training("looked", small_config(**changes))
    assert_same_tensors(plain, looked)


def test_accumulated_micro_batches_are_the_whole_batch(run_training: RunTraining) -> None:
    whole, one, _ = run_training("whole", small_config(dropout=0.0))
    parts, four, _ = run_training("parts", small_config(dropout=0.0, micro_batch_size=1))
    for name, tensor in load_file(whole.last).items():
        torch.testing.assert_close(tensor, load_file(parts.last)[name], rtol=1e-3, atol=1e-5)
    assert one.losses("train_loss") == pytest.approx(four.losses("train_loss"), rel=1e-5)


def test_a_small_model_learns(run_training: RunTraining) -> None:
    _, told, result = run_training("run", small_config(max_iters=300, eval_interval=100, dropout=0.0))
    assert told.losses("val_loss")[300] < 1.5 < told.losses("train_loss")[3]
    assert result.progress.best_loss == min(told.losses("val_loss").values())
    assert result.epochs == pytest.approx(300 * 4 * 8 / 3600, rel=0.2)


def test_checkpoints_hold_what_they_promise(run_training: RunTraining, dataset: Dataset) -> None:
    folder, told, _ = run_training("run", small_config())
    last, best = load(folder.last), load(folder.best)
    order = [("last", 6), ("best", 6), ("last", 12), ("best", 12), ("last", 12)]  # at the end with the evaluation
    assert told.saves == [(f"{name}.safetensors", step) for name, step in order]
    assert {name.split(".")[0] for name in best.tensors} == {"model"}
    assert {name.split(".")[0] for name in last.tensors} == {"model", "optimizer"}
    assert last.header.val_loss == told.losses("val_loss")[12]
    assert last.header.tokens_seen == 12 * 4 * 8
    assert last.header.dataset_fingerprint == dataset.meta.fingerprint
    assert last.config == small_config()


def test_checkpoints_of_an_averaging_run_hold_the_average_and_are_judged_by_it(
    run_training: RunTraining, dataset: Dataset
) -> None:
    """`model.` is what was evaluated; `optimizer.*.trained` is what training goes on with."""
    config = small_config(ema=0.9, max_iters=12, learning_rate=3e-2)
    folder, told, _ = run_training("averaged", config)
    plain, _, _ = run_training("plain", small_config(max_iters=12, learning_rate=3e-2))
    saved, unaveraged = load(folder.last), load(plain.last)
    assert [load(path).header.weights for path in (folder.last, folder.best, plain.best)] == [
        "averaged", "averaged", "trained"]  # fmt: skip
    for name, tensor in saved.part("model.").items():
        trained = saved.tensors[f"optimizer.{name}.trained"]
        assert torch.equal(trained, unaveraged.tensors[f"model.{name}"]), name  # averaging changes no step
        assert not torch.equal(trained, tensor), name
    for path in (folder.last, folder.best):
        checkpoint = load(path)
        score = evaluate(checkpoint.model(), dataset.val, CPU)
        assert score is not None
        assert score.loss == pytest.approx(told.losses("val_loss")[checkpoint.header.step], abs=1e-6)


def test_snapshots_are_kept_and_no_more_than_asked(run_training: RunTraining) -> None:
    folder, _, _ = run_training("run", small_config(keep=2, checkpoint_interval=3))
    assert [path.name for path in folder.snapshots()] == ["step-00000009.safetensors", "step-00000012.safetensors"]
    snapshot = load_file(folder.snapshots()[-1])
    assert all(torch.equal(snapshot[name], tensor) for name, tensor in load_file(folder.last).items())


@pytest.mark.parametrize("checkpoints", ["file", "sharded"])
def test_last_is_saved_by_time_too_and_best_only_by_evaluations(run_training: RunTraining, checkpoints: str) -> None:
    rarely = {"checkpoint_interval": 100, "eval_interval": 100, "max_iters": 3, "keep": 9, "checkpoints": checkpoints}
    for minutes, steps in ((1e-9, [1, 2, 3]), (None, [3]), (10.0, [3])):
        folder, told, _ = run_training(f"every {minutes}", small_config(**rarely, checkpoint_minutes=minutes))
        saves = [(name.split(".")[0].split("-")[0], step) for name, step in told.saves]
        assert sorted({step for kind, step in saves if kind == "last"}) == steps
        assert [step for kind, step in saves if kind == "best"] == [3]
        assert len(folder.snapshots()) == (checkpoints == "file"), "snapshots are by steps, and of the end"


def test_the_first_evaluation_comes_with_a_checkpoint_to_resume_from(run_training: RunTraining) -> None:
    """Later ones do not: `last` is saved when it is due."""
    _, told, _ = run_training("run", small_config(eval_interval=3, checkpoint_interval=100, max_iters=10))
    order = [("last", 3), ("best", 3), ("best", 6), ("best", 9), ("last", 10), ("best", 10), ("last", 10)]
    assert told.saves == [(f"{name}.safetensors", step) for name, step in order]


def test_a_save_that_fails_is_noticed_during_the_evaluation(
    tmp_path: Path, verse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it: it may take an hour."""
    long = write_dataset(tmp_path / "long", verse * 20)
    monkeypatch.setattr("minigpt_cli.core.evaluate.EVALUATED_AT_ONCE", 8)  # a thousand batches of one window
    obstacle = tmp_path / "run" / f"{TEMPORARY}last.safetensors.{os.getpid()}"
    recorder = Recorder(events={5: obstacle.mkdir})
    with pytest.raises(IsADirectoryError):
        run_in(tmp_path / "run", long, small_config(), CPU, recorder)
    assert not recorder.losses("val_loss")


def test_patience_ends_a_run_that_no_longer_improves(run_training: RunTraining) -> None:
    config = small_config(max_iters=400, eval_interval=5, patience=2, learning_rate=0.3)
    _, told, result = run_training("run", config)
    losses = list(told.losses("val_loss").values())
    assert result.reason == "patience"
    assert min(losses) == losses[-3] < min(losses[-2:])


def test_a_time_budget_ends_a_run_and_saves_it(run_training: RunTraining) -> None:
    folder, _, result = run_training("run", small_config(max_iters=1_000_000, max_minutes=0.02))
    assert result.reason == "time"
    assert 1.2 <= result.progress.seconds < 60  # far more only where the machine itself stood still
    assert load(folder.last).header.step == result.progress.step > 0


def test_a_learning_rate_that_explodes_ends_the_run_and_keeps_the_checkpoint(run_training: RunTraining) -> None:
    folder, _, _ = run_training("run", small_config(max_iters=6))
    before = folder.last.read_bytes()
    with pytest.raises(MinigptError, match=r"not finite at step \d+.*learning_rate"):
        run_training("run", small_config(max_iters=60, learning_rate=1e30, checkpoint_interval=1), resume=True)
    # Step 6's update is finite but absurd: the weights it leaves give no finite loss, so they are never saved.
    assert folder.last.read_bytes() == before


def test_a_poisoned_weight_is_named_and_never_saved(run_training: RunTraining) -> None:
    folder, _, _ = run_training("run", small_config(max_iters=6))
    last = load(folder.last)
    last.tensors["model.blocks.0.mlp.up.weight"][0, 0] = float("nan")
    save(folder.last, last.tensors, last.header.model_dump(exclude={"versions", "checksums"}))
    before = folder.last.read_bytes()
    with pytest.raises(MinigptError, match="not finite at step 6"):
        run_training("run", small_config(), resume=True)
    assert folder.last.read_bytes() == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_that_no_check_before_the_run_has_seen_ends_it(
    run_training: RunTraining, dataset: Dataset, split: str
) -> None:
    tokens = np.memmap(dataset.folder / f"{split}.bin", dtype="<u2", mode="r+")
    tokens[len(tokens) // 2] = 60_000
    with pytest.raises(MinigptError, match=r"token 60000 in a vocabulary of .* the dataset is damaged"):
        run_training(
            "run", small_config(sampling="epoch", max_iters=1000, eval_interval=1000 if split == "train" else 1)
        )


def test_a_failed_step_leaves_the_weights_alone(dataset: Dataset) -> None:
    """The device notices by itself: between the bad step and the host's next look no weight moves."""
    config = small_config(dropout=0.0)
    model = GPT(config.model, 40)
    optimizer, scaler, counters = make_optimizer(model, config.train), CPU.scaler(), Statistics.zeros(CPU.device)
    batches = Batches(dataset.train, 8, 4, seed=1, sampling="random", device=CPU.device)
    train_step(model, optimizer, scaler, [batches.at(0)], config, CPU, counters, 0)
    with torch.no_grad():
        model.head.bias[0] = float("inf")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in (1, 2, 3):
        train_step(model, optimizer, scaler, [batches.at(step)], config, CPU, counters, step)
    assert int(counters.failed_at) == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_samples_are_told_and_repeat(run_training: RunTraining) -> None:
    _, one, _ = run_training("one", small_config(sample_interval=6))
    _, two, _ = run_training("two", small_config(sample_interval=6, log_interval=1))
    assert len(one.samples) == 2
    assert one.samples == two.samples
    assert len(one.samples[0]) == 200


def resumable(saved_with: Config, now: Config, run_training: RunTraining, dataset: Dataset) -> dict[str, Any]:
    folder, _, _ = run_training("run", saved_with)
    return check_resumable(load(folder.last), now, dataset, allow_data_change=False)


def test_another_architecture_is_refused_with_the_difference(run_training: RunTraining, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"model.n_layer: 2 -> 3"):
        resumable(small_config(), small_config(n_layer=3), run_training, dataset)


def test_other_rates_and_intervals_are_allowed_and_told(run_training: RunTraining, dataset: Dataset) -> None:
    changed = resumable(small_config(), small_config(learning_rate=5e-3, dropout=0.2), run_training, dataset)
    assert changed == {"train.learning_rate": (0.01, 0.005), "model.dropout": (0.1, 0.2)}


def test_other_data_is_refused_unless_allowed(run_training: RunTraining, tmp_path: Path, verse: str) -> None:
    folder, _, _ = run_training("run", small_config())
    other = write_dataset(tmp_path / "other", verse[::-1])
    with pytest.raises(UserError, match="--allow-data-change"):
        check_resumable(load(folder.last), small_config(), other, allow_data_change=False)
    assert check_resumable(load(folder.last), small_config(), other, allow_data_change=True) == {}
    foreign = write_dataset(tmp_path / "foreign", "0123456789" * 100)
    with pytest.raises(UserError, match="another tokenizer"):
        check_resumable(load(folder.last), small_config(), foreign, allow_data_change=True)


def test_the_first_ten_losses_are_the_golden_ones(run_training: RunTraining) -> None:
    """Committed numbers: a change of initialisation, batches or optimizer shows here first.

    The parts are held by oracles elsewhere; after a deliberate change, copy the new numbers from the failure.
    """
    _, told, _ = run_training("run", small_config(max_iters=10, log_interval=1, dropout=0.0))
    assert list(told.losses("train_loss").values()) == pytest.approx(GOLDEN, abs=2e-4)


GOLDEN = [3.3229, 3.3003, 3.2494, 3.1969, 3.1035, 3.0412, 2.994, 3.0355, 2.8567, 2.8349]


def test_a_save_that_fails_ends_the_run_and_keeps_the_last_one(run_training: RunTraining, tmp_path: Path) -> None:
    folder, _, _ = run_training("run", small_config(max_iters=6))
    before = folder.last.read_bytes()
    obstacle = tmp_path / "run" / f"{TEMPORARY}{folder.last.name}.{os.getpid()}"  # where the next save begins to write
    with pytest.raises(IsADirectoryError):
        run_training("run", small_config(max_iters=60), resume=True, events={8: obstacle.mkdir})
    assert folder.last.read_bytes() == before
