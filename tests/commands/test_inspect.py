"""`minigpt inspect` as a user meets it: a page, a JSON object, and plain words for what cannot be done."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands.conftest import call, environment, on_a_terminal, run

CKPT = "checkpoints/best.safetensors"


def numbers(*arguments: object) -> dict[str, Any]:
    done = call("inspect", "--ckpt", CKPT, "--json", *arguments)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_it_writes_one_page_and_says_where(here: Path) -> None:
    done = call("inspect", "--ckpt", CKPT)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("Wrote report.html (")
    assert (here / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((here / "report.html").stat().st_mode) == 0o666 & ~umask
    assert {path.name for path in here.iterdir()} == {"input.txt", "data", "checkpoints", "report.html"}


def test_json_is_all_there_is_on_stdout_and_makes_a_page_only_when_asked(here: Path) -> None:
    found = numbers("--prompt", "the king")
    assert not (here / "report.html").exists()
    assert len(found["text"]["ids"]) == 8
    assert found["text"]["source"] == "the text of --prompt"
    assert found["validation"]["tokens"] > 100
    assert len(found["heads"]) == 2
    assert all(isinstance(head["importance"]["rise"], float) for head in found["heads"])
    assert [len(row) for row in found["attention"]["weights"][0][0]] == list(range(1, 9))
    assert {"train_loss", "val_loss", "lr"} == set(found["training"]["curves"])
    numbers("--prompt", "the king", "--out", "page.html")
    assert (here / "page.html").exists()


def test_the_same_question_has_the_same_answer(here: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        assert call("inspect", "--ckpt", CKPT, "--out", name).code == 0
        pages.append((here / name).read_bytes())
    assert pages[0] == pages[1]


def test_without_a_prompt_it_reads_the_validation_text_else_what_the_model_writes(here: Path) -> None:
    found = numbers()
    assert found["text"]["source"] == "the beginning of the validation text of data/input"
    assert len(found["text"]["ids"]) == 16  # the context
    (here / "data").rename(here / "elsewhere")
    done = call("inspect", "--ckpt", CKPT, "--json")
    alone = json.loads(done.out)
    assert alone["text"]["source"].startswith("a text that the model wrote itself")
    assert alone["validation"]["tokens"] == 0
    assert "no validation text at hand" in alone["validation"]["note"]
    assert "name some with --data" in done.err
    assert all(head["importance"] is None for head in alone["heads"])
    assert call("inspect", "--ckpt", CKPT).code == 0
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "give <code>--data</code>" in page
    named = numbers("--data", "elsewhere/input")
    assert named["validation"]["path"] == "elsewhere/input"
    assert named["heads"] == found["heads"]
    assert numbers("--data", "input.txt")["validation"]["tokens"] > 1000  # a text file, whole


def test_a_prompt_from_a_file_and_from_stdin(here: Path) -> None:
    (here / "prompt.txt").write_text("the queen")
    from_file = numbers("--prompt-file", "prompt.txt")
    done = call("inspect", "--ckpt", CKPT, "--json", "--prompt-file", "-", stdin=b"the queen")
    given = numbers("--prompt", "the queen")
    assert json.loads(done.out)["text"]["ids"] == from_file["text"]["ids"] == given["text"]["ids"]


def test_a_prompt_longer_than_the_context_counts_with_its_newest_tokens(here: Path) -> None:
    done = call("inspect", "--ckpt", CKPT, "--json", "--prompt", "the king and queen of winter")
    assert "28 tokens and the context is 16: its newest count" in done.err
    found = json.loads(done.out)
    assert "".join(found["labels"][str(i)] for i in found["text"]["ids"]) == "queen␣of␣winter"[-16:].rjust(16, "␣")
    assert "28 tokens" in found["text"]["note"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", ""], 2, "--prompt: the text is empty"),
        (["--prompt", "the naïf"], 2, "--prompt: this character is not in the vocabulary of 26 characters: 'ï'"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "--prompt and --prompt-file: choose one"),
        (["--prompt-file", "missing.txt"], 2, "missing.txt: No such file or directory"),
        (["--prompt-file", "latin.txt"], 2, "latin.txt: not UTF-8 text (byte 3)"),
        (["--prompt-file", "empty.txt"], 2, "empty.txt: the text is empty"),
        (["--out", "taken.html"], 2, "taken.html exists; --force replaces it, --out names another file"),
        (["--out", "taken.html", "--ckpt", "no"], 2, "taken.html exists"),  # said before any work is done
        (["--out", "data"], 2, "data: not a plain file"),
        (["--out", "nowhere/a.html"], 2, "nowhere/a.html: there is no folder nowhere"),
        (["--out", "input.txt/a.html"], 2, "input.txt/a.html"),
        (["--out", "x" * 300], 2, "File name too long"),
        (["--out", CKPT, "--force"], 2, "that is the checkpoint itself"),
        (["--out", "/dev/null", "--force"], 2, "/dev/null: not a plain file"),
        (["--data", "nowhere"], 2, "nowhere: no such file or folder"),
        (["--data", "checkpoints"], 2, "checkpoints: not a dataset folder; it has no meta.json"),
        (["--data", "latin.txt"], 2, "latin.txt: not UTF-8 text"),
        (["--data", "empty.txt"], 2, "empty.txt: 0 token(s) to measure on; at least 2 are needed"),
        (["--device", "tpu"], 2, "--device"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(here: Path, arguments: list[str], code: int, message: str) -> None:
    (here / "taken.html").write_text("mine")
    (here / "latin.txt").write_bytes(b"na\x20\xefve")
    (here / "empty.txt").write_bytes(b"")
    before = sorted(path.name for path in here.iterdir())
    done = call("inspect", "--ckpt", CKPT, *arguments)
    assert done.code == code
    assert message in done.error
    assert (here / "taken.html").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == before


def test_force_replaces_a_page(here: Path) -> None:
    (here / "report.html").write_text("old")
    assert call("inspect", "--ckpt", CKPT, "--force").code == 0
    assert (here / "report.html").stat().st_size > 10_000


def test_a_missing_or_damaged_checkpoint(here: Path) -> None:
    assert call("inspect", "--ckpt", "none.safetensors").code == 2
    data = bytearray((here / CKPT).read_bytes())
    data[-5] ^= 1
    (here / "bad.safetensors").write_bytes(data)
    done = call("inspect", "--ckpt", "bad.safetensors")
    assert done.code == 1
    assert "does not match its checksum" in done.error
    assert not (here / "report.html").exists()


def test_a_checkpoint_alone_in_the_world_has_no_metrics_and_says_so(here: Path) -> None:
    (here / "alone").mkdir()
    (here / CKPT).rename(here / "alone" / "model.safetensors")
    assert call("inspect", "--ckpt", "alone/model.safetensors").code == 0
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "no metrics.jsonl lies beside the checkpoint" in page


def test_data_of_another_tokenizer_is_refused_when_named_and_passed_by_when_not(here: Path) -> None:
    assert call("prepare", "input.txt", "--tokenizer", "byte", "--out", "bytes").code == 0
    done = call("inspect", "--ckpt", CKPT, "--data", "bytes")
    assert done.code == 2
    assert "bytes: prepared with another tokenizer than the model's" in done.error
    (here / "data" / "input").rename(here / "old")
    (here / "bytes").rename(here / "data" / "input")
    done = call("inspect", "--ckpt", CKPT)
    assert done.code == 0
    assert "another tokenizer" in done.err


def test_a_folder_that_may_not_be_written_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "closed").mkdir(mode=0o500)
    if os.access(here / "closed", os.W_OK):  # nothing is closed to root, whom some machines run tests as
        really = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: really(path, mode) and not mode & os.W_OK)
    done = call("inspect", "--ckpt", CKPT, "--out", "closed/a.html")
    assert done.code == 2
    assert "the folder closed cannot be written to" in done.error


def test_a_write_that_fails_leaves_the_old_page(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = call("inspect", "--ckpt", CKPT, "--force")
    assert done.code == 1
    assert "the disk is full" in done.err
    assert (here / "report.html").read_text() == "old"
    assert not list(here.glob(".tmp-*"))


def test_a_path_in_the_checkpoint_is_no_reason_to_read_a_file(here: Path) -> None:
    """A checkpoint from elsewhere may name any file as its data; its words would stand on the page."""
    (here / "data").rename(here / "gone")
    (here / "data").mkdir()
    (here / "data" / "input").write_text("speak no more the king " * 9)
    found = numbers()
    assert found["text"]["source"].startswith("a text that the model wrote itself")
    assert found["validation"]["tokens"] == 0


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_tokenizer_and_text_that_would_drive_a_terminal(polyglot: Path, tmp_path: Path, kind: str) -> None:
    done = call(
        "inspect", "--ckpt", polyglot / kind / "best.safetensors", "--data", polyglot / "data" / kind,
        "--out", tmp_path / "page.html",
    )  # fmt: skip
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "\x07" not in page
    assert "東" in page or kind == "byte" or "\\u6771" in page


def test_help_is_instant_and_complete(here: Path) -> None:
    probe = """if True:
        import sys
        from minigpt_cli.commands import main
        sys.argv = ["minigpt", "inspect", "--help"]
        try:
            main()
        finally:
            print([name for name in ("torch", "jinja2", "numpy", "pydantic") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("[]")
    for option in ("--ckpt", "--prompt", "--prompt-file", "--data", "--out", "--force", "--json", "--device"):
        assert option in done.stdout


@pytest.mark.slow
def test_progress_is_for_terminals(here: Path) -> None:
    code, shown = on_a_terminal("inspect", "--ckpt", CKPT)
    assert code == 0
    assert "silencing heads" in shown
    done = run("inspect", "--ckpt", CKPT, "--force")
    assert done.code == 0
    assert done.err.count("\n") == 1
