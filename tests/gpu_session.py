"""One call on a machine with a GPU: the `cuda` tests, the benchmarks, real runs. Writes one JSON and the full log.

    python tests/gpu_session.py OUT [--text FILE] [--nanogpt CHECKOUT] [--minutes 9]

Each part runs in a process of its own and none stops the others: what failed, with its exit code and the end of its
output, stands in OUT/session.json beside what was measured. `--text` is the corpus of the real runs (tiny Shakespeare
for figures that compare with published ones); `--nanogpt` trains its `train_shakespeare_char` on the same text, each
line with the second it came in, to be compared with the `seconds` of our metrics.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MINIGPT = [sys.executable, "-m", "minigpt_cli"]


NANOGPT = """\
cd "$2" && cp "$1" data/shakespeare_char/input.txt && python data/shakespeare_char/prepare.py && date +%s &&
python -u train.py config/train_shakespeare_char.py | while read -r line; do echo "$(date +%s.%N) $line"; done
"""


def parts(out: Path, text: str | None, nanogpt: str | None) -> dict[str, list[str]]:
    """Name -> command, the most wanted first: the time may run out."""
    data = ["--set", f"data.path={out / 'data'}"]
    bench = [*MINIGPT, "bench", "--json", "--config", "gpt", "--device", "cuda"]
    many = ["--streams", "256", "--tokens", "1000", "--set", "runtime.compile=false"]
    commands = {
        "nvidia-smi": ["nvidia-smi"],
        "tests: cuda": [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"],
        "bench: gpt eager, naive": [*bench, "--set", "runtime.compile=false", "--baseline", "naive"],
        "bench: gpt eager, hf": [*bench, "--set", "runtime.compile=false", "--baseline", "hf"],
        "bench: gpt compiled": [*bench, "--set", "runtime.compile=true"],
        "bench: gpt fp32 eager": [*bench, "--set", "runtime.compile=false", "--set", "runtime.precision=fp32"],
        "bench: 16 streams": [*bench, "--streams", "16", "--tokens", "1000", "--set", "runtime.compile=false"],
        "bench: 256 streams, naive": [*bench, *many, "--baseline", "naive", "--seconds", "60"],
        "bench: 256 streams, hf": [*bench, *many, "--baseline", "hf"],
    }
    gpt2 = [*MINIGPT, "bench", "--json", "--config", "gpt2", "--device", "cuda", "--vocab-size", "50257"]
    for rows in (4, 16, 32):
        commands[f"bench: gpt2, {rows} sequences at a time"] = [
            *gpt2, "--set", f"train.batch_size={rows}", "--set", f"train.micro_batch_size={rows}", "--steps", "10",
        ]  # fmt: skip
    commands["memory: planned and measured"] = [sys.executable, "tests/memory.py", "--device", "cuda"]
    if text is not None:
        commands |= {
            "prepare": [*MINIGPT, "prepare", text, "--out", str(out / "data")],
            "train: gpt": [*MINIGPT, "train", "--config", "gpt", *data, "--out", str(out / "gpt"), "--device", "cuda"],
            "eval: gpt": [*MINIGPT, "eval", "--ckpt", str(out / "gpt" / "best.safetensors"), "--json"],
            "train: v2": [*MINIGPT, "train", "--config", "v2", *data, "--out", str(out / "v2"), "--device", "cuda"],
            "eval: v2": [*MINIGPT, "eval", "--ckpt", str(out / "v2" / "best.safetensors"), "--json"],
        }
        for seed in (1337, 1, 2):
            run_folder = str(out / f"modern-{seed}")
            commands[f"train: modern, seed {seed}"] = [
                *MINIGPT, "train", "--config", "modern", *data, "--out", run_folder, "--device", "cuda",
                "--set", f"train.seed={seed}",
            ]  # fmt: skip
    if text is not None and nanogpt is not None:
        in_bash = ["bash", "-o", "pipefail", "-c", NANOGPT, "bash"]
        commands["train: nanoGPT"] = [*in_bash, str(Path(text).resolve()), nanogpt]
    return commands


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run one part to its end or to the limit; never raises for what the part does."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, stdout, stderr = None, _text(error.stdout), _text(error.stderr)
    except OSError as error:
        code, stdout, stderr = None, "", str(error)
    result: dict[str, Any] = {
        "command": command, "exit": code, "seconds": time.perf_counter() - begin,
        "stdout": stdout[-20_000:], "stderr": stderr[-20_000:],
    }  # fmt: skip
    with contextlib.suppress(ValueError):
        result["json"] = json.loads(stdout)
    return result


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--nanogpt")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", help="only the parts whose name contains this")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {}
    for name, command in parts(arguments.out, arguments.text, arguments.nanogpt).items():
        if arguments.only and arguments.only not in name:
            continue
        left = end - time.monotonic()
        results[name] = run(command, left) if left > 5 else {"skipped": "the time was up"}
        (arguments.out / "session.json").write_text(json.dumps(results, indent=1))
        print(name, results[name].get("exit"), f"{results[name].get('seconds', 0):.1f} s", flush=True)


if __name__ == "__main__":
    main()
