"""Checkpoints, settings and datasets that are damaged or lie: one line, little memory, and the run goes on."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.conftest import SETTINGS, Launch, temporaries, train_arguments, verified_step
from minigpt_cli.core import shards
from minigpt_cli.core.checkpoint import save
from minigpt_cli.core.run import RunFolder
from minigpt_cli.core.world import ALONE
from runs import saved

MEGABYTES = 280  # beyond importing torch, which takes 220, and 630 with the libraries of CUDA
MUTANTS = int(os.environ.get("MINIGPT_MUTANTS", "3000"))
SHORT = ("train.max_iters=6", "train.checkpoint_interval=2", "train.eval_interval=6", "train.keep=2")


# A process counts as its own peak what its parent held when it was started. So a small one stands in between.
LAUNCHER = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run_fresh(arguments: list[str], folder: Path) -> tuple[int, str, float]:
    """(exit code, stderr, peak resident megabytes) of a command in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *arguments], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    code, peak = map(int, done.stdout.split())
    return code, done.stderr, peak * (1 if sys.platform == "darwin" else 1024) / 1e6


@functools.cache
def torch_alone() -> float:
    """The megabytes of a process that imports torch, and nothing else."""
    return run_fresh(["-c", "import torch"], Path.cwd())[2]


def relabel(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its safetensors header changed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def claim_width(data: bytes) -> bytes:
    """Metadata that asks for n_embd = 10^9, with a checksum that fits."""
    import hashlib

    def change(header: dict[str, Any]) -> None:
        document = json.loads(header["__metadata__"]["minigpt"])
        document["config"]["model"]["n_embd"] = 10**9
        text = json.dumps(document)
        header["__metadata__"] = {"minigpt": text, "minigpt_sha256": hashlib.sha256(text.encode()).hexdigest()}

    return relabel(data, change)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short by ten bytes": lambda data: data[:-10],
    "one byte of a tensor flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "garbage for a header": lambda data: data[:8] + random.Random(0).randbytes(len(data) - 8),
    "2^40 elements": lambda data: relabel(data, lambda h: h["model.norm.weight"].update(shape=[1 << 40])),
    "12 MB of header": lambda data: (12_000_000).to_bytes(8, "little") + b"{" + b" " * 12_000_000 + data,
    "9 MB of empty lists": lambda data: (9_000_000).to_bytes(8, "little") + b"[" + b"[]," * 2_999_999 + b"[]" + data,
    "9 MB of small objects": lambda data: (
        (9_000_000).to_bytes(8, "little") + b"[" + b'{"":0},' * 1_285_714 + b"0]" + data
    ),
    "a pickle": lambda data: pickle.dumps({"weights": list(range(1000))}),
    "n_embd of a billion": claim_width,
}


def test_where_the_only_last_is_damaged_best_goes_on_and_it_is_replaced(launch: Launch, place: Path) -> None:
    """In the sharded form; the run comes to the step of the damaged one again."""
    settings = (SETTINGS[1], "train.checkpoint_interval=2", "train.eval_interval=4")
    assert launch(train_arguments(*settings, "train.max_iters=4")).wait() == 0
    (best,) = (place / "run").glob("best-*")
    shutil.copytree(best, place / best.name)
    assert launch(train_arguments(*settings, "train.max_iters=6", flags=("--resume",))).wait() == 0
    for later in (place / "run").glob("best-*"):
        shutil.rmtree(later)
    shutil.copytree(place / best.name, best)
    (part,) = (place / "run").glob("last-00000006.sharded/shard-*")
    part.write_bytes(part.read_bytes()[:-10])
    resumed = launch(train_arguments(*settings, "train.max_iters=6", flags=("--resume",)))
    assert resumed.wait() == 0, resumed.stderr.read_text()
    said = resumed.stderr.read_text()
    assert "last-00000006.sharded: damaged" in said
    assert "going on from best-00000004.sharded, step 4" in said
    assert "no optimizer state" in said
    assert verified_step(place / "run", at_least=6) == 6
    assert temporaries(place / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_costs_one_line_and_little_memory(
    launch: Launch, place: Path, damage: Callable[[bytes], bytes]
) -> None:
    assert launch(train_arguments(*SHORT)).wait() == 0
    last = place / "run" / "last.safetensors"
    last.write_bytes(damage(last.read_bytes()))
    code, text, megabytes = run_fresh(["-m", "minigpt_cli", "sample", "--ckpt", "run/last.safetensors"], place)
    assert code == 1
    assert text.startswith("minigpt: error: run/last.safetensors: ")
    assert text.count("\n") == 1
    assert megabytes < torch_alone() + MEGABYTES
    resumed = launch(train_arguments(*SHORT, "train.max_iters=8", flags=("--resume",)))
    assert resumed.wait() == 0, resumed.stderr.read_text()
    assert "going on from step-00000006.safetensors, step 6" in resumed.stderr.read_text()
    assert verified_step(place / "run", at_least=8) == 8


def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(launch: Launch, place: Path, form: str) -> None:
    """SIGKILL, SIGTERM and Ctrl-C in turn, with dropout and accumulation; the log has no gap and no double."""
    import signal

    settings = (form, "train.max_iters=90", "model.dropout=0.1", "train.micro_batch_size=1")
    settings += ("train.checkpoint_interval=10", "train.eval_interval=10", "train.sample_interval=30")
    assert launch(train_arguments(*settings)).wait() == 0
    (place / "run").rename(place / "whole")
    flags: tuple[str, ...] = ()
    for step, number in ((20, signal.SIGKILL), (40, signal.SIGTERM), (60, signal.SIGKILL), (70, signal.SIGINT)):
        child = launch(train_arguments(*settings, flags=flags))
        child.wait_for(rf"saved run/last\S+ at step ({step}|{step + 10}|90)\b")
        child.send(number)
        child.wait()
        flags = ("--resume",)
    assert launch(train_arguments(*settings, flags=flags)).wait() == 0
    (header, whole), (resumed, parts) = (saved(RunFolder(place / name)) for name in ("whole", "run"))
    assert resumed.val_loss == header.val_loss is not None
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timing = ("seconds", "tokens_per_second", "peak_memory_bytes", "gpu_use")
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in timing}
            for line in (place / run / "metrics.jsonl").open()
        ]
        for run in ("whole", "run")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("poison", ["a learning rate of 1e30", "a weight that is not a number"])
def test_a_run_that_diverges_ends_and_keeps_its_checkpoint(launch: Launch, place: Path, poison: str, form: str) -> None:
    assert launch(train_arguments(form, *SHORT)).wait() == 0
    settings = [form, "train.max_iters=60"]
    if poison.startswith("a weight"):
        header, tensors = saved(RunFolder(place / "run"))
        tensors["model.head.weight"][0, 0] = float("nan")
        fields = header.model_dump(exclude={"versions", "checksums"})
        if form == SETTINGS[0]:
            save(place / "run" / "last.safetensors", tensors, fields)
        else:
            shards.save(place / "run" / "last-00000006.sharded", tensors, fields, ALONE)
    else:
        settings.append("train.learning_rate=1e30")
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if "last" in str(path) and path.is_file()}
    child = launch(train_arguments(*settings, flags=("--resume",)))
    assert child.wait() == 1
    assert "not finite at step" in child.stderr.read_text()
    assert "Traceback" not in child.stderr.read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_out_of_memory_names_the_micro_batch_that_halves_it(launch: Launch, place: Path) -> None:
    """The system refuses memory, as a GPU's allocator would."""
    import resource

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know how much is in use")
    child = launch(train_arguments("train.batch_size=262144"), before=limit)
    assert child.wait() == 1
    assert "out of memory" in child.stderr.read_text()
    assert "train.micro_batch_size=131072" in child.stderr.read_text()


@pytest.mark.slow
def test_mutated_files_never_crash_hang_or_fill_memory(launch: Launch, place: Path) -> None:
    """Thousands of mutants of a checkpoint, a config and a dataset's meta.json, in one process that is watched."""
    assert launch(train_arguments(*SHORT)).wait() == 0
    script = textwrap.dedent("""
        import random, signal, sys
        from pathlib import Path
        from minigpt_cli.core.checkpoint import load
        from minigpt_cli.core.config import load_config
        from minigpt_cli.core.dataset import Dataset
        from minigpt_cli.core.errors import MinigptError
        from minigpt_cli.core.tokenizer import from_json

        dice = random.Random(3)
        pieces = [b'"', b"[", b"]", b"{", b"}", b":", b",", b"9" * 30, b"-1", b"1e999", b"null", b"\\\\u0000", b"\\xff",
                  b"&a", b"*a", b"!!python/object:os.system", b"\\n", b"  ", b"true", b"NaN"]

        def mutate(data):
            data = bytearray(data)
            head = len(data) if dice.random() < 0.3 else min(len(data), 4000)  # mostly where the structure is
            for _ in range(dice.randint(1, 6)):
                at = dice.randrange(head)
                what = dice.random()
                if what < 0.3: data[at] = dice.randrange(256)
                elif what < 0.6: data[at:at] = dice.choice(pieces)
                elif what < 0.8: del data[at : at + dice.randint(1, 50)]
                elif what < 0.9: data[at:at] = data[dice.randrange(head):][: dice.randint(1, 200)]
                else: del data[at:]
                head = max(1, min(head, len(data)))
                if not data: break
            return bytes(data)

        targets = {
            "run/last.safetensors": lambda: load("run/last.safetensors").model(),
            "run/config.yaml": lambda: load_config("run/config.yaml"),
            "data/meta.json": lambda: from_json(Dataset("data").meta.tokenizer),
        }
        counts = {}
        for name, read in targets.items():
            original = Path(name).read_bytes()
            for _ in range(int(sys.argv[1]) // len(targets)):
                Path(name).write_bytes(mutate(original))
                signal.alarm(20)  # a hang kills the process
                try:
                    read()
                    outcome = "accepted"
                except MinigptError as error:
                    outcome = "refused"
                    assert "\\n" not in str(error), str(error)
                signal.alarm(0)
                counts[name, outcome] = counts.get((name, outcome), 0) + 1
            Path(name).write_bytes(original)
        print(counts, file=sys.stderr)
    """)
    (place / "fuzz.py").write_text(script)
    code, text, megabytes = run_fresh(["fuzz.py", str(MUTANTS)], place)
    assert code == 0, text
    assert text.count("refused") == 3, text
    assert megabytes < torch_alone() + MEGABYTES
