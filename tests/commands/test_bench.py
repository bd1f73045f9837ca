"""`minigpt bench` as a user meets it: numbers of this machine, with or without a dataset."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from commands.conftest import TINY, call, run, sets, tree

QUICK = ["--steps", "3", "--tokens", "40"]


def test_json_has_the_promised_numbers_without_any_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("bench", "--config", "gpt", *TINY, *QUICK, "--json")
    assert (done.code, done.err) == (0, "compile: off, cpu gains too little\n")
    result = json.loads(done.out)
    assert 100 < result["train_tokens_per_second"] < 1e8
    assert 10 < result["decode_tokens_per_second"] < 1e7
    assert 5e7 < result["peak_memory_bytes"] < 1e11
    assert result["parameters"] == 4378 + (65 - 26) * (16 + 17)  # 65 kinds of tokens instead of 26
    assert result["train_tokens_per_second"] == pytest.approx(4 * 16 / result["step_seconds"])
    assert result["first_step_seconds"] > 0
    assert result["flops_utilisation"] is None
    assert result["data"] == "random tokens"
    assert not list(tmp_path.iterdir())


def test_the_dataset_is_used_where_there_is_one_and_nothing_is_written(here: Path) -> None:
    before = tree(here)
    done = call("bench", "--config", "gpt", *TINY, *QUICK, "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["parameters"] == 4378
    assert result["data"] == "data/input"
    assert tree(here) == before


def test_set_changes_what_is_measured(here: Path) -> None:
    wider = [*TINY, *sets(model__n_embd=32)]
    result = json.loads(call("bench", "--config", "gpt", *wider, *QUICK, "--json").out)
    assert result["parameters"] == 26 * 32 + 16 * 32 + (4 * 32 * 32 + 32) + (8 * 32 * 32 + 5 * 32) + 6 * 32 + 33 * 26


def test_a_table_for_people(here: Path) -> None:
    done = call("bench", "--config", "bigram", *sets(runtime__precision="fp32"), *QUICK, "--streams", "3")
    assert done.code == 0
    assert done.out.startswith("bench bigram")
    for word in (
        "training", "tokens/s", "one step", "decoding", "(3 streams)", "peak memory", "model FLOPs utilisation",
        "parameters", "1,946", "data/input", "fp32",
    ):  # fmt: skip
        assert word in done.out
    assert "\x1b" not in done.out


def test_samples_side_by_side_are_counted_together(here: Path) -> None:
    arguments = ["bench", "--config", "gpt", *TINY, "--steps", 1, "--tokens", 60, "--json"]
    one, many = (json.loads(call(*arguments, "--streams", n).out)["decode_tokens_per_second"] for n in (1, 64))
    assert many > 5 * one


def test_the_time_limit_holds(here: Path) -> None:
    begin = time.monotonic()
    done = call("bench", "--config", "gpt", *TINY, "--steps", 10**9, "--tokens", 10**9, "--seconds", "0.3", "--json")
    assert done.code == 0
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--config'"),
        (["--config", "gtp"], "did you mean gpt?"),
        (["--config", "gpt", "--set", "model.n_embd=385"], "384 or 390"),
        (["--config", "gpt", "--steps", "0"], "Invalid value for '--steps'"),
        (["--config", "gpt", "--tokens", "0"], "Invalid value for '--tokens'"),
        (["--config", "gpt", "--streams", "0"], "Invalid value for '--streams'"),
        (["--config", "gpt", "--seconds", "-1"], "Invalid value for '--seconds'"),
        (["--config", "gpt", "--device", "cuda:99"], "device cuda:99 was asked for"),
        (["--config", "gpt", "--set", "data.path=checkpoints"], "checkpoints: not a dataset folder"),
        (["--config", "gpt", "--set", "model.block_size=99999"], "a context of 99,999 needs at least 100,000"),
    ],
)
def test_what_cannot_be_measured(here: Path, arguments: list[str], message: str) -> None:
    done = call("bench", *arguments)
    assert done.code == 2
    assert message in done.error
