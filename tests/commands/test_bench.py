"""`minigpt bench` as a user meets it: numbers of this machine, with or without a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands.conftest import TINY, call, run, sets, tree

QUICK = ["--steps", "3", "--tokens", "40"]


def test_json_has_the_promised_numbers_without_any_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("bench", "--config", "gpt", *TINY, *QUICK, "--json")
    assert done.code == 0
    first, *others = done.err.splitlines()
    assert first == "compile: off, it makes training on cpu no faster"
    assert {line.partition(" ")[0] for line in others} <= {"timing"}  # on a busy machine
    result = json.loads(done.out)
    assert 100 < result["train_tokens_per_second"] < 1e8
    assert 10 < result["decode_tokens_per_second"] < 1e7
    assert 5e7 < result["peak_memory_bytes"] < 1e11
    assert result["parameters"] == 4378 + (65 - 26) * (16 + 17)  # 65 kinds of tokens instead of 26
    assert result["train_tokens_per_second"] == pytest.approx(4 * 16 / result["step_seconds"])
    assert result["first_step_seconds"] > 0
    assert result["flops_utilisation"] is None
    assert result["data"] == "random tokens"
    assert result["decode_precision"] == "fp32"
    assert "baselines" not in result
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
        "training", "tokens/s", "one step", "decoding", "(3 streams, fp32)", "peak memory", "model FLOPs utilisation",
        "parameters", "1,946", "data/input", "fp32",
    ):  # fmt: skip
        assert word in done.out
    assert "\x1b" not in done.out


# --- baselines ---


@pytest.mark.parametrize("arguments", [["--baseline", "naive,hf"], ["--baseline", "hf", "--baseline", "naive"]])
def test_baselines_take_turns_with_ours_and_the_ratios_are_of_one_run(here: Path, arguments: list[str]) -> None:
    pytest.importorskip("transformers")
    done = call("bench", "--config", "gpt", *TINY, *QUICK, *arguments, "--seconds", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["baselines"]
    assert set(found) == {"naive", "hf"}
    assert found["naive"]["tokens"] == 40
    assert found["hf"]["tokens"] == 15  # GPT-2 cannot go past its context of 16
    assert "1 layers of 16" in found["hf"]["what"]
    for other in found.values():
        assert 1 <= other["rounds"]["train"] <= 3
        assert 1 <= other["rounds"]["decode"] <= 3
        for what in ("train", "decode"):
            assert other[f"{what}_tokens_per_second"] > 10
            assert 0.01 < other[f"{what}_ratio"] < 1000


def test_a_table_with_baselines(here: Path) -> None:
    done = call("bench", "--config", "gpt", *TINY, *QUICK, "--baseline", "naive", "--seconds", "1")
    assert done.code == 0
    assert "against naive" in done.out
    assert done.out.count("; ours ") == 2


def test_every_shape_can_be_compared_with_the_naive_model(here: Path) -> None:
    modern = sets(model__position="rope", model__norm="rmsnorm", model__mlp="swiglu", model__n_kv_head=1)
    done = call("bench", "--config", "gpt", *TINY, *modern, *QUICK, "--baseline", "naive", "--seconds", "1", "--json")
    assert done.code == 0
    assert json.loads(done.out)["baselines"]["naive"]["train_ratio"] > 0


def test_from_a_wheel_the_naive_model_is_missing_and_that_is_said_first(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt_cli.extras.baselines.ORACLE", here)
    done = call("bench", "--config", "gpt", "--baseline", "naive")
    assert done.code == 2
    assert "tests/oracle of minigpt's repository" in done.error
    assert len(done.err.splitlines()) == 1


def test_without_transformers_it_is_said_how_to_get_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("bench", "--config", "gpt", "--baseline", "hf")
    assert done.code == 2
    assert done.error == "minigpt: error: --baseline hf: transformers is not installed; pip install 'minigpt[hf]'\n"


def test_samples_side_by_side_are_counted_together(here: Path) -> None:
    arguments = ["bench", "--config", "gpt", *TINY, "--steps", 1, "--tokens", 60, "--json"]

    def speed(streams: int) -> float:
        """The best of three: the machine may have had other work."""
        runs = [json.loads(call(*arguments, "--streams", streams).out) for _ in range(3)]
        return max(run["decode_tokens_per_second"] for run in runs)

    assert speed(64) > 3 * speed(1)  # counted one by one they would be slower


def test_the_time_limit_holds(here: Path) -> None:
    """Which would be weeks otherwise."""
    done = call("bench", "--config", "gpt", *TINY, "--steps", 10**9, "--tokens", 10**9, "--seconds", "0.3", "--json")
    assert done.code == 0


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
        (["--config", "gpt", "--baseline", "gpt3"], "--baseline gpt3: no such baseline; there are naive and hf"),
        (["--config", "gpt", "--device", "cuda:99"], "device cuda:99 was asked for"),
        (["--config", "gpt", "--set", "data.path=checkpoints"], "checkpoints: not a dataset folder"),
        (["--config", "gpt", "--set", "model.block_size=99999"], "a context of 99,999 needs at least 100,000"),
    ],
)
def test_what_cannot_be_measured(here: Path, arguments: list[str], message: str) -> None:
    done = call("bench", *arguments)
    assert done.code == 2
    assert message in done.error


def test_a_vocabulary_can_be_given_instead_of_a_corpus(here: Path) -> None:
    found = json.loads(call("bench", "--config", "gpt", *TINY, *QUICK, "--vocab-size", "999", "--json").out)
    assert found["data"] == "random tokens"
    parameters = json.loads(call("bench", "--config", "gpt", *TINY, *QUICK, "--json").out)["parameters"]
    assert found["parameters"] - parameters == (999 - 26) * (2 * 16 + 1)
