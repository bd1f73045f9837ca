"""`minigpt info`: what it says agrees with what else is known, and no damaged byte escapes it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.conftest import Done, call, on_a_terminal
from minigpt_cli.core.checkpoint import Progress, load, peek, save, verify

BEST, LAST = "checkpoints/best.safetensors", "checkpoints/last.safetensors"


def facts_of(*arguments: object) -> Any:
    done = call("info", *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def table(done: Done) -> dict[str, str]:
    """Label -> value of a table's rows."""
    assert (done.code, done.err) == (0, "")
    rows = re.findall(r"^│ (.*?)\s+│\s+(.*?) │$", done.out, re.M)
    return dict(rows)


def test_what_it_says_is_what_the_checkpoint_holds(here: Path) -> None:
    facts, loaded = facts_of(BEST), load(BEST)
    model = loaded.model()
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"] == model.parameter_counts()
    assert (facts["step"], facts["tokens_seen"], facts["val_loss"]) == (20, 20 * 4 * 16, loaded.header.val_loss)
    assert facts["epochs"] == 20 * 4 * 16 / json.loads(Path("data/input/meta.json").read_text())["train"]["tokens"]
    assert facts["tokenizer"] == {"kind": "char", "vocab_size": loaded.tokenizer.vocab_size}
    assert facts["config"] == loaded.config.model_dump()
    assert (facts["bytes"], facts["verified"]) == (Path(BEST).stat().st_size, True)
    assert (facts["optimizer"], facts_of(LAST)["optimizer"]) == (False, True)
    assert facts["versions"]["torch"] == torch.__version__


def test_the_table_is_in_words(here: Path) -> None:
    done = call("info", BEST)
    rows = table(done)
    assert rows["model"].startswith("1 layer, 2 heads, width 16, context 16; ")
    assert rows["trained"].startswith("20 of 20 steps, 1,280 tokens, 0.1 passes over the text")
    assert rows["holds"] == "weights only"
    assert rows["data"].startswith("data/input (fingerprint ")
    assert "weights and optimizer" in table(call("info", LAST))["holds"]
    assert done.out.splitlines()[-1] == f"All {len(load(BEST).tensors)} tensors match their checksums."


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_bits_per_byte_are_those_of_eval(polyglot: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(polyglot)
    facts = facts_of(f"{kind}/last.safetensors")
    measured = json.loads(call("eval", "--ckpt", f"{kind}/last.safetensors", "--json").out)
    assert facts["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-6)
    assert facts["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-6)


def test_what_cannot_be_known_is_left_out(polyglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from its data: neither the passes over it nor, where tokens are no bytes, bits per byte."""
    for kind in ("byte", "bpe"):
        shutil.copy(polyglot / kind / "best.safetensors", tmp_path / f"{kind}.safetensors")
    monkeypatch.chdir(tmp_path)
    facts = facts_of("bpe.safetensors")
    assert facts["epochs"] is facts["bits_per_byte"] is None
    assert facts_of("byte.safetensors")["bits_per_byte"] is not None
    assert "passes" not in call("info", "bpe.safetensors").out


def test_every_damaged_tensor_is_found_and_named(here: Path) -> None:
    """One bit, in the first and in the last tensor of the file: the header is still whole, and is shown."""
    whole = Path(LAST).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8 : 8 + length])
    layout.pop("__metadata__")
    for name in (
        min(layout, key=lambda n: layout[n]["data_offsets"]),
        max(layout, key=lambda n: layout[n]["data_offsets"]),
    ):
        at = 8 + length + layout[name]["data_offsets"][0]
        Path(LAST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        done = call("info", LAST)
        assert done.code == 1
        assert done.err == f"minigpt: error: {LAST}: damaged: the tensor {name} does not match its checksum\n"
        assert "parameters" in done.out
        assert "match" not in done.out
        assert (call("info", LAST, "--json").code, call("info", LAST, "--json").out) == (1, "")


def test_a_run_folder_shows_its_checkpoints_and_finds_the_damaged_one(here: Path) -> None:
    done = call("info", "checkpoints")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"│ best.safetensors │\s+20 │\s+3\.\d{4} │\s+\d+ kB │ weights only │", done.out)
    assert re.search(r"│ last.safetensors │\s+20 │\s+3\.\d{4} │\s+\d+ kB │\s+to resume │", done.out)
    assert [Path(facts["file"]).name for facts in facts_of("checkpoints")["checkpoints"]] == [
        "best.safetensors", "last.safetensors",
    ]  # fmt: skip
    Path(LAST).write_bytes(Path(LAST).read_bytes()[:-4])
    done = call("info", "checkpoints")
    assert done.code == 1
    assert done.err.startswith(f"minigpt: error: {LAST}: damaged: ")
    assert "best.safetensors" in done.out
    assert "last.safetensors" not in done.out


def test_a_dataset_folder_shows_its_counts(here: Path) -> None:
    meta = json.loads(Path("data/input/meta.json").read_text())
    rows = table(call("info", "data/input"))
    assert rows["training split"].startswith(f"{meta['train']['tokens']:,} tokens")
    assert rows["made from"].startswith("input.txt, ")
    assert rows["fingerprint"] == facts_of("data/input")["fingerprint"] == meta["fingerprint"]


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("nowhere.safetensors", 2, "nowhere.safetensors: no such checkpoint"),
        ("input.txt", 1, "input.txt: not a checkpoint"),
        ("data", 2, "data: a folder with neither checkpoints (*.safetensors) nor a dataset (meta.json) in it"),
    ],
)
def test_what_is_no_checkpoint(here: Path, path: str, code: int, message: str) -> None:
    done = call("info", path)
    assert done.code == code
    assert message in done.error


def test_a_header_cannot_drive_the_terminal(here: Path) -> None:
    known = load(BEST)
    fields = known.header.model_dump(exclude={"checksums", "versions"})
    fields["config"]["data"]["path"] = "\x1b[2Jdata\x07"
    save(Path("evil.safetensors"), known.tensors, fields | {"progress": known.header.progress})
    done = call("info", "evil.safetensors")
    assert done.code == 0
    assert "\\x1b[2Jdata\\x07" in done.out
    assert "\x1b" not in done.out


def test_an_imported_model_was_trained_elsewhere(here: Path) -> None:
    known = load(BEST)
    nothing = {"step": 0, "tokens_seen": 0, "val_loss": None, "progress": Progress(), "dataset_fingerprint": "imported"}
    save(
        Path("imported.safetensors"),
        known.tensors,
        known.header.model_dump(exclude={"checksums", "versions"}) | nothing,
    )
    rows = table(call("info", "imported.safetensors"))
    assert rows["trained"] == "elsewhere, before it was imported"
    assert rows["parameters"] == table(call("info", BEST))["parameters"]


@pytest.mark.parametrize("path", ["checkpoints", "checkpoints/last-00000020.sharded"])
def test_a_checkpoint_in_parts_says_how_to_make_one_file_of_it(here: Path, path: str) -> None:
    for file in (here / "checkpoints").glob("*.safetensors"):
        file.unlink()
    (here / "checkpoints/last-00000020.sharded").mkdir()
    done = call("info", path)
    assert done.code == 2
    assert "last-00000020.sharded: in parts; make one file of it: minigpt export" in done.error


def test_verifying_tells_how_far_it_is(here: Path) -> None:
    heard: list[tuple[int, int]] = []
    verify(peek(LAST), lambda done, total: heard.append((done, total)))
    assert len(heard) == len(load(LAST).tensors)
    assert heard == sorted(heard)
    assert {total for _, total in heard} == {os.path.getsize(LAST)}
    assert heard[-1][0] == sum(tensor.nbytes for tensor in load(LAST).tensors.values())


def test_on_a_terminal(here: Path) -> None:
    code, shown = on_a_terminal("info", BEST)
    assert code == 0
    assert "match their checksums." in shown
