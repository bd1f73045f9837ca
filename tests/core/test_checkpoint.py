"""A checkpoint is whole or not there, says so when it is damaged, and cannot make a reader do anything else."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from minigpt_cli.core import shards
from minigpt_cli.core.checkpoint import FORMAT_VERSION, load, read_header, require_storable, save
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError
from minigpt_cli.core.files import TEMPORARY
from runs import RunTraining, saved, small_config


@pytest.fixture
def last(run_training: RunTraining) -> Path:
    return run_training("run", small_config(max_iters=6))[0].last


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensors) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], tensors: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + tensors


def with_document(data: bytes, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> bytes:
    """The file with our JSON document changed, and its checksum made to fit: a liar, not an accident."""
    header, tensors = split(data)
    document = json.loads(header["__metadata__"]["minigpt"])
    change(document)
    text = json.dumps(document)
    header["__metadata__"]["minigpt"] = text
    if sign:
        header["__metadata__"]["minigpt_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return joined(header, tensors)


def test_what_is_saved_is_what_is_loaded(last: Path) -> None:
    checkpoint = load(last)
    model = checkpoint.model()
    weights = {"model." + name: tensor for name, tensor in model.state_dict().items()}
    with safe_open(last, framework="pt") as file:  # the format's own library reads it, and agrees
        assert set(file.keys()) == set(checkpoint.tensors)
        for name, tensor in weights.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, checkpoint.tokenizer.vocab_size)
    assert set(load(last, weights_only=True).tensors) == set(weights)


TIED = {"tie_weights": True, "max_iters": 6, "ema": 0.5}


@pytest.mark.parametrize("form", ["file", "sharded"])
def test_a_tied_matrix_is_stored_once(run_training: RunTraining, form: str) -> None:
    folder, _, _ = run_training("run", small_config(**TIED, checkpoints=form))
    for kind in ("last", "best"):
        _, tensors = saved(folder, kind)
        assert "model.token_embedding.weight" in tensors
        assert not [name for name in tensors if "head.weight" in name]
    path = folder.newest_of("best")
    assert path is not None
    found = load(path) if form == "file" else shards.gathered(path)
    model = found.model()
    assert model.head.weight is model.token_embedding.weight
    assert found.tensors["model.head.weight"].data_ptr() == found.tensors["model.token_embedding.weight"].data_ptr()


@pytest.mark.parametrize("form", ["file", "sharded"])
def test_a_run_whose_checkpoints_hold_a_tied_matrix_twice_goes_on(
    run_training: RunTraining, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """As they were written at first."""
    whole, _, _ = run_training("whole", small_config(**TIED | {"max_iters": 9}, checkpoints=form))
    with monkeypatch.context() as before:
        for module in ("checkpoint", "shards", "state"):
            before.setattr(f"minigpt_cli.core.{module}.stored_once", twice)
        folder, _, _ = run_training("run", small_config(**TIED, checkpoints=form))
    assert "model.head.weight" in saved(folder)[1]
    path = folder.newest_of("best")
    assert path is not None
    weights = (load(path, weights_only=True) if form == "file" else shards.gathered(path)).tensors
    assert torch.equal(weights["model.head.weight"], weights["model.token_embedding.weight"])
    folder, _, _ = run_training("run", small_config(**TIED | {"max_iters": 9}, checkpoints=form), resume=True)
    (_, expected), (_, tensors) = saved(whole), saved(folder)
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors.items())


def twice(tensors: Mapping[str, Tensor], config: object) -> dict[str, Tensor]:
    """A tied head has a tensor of its own in the file."""
    return {name: tensor.clone() if name == "model.head.weight" else tensor for name, tensor in tensors.items()}


def test_a_tied_matrix_that_is_stored_as_two_different_ones_is_damage(
    run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = run_training("run", small_config(**TIED))
    found = load(folder.last)
    found.tensors["model.head.weight"] = found.tensors["model.head.weight"] + 1
    monkeypatch.setattr("minigpt_cli.core.checkpoint.stored_once", twice)
    save(folder.last, found.tensors, found.header.model_dump(exclude={"versions", "checksums"}))
    with pytest.raises(CheckpointError, match="its config ties head and embedding, but they differ"):
        load(folder.last)


def test_a_header_that_ties_what_the_file_has_not_is_refused(last: Path) -> None:
    data = last.read_bytes()
    last.write_bytes(with_document(data, lambda d: d["config"]["model"].update(tie_weights=True)))
    with pytest.raises(CheckpointError, match="differ"):
        load(last)


def test_it_needs_nothing_beside_it(last: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "renamed.safetensors"
    alone.parent.mkdir()
    os.rename(last, alone)
    checkpoint = load(alone)
    assert checkpoint.config == small_config(max_iters=6)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("king")) == "king"
    assert set(checkpoint.header.versions) == {"minigpt", "torch", "python"}


def test_tensors_begin_at_multiples_of_eight(last: Path) -> None:
    assert int.from_bytes(last.read_bytes()[:8], "little") % 8 == 0


def test_the_users_umask_decides_who_may_read_it(run_training: RunTraining) -> None:
    old = os.umask(0o027)
    try:
        folder, _, _ = run_training("run", small_config(max_iters=6))
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.last.stat().st_mode) == 0o640


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "only the header": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "cut short by ten bytes": lambda data: data[:-10],
    "longer by ten bytes": lambda data: data + b"0123456789",
    "one byte of a tensor flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "one byte of the config flipped": lambda data: data.replace(b'n_embd\\":16', b'n_embd\\":17', 1),
    "garbage for a header": lambda data: data[:8] + os.urandom(int.from_bytes(data[:8], "little")) + data[-100:],
    "a header that claims 2^40 bytes": lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
    "a header of 12 MB": lambda data: joined({"pad": "x" * 12_000_000}, b""),
    "brackets without end": lambda data: (4_000_000).to_bytes(8, "little") + b"[" * 4_000_000,
    "a pickle": lambda data: pickle.dumps({"model": [1, 2, 3]}),
    "a zip, as torch.save makes": lambda data: b"PK\x03\x04" + bytes(200),
    "another's safetensors file": lambda data: joined({"w": split(data)[0]["model.head.bias"]}, split(data)[1]),
    "a document that is no object": lambda data: joined(
        {"__metadata__": {"minigpt": "3", "minigpt_sha256": hashlib.sha256(b"3").hexdigest()}}, b""
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_and_a_checkpoint_error(last: Path, damage: Callable[[bytes], bytes]) -> None:
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        load(last)
    assert str(last) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "n_embd of a billion": lambda d: d["config"]["model"].update(n_embd=10**9),
    "as wide as a config may be": lambda d: d["config"]["model"].update(n_embd=65536),
    "a thousand layers": lambda d: d["config"]["model"].update(n_layer=1000),
    "another width": lambda d: d["config"]["model"].update(n_embd=32),
    "another vocabulary": lambda d: d["tokenizer"].update(chars="ab"),
    "a tokenizer of no kind": lambda d: d["tokenizer"].update(kind="none"),
    "an unknown setting": lambda d: d["config"]["model"].update(wings=2),
    "a negative step": lambda d: d.update(step=-1),
    "a step that is a word": lambda d: d["progress"].update(step="many"),
    "checksums for other tensors": lambda d: d["checksums"].pop("model.head.bias"),
    "an extra field": lambda d: d.update(command="rm"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_in_the_header_is_found(last: Path, lie: Callable[[dict[str, Any]], object]) -> None:
    last.write_bytes(with_document(last.read_bytes(), lie))
    with pytest.raises(CheckpointError):
        load(last)


def test_a_shape_of_two_to_the_forty_allocates_nothing(last: Path) -> None:
    header, tensors = split(last.read_bytes())
    header["model.head.bias"]["shape"] = [1 << 40]
    last.write_bytes(joined(header, tensors))
    with pytest.raises(CheckpointError):
        load(last)


def test_a_sparse_file_of_eight_gigabytes_allocates_nothing(last: Path) -> None:
    """Offsets, shape and file size agree with each other, but not with the config: the config decides."""
    header, tensors = split(last.read_bytes())
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    begin = header[name]["data_offsets"][0]
    header[name].update(shape=[1 << 31], data_offsets=[begin, begin + (1 << 33)])
    last.write_bytes(joined(header, tensors))
    os.truncate(last, len(joined(header, b"")) + begin + (1 << 33))
    with pytest.raises(CheckpointError, match="does not fit the config"):
        load(last)


def test_a_tokenizer_too_large_to_be_read_again_is_refused_before_the_first_step() -> None:
    require_storable({"kind": "char", "chars": "\u0436" * 5_000_000})
    with pytest.raises(UserError, match="too large for a checkpoint"):
        require_storable({"kind": "char", "chars": "\u0436" * 20_000_000})
    with pytest.raises(UserError, match="too large for a checkpoint"):
        require_storable({"kind": "bpe", "merges": list(range(1_100_000))})


def test_a_header_that_could_not_be_read_again_is_not_written(last: Path) -> None:
    before, saved = last.read_bytes(), load(last)
    fields = saved.header.model_dump(exclude={"versions", "checksums"}) | {"tokenizer": {"a": list(range(1_100_000))}}
    with pytest.raises(MinigptError, match="not written"):
        save(last, saved.tensors, fields)
    assert last.read_bytes() == before


def test_a_newer_format_says_so(last: Path) -> None:
    last.write_bytes(with_document(last.read_bytes(), lambda d: d.update(format_version=FORMAT_VERSION + 1, wings=2)))
    with pytest.raises(CheckpointError, match="made by a newer minigpt"):
        load(last)


def test_no_file_and_a_folder_are_the_users_mistake(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_header(path)


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "it-ran",)

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="pickle"):
        load(path)
    assert not (tmp_path / "it-ran").exists()


@given(data=st.data())
def test_mutants_raise_our_errors_and_no_others(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mutants")
    document = {
        "format_version": 1, "config": small_config().model_dump(), "tokenizer": {"kind": "byte"}, "step": 1,
        "tokens_seen": 1, "val_loss": None, "dataset_fingerprint": "x", "progress": {},
    }  # fmt: skip
    path = folder / "mutant.safetensors"
    save(path, {"model.head.bias": torch.zeros(256)}, document)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[place] = data.draw(st.integers(0, 255))
        else:
            raw[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    path.write_bytes(raw)
    with pytest.raises(MinigptError):
        load(path)


def test_a_save_that_is_killed_leaves_the_old_file(last: Path) -> None:
    """The process dies while it writes, by SIGKILL: nothing can be cleaned up, and nothing needs to be."""
    before = last.read_bytes()
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from minigpt_cli.core import checkpoint
        from minigpt_cli.core.files import atomic_write
        with atomic_write(Path({str(last)!r})) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert last.read_bytes() == before
    assert [path.read_bytes() for path in last.parent.glob(f"{TEMPORARY}*")] == [b"half"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    last: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = last.read_bytes(), sorted(os.listdir(last.parent))
    saved = load(last)
    if call == "write":  # a real limit of the system, in a process of its own
        script = f"""
import resource, signal
from pathlib import Path
from minigpt_cli.core.checkpoint import load, save
saved = load({str(last)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save(Path({str(last)!r}), saved.tensors, saved.header.model_dump(exclude={{"versions", "checksums"}}))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "File too large" in done.stderr
    else:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output error"):
            save(last, saved.tensors, saved.header.model_dump(exclude={"versions", "checksums"}))
        monkeypatch.undo()
    assert last.read_bytes() == before
    assert sorted(os.listdir(last.parent)) == names
