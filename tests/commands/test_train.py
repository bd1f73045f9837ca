"""`minigpt train` as a user meets it: what a run leaves, what is refused before anything is touched, how it ends."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clock import PATIENCE, compute
from commands.conftest import FOREVER, TINY, Done, call, command, environment, run, sets, tree, wait_for
from minigpt_cli.core import checkpoint
from minigpt_cli.core.checkpoint import Progress
from minigpt_cli.core.config import load_config, parse_config, shipped_configs
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.train import Result
from minigpt_cli.core.verdict import advice, verdict


def train(*arguments: object) -> Done:
    return call("train", "--config", "gpt", *TINY, *arguments)


def test_a_run_leaves_what_the_design_names(here: Path) -> None:
    folder = here / "checkpoints"
    assert {p.name for p in folder.iterdir()} - {".lock"} == {
        "last.safetensors", "best.safetensors", "metrics.jsonl", "loss.png", "config.yaml",
    }  # fmt: skip
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train_loss" in r] == [10, 20]
    assert [r["step"] for r in records if "val_loss" in r] == [10, 20]
    assert set().union(*records) >= {"step", "train_loss", "val_loss", "lr", "tokens_per_second", "seconds"}
    overrides = [("model.n_layer", 1), ("model.n_head", 2), ("model.n_embd", 16), ("model.block_size", 16)]
    overrides += [("train.batch_size", 4), ("train.max_iters", 20), ("train.eval_interval", 10)]
    overrides += [("runtime.device", "cpu"), ("runtime.precision", "fp32")]  # type: ignore[list-item]
    assert load_config(str(folder / "config.yaml")) == load_config("gpt", overrides)
    last, best = (checkpoint.load(folder / f"{name}.safetensors") for name in ("last", "best"))
    assert last.part("optimizer.")
    assert not best.part("optimizer.")
    assert last.header.step == 20


def test_the_real_command_trains_and_says_how_it_went(here: Path) -> None:
    done = run("train", "--config", "gpt", *TINY, "--out", "runs/two", *sets(train__sample_interval=20))
    assert done.code == 0
    said = done.err.splitlines()
    assert "\x1b" not in done.err + done.out
    assert any(line.startswith("step 20/20  loss 3.") and "val 3." in line and "tok/s" in line for line in said)
    assert "--- sample at step 20 ---" in said
    assert "saved runs/two/last.safetensors at step 20" in said
    assert done.out.startswith("Best validation loss 3.")
    assert done.out.splitlines()[-1] == ("Sample from it: minigpt sample --ckpt runs/two/best.safetensors --tokens 500")


def test_the_command_that_it_recommends_works(here: Path) -> None:
    done = train("--out", "with space")
    words = shlex.split(done.out.splitlines()[-1].removeprefix("Sample from it: "))
    assert words[0] == "minigpt"
    assert call(*words[1:], "--seed", "1").code == 0


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_trains(here: Path, name: str) -> None:
    width = load_config(name).model.n_head * 4
    small = sets(model__n_embd=width, model__block_size=8, train__batch_size=4, train__max_iters=3, out_dir=name)
    small += sets(data__path="data/input")
    small += sets(runtime__precision="fp32", model__n_layer=min(2, load_config(name).model.n_layer))
    assert call("train", "--config", name, *small, *sets(train__micro_batch_size="null")).code == 0
    assert checkpoint.load(here / name / "best.safetensors").header.step == 3


def test_a_config_by_path(here: Path) -> None:
    (here / "mine.yaml").write_text("model: {n_layer: 0, n_embd: 8, block_size: 4}\ntrain: {max_iters: 2}\n")
    done = call("train", "--config", "mine.yaml", "--out", "mine", *sets(train__learning_rate="1e-3"))
    assert done.code == 0
    assert load_config("mine/config.yaml").train.learning_rate == 0.001


# --- the run folder ---


def test_a_used_folder_is_refused_and_left_alone(here: Path) -> None:
    before = tree(here)
    done = train()
    assert done.code == 2
    assert "checkpoints already holds a run" in done.error
    for way in ("--resume", "--overwrite", "--out DIR"):
        assert way in done.error
    assert tree(here) == before


def test_overwrite_replaces_the_run(here: Path) -> None:
    done = train("--overwrite", *sets(train__max_iters=5, train__eval_interval=5))
    assert done.code == 0
    steps = [json.loads(line)["step"] for line in (here / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {5}
    for name in ("last", "best"):
        assert checkpoint.load(here / f"checkpoints/{name}.safetensors").header.step == 5


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    "wrong",
    [
        ["--set", "train.learning_rate=-1"], ["--set", "model.n_heads=2"], ["--set", "data.path=nowhere"],
        ["--set", "model.block_size=99999"], ["--device", "cuda:99"], ["--set", "train.micro_batch_size=3"],
    ],
)  # fmt: skip
def test_the_old_run_survives_a_mistake(here: Path, flag: str, wrong: list[str]) -> None:
    before = tree(here)
    done = train(flag, *wrong)
    assert done.code == 2
    assert done.error
    assert tree(here) == before


def test_resume_and_overwrite_exclude_each_other(here: Path) -> None:
    done = train("--resume", "--overwrite")
    assert done.code == 2
    assert "choose one" in done.error


@pytest.mark.parametrize("arguments", [["--config", "gpt"], []])
def test_nothing_to_resume(here: Path, arguments: list[str]) -> None:
    (here / "hollow").mkdir()
    for folder in ("nowhere", "hollow"):
        done = call("train", *arguments, "--resume", "--out", folder)
        assert done.code == 2
        assert f"minigpt: error: {folder}: no " in done.error
        assert "resume" in done.error
    assert not (here / "nowhere").exists()


def test_a_finished_run_says_so_and_more_steps_go_on(here: Path) -> None:
    before = tree(here)
    done = train("--resume")
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        "checkpoints: this run is finished (step 20); to go on give it more steps: --resume --set train.max_iters=N\n"
    )
    changed = {name for name, content in tree(here).items() if before.get(name) != content}
    assert not changed
    more = call("train", "--resume", *sets(train__max_iters=30))  # no --config: the run knows its own
    assert more.code == 0
    assert "changed since the last session: train.max_iters: 20 -> 30\n" in more.err
    assert "resuming checkpoints/last.safetensors at step 20\n" in more.err
    assert "step 30/30" in more.err
    records = [json.loads(line) for line in (here / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train_loss" in r] == [10, 20, 30]


def test_the_remedy_for_memory_is_taken_by_a_run_that_knows_its_own_batch(here: Path) -> None:
    """Without --config, --set is checked against the run's settings, not against the defaults (a batch of 64)."""
    assert train("--out", "wide", *sets(train__batch_size=100, train__max_iters=2)).code == 0
    small = sets(train__micro_batch_size=50, train__max_iters=3)
    done = call("train", "--resume", "--out", "wide", *small)
    assert done.code == 0, done.err
    assert checkpoint.load("wide/last.safetensors").config.train.accumulation == 2
    refused = call("train", "--resume", "--out", "wide", *sets(train__micro_batch_size=64))
    assert refused.code == 2
    assert "--set: train: batch_size 100 cannot be split into micro batches of 64; try 50 or 100" in refused.error
    named = call("train", "--resume", *small, *sets(out_dir="wide", train__min_lr=4e-4, train__learning_rate=5e-4))
    assert named.code == 0, named.err


def test_resuming_as_another_model_or_on_other_data_is_refused(here: Path) -> None:
    done = train("--resume", *sets(model__n_layer=2, train__max_iters=30))
    assert done.code == 2
    assert "as another model (model.n_layer: 1 -> 2)" in done.error
    (here / "other.txt").write_text("the king\n" * 99)
    assert call("prepare", "other.txt").code == 0
    done = train("--resume", *sets(data__path="data/other", train__max_iters=30))
    assert done.code == 2
    assert "--allow-data-change" in done.error


def test_another_split_of_the_same_text_is_other_data(here: Path) -> None:
    """Else what was kept for validation would be trained on, unnoticed."""
    assert call("prepare", "input.txt", "--val-fraction", "0.05", "--force").code == 0
    done = train("--resume", *sets(train__max_iters=30))
    assert done.code == 2
    assert "--allow-data-change" in done.error


def test_other_data_that_is_allowed_has_a_best_and_a_verdict_of_its_own(here: Path) -> None:
    """The old text was easier: its best must not stand for the new."""
    drawn = random.Random(3)
    letters = sorted(set((here / "input.txt").read_text()))
    (here / "other.txt").write_text("".join(drawn.choice(letters) for _ in range(6000)))
    assert call("prepare", "other.txt", "--tokenizer", "checkpoints/best.safetensors").code == 0
    before = checkpoint.load(here / "checkpoints/best.safetensors").header
    done = train("--resume", "--allow-data-change", *sets(data__path="data/other", train__max_iters=40))
    assert done.code == 0, done.err
    assert "other data than before: `best`, patience and passes are counted from here\n" in done.err
    best = checkpoint.load(here / "checkpoints/best.safetensors").header
    assert best.dataset_fingerprint != before.dataset_fingerprint
    assert best.val_loss is not None
    assert before.val_loss is not None
    assert best.val_loss > before.val_loss
    assert best.step >= 20
    tokens = len(Dataset("data/other").train)
    passes = (best.step - 20) * 64 / tokens  # none, where the first evaluation on the new data was the best
    read = f"{passes:.1f} passes over the training text" if passes else "a small part of the training text"
    assert done.out.startswith(f"Best validation loss {best.val_loss:.4f} at step {best.step}, after {read}.\n")
    facts = json.loads(call("info", "checkpoints/last.safetensors", "--json").out)
    assert facts["epochs"] == pytest.approx(20 * 64 / tokens)
    again = call("train", "--resume", *sets(train__max_iters=41))  # the new data is the run's data now
    assert again.code == 0, again.err
    assert "other data" not in again.err


def test_a_damaged_last_checkpoint_is_said_and_best_goes_on(here: Path) -> None:
    (here / "checkpoints/last.safetensors").write_bytes(b"")
    done = train("--resume", *sets(train__max_iters=25))
    assert done.code == 0
    assert "checkpoints/last.safetensors: not a checkpoint: the file is empty\n" in done.err
    assert "no optimizer state" in done.err
    (here / "checkpoints/best.safetensors").write_bytes(b"")
    (here / "checkpoints/last.safetensors").write_bytes(b"")
    done = train("--resume", *sets(train__max_iters=30))
    assert done.code == 1
    assert done.error


@pytest.mark.parametrize(("out", "why"), [("input.txt", "File exists"), ("input.txt/run", "Not a directory")])
def test_a_file_in_the_way_is_found_before_step_0(here: Path, out: str, why: str) -> None:
    before = tree(here)
    done = train("--out", out)
    assert done.code == 2
    assert done.error == f"minigpt: error: {out}: cannot be written: {why}\n"
    assert tree(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_found_before_step_0(here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    for out in ("locked", "locked/run"):
        done = train("--out", out)
        assert done.code == 2
        assert "cannot be written: Permission denied" in done.error


# --- the dry run ---


def test_a_dry_run_counts_and_writes_nothing(here: Path) -> None:
    before = tree(here)
    done = train("--dry-run", "--out", "new/run")
    assert done.code == 0
    assert tree(here) == before
    shown = {}
    for line in done.out.splitlines():
        cells = [cell.strip() for cell in line.strip("│| ").split("│")]
        if len(cells) == 2:
            shown[cells[0]] = cells[1]
    parts = ["token embedding", "position embedding", "attention", "feed-forward", "norms", "head"]
    counts = [int(shown[part].replace(",", "")) for part in parts]
    assert counts == [26 * 16, 16 * 16, 4 * 16 * 16 + 16, 2 * 4 * 16 * 16 + 4 * 16 + 16, 2 * 3 * 16, 17 * 26]
    assert int(shown["total"].replace(",", "")) == sum(counts)
    tokens = int(shown["training tokens"].replace(",", ""))
    assert shown["tokens per step"] == "64"
    assert shown["steps per epoch"] == f"{tokens / 64:,.1f}"
    assert shown["epochs"] == f"{20 * 64 / tokens:.1f}"
    assert shown["memory: weights (planned)"] == f"{4 * sum(counts) / 1e3:.0f} kB"
    assert "loss 3." in shown["one step"]
    assert done.out.endswith("Nothing was written.\n")


# --- what does not suit the text ---


def few_steps(here: Path) -> list[str]:
    """`modern.yaml`, small, with a batch that a pass over the text has only five of."""
    tokens = len(Dataset("data/input").train)
    small = sets(model__n_layer=1, model__n_embd=24, model__block_size=16, runtime__precision="fp32")
    return ["--config", "modern", *small, *sets(train__batch_size=tokens // (5 * 16), train__max_iters=60)]


def test_a_run_is_told_before_it_begins_what_does_not_suit_its_text(here: Path) -> None:
    said = "A pass over the text takes only 5.0 steps"
    done = call("train", *few_steps(here), "--out", "few")
    assert done.code == 0
    assert done.err.index(said) < done.err.index("step 10/60")
    assert said in call("train", *few_steps(here), "--dry-run").out
    more = call("train", *few_steps(here), "--out", "few", "--resume", *sets(train__max_iters=61))
    assert more.code == 0
    assert said not in more.err
    begun = call("train", *few_steps(here), "--out", "begun", "--init-from", "few/best.safetensors")
    assert begun.code == 0
    assert said not in begun.err


def test_a_short_horizon_of_its_own_has_a_short_warmup(here: Path) -> None:
    done = call("train", *few_steps(here), *sets(train__max_iters="auto"), "--out", "auto")
    assert done.code == 0
    chosen = load_config("auto/config.yaml").train
    assert chosen.warmup_iters == chosen.steps // 4 < 100
    assert f"warmup_iters: {chosen.warmup_iters} instead of 100, for so few steps" in done.err


# --- settings ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["which config?", "--config cpu"]),
        (["--config", "gtp"], ["gtp: no such file, and no config of that name", "did you mean gpt?", "bigram"]),
        (["--config", "."], [".: not a file"]),
        (["--config", "gpt", "--set", "model.n_lyer=3"], ["unknown key model.n_lyer; did you mean n_layer?"]),
        (["--config", "gpt", "--set", "learning_rate=1"], ["it belongs at train.learning_rate"]),
        (["--config", "gpt", "--set", "train"], ["write it as section.key=value"]),
        (["--config", "gpt", "--set", "model.n_layer=two"], ["model.n_layer", "integer", "'two'"]),
        (["--config", "gpt", "--set", "model.n_layer=1.5"], ["model.n_layer", "integer", "1.5"]),
        (["--config", "gpt", "--set", "model.bias=1"], ["model.bias", "boolean"]),
        (["--config", "gpt", "--set", "model.n_embd=385"], ["385 is not divisible by n_head 6", "384 or 390"]),
        (["--config", "gpt", "--set", "train.learning_rate=-1"], ["train.learning_rate", "greater than 0", "-1"]),
        (["--config", "gpt", "--set", "train.learning_rate=.nan"], ["train.learning_rate", "nan"]),
        (["--config", "gpt", "--set", "train.micro_batch_size=7"], ["64 cannot be split", "of 7; try 4 or 8"]),
        (["--config", "gpt", "--set", "train.lr_schedule=cosin"], ["'constant', 'cosine', 'linear' or 'wsd'"]),
        (["--config", "gpt", "--device", "gpu"], ["device", "'gpu'"]),
        (["--config", "gpt", "--device", "cuda:99"], ["device cuda:99 was asked for", "--device cpu"]),
        (["--config", "gpt", "--out", ""], ["out_dir"]),
        (["--config", "gpt", "--set", "train.\x1b[2J=1"], ["unknown key train.\\x1b[2J"]),
    ],
)
def test_settings_that_are_wrong(here: Path, arguments: list[str], words: list[str]) -> None:
    before = tree(here)
    done = call("train", *arguments)
    assert done.code == 2
    for word in words:
        assert word in done.error
    assert tree(here) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {n_layer: 1}\nmodle: {n_layer: 1}\n", ["unknown key modle; did you mean model?"]),
        ("model:\n  n_layer: 1\n  n_layer: 2\n", ["line 3", "'n_layer' stands twice"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ["line 2", "aliases"]),
        ("model: 3\n", ["model: expected a section of keys, not 3"]),
        ("- model\n", ["a config is a mapping of sections (data, model, train, runtime)"]),
        ("n_layer: 3\n", ["it belongs at model.n_layer"]),
        ("model: {n_layer: [1\n", ["bad.yaml, line 2"]),
        ("train: {max_iters: !!python/object/apply:os.system ['touch pwned']}\n", ["bad.yaml"]),
        ("\xff", ["bad.yaml"]),
    ],
)
def test_config_files_that_are_wrong(here: Path, text: str, words: list[str]) -> None:
    (here / "bad.yaml").write_bytes(text.encode("latin-1"))
    before = tree(here)
    done = call("train", "--config", "bad.yaml")
    assert done.code == 2
    for word in words:
        assert word in done.error
    assert tree(here) == before


def test_a_wrong_setting_through_the_real_command(here: Path) -> None:
    done = run("train", "--config", "gpt", "--set", "model.n_lyer=3")
    assert done.code == 2
    assert "did you mean n_layer?" in done.error


# --- data ---


def test_data_that_is_not_there_or_not_whole(here: Path) -> None:
    shutil.copytree("data/input", "data/half")
    for damage, word in (
        (lambda: (here / "data/half/train.bin").write_bytes(b"\0" * 10), "train.bin: 10 bytes, but meta.json promises"),
        (lambda: (here / "data/half/val.bin").unlink(), "val.bin: No such file"),
        (lambda: (here / "data/half/meta.json").write_text('{"format_ver'), "meta.json: damaged: not JSON"),
        (lambda: (here / "data/half/meta.json").unlink(), "data/half: not a dataset folder; it has no meta.json"),
        (lambda: shutil.rmtree("data/half"), "data/half: not a dataset folder; run `minigpt prepare FILE` first"),
    ):
        damage()
        if "val.bin" in word:
            shutil.copy("data/input/train.bin", "data/half/train.bin")
        done = train("--out", "new", *sets(data__path="data/half"))
        assert done.code == 2
        assert word in done.error
        assert not (here / "new").exists()


def test_a_text_shorter_than_the_context_gives_the_numbers(here: Path) -> None:
    (here / "short.txt").write_text("abcdefghij" * 10)
    assert call("prepare", "short.txt").code == 0
    arguments = ["--out", "new", *sets(data__path="data/short")]
    done = train(*arguments, *sets(model__block_size=90))
    assert done.code == 2
    assert "the training split has 90 tokens, and a context of 90 needs at least 91" in done.error
    assert not (here / "new").exists()
    assert train(*arguments, *sets(model__block_size=89)).code == 0


# --- how a run ends ---


def test_the_time_budget_ends_a_run_with_everything_saved(here: Path) -> None:
    limits = sets(train__max_iters=FOREVER, train__max_minutes=0.01, train__eval_interval=100)
    done = train("--out", "brief", *limits)
    assert done.code == 0
    assert "Stopped by the time budget (train.max_minutes)" in done.out
    last = checkpoint.load(here / "brief/last.safetensors").header
    assert last.step > 0
    assert last.progress.seconds >= 0.6


def test_patience_ends_a_run_that_no_longer_improves(here: Path) -> None:
    stuck = sets(train__max_iters=FOREVER, train__patience=3, train__eval_interval=2, train__learning_rate=1.0)
    done = train("--out", "stuck", *stuck)
    assert done.code == 0
    assert "Stopped early: 3 evaluations without a better one (train.patience)." in done.out
    progress = checkpoint.load(here / "stuck/last.safetensors").header.progress
    assert progress.worse == 3
    assert progress.step == progress.best_step + 6


def test_a_run_that_diverges_says_what_to_lower(here: Path) -> None:
    done = train("--out", "wild", *sets(train__learning_rate=1e30))
    assert done.code == 1
    message = done.err.splitlines()[-1]
    assert message.startswith("minigpt: error: the loss or its gradient is not finite at step ")
    assert "Lower train.learning_rate (now 1e+30)" in message


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", *arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_saves_and_gives_the_command_that_goes_on(here: Path) -> None:
    child = started("--config", "gpt", *TINY, *sets(train__max_iters=FOREVER), "--out", "long run", "--overwrite")
    best = here / "long run/best.safetensors"
    wait_for(best.exists, "the first evaluation")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (130, "")
    step = checkpoint.load(here / "long run/last.safetensors").header.step
    *_, said, line = err.splitlines()
    assert said == f"stopped at step {step:,}, all saved; go on with:"
    words = shlex.split(line)
    assert words[:2] == ["minigpt", "train"]
    assert "--overwrite" not in words
    again = started(*words[2:])
    wait_for(lambda: checkpoint.read_header(best).step > step, "the run to go on")
    again.send_signal(signal.SIGTERM)
    out, err = again.communicate(timeout=PATIENCE)
    assert (again.returncode, out) == (143, "")
    assert f"resuming long run/last.safetensors at step {step:,}\n" in err
    assert checkpoint.load(here / "long run/last.safetensors").header.step > step


def notes_signals(pid: int) -> bool:
    """Whether a process has said what happens at SIGTERM, which ends it otherwise."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(here: Path) -> None:
    kept = checkpoint.load(here / "checkpoints/last.safetensors").header
    child = started("--resume", *sets(train__max_iters=FOREVER, train__batch_size=10**6, train__micro_batch_size=1))
    wait_for(lambda: notes_signals(child.pid), "the run to begin")
    compute(child.pid, 0.5)  # the step has begun, which takes an hour: the first Ctrl-C waits for its end
    child.send_signal(signal.SIGINT)
    compute(child.pid, 0.5)  # and it has noted that
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert "stopped at step" not in err
    assert checkpoint.load(here / "checkpoints/last.safetensors").header == kept


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(here: Path) -> None:
    child = started("--config", "gpt", *TINY, *sets(train__max_iters=FOREVER), "--out", "shared")
    try:
        wait_for((here / "shared/best.safetensors").exists, "the first run")
        done = train("--out", "shared", "--overwrite")
        assert done.code == 2
        assert f"process {child.pid} on " in done.error
        assert "is training here" in done.error
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=PATIENCE)
    assert child.returncode == 143


# --- the verdict ---


def judged(
    losses: list[float], training: list[float], reason: str = "finished", epochs: float = 4.0,
    n_tokens: int = 1_000_000, dropout: float = 0.0, fine_tuned: bool = False, **train: object,
) -> str:  # fmt: skip
    """The verdict on a run with these validation losses, one every 100 steps, and these training losses."""
    best = min(losses, default=None)
    progress = Progress(
        step=100 * len(losses), best_loss=best, best_step=100 * (losses.index(best) + 1) if best is not None else 0,
        worse=len(losses) - 1 - losses.index(best) if best is not None else 0,
    )  # fmt: skip
    records: list[dict[str, Any]] = [{"step": 100 * (i + 1), "val_loss": loss} for i, loss in enumerate(losses)]
    records += [{"step": 100 * (i + 1), "train_loss": loss} for i, loss in enumerate(training)]
    config = parse_config(
        {"model": {"block_size": 100, "dropout": dropout}, "train": {"max_iters": 1200, **train}}, "test"
    )
    result = Result(reason, progress, epochs, Path("best"), Path("last"), fine_tuned)
    return "\n".join(verdict(result, records, config, n_tokens, 4_000_000))


def test_the_verdict_names_the_best_step_and_the_epochs_until_then() -> None:
    said = judged([3.0, 2.0, 1.5, 1.49], [2.0, 1.5])
    assert said.startswith("Best validation loss 1.4900 at step 400, after 4.0 passes over the training text.\n")
    assert "after 2.0 passes" in judged([3.0, 1.5, 1.6, 1.7], [2.0, 1.0])
    assert "after a small part of the training text" in judged([3.0, 2.0, 1.0], [2.0], epochs=0.01)


def test_the_verdict_on_overfitting_says_what_to_change() -> None:
    said = judged([2.0, 1.5, 1.7, 1.9], [2.0, 1.4, 1.0, 0.6])
    assert "It overfits" in said
    assert "rose to 1.9000" in said
    assert "stop near step 200" in said
    assert said.endswith("(train.max_iters or train.patience), set train.weight_decay=auto, or add text.")


def test_the_verdict_advises_nothing_that_the_run_has() -> None:
    """Twelve passes of 100 steps each, with four parameters per token: the rule asks for a weight decay of 1."""
    curves = [2.0, 1.5, 1.7, 1.9], [2.0, 1.4, 1.0, 0.6]
    rule = {"optimizer": "muon", "batch_size": 100}
    assert judged(*curves, **rule, weight_decay=1.0).endswith("(train.max_iters or train.patience), or add text.")
    assert "set train.weight_decay=auto, or" in judged(*curves, **rule, weight_decay=0.1)
    assert "set train.weight_decay=auto with model.dropout=0, or" in judged(*curves, **rule, dropout=0.2)
    assert judged(*curves, **rule, fine_tuned=True).endswith("(train.max_iters or train.patience), or add text.")
    few = judged(*curves, n_tokens=50_000, batch_size=100, weight_decay=1e3)
    assert few.endswith("(train.max_iters or train.patience), set train.batch_size=12, or add text.")
    flat = [2.0, 1.5, 1.4999, 1.4998]
    assert "by heart. More text would help; a larger" in judged(flat, [1.0], **rule, weight_decay=1.0)
    assert "by heart. More text or train.weight_decay=auto would" in judged(flat, [1.0], **rule, weight_decay=0.1)


def test_the_verdict_on_a_run_that_was_still_learning() -> None:
    assert "still learning at the end: a larger train.max_iters (with --resume)" in judged([3.0, 2.5, 2.0], [2.0])
    said = judged([3.0, 2.5, 2.0], [2.0], reason="time")
    assert "Stopped by the time budget" in said
    assert "a larger train.max_minutes (with --resume)" in said


def test_the_verdict_on_a_schedule_that_came_to_its_end() -> None:
    """The loss always falls fast there; resuming with more steps would only raise the rate again."""
    said = judged([3.0, 2.5, 2.0], [2.0], lr_schedule="linear")
    assert "twice the train.max_iters" in said
    assert "--resume" not in said
    assert "more text would gain more" in judged([3.0, 2.5, 2.0], [2.0], epochs=12.0, lr_schedule="linear")
    assert "by heart" in judged([3.0, 2.5, 2.0], [1.0], lr_schedule="linear")
    assert "--resume" in judged([3.0, 2.5, 2.0], [2.0], lr_schedule="linear", reason="time")


@pytest.mark.parametrize(
    ("epochs", "dropout", "decay", "word"),
    [(1.0, 0.2, 0.1, "0.0 would learn more"), (3.9, 0.1, 0.1, "0.0 would"), (4.1, 0.2, 0.1, None),
     (3.0, 0.0, 0.1, None), (9.0, 0.0, 0.1, None), (12.0, 0.0, 0.1, "train.weight_decay=auto, which is 1 here"),
     (40.0, 0.05, 0.1, "40 passes"), (40.0, 0.2, 0.1, None), (40.0, 0.0, 0.6, None)],
)  # fmt: skip
def test_advice_follows_the_passes_over_the_text(epochs: float, dropout: float, decay: float, word: str | None) -> None:
    """Of 100 steps each, with four parameters per token."""
    train = {"max_iters": round(100 * epochs), "batch_size": 100, "weight_decay": decay, "optimizer": "muon"}
    config = parse_config({"model": {"dropout": dropout, "block_size": 100}, "train": train}, "test")
    said = advice(config, 1_000_000, 4_000_000)
    assert (word in said) if word and said else said is None and word is None


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [(100, ["only 5.0 steps", "train.batch_size=12 makes 42 of it"]), (17, ["only 29.4", "=8 makes 62"]), (16, [])],
)
def test_advice_on_a_text_that_few_steps_read(batch_size: int, words: list[str]) -> None:
    """50,000 tokens are 500 windows; halved until a pass takes 30 steps."""
    train = {"max_iters": 600, "batch_size": batch_size}
    config = parse_config({"model": {"block_size": 100}, "train": train}, "test")
    said = advice(config, 50_000, 1_000) or ""
    assert all(word in said for word in words) if words else "steps" not in said


def test_advice_on_a_text_of_a_few_windows() -> None:
    config = parse_config({"model": {"block_size": 100}, "train": {"max_iters": 600, "batch_size": 1}}, "test")
    assert "only 3.0 steps: it is soon known by heart. More text would help" in (advice(config, 300, 1000) or "")


def test_the_verdict_on_a_flat_curve() -> None:
    said = judged([2.0, 1.5, 1.4999, 1.4998], [1.5])
    assert "No sign of overfitting; the curve has flattened" in said


def test_the_verdict_on_learning_by_heart() -> None:
    assert "begins to learn the text by heart" in judged([2.0, 1.5, 1.4999, 1.4998], [1.0])


def test_the_verdict_on_patience() -> None:
    said = judged([2.0, 1.5, 1.7, 1.9], [1.4, 1.0], reason="patience")
    assert "Stopped early: 2 evaluations without a better one (train.patience)." in said


def test_no_verdict_without_an_evaluation() -> None:
    assert judged([], [2.0]) == "Stopped after step 0, before the first evaluation."


def test_a_config_that_is_no_runs_is_not_replaced(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/config.yaml").write_text("# my notes\ntrain: {max_iters: 5}\n")
    done = call("train", "--config", "mine/config.yaml", "--out", "mine", *TINY)
    assert done.code == 2
    assert "mine/config.yaml is not a run's" in done.error
    assert (here / "mine/config.yaml").read_text().startswith("# my notes")


def test_overwriting_with_a_run_that_fails_brings_the_old_one_back(here: Path) -> None:
    before = {name: (here / "checkpoints" / name).read_bytes() for name in ("last.safetensors", "metrics.jsonl")}
    done = train("--overwrite", *sets(train__learning_rate=1e30))
    assert done.code == 1
    assert "not finite" in done.err
    assert {name: (here / "checkpoints" / name).read_bytes() for name in before} == before


def test_a_folder_name_from_a_config_cannot_drive_a_terminal(here: Path) -> None:
    (here / "evil.yaml").write_text('out_dir: "r\\e]0;title\\a"\n')
    done = call("train", "--config", "evil.yaml", *TINY)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert "\\033]0;title" in done.out


def test_a_token_that_the_vocabulary_lacks_is_found_before_the_first_step(here: Path) -> None:
    shutil.copytree(here / "data/input", here / "data/strange")
    raw = bytearray((here / "data/strange/val.bin").read_bytes())
    raw[10:12] = b"\xff\x7f"
    (here / "data/strange/val.bin").write_bytes(raw)
    for done in (
        train("--out", "elsewhere", *sets(data__path="data/strange")),
        call("eval", "--ckpt", "checkpoints/best.safetensors", "--data", "data/strange"),
    ):
        assert done.code == 2
        assert "token 32767 in a vocabulary of" in done.error
    assert not (here / "elsewhere").exists()
