"""A run folder is a checkpoint wherever one is taken: its best, or its last where there is no best."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands.conftest import TINY, call, sets
from minigpt_cli import load
from minigpt_cli.core import checkpoint, shards
from minigpt_cli.core.world import ALONE

WAYS: dict[str, list[Any]] = {
    "sample": ["--tokens", 20, "--seed", 1],
    "eval": ["--json"],
    "inspect": ["--json"],
    "export": ["--to", "file", "one.safetensors", "--force"],
}


@pytest.fixture
def run(here: Path) -> Path:
    """A run whose best step is not its last."""
    shutil.copytree("checkpoints", "run")
    assert (
        call("train", "--config", "gpt", *TINY, *sets(train__max_iters=1, train__eval_interval=1), "--out", "one").code
        == 0
    )
    shutil.copy("one/best.safetensors", "run/best.safetensors")
    return here


def scatter(name: str, kind: str) -> None:
    """One of the run's checkpoints in parts, in place of its file."""
    saved = checkpoint.load(f"run/{kind}.safetensors")
    header = saved.header.model_dump(exclude={"versions", "checksums"})
    shards.save(Path(f"run/{name}"), {k: v for k, v in saved.tensors.items() if k.startswith("model.")}, header, ALONE)
    Path(f"run/{kind}.safetensors").unlink()


@pytest.mark.parametrize("name", WAYS)
def test_a_command_takes_the_best_of_a_run_and_says_so(run: Path, name: str) -> None:
    expected = call(name, "--ckpt", "run/best.safetensors", *WAYS[name])
    done = call(name, "--ckpt", "run", *WAYS[name])
    assert (done.code, expected.code) == (0, 0), done.err
    assert done.out == expected.out
    assert "run: using best.safetensors\n" in done.err
    Path("run/best.safetensors").unlink()
    last = call(name, "--ckpt", "run/", *WAYS[name])
    assert last.code == 0
    assert "run: using last.safetensors\n" in last.err
    if name != "export":
        assert last.out == call(name, "--ckpt", "run/last.safetensors", *WAYS[name]).out
        assert name == "sample" or last.out != done.out  # so little was learned that the text may be the same


def test_a_run_begins_with_the_best_of_another(run: Path) -> None:
    words = ["--config", "finetune", *sets(train__max_iters=1), "--device", "cpu"]
    done = call("train", *words, "--init-from", "run", "--out", "tuned")
    assert done.code == 0, done.err
    assert "run: using best.safetensors\n" in done.err
    began = checkpoint.load("tuned/last.safetensors").header.initialised_from
    assert began is not None
    assert (began.name, began.step) == ("best.safetensors", 1)


def test_prepare_takes_the_tokens_of_a_run(run: Path) -> None:
    done = call("prepare", "input.txt", "--tokenizer", "run", "--out", "again")
    assert done.code == 0, done.err
    assert done.out.endswith("Next: minigpt train --config finetune --init-from run --data again\n")
    meta = json.loads(Path("again/meta.json").read_text())
    assert meta["tokenizer"] == checkpoint.load("run/best.safetensors").header.tokenizer


def test_python_takes_a_run_folder(run: Path) -> None:
    assert (load("run").step, load("checkpoints").step) == (1, load("checkpoints/best.safetensors").step)


@pytest.mark.parametrize("kind", ["best", "last"])
def test_a_checkpoint_in_parts_is_taken_where_it_can_be_read(run: Path, kind: str) -> None:
    if kind == "last":
        Path("run/best.safetensors").unlink()
    step = checkpoint.load(f"run/{kind}.safetensors").header.step
    scatter(f"{kind}-{step:08d}.sharded", kind)
    done = call("export", "--ckpt", "run", "--to", "file", "one.safetensors")
    assert done.code == 0, done.err
    assert f"run: using {kind}-{step:08d}.sharded\n" in done.err
    assert checkpoint.load("one.safetensors").header.step == step
    refused = call("sample", "--ckpt", "run")
    assert refused.code == 2
    assert f"minigpt export --ckpt run/{kind}-{step:08d}.sharded --to file OUT" in refused.err


def test_a_folder_that_is_no_run_is_refused(run: Path) -> None:
    for folder in ("data/input", "."):
        done = call("sample", "--ckpt", folder)
        assert done.code == 2
        assert re.fullmatch(rf"minigpt: error: {re.escape(folder)}: .*\n", done.error)
