"""`minigpt export` and `minigpt import` as a user meets them: out, back in, and used like any other checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands.conftest import TINY, call, environment, run, sets, tree
from minigpt_cli import load

CKPT = "checkpoints/best.safetensors"


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finished`, with a run whose head has no bias: that of 26 characters, for a width of 16, cannot be exported."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(finished / "data", folder / "data")
    shutil.copy(finished / "input.txt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train", "--config", "gpt", *TINY, *sets(model__bias_head="false")).code == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `trained` of its own for each test, and the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(here: Path, out: str = "exported") -> Path:
    done = call("export", "--ckpt", CKPT, "--to", "hf", out)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"Wrote {out}: GPT2LMHeadModel, for AutoModelForCausalLM.from_pretrained and AutoTokenizer\n"
    return here / out


def test_out_and_in_again_it_is_the_same_model_to_every_command(here: Path) -> None:
    """In a process of its own, in which transformers cannot be imported: nothing here needs it."""
    exported(here)
    (here / "without").mkdir()
    (here / "without" / "transformers.py").write_text("raise ImportError('not here')")
    path = f"{here / 'without'}{os.pathsep}{environment()['PYTHONPATH']}"
    done = run("import", "exported", "--out", "deep/back.safetensors", PYTHONPATH=path)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("Next: minigpt sample --ckpt deep/back.safetensors\n")
    written = ["--prompt", "the king", "--seed", 3, "--tokens", 40, "--precision", "fp32"]
    before, after = (call("sample", "--ckpt", ckpt, *written) for ckpt in (CKPT, "deep/back.safetensors"))
    assert before.out == after.out
    assert len(after.out) == 48
    ours, theirs = (
        json.loads(call("eval", "--ckpt", ckpt, "--data", "input.txt", "--json").out)
        for ckpt in (CKPT, "deep/back.safetensors")
    )
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert (theirs["step"], theirs["tokens"]) == (0, ours["tokens"])
    seen = call("inspect", "--ckpt", "deep/back.safetensors", "--json", "--prompt", "the king")
    assert len(json.loads(seen.out)["heads"]) == 2, seen.err
    assert call("import", "exported/model.safetensors", "--out", "one.safetensors", "--block-size", 9).code == 0
    assert "\x1b" not in done.out


def test_the_card_says_what_eval_says(here: Path) -> None:
    card = (exported(here) / "README.md").read_text(encoding="utf-8")
    found = json.loads(call("eval", "--ckpt", CKPT, "--json").out)
    for row in (
        f"| validation loss | {found['loss']:.4f} nats per token |",
        f"| perplexity | {found['perplexity']:,.3f} per token |",
        f"| bits per byte | {found['bits_per_byte']:.4f} |", "| vocabulary | 26 (char) |",
    ):  # fmt: skip
        assert row in card
    assert f"| trained | {found['step']:,} steps, {found['step'] * 64:,} tokens |" in card
    assert "| data | input.txt (sha256 " in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--ckpt", CKPT, "--to", "onnx", "x"], "--to onnx: "),
        (["export", "--ckpt", "none", "x"], "none: no such checkpoint"),
        (["export", "--ckpt", CKPT, "data"], "holds other files and is never replaced"),
        (["export", "--ckpt", CKPT, "input.txt"], "exists and is no folder"),
        (["import", "none", "--out", "x"], "none: no such file or folder"),
        (["import", "data", "--out", "x"], "data: no model.safetensors"),
        (["export", "--ckpt", CKPT, "--to", "gguf", "input.txt"], "input.txt exists; --force replaces it"),
        (["export", "--ckpt", CKPT, "--to", "gguf", CKPT, "--force"], "that is what is read; name another file"),
        (["export", "--ckpt", CKPT, "--to", "gguf", "x.gguf"], "llama.cpp's gpt2 cannot have model.mlp=relu"),
        (["import", "data", "--out", "input.txt"], "input.txt exists; --force replaces it"),
        (["import", "data", "--out", "data"], "data: a folder; name the file to make"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line_and_changes_nothing(
    arguments: list[str], message: str, here: Path
) -> None:
    before = tree(here)
    done = call(*arguments)
    assert done.code == 2
    assert message in done.error
    assert tree(here) == before


def test_force_replaces_and_without_it_nothing_is_touched(here: Path) -> None:
    folder = exported(here)
    call("import", "exported", "--out", "back.safetensors")
    before = tree(here)
    for arguments in (["export", "--ckpt", CKPT, "exported"], ["import", "exported", "--out", "back.safetensors"]):
        assert "--force" in call(*arguments).error
    assert tree(here) == before
    (folder / "config.json").write_text("{}")
    assert call("export", "--ckpt", CKPT, "exported", "--force").code == 0
    assert call("import", "exported", "--out", "back.safetensors", "--force").code == 0
    assert tree(here) == before


def test_a_damaged_model_is_a_failure_and_leaves_no_file(here: Path) -> None:
    folder = exported(here)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    before = tree(here)
    done = call("import", "exported", "--out", "x.safetensors")
    assert done.code == 1
    assert "damaged" in done.error
    assert tree(here) == before


class Pickled:
    """Unpickling it writes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch opened",)


def test_a_pickle_is_never_opened(here: Path) -> None:
    folder = exported(here)
    torch.save(Pickled(), folder / "pytorch_model.bin")
    assert call("import", "exported", "--out", "x.safetensors").code == 0  # the other file is there too
    (folder / "model.safetensors").unlink()
    done = call("import", "exported", "--out", "y.safetensors")
    assert done.code == 2
    assert "its weights are a pickle" in done.error
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    assert call("import", "exported", "--out", "y.safetensors").code == 1
    assert not (here / "opened").exists()


def test_names_that_would_drive_a_terminal_are_spelled_out(here: Path) -> None:
    evil = "a\x1b[31mb"
    done = call("export", "--ckpt", CKPT, evil)
    assert (done.code, "\x1b" in done.out + done.err) == (0, False)
    config = json.loads((here / evil / "config.json").read_text())
    (here / evil / "config.json").write_text(json.dumps(config | {"model_type": evil}))
    done = call("import", evil, "--out", "x")
    assert "\x1b" not in done.error


def test_one_file_is_made_of_parts_and_of_a_file_with_more_in_it(here: Path) -> None:
    done = call("train", "--config", "gpt", *TINY, *sets(runtime__checkpoints="sharded"), "--out", "parts")
    assert done.code == 0
    (parts,) = Path("parts").glob("best-*.sharded")
    assert f"minigpt export --ckpt {parts} --to file best.safetensors" in done.out
    refused = call("sample", "--ckpt", parts)
    assert refused.code == 2
    assert "in parts" in refused.err
    whole = call("train", "--config", "gpt", *TINY, "--out", "whole")
    assert whole.code == 0
    for ckpt, out in ((parts, "a.safetensors"), (Path("whole/last.safetensors"), "b.safetensors")):
        done = call("export", "--ckpt", ckpt, "--to", "file", out)
        assert (done.code, done.err, done.out) == (0, "", f"Wrote {out}: the weights of step 20\n")
    best = load_file("whole/best.safetensors")
    for out in ("a.safetensors", "b.safetensors"):
        made = load_file(out)
        assert made.keys() == best.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in best.items())
    assert call("sample", "--ckpt", "a.safetensors", "--tokens", 5).code == 0
    assert call("export", "--ckpt", parts, "--to", "file", "a.safetensors").code == 2


def test_a_tied_model_has_one_number_of_parameters(here: Path) -> None:
    """Whoever prints it: the matrix that is embedding and head is one."""
    tied = sets(model__tie_weights="true", model__bias_head="false", model__mlp="gelu", model__bias_qkv="true")
    assert "total" in (plan := call("train", "--config", "gpt", *TINY, *tied, "--dry-run", "--out", "tied").out)
    assert call("train", "--config", "gpt", *TINY, *tied, "--out", "tied").code == 0
    done = call("export", "--ckpt", "tied/best.safetensors", "--to", "file", "one.safetensors")
    assert done.code == 0, done.err
    told = [call("info", ckpt, "--json").out for ckpt in ("tied/last.safetensors", "one.safetensors")]
    (count,) = {json.loads(facts)["parameters"]["total"] for facts in told}
    stored = load_file("tied/best.safetensors")
    assert count == sum(tensor.numel() for tensor in stored.values())
    assert f"{count:,}" in plan
    assert call("export", "--ckpt", "one.safetensors", "--to", "hf", "theirs").code == 0
    done = call("import", "theirs", "--out", "back.safetensors")
    assert f"{count:,} parameters" in done.out
    assert load_file("back.safetensors").keys() == stored.keys()
    assert f"{count:,} parameters" in repr(load("back.safetensors"))
