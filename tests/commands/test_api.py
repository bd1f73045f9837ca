"""The Python interface does what the commands do, word for word and bit for bit, and leaves a notebook alone."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigpt_cli
from commands.conftest import call, environment
from minigpt_cli import MinigptError, Model, UserError, evaluate, generate, load, prepare, stream, train
from minigpt_cli.core.errors import CheckpointError

SMALL = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "train.batch_size": 4,
    "train.max_iters": 20, "train.eval_interval": 10, "runtime.precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    return load(finished / "checkpoints/best.safetensors", device="cpu", precision="fp32")


def test_importing_it_imports_nothing_heavy() -> None:
    code = """
import sys, minigpt_cli
from minigpt_cli import __version__
assert set(dir(minigpt_cli)) >= {"load", "generate", "__version__"}
print(sorted({"torch", "numpy", "pydantic", "typer", "rich"} & set(sys.modules)))
minigpt_cli.load
print(sorted({"torch", "typer", "rich", "matplotlib"} & set(sys.modules)))
try:
    minigpt_cli.laod
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['torch']", "module 'minigpt_cli' has no attribute 'laod'"]


def test_every_name_is_there_and_described() -> None:
    assert minigpt_cli.__all__ == minigpt_cli.api.__all__
    for name in minigpt_cli.__all__:
        assert inspect.getdoc(getattr(minigpt_cli, name)), name
    assert (Path(minigpt_cli.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, []),
        ({"temperature": 0.7, "top_k": 5}, ["--temperature", "0.7", "--top-k", "5"]),
        ({"top_p": 0.8, "stop": "the"}, ["--top-p", "0.8", "--stop", "the"]),
        ({"stop": ("q", "the")}, ["--stop", "q", "--stop", "the"]),
        ({"temperature": 0}, ["--temperature", "0"]),
    ],
)
@pytest.mark.parametrize("prompt", ["", "the king"])
def test_the_text_is_that_of_the_command(
    finished: Path, model: Model, arguments: dict[str, Any], options: list[str], prompt: str
) -> None:
    done = call(
        "sample", "--ckpt", finished / "checkpoints/best.safetensors", "--tokens", 60, "--seed", 5,
        "--precision", "fp32", "--prompt", prompt, *options,
    )  # fmt: skip
    assert done.code == 0
    assert prompt + generate(model, prompt, tokens=60, seed=5, **arguments) == done.out


def test_a_stream_is_whole_characters_as_they_come(polyglot: Path) -> None:
    model = load(polyglot / "byte/last.safetensors")
    pieces = list(stream(model, "Zeile eins ", tokens=60, temperature=0))
    assert "".join(pieces) == generate(model, "Zeile eins ", tokens=60, temperature=0)
    assert "東" in "".join(pieces)
    assert all(pieces)
    assert len(pieces) > 30
    text = stream(model, tokens=10**9)
    assert next(text)  # nobody waits for the end


def test_the_loss_is_that_of_the_command(finished: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    done = call("eval", "--ckpt", "checkpoints/best.safetensors", "--data", "input.txt", "--json")
    score = evaluate(model, Path("input.txt").read_text())
    assert json.loads(done.out)["loss"] == score.loss
    assert json.loads(done.out)["tokens"] == score.tokens


def test_what_a_model_tells_of_itself(model: Model) -> None:
    assert (model.step, model.config.model.n_embd) == (20, 16)
    assert model.tokenizer.decode(model.tokenizer.encode("the king")) == "the king"
    assert model.val_loss is not None
    assert 3 < model.val_loss < 4
    logits = model.module(torch.zeros(1, 4, dtype=torch.long))
    assert logits.shape == (1, 4, model.tokenizer.vocab_size)
    assert repr(model).startswith("<minigpt model: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens 0: ask for at least 1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0: at least 1"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"seed": -1}, "seed -1"),
        ({"stop": ""}, "stop: the text to stop at is empty"),
        ({"stop": ["a", ""]}, "stop: the text to stop at is empty"),
        ({"prompt": "ß"}, "not in the vocabulary"),
    ],
)
def test_arguments_that_make_no_sense(model: Model, arguments: dict[str, Any], message: str) -> None:
    for function in (generate, stream):  # a stream says it at once, not when it is first read
        with pytest.raises(UserError, match=message):
            function(model, **arguments)


def test_files_and_devices_that_will_not_do(here: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load("nowhere.safetensors")
    with pytest.raises(UserError, match="device"):
        load("checkpoints/best.safetensors", device="tpu")
    best = here / "checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load(best)
    assert issubclass(CheckpointError, MinigptError)
    with pytest.raises(UserError, match="which config"):
        train()
    with pytest.raises(UserError, match="already holds a run"):
        train("gpt", settings=SMALL)
    with pytest.raises(UserError, match="did you mean max_iters"):
        train("gpt", settings={"train.max_iter": 3})
    with pytest.raises(UserError, match="already holds a dataset"):
        prepare("input.txt", "data/input")
    with pytest.raises(ValueError, match="no such file"):
        prepare("nowhere.txt", "data/nowhere")


def test_training_is_that_of_the_command_and_prints_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = prepare("input.txt", "data/again")
    assert report.meta.fingerprint == json.loads((here / "data/input/meta.json").read_text())["fingerprint"]
    records: list[dict[str, Any]] = []
    result = train(
        "gpt", data=Path("data/again"), out=here / "again", device="cpu", settings=SMALL, on_record=records.append
    )
    assert (result.reason, result.progress.step) == ("finished", 20)
    assert result.metrics == records
    assert capfd.readouterr() == ("", "")
    ours, theirs = load_file(result.last), load_file(here / "checkpoints/last.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    notes: list[str] = []
    assert train(resume=True, out="again", note=notes.append).reason == "complete"
    assert "this run is finished" in notes[-1]


def test_preparing_runs_no_script_twice(tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"`, on input that is worth worker processes to the command."""
    (tmp_path / "big.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + "x" * 999}) + "\n" for i in range(17_000))
    )
    script = tmp_path / "script.py"
    script.write_text("import minigpt_cli\nprint(minigpt_cli.prepare('big.jsonl', 'out', tokenizer='byte').tokens)\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 17_000_000


def test_an_interrupt_is_raised_when_the_run_has_saved_itself(here: Path) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 10:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train("gpt", out="stopped", device="cpu", settings=SMALL, on_record=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert load("stopped/last.safetensors").step == 10
    result = train(resume=True, out="stopped")
    whole = load_file(here / "checkpoints/last.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(result.last).items())


def test_a_second_interrupt_does_not_wait(here: Path) -> None:
    """And does not end the process, which is a notebook's kernel."""

    def interrupt_twice(record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        train("gpt", out="stopped", device="cpu", settings=SMALL, on_record=interrupt_twice)


def test_it_trains_in_any_thread(here: Path) -> None:
    done: list[str] = []
    thread = threading.Thread(
        target=lambda: done.append(train("gpt", out="threaded", device="cpu", settings=SMALL).reason)
    )
    thread.start()
    thread.join(60)
    assert done == ["finished"]
