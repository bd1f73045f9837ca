"""`minigpt eval` as a user meets it: its numbers against ones that the test works out by itself."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.conftest import POLYGLOT, TINY, call, run, sets, tree
from minigpt_cli.core import checkpoint
from minigpt_cli.core.dataset import Dataset

BEST = "checkpoints/best.safetensors"


def scored(*arguments: object, ckpt: str | Path = BEST) -> dict[str, Any]:
    done = call("eval", "--ckpt", ckpt, *arguments, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def windows_of(ckpt: str | Path, tokens: list[int]) -> list[tuple[list[float], int]]:
    """For every window, one at a time: the loss of each of its tokens, and how many of them were guessed right."""
    model = checkpoint.load(ckpt).model().eval()
    size, windows = model.config.block_size, []
    for begin in range(0, len(tokens) - 1, size):
        x, y = tokens[begin : begin + size], tokens[begin + 1 : begin + size + 1]
        with torch.no_grad():
            logp = model(torch.tensor([x[: len(y)]]))[0].double().log_softmax(dim=-1)
        losses = [-float(logp[t, target]) for t, target in enumerate(y)]
        windows.append((losses, sum(int(logp[t].argmax()) == target for t, target in enumerate(y))))
    return windows


def test_the_numbers_of_a_dataset(here: Path) -> None:
    dataset = Dataset("data/input")
    tokens = dataset.val.tolist()
    windows = windows_of(BEST, tokens)
    losses = [loss for window, _ in windows for loss in window]
    loss = sum(losses) / len(losses)
    result = scored()
    assert result["tokens"] == len(losses) == len(tokens) - 1
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["accuracy"] == pytest.approx(sum(hits for _, hits in windows) / len(losses), abs=1e-9)
    # one byte a character, one character a token
    assert result["bits_per_byte"] == result["bits_per_character"] == pytest.approx(loss / math.log(2), rel=1e-5)
    n = len(windows)
    variance = sum((sum(window) - loss * len(window)) ** 2 for window, _ in windows) / (n - 1)
    assert result["standard_error"] == pytest.approx(math.sqrt(n * variance) / len(losses), rel=1e-3)
    train = [loss for window, _ in windows_of(BEST, dataset.train[-len(tokens) :].tolist()) for loss in window]
    assert result["train_loss"] == pytest.approx(sum(train) / len(train), rel=1e-5)
    assert result["gap"] == pytest.approx(result["loss"] - result["train_loss"], abs=1e-12)
    assert result["step"] == 20
    records = [json.loads(line) for line in (here / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert result["loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-6)  # as the run itself saw it


def test_the_counting_models(here: Path) -> None:
    dataset = Dataset("data/input")
    train, val, vocabulary = dataset.train.tolist(), dataset.val.tolist(), 26
    singles, pairs = Counter(train), Counter(itertools.pairwise(train))
    contexts = Counter(train[:-1])
    unigram = {t: (singles[t] + 1) / (len(train) + vocabulary) for t in range(vocabulary)}
    naive = {"uniform": math.log(vocabulary), "unigram": 0.0, "bigram": 0.0}
    for before, after in itertools.pairwise(val):
        naive["unigram"] -= math.log(unigram[after]) / (len(val) - 1)
        bigram = (pairs[before, after] + unigram[after]) / (contexts[before] + 1)
        naive["bigram"] -= math.log(bigram) / (len(val) - 1)
    assert scored()["baselines"] == pytest.approx(naive, rel=1e-9)


def test_the_training_split(here: Path) -> None:
    tokens = Dataset("data/input").train.tolist()
    losses = [loss for window, _ in windows_of(BEST, tokens) for loss in window]
    result = scored("--split", "train")
    assert result["tokens"] == len(tokens) - 1
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert "gap" not in result


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_bits_per_byte_and_per_character(polyglot: Path, kind: str) -> None:
    ckpt = polyglot / kind / "last.safetensors"
    tokenizer = checkpoint.load(ckpt).tokenizer
    text = "über 東京 😀\r\nund zwei " * 3
    (polyglot / "some.txt").write_bytes(text.encode())
    tokens = tokenizer.encode(text).tolist()
    nats = sum(loss for window, _ in windows_of(ckpt, tokens) for loss in window)
    rest = tokenizer.decode(tokens[1:])  # the first token is given, not guessed
    if kind == "byte":  # of ü, whose first byte is given, the second is left over: not a character of its own
        rest = rest.removeprefix("\ufffd")
    result = scored("--data", polyglot / "some.txt", ckpt=ckpt)
    n_bytes = sum(len(tokenizer.token_bytes()[t]) for t in tokens[1:])
    assert (result["characters"], result["bytes"], result["tokens"]) == (len(rest), n_bytes, len(tokens) - 1)
    assert result["bits_per_character"] == pytest.approx(nats / math.log(2) / len(rest), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_a_text_file_is_scored_whole_and_without_what_it_does_not_need(here: Path) -> None:
    text = "the king and queen of winter\n" * 5
    (here / "some.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with_data = scored("--data", "some.txt")
    assert with_data["characters"] == len(text) - 1
    assert set(with_data["baselines"]) == {"uniform", "unigram", "bigram"}
    for damage in (lambda: (here / "data/input/meta.json").write_text("{"), lambda: shutil.rmtree("data")):
        damage()
        without = scored("--data", "some.txt")
        assert without["loss"] == with_data["loss"]
        assert "baselines" not in without
        assert "gap" not in without


def test_one_window_has_no_standard_error(here: Path) -> None:
    (here / "some.txt").write_text("the king")
    assert scored("--data", "some.txt")["standard_error"] is None
    shown = call("eval", "--ckpt", BEST, "--data", "some.txt")
    assert shown.code == 0
    assert "+/-" not in shown.out


def test_a_dataset_folder_other_than_the_one_it_was_trained_on_is_said(here: Path) -> None:
    (here / "other.txt").write_text((here / "input.txt").read_text()[::-1])
    assert call("prepare", "other.txt").code == 0
    done = call("eval", "--ckpt", BEST, "--data", "data/other", "--json")
    assert done.code == 0
    assert done.err == "data/other is not the data that this model was trained on\n"
    assert json.loads(done.out)["tokens"] == len(Dataset("data/other").val) - 1


def test_the_real_command_prints_a_table(here: Path) -> None:
    before = tree(here)
    done = run("eval", "--ckpt", BEST)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{BEST}, step 20, on data/input")
    for word in (
        "loss (nats per token)", " +/- ", "perplexity", "bits per character", "bits per byte", "top-1 accuracy",
        "1,429", "loss on as much training text", "for comparison: uniform", "3.2581", "unigram", "bigram",
    ):  # fmt: skip
        assert word in done.out
    assert tree(here) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "--split test: val or train"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "checkpoints"], "checkpoints: not a dataset folder; it has no meta.json"),
        (["--data", "data/byte"], "data/byte: prepared with another tokenizer than the model's"),
        (
            ["--data", "unknown.txt"],
            "unknown.txt: this character is not in the vocabulary of 26 characters: 'é' (U+00E9)",
        ),
        (["--data", "latin1.txt"], "latin1.txt: not UTF-8 text (byte 3)"),
        (["--data", "one.txt"], "evaluating needs at least 2"),
        (["--data", "none.txt"], "evaluating needs at least 2"),
        (["--data", "input.txt", "--split", "train"], "--split goes with a dataset folder"),
        (["--device", "gpu"], "'gpu'"),
    ],
)
def test_what_cannot_be_evaluated(here: Path, arguments: list[str], message: str) -> None:
    assert call("prepare", "input.txt", "--tokenizer", "byte", "--out", "data/byte").code == 0
    for name, content in (("unknown", b"caf\xc3\xa9"), ("latin1", b"caf\xe9"), ("one", b"t"), ("none", b"")):
        (here / f"{name}.txt").write_bytes(content)
    done = call("eval", "--ckpt", BEST, *arguments)
    assert done.code == 2
    assert message in done.error


def test_data_that_is_gone(here: Path) -> None:
    shutil.rmtree("data")
    done = call("eval", "--ckpt", BEST, "--json")
    assert done.code == 2
    assert done.error == (
        "minigpt: error: data/input, the data it was trained on, is not here; "
        "name a dataset folder or a text file with --data\n"
    )


def test_a_model_that_knows_its_text_beats_the_models_that_count(
    polyglot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(polyglot)
    result = scored(ckpt="char/last.safetensors")
    assert result["loss"] < result["baselines"]["bigram"] < result["baselines"]["unigram"]
    assert result["bits_per_byte"] == pytest.approx(
        result["bits_per_character"] * len(POLYGLOT) / len(POLYGLOT.encode()), rel=0.05
    )


def test_a_loss_beyond_all_bounds_is_still_json(here: Path) -> None:
    wild = [*TINY, *sets(train__learning_rate=1e4, train__max_iters=3, train__eval_interval=1)]
    done = call("train", "--config", "gpt", *wild, "--out", "wild")
    if done.code == 0:
        shown = call("eval", "--ckpt", "wild/last.safetensors", "--json")
        json.loads(shown.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
