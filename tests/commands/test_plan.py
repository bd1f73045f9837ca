"""`train --dry-run --world-size N`: what is planned, for whom, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands.conftest import Done, call, command, environment, sets, tree

CORPUS = ("--vocab-size", "50257", "--tokens", "9e9")


def plan(*arguments: object, ranks: int = 8) -> Done:
    return call("train", "--config", "gpt2", "--dry-run", "--world-size", ranks, *arguments)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_plan_in_numbers(tmp_path: Path) -> None:
    done = plan(*CORPUS, "--price", "2.5", "--device-name", "a100", "--utilisation", "0.5", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["parameters"]["total"] == 124_439_808
    assert found["parameters"]["padding"] == 47 * 768
    assert found["parameters_not_embedding"] == 124_439_808 - (50257 + 1024) * 768
    assert found["flops_6n"] == 6 * 124_439_808
    assert (found["micro_batch_size"], found["accumulation"], found["tokens_per_step"]) == (8, 8, 512 * 1024)
    assert found["tokens_per_second"] == pytest.approx(8 * 0.5 * 312e12 / found["flops_per_token"])
    assert found["days"] == pytest.approx(19073 * 512 * 1024 / found["tokens_per_second"] / 86400)
    assert found["cost"] == pytest.approx(2.5 * 8 * 24 * found["days"])
    assert found["epochs"] == pytest.approx(19073 * 512 * 1024 / 9e9)
    ways = [(entry["parallel"], entry["checkpoint_activations"]) for entry in found["memory"]]
    assert ways == [("ddp", False), ("fsdp", False), ("ddp", True), ("fsdp", True)]
    peaks = [entry["peak"] for entry in found["memory"]]
    assert peaks[0] > peaks[1] > peaks[3]
    assert peaks[0] > peaks[2] > peaks[3]
    assert tree(tmp_path) == {}


def test_a_plan_for_people(tmp_path: Path) -> None:
    done = plan(*CORPUS, "--price", "2.5", *sets(runtime__checkpoint_activations="true"))
    assert done.code == 0, done.err
    for words in ("124,439,808", "DDP, recomputing", "8 x 1,024 tokens at a time", "1.14 x 6N", "of them twice",
                  "1.11 of 9,000,000,000 tokens", "cost", "989 TFLOP/s"):  # fmt: skip
        assert words in done.out
    assert "40 % of the peak is an assumption" in done.err
    alone = plan(*CORPUS, ranks=1).out
    assert "FSDP" not in alone
    assert "cost" not in alone


def test_a_prepared_corpus_needs_no_numbers(here: Path) -> None:
    done = call("train", "--config", "gpt", "--dry-run", "--world-size", "2", *sets(train__max_iters="auto"), "--json")
    assert done.code == 0, done.err
    meta = json.loads((here / "data" / "input" / "meta.json").read_text())
    found = json.loads(done.out)
    assert found["vocab_size"] == 26
    assert found["epochs"] == pytest.approx(found["tokens"] / meta["train"]["tokens"])


def test_a_model_that_no_machine_here_could_hold_is_planned_at_once() -> None:
    """GPT-3's 175 billion parameters, in less memory than the smallest matrix of a block would take."""
    settings = sets(
        model__n_layer=96, model__n_head=96, model__n_embd=12288, model__block_size=2048, train__batch_size=1024,
        train__micro_batch_size=1,
    )  # fmt: skip
    arguments = command(
        "train", "--config", "gpt2", "--dry-run", "--world-size", 1024, "--vocab-size", 50257, *settings, "--json"
    )
    program = """if True:
        import json, resource, subprocess, sys
        for command in json.loads(sys.argv[1]):
            done = subprocess.run(command)
            print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
        sys.exit(done.returncode)
    """
    torch_alone = [sys.executable, "-c", "import torch"]  # half a gigabyte more with the libraries of CUDA than without
    words = [sys.executable, "-c", program, json.dumps([torch_alone, arguments])]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    C = 12288
    assert found["parameters"]["total"] == (50257 + 2048 + 2) * C + 96 * (12 * C * C + 13 * C)
    ddp, fsdp = found["memory"][:2]
    assert ddp["peak"] > 16 * found["parameters"]["total"]
    assert fsdp["peak"] < ddp["peak"] / 20
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    before, peak = (int(line) * scale for line in done.stderr.splitlines()[-2:])
    assert peak - before < 4 * C * C


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--world-size", "8"], ["data/openwebtext is not prepared", "--vocab-size 50257 --tokens 9e9"]),
        (["--dry-run", "--world-size", "8", *CORPUS, "--device-name", "abacus"], ["abacus: unknown", "H200, H100"]),
        (["--dry-run", "--world-size", "7", *CORPUS], ["512 cannot be shared by 7 ranks"]),
        (["--dry-run", "--world-size", "8", *CORPUS, "--set", "runtime.precision=fp32"], ["--peak-tflops"]),
        (
            ["--dry-run", "--world-size", "8", "--vocab-size", "9", "--set", "train.max_iters=auto"],
            ["max_iters is auto", "--tokens"],
        ),
        (["--world-size", "8"], ["goes with --dry-run", "torchrun"]),
        (["--dry-run", "--price", "2"], ["go with --dry-run --world-size N"]),
        (["--dry-run", "--world-size", "0"], ["world-size"]),
        (["--dry-run", "--world-size", "8", *CORPUS, "--utilisation", "1.5"], ["utilisation"]),
    ],
    ids=str,
)
def test_plans_that_are_refused(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = call("train", "--config", "gpt2", *arguments)
    assert done.code == 2
    for word in words:
        assert word in done.error
    assert tree(tmp_path) == {}
