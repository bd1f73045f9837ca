"""How fast `prepare` is: characters in MB/s, and BPE against one process that encodes piece by piece.

    python tests/prepare_speed.py input.txt [--mb 300] [--bpe-mb 22] [--documents-mb 60] [--rounds 3]

The text is repeated to the size asked for; documents are cuts of it, every tenth word of them changed. Wants an idle
machine: `prepare` uses all processors, the loop one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minigpt_cli.core.corpus import prepare


def repeated(text: bytes, megabytes: float, path: Path) -> Path:
    with path.open("wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / len(text)))):
            file.write(text)
    return path


def documents(text: str, megabytes: float, path: Path) -> Path:
    """A .jsonl of documents of half a kilobyte to eight."""
    rng, words = random.Random(1), text.split(" ")
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            start = rng.randrange(len(words) - 1500)
            document = words[start : start + rng.randrange(100, 1500)]
            for _ in range(len(document) // 10):
                document[rng.randrange(len(document))] = rng.choice(words) + str(rng.randrange(1000))
            size += file.write(json.dumps({"text": " ".join(document)}) + "\n")
    return path


def loop(tokenizer: Tokenizer, text: Path, out: Path) -> float:
    """As one writes it: whole lines, about a megabyte at a time, encoded one after the other. Seconds."""
    start = time.perf_counter()
    with text.open(encoding="utf-8") as file, out.open("wb") as ids:
        while lines := file.readlines(1 << 20):
            ids.write(np.array(tokenizer.encode("".join(lines)).ids, dtype="<u2").tobytes())
    return time.perf_counter() - start


def document_loop(tokenizer: Tokenizer, path: Path, out: Path) -> float:
    """As one writes it: a line, a document, its ids and an end of text. Seconds."""
    start = time.perf_counter()
    end = tokenizer.get_vocab_size()
    with path.open(encoding="utf-8") as file, out.open("wb") as ids:
        for line in file:
            ids.write(np.array([*tokenizer.encode(json.loads(line)["text"]).ids, end], dtype="<u2").tobytes())
    return time.perf_counter() - start


def compare(
    what: str, one: Callable[[Tokenizer, Path, Path], float], path: Path, tokenizer: Path, folder: Path, rounds: int
) -> None:
    rust = Tokenizer.from_file(str(tokenizer))
    ratios = []
    for _ in range(rounds):
        plain = one(rust, path, folder / "ids.bin")
        ours = prepare([path], folder / "out", tokenizer=str(tokenizer), force=True).seconds
        ratios.append(plain / ours)
        speed = path.stat().st_size / 1e6 / ours
        print(f"{what}: loop {plain:.2f} s, prepare {ours:.2f} s ({speed:.1f} MB/s), {plain / ours:.2f}x", flush=True)
    print(f"{what}: {statistics.median(ratios):.2f}x the one-process loop; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--mb", type=float, default=300)
    parser.add_argument("--bpe-mb", type=float, default=22)
    parser.add_argument("--documents-mb", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch), arguments.text.read_bytes()
        if arguments.mb:
            big = repeated(text, arguments.mb, folder / "big.txt")
            seconds = [prepare([big], folder / "out", force=True).seconds for _ in range(arguments.rounds)]
            speeds = ", ".join(f"{big.stat().st_size / 1e6 / s:.0f}" for s in seconds)
            print(f"characters: {speeds} MB/s", flush=True)
        learned = prepare([arguments.text], folder / "learn", tokenizer="bpe", vocab_size=4096).meta.tokenizer
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(json.dumps(learned["tokenizer"]))
        if arguments.bpe_mb:
            small = repeated(text, arguments.bpe_mb, folder / "small.txt")
            compare("BPE of one text", loop, small, tokenizer, folder, arguments.rounds)
        if arguments.documents_mb:
            path = documents(text.decode("utf-8"), arguments.documents_mb, folder / "documents.jsonl")
            compare("BPE of documents", document_loop, path, tokenizer, folder, arguments.rounds)


if __name__ == "__main__":
    main()
