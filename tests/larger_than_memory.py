"""How long training waits for its data: from memory, from a disk, and from a disk with nothing read ahead.

    python tests/larger_than_memory.py FOLDER [--gb 4] [--rounds 3] [--steps 30] [--batch 512] [--step-ms 100]

FOLDER must lie on the disk to be measured; a file of random tokens is made there, and removed in the end. Before each
turn the file is read whole, or dropped from the page cache: then every window comes from the disk, as it does where the
data is far larger than memory. A step of the model is played by sleeping, as a host does while its GPU computes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minigpt_cli.core.dataset import Batches

VOCAB = 50_257


def random_file(path: Path, gigabytes: float) -> None:
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for _ in range(max(1, round(gigabytes * 1e9 / (1 << 26)))):
            file.write(rng.integers(0, VOCAB, 1 << 25, dtype=np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())


def drop(path: Path) -> None:
    gc.collect()  # what is still mapped somewhere would stay
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def waits(path: Path, batch: int, steps: int, step_seconds: float, ahead: bool) -> list[float]:
    """Milliseconds that each step but the first waits for its batch, on a new memory map."""
    batches = Batches(
        np.memmap(path, dtype="<u2", mode="r"), 1024, batch, seed=1, sampling="random", device=torch.device("cpu"),
        vocab_size=VOCAB, ahead_bytes=0 if ahead else 1 << 62,
    )  # fmt: skip
    waited = []
    for step in range(steps):
        start = time.perf_counter()
        batches.at(step)
        waited.append(1e3 * (time.perf_counter() - start))
        time.sleep(step_seconds)
    return waited[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=100)
    arguments = parser.parse_args()
    turns = {
        "from memory, read ahead": (load, True),
        "from memory, nothing ahead": (load, False),
        "from the disk, read ahead": (drop, True),
        "from the disk, nothing ahead": (drop, False),
    }
    waited: dict[str, list[float]] = {name: [] for name in turns}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        path = Path(scratch) / "train.bin"
        random_file(path, arguments.gb)
        for _ in range(arguments.rounds):
            for name, (before, ahead) in turns.items():
                before(path)
                waited[name] += waits(path, arguments.batch, arguments.steps, arguments.step_ms / 1e3, ahead)
    print(
        f"{arguments.batch} windows of 1,024 tokens a step of {arguments.step_ms:.0f} ms; load {os.getloadavg()[0]:.1f}"
    )
    for name, times in waited.items():
        mean, share = statistics.mean(times), arguments.step_ms / (arguments.step_ms + statistics.mean(times))
        median, most = statistics.median(times), max(times)
        print(f"{name}: waits {median:.2f} ms (mean {mean:.2f}, at most {most:.0f}): {share:.1%} of full speed")


if __name__ == "__main__":
    main()
