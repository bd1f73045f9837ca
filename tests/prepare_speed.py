"""How fast `prepare` is: characters in MB/s, and BPE against one process that encodes piece by piece.

    python tests/prepare_speed.py input.txt [--mb 300] [--bpe-mb 22] [--rounds 3]

The text is repeated to the size asked for. Wants an idle machine: `prepare` uses two cores, the loop one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minigpt_cli.core.corpus import prepare


def repeated(text: bytes, megabytes: float, path: Path) -> Path:
    with path.open("wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / len(text)))):
            file.write(text)
    return path


def loop(tokenizer: Tokenizer, text: Path, out: Path) -> float:
    """As one writes it: whole lines, about a megabyte at a time, encoded one after the other. Seconds."""
    start = time.perf_counter()
    with text.open(encoding="utf-8") as file, out.open("wb") as ids:
        while lines := file.readlines(1 << 20):
            ids.write(np.array(tokenizer.encode("".join(lines)).ids, dtype="<u2").tobytes())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--mb", type=float, default=300)
    parser.add_argument("--bpe-mb", type=float, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        big = repeated(arguments.text.read_bytes(), arguments.mb, folder / "big.txt")
        speeds = [
            big.stat().st_size / 1e6 / prepare([big], folder / f"char{i}").seconds for i in range(arguments.rounds)
        ]
        print("characters:", ", ".join(f"{speed:.0f}" for speed in speeds), "MB/s", flush=True)
        small = repeated(arguments.text.read_bytes(), arguments.bpe_mb, folder / "small.txt")
        learned = prepare([arguments.text], folder / "learn", tokenizer="bpe", vocab_size=4096).meta.tokenizer
        (folder / "tokenizer.json").write_text(json.dumps(learned["tokenizer"]))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ratios = []
        for i in range(arguments.rounds):
            plain = loop(tokenizer, small, folder / "ids.bin")
            ours = prepare([small], folder / f"bpe{i}", tokenizer=str(folder / "tokenizer.json")).seconds
            ratios.append(plain / ours)
            print(f"BPE: loop {plain:.2f} s, prepare {ours:.2f} s, {plain / ours:.2f}x", flush=True)
        print(f"BPE: {statistics.median(ratios):.2f}x the one-process loop")


if __name__ == "__main__":
    main()
