"""Which tokens a step sees, and what becomes of a dataset folder that is not what it should be."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clock import PATIENCE
from minigpt_cli.core import dataset as dataset_module
from minigpt_cli.core.dataset import Batches, Dataset, require_known_tokens, window_offsets, windows_per_epoch
from minigpt_cli.core.errors import MinigptError, UserError

CPU = torch.device("cpu")
NEEDS_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def offsets(n: int, block_size: int, sampling: str, *, seed: int = 1, step: int = 0, batch: int = 4) -> list[int]:
    """Where the windows of a step begin in a split of `n` tokens."""
    drawn = window_offsets(n, block_size, seed=seed, step=step, batch_size=batch, sampling=sampling)
    assert drawn.shape == (batch,)
    assert drawn.dtype == np.int64
    return drawn.tolist()


def epoch(n: int, block_size: int, number: int, *, seed: int = 1, n_tokens: int) -> list[int]:
    """The windows of an epoch of `n`, in order, asked for one at a time."""
    return [offsets(n_tokens, block_size, "epoch", seed=seed, step=number * n + i, batch=1)[0] for i in range(n)]


# ---------------------------------------------------------------------------------------------------- window_offsets


@given(
    block_size=st.integers(1, 40),
    extra=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**6),
    batch=st.integers(1, 50),
    sampling=st.sampled_from(["random", "epoch"]),
)
def test_every_window_and_its_last_target_lie_in_the_split(
    block_size: int, extra: int, seed: int, step: int, batch: int, sampling: str
) -> None:
    n_tokens = block_size + extra
    for offset in offsets(n_tokens, block_size, sampling, seed=seed, step=step, batch=batch):
        assert offset >= 0
        assert offset + block_size <= n_tokens - 1  # the last target


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_offsets_are_a_pure_function_of_seed_and_step(sampling: str) -> None:
    steps = [0, 7, 3, 7, 1000, 0, 1, 6, 3, 2]  # in any order, with other seeds and sizes asked for between
    seen: dict[int, list[int]] = {}
    for step in steps:
        drawn = offsets(1000, 8, sampling, step=step)
        assert seen.setdefault(step, drawn) == drawn
        offsets(999, 7, sampling, seed=step, step=step)
    assert len({tuple(drawn) for drawn in seen.values()}) == len(seen)
    assert offsets(1000, 8, sampling, seed=2) != offsets(1000, 8, sampling, seed=1)


def test_offsets_do_not_touch_the_global_generators() -> None:
    np.random.seed(0)
    before = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    offsets(1000, 8, "random")
    offsets(1000, 8, "epoch")
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_random_sampling_covers_the_split_evenly_from_its_first_window_to_its_last() -> None:
    counts = Counter(o for step in range(100) for o in offsets(58, 8, "random", step=step, batch=500))
    assert sorted(counts) == list(range(50))  # 50 windows, 0 to 49, each with its target
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 100  # chi-square, 49 degrees of freedom


@pytest.mark.parametrize(("n_tokens", "block_size"), [(100, 8), (97, 8), (105, 8), (60, 7), (40, 1), (33, 16)])
def test_an_epoch_visits_every_window_of_its_grid_exactly_once(n_tokens: int, block_size: int) -> None:
    n = windows_per_epoch(n_tokens, block_size)
    shifts = set()
    for number in range(40):
        visited = sorted(epoch(n, block_size, number, n_tokens=n_tokens))
        shift = visited[0]
        assert visited == [shift + i * block_size for i in range(n)]
        assert 0 <= shift < block_size
        shifts.add(shift)
    assert len(shifts) > block_size * 0.8  # the grid moves from epoch to epoch


def test_an_epoch_leaves_out_less_than_two_windows() -> None:
    for n_tokens in range(9, 200):
        assert n_tokens - windows_per_epoch(n_tokens, 8) * 8 < 2 * 8


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 11, 12, 25, 100])
def test_batches_cut_the_stream_of_epochs_wherever_they_end(batch: int) -> None:
    n = windows_per_epoch(100, 8)
    stream = [o for number in range(12) for o in epoch(n, 8, number, n_tokens=100)]
    in_batches = [o for step in range(100 // batch + 1) for o in offsets(100, 8, "epoch", step=step, batch=batch)]
    assert in_batches[: len(stream)] == stream[: len(in_batches)]


def test_every_epoch_has_its_own_order() -> None:
    n = windows_per_epoch(1000, 8)
    orders = []
    for number in range(5):
        visited = epoch(n, 8, number, n_tokens=1000)
        orders.append(tuple((o - min(visited)) // 8 for o in visited))
    assert len(set(orders)) == 5
    assert tuple(range(n)) not in orders


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_the_smallest_split_has_one_window(sampling: str) -> None:
    assert offsets(9, 8, sampling, batch=5) == [0] * 5


# ----------------------------------------------------------------------------------------------------------- Batches


def batches(tokens: np.ndarray[Any, Any], sampling: str = "random", batch_size: int = 6, **options: int) -> Batches:
    return Batches(tokens, 8, batch_size, seed=1, sampling=sampling, device=CPU, **options)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_a_batch_is_the_windows_at_its_offsets_and_y_is_one_token_ahead(sampling: str, dtype: str) -> None:
    tokens = np.random.Generator(np.random.Philox(1)).integers(0, 60_000, 500).astype(dtype)
    for step in (0, 1, 50):
        x, y = batches(tokens, sampling).at(step)
        assert x.shape == y.shape == (6, 8)
        assert x.dtype == y.dtype == torch.int64
        for row, o in enumerate(offsets(500, 8, sampling, step=step, batch=6)):
            assert x[row].tolist() == tokens[o : o + 8].tolist()
            assert y[row].tolist() == tokens[o + 1 : o + 9].tolist()


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_some_rows_of_a_batch_are_those_rows_of_the_whole(sampling: str) -> None:
    source = batches(np.arange(500, dtype=np.uint16), sampling)
    for step in (0, 9):
        x, y = source.at(step)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(1, None, 2), slice(5, 6)):
            part_x, part_y = source.at(step, rows)
            assert torch.equal(part_x, x[rows])
            assert torch.equal(part_y, y[rows])


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_reading_ahead_changes_nothing_in_whatever_order_steps_and_rows_are_asked_for(sampling: str) -> None:
    tokens = np.random.Generator(np.random.Philox(1)).integers(0, 60_000, 500).astype("<u2")
    plain, ahead = batches(tokens, sampling), batches(tokens, sampling, ahead_bytes=0)
    asked = [(step, slice(None)) for step in (0, 0, 1, 2, 3, 9, 10, 4, 5)]
    asked += [(step, rows) for step in (6, 7, 8) for rows in (slice(0, 2), slice(2, 4), slice(None, None, 2))]
    for step, rows in asked:
        for mine, theirs in zip(ahead.at(step, rows), plain.at(step, rows), strict=True):
            assert torch.equal(mine, theirs)


def test_the_next_step_is_read_while_this_one_is_at_work_and_the_thread_ends_with_the_batches() -> None:
    before = set(threading.enumerate())
    read: list[tuple[int, bool]] = []

    def three_steps() -> threading.Thread:
        source = batches(np.arange(500, dtype=np.uint16), ahead_bytes=0)
        ahead = source._ahead
        assert ahead is not None
        work = ahead._read

        def noted(step: int, rows: slice) -> torch.Tensor:
            read.append((step, threading.current_thread() is threading.main_thread()))
            return work(step, rows)

        ahead._read = noted
        for step in (0, 1, 2):
            source.at(step)
            ahead._waiting[step + 1, str(slice(None))].result()
        [thread] = set(threading.enumerate()) - before
        return thread

    thread = three_steps()
    gc.collect()
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()
    assert read == [(0, True), (1, False), (2, False), (3, False)]


ID_65 = "token 65 in a vocabulary of 65: the dataset is damaged; prepare it again"


def tokens_of(step: int, source: Batches) -> set[int]:
    """The places of all tokens that a step reads, the last targets among them."""
    drawn = source._offsets(step, slice(None)).tolist()
    return {place for start in drawn for place in range(start, start + source.block_size + 1)}


@pytest.mark.parametrize("ahead_bytes", [0, 1 << 30])
def test_an_id_that_the_vocabulary_has_not_is_refused_where_it_would_be_used(ahead_bytes: int) -> None:
    tokens = np.zeros(500, np.uint16)
    tokens[250] = 65
    source = batches(tokens, "epoch", ahead_bytes=ahead_bytes, vocab_size=65)
    in_it = [250 in tokens_of(step, source) for step in range(30)]
    assert 0 < sum(in_it) < 30
    for step, wrong in enumerate(in_it):
        with pytest.raises(MinigptError, match=ID_65) if wrong else contextlib.nullcontext():
            source.at(step)


def test_of_a_large_split_only_the_ends_are_looked_at_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "PIECE", 100)
    for place, size, known in ((0, 1000, False), (999, 1000, False), (500, 1000, True), (500, 900, False)):
        monkeypatch.setattr(dataset_module, "SCANNED", 900)
        tokens = np.zeros(size, np.uint16)
        tokens[place] = 7
        require_known_tokens(tokens, 8, Path("here"))
        if known:
            require_known_tokens(tokens, 7, Path("here"))
            continue
        with pytest.raises(UserError, match="here: token 7 in a vocabulary of 7"):
            require_known_tokens(tokens, 7, Path("here"))


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=NEEDS_CUDA)])
@pytest.mark.parametrize("shards", [[500], [100, 100, 100, 100, 100], [7] * 71 + [3], [250, 250]])
def test_a_split_in_shards_is_the_same_as_in_one_file(tmp_path: Path, shards: list[int], device: torch.device) -> None:
    tokens = np.random.Generator(np.random.Philox(1)).integers(0, 60_000, 500).astype("<u2")
    meta = meta_of(500, 10, format_version=2)
    meta["train"] |= {"shards": shards, "documents": 3}
    folder = make_folder(tmp_path / "data", meta, train=0)
    (folder / "train.bin").unlink()
    for number, (start, size) in enumerate(zip(np.cumsum([0, *shards]), shards, strict=False)):
        tokens[start : start + size].tofile(folder / f"train-{number:05d}.bin")
    split = Dataset(folder).train
    assert len(split) == 500
    assert split.dtype == tokens.dtype
    for start, stop in ((0, 500), (3, 9), (95, 305), (-20, None), (7, 7), (499, 900), (600, 700)):
        where = slice(start, stop)
        assert split[where].tolist() == tokens[where].tolist()
    for ahead_bytes in (0, 1 << 30):
        options: dict[str, Any] = {"seed": 1, "sampling": "random", "device": device, "ahead_bytes": ahead_bytes}
        mine = Batches(split, 8, 50, resident_bytes=0, **options)
        for step in range(4):
            for x, y in zip(mine.at(step), batches(tokens, batch_size=50).at(step), strict=True):
                assert torch.equal(x.cpu(), y)


SHARD_LIES = {
    "too few": [400],
    "more than there are": [500, 1],
    "none of a size": [500, 0],
    "negative": [501, -1],
    "words": ["500"],
    "not a list": 500,
}


@pytest.mark.parametrize("lie", SHARD_LIES.values(), ids=SHARD_LIES)
def test_a_lie_about_shards_is_refused_in_one_line(tmp_path: Path, lie: object) -> None:
    meta = meta_of(500, 10, format_version=2)
    meta["train"]["shards"] = lie
    refusal(make_folder(tmp_path / "data", meta))


def test_a_missing_or_short_shard_is_refused_by_name(tmp_path: Path) -> None:
    meta = meta_of(30, 10, format_version=2)
    meta["train"]["shards"] = [20, 10]
    folder = make_folder(tmp_path / "data", meta)
    np.zeros(20, "<u2").tofile(folder / "train-00000.bin")
    assert "train-00001.bin: No such file" in refusal(folder)
    np.zeros(9, "<u2").tofile(folder / "train-00001.bin")
    assert "train-00001.bin: 18 bytes, but meta.json promises 10 tokens" in refusal(folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_batches_on_a_gpu_are_those_on_the_cpu(resident_bytes: int) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    on_gpu = Batches(
        tokens, 8, 6, seed=1, sampling="random", device=torch.device("cuda"), resident_bytes=resident_bytes
    )
    for mine, theirs in zip(on_gpu.at(3), batches(tokens).at(3), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("n_tokens", [0, 1, 8])
def test_a_split_shorter_than_the_context_is_refused_with_both_numbers(n_tokens: int) -> None:
    with pytest.raises(UserError, match=rf"has {n_tokens} tokens.* context of 8 needs at least 9"):
        batches(np.zeros(n_tokens, np.uint16))
    assert batches(np.zeros(9, np.uint16)).at(0)[0].shape == (6, 8)


# ----------------------------------------------------------------------------------------------------------- folders


def meta_of(train: int, val: int, dtype: str = "uint16", **changes: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "dtype": dtype,
        "tokenizer": {"type": "char", "vocabulary": ["a", "b"]},
        "train": {"tokens": train, "characters": train, "bytes": train},
        "val": {"tokens": val, "characters": val, "bytes": val},
        "inputs": [{"name": "input.txt", "bytes": train + val, "sha256": "0" * 64}],
        "source": None,
        "fingerprint": "f" * 64,
    } | changes


def make_folder(folder: Path, meta: object, train: int = 90, val: int = 10, dtype: str = "<u2") -> Path:
    folder.mkdir()
    np.arange(train, dtype=dtype).tofile(folder / "train.bin")
    np.arange(val, dtype=dtype).tofile(folder / "val.bin")
    (folder / "meta.json").write_bytes(meta if isinstance(meta, bytes) else json.dumps(meta).encode())
    return folder


def refusal(folder: Path) -> str:
    """The message that opening `folder` is refused with: one line, of a length that a person reads."""
    with pytest.raises(UserError) as caught:
        Dataset(folder)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert len(message) < 500
    assert "pydantic" not in message
    assert message.startswith(str(folder))
    return message.removeprefix(str(folder))


@pytest.mark.parametrize(("dtype", "on_disk"), [("uint16", "<u2"), ("uint32", "<u4")])
def test_a_whole_folder_opens_with_its_tokens(dtype: str, on_disk: str, tmp_path: Path) -> None:
    dataset = Dataset(make_folder(tmp_path / "data", meta_of(90, 10, dtype), dtype=on_disk))
    assert dataset.train.tolist() == dataset.split("train").tolist() == list(range(90))
    assert dataset.val.tolist() == dataset.split("val").tolist() == list(range(10))
    assert dataset.meta.tokenizer == {"type": "char", "vocabulary": ["a", "b"]}


def test_a_folder_with_an_empty_split_opens(tmp_path: Path) -> None:
    assert len(Dataset(make_folder(tmp_path / "data", meta_of(90, 0), val=0)).val) == 0


def test_a_missing_folder_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    assert "minigpt prepare" in refusal(tmp_path / "nothing")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("text")
    assert "not a dataset folder" in refusal(tmp_path / "data")


@pytest.mark.parametrize("missing", ["meta.json", "train.bin", "val.bin"])
def test_a_half_written_folder_is_refused_by_the_name_of_what_is_missing(missing: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", meta_of(90, 10))
    (folder / missing).unlink()
    assert missing in refusal(folder)


@pytest.mark.parametrize("place", ["meta.json", "train.bin"])
def test_a_folder_in_place_of_a_file_is_refused(place: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", meta_of(90, 10))
    (folder / place).unlink()
    (folder / place).mkdir()
    assert place in refusal(folder)


@pytest.mark.parametrize("size", [0, 1, 179, 181, 200])
def test_a_split_of_another_size_than_promised_is_refused_with_the_numbers(size: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", meta_of(90, 10))
    (folder / "train.bin").write_bytes(bytes(size))
    message = refusal(folder)
    assert "train.bin" in message
    assert f"{size} bytes" in message
    assert "90 tokens" in message


LIES: dict[str, dict[str, Any]] = {
    "more tokens than there are": {"train": {"tokens": 91, "characters": 90, "bytes": 90}},
    "a terabyte of tokens": {"train": {"tokens": 10**12, "characters": 90, "bytes": 90}},
    "tokens beyond any integer type": {"train": {"tokens": 10**400, "characters": 90, "bytes": 90}},
    "a negative count": {"train": {"tokens": -90, "characters": 90, "bytes": 90}},
    "a fraction of a token": {"train": {"tokens": 90.5, "characters": 90, "bytes": 90}},
    "a count that is a word": {"train": {"tokens": "many", "characters": 90, "bytes": 90}},
    "a count that is a string of digits": {"train": {"tokens": "90", "characters": 90, "bytes": 90}},
    "a count that is true": {"val": {"tokens": True, "characters": 10, "bytes": 10}},
    "a split that is a number": {"train": 90},
    "a split without counts": {"train": {}},
    "another dtype": {"dtype": "float64"},
    "a dtype that would run code": {"dtype": "O"},
    "the other integer type": {"dtype": "uint32"},
    "a tokenizer that is a list": {"tokenizer": []},
    "inputs that are one": {"inputs": {"name": "x", "bytes": 1, "sha256": ""}},
    "a fingerprint that is a number": {"fingerprint": 7},
    "a version that is a word": {"format_version": "newest"},
    "no version": {"format_version": None},
    "version 0": {"format_version": 0},
    "a newer version as a word": {"format_version": "3"},
    "a newer version as a fraction": {"format_version": 3.0},
    "a key that nobody knows": {"surprise": 1},
    "a key of several lines": {"one\ntwo\x1b[31m": 1},
    "a key of a megabyte": {"x" * (1 << 20): 1},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_in_meta_json_is_refused_in_one_line(lie: dict[str, Any], tmp_path: Path) -> None:
    refusal(make_folder(tmp_path / "data", meta_of(90, 10) | lie))


@pytest.mark.parametrize("rest", [{}, meta_of(90, 10), {"train": [], "new": True}], ids=["nothing", "as now", "other"])
@pytest.mark.parametrize("version", [3, 10**30])
def test_a_newer_format_is_refused_as_newer_whatever_else_it_holds(
    version: int, rest: dict[str, Any], tmp_path: Path
) -> None:
    assert "newer minigpt" in refusal(make_folder(tmp_path / "data", rest | {"format_version": version}))


@pytest.mark.parametrize("key", list(meta_of(0, 0)))
def test_a_missing_key_is_refused_by_name_unless_it_has_a_default(key: str, tmp_path: Path) -> None:
    meta = meta_of(90, 10)
    del meta[key]
    folder = make_folder(tmp_path / "data", meta)
    if key in ("format_version", "source"):
        Dataset(folder)
    else:
        assert key in refusal(folder)


NOT_META = {
    "nothing": b"",
    "half a document": json.dumps(meta_of(90, 10)).encode()[:100],
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "not UTF-8": b'{"format_version": "\xff\xfe"}',
    "binary": bytes(range(256)),
    "a hundred thousand brackets": b"[" * 100_000,
    "a hundred thousand braces": b'{"a":' * 100_000,
    "a number of a hundred thousand digits": b'{"format_version": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"format_version": NaN}',
}


@pytest.mark.parametrize("content", NOT_META.values(), ids=NOT_META)
def test_a_meta_json_that_is_none_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    assert "meta.json" in refusal(make_folder(tmp_path / "data", content))


def test_a_meta_json_of_300_megabytes_is_refused_unread(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", b"{")
    with (folder / "meta.json").open("r+b") as file:
        file.truncate(300 << 20)  # a hole: it takes no room, unless someone reads it
    assert "too large" in refusal(folder)


@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,.-+0123456789eEtruefalsn \\u').map(str.encode))
def test_no_meta_json_raises_anything_but_a_user_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    refusal(make_folder(tmp_path_factory.mktemp("fuzz") / "data", content))


@given(
    key=st.sampled_from([*meta_of(0, 0), "train.tokens", "val.bytes", "inputs.name"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_no_value_in_meta_json_raises_anything_but_a_user_error(
    key: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    meta = meta_of(90, 10)
    outer, _, inner = key.partition(".")
    part = meta if not inner else meta[outer][0] if outer == "inputs" else meta[outer]
    part[inner or outer] = value
    folder = make_folder(tmp_path_factory.mktemp("fuzz") / "data", meta)
    try:
        Dataset(folder)
    except UserError:
        refusal(folder)
