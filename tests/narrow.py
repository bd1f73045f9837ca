"""Run the tests of numbers as on a processor that has no more than AVX2: python tests/narrow.py [PYTEST'S ARGUMENTS]

Processors round differently, and some have instructions for bf16: what passes on a server may fail on a laptop. Three
libraries compute, each reads a variable of its own when it starts, and decode.c is compiled for what PyTorch has left:

    ATEN_CPU_CAPABILITY      PyTorch's own kernels, and decode.c
    ONEDNN_MAX_CPU_ISA       oneDNN, which multiplies bf16
    MKL_ENABLE_INSTRUCTIONS  MKL, which multiplies float32 (on Intel's processors; on others it chooses by itself)

What each of them then says it uses is read before a test runs. Where one says more than AVX2, nothing is run (exit 1);
where there is nothing to narrow, the ordinary run was the narrow one, and that is said (exit 0).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
NARROW = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
TESTS = ("model", "start", "native", "generate", "optim", "kernels", "gpt2", "runtime")
WIDE = re.compile(r"AVX-?512|AVX-?10|AMX")

PROBE = """
import torch
from minigpt_cli.core import compiler
x = torch.ones(64, 64)
x @ x
x.to_mkldnn().relu()
print("PyTorch:", torch.backends.cpu.get_cpu_capability())
compiler.decode_library("fp32")
"""
# A compiler that also writes down what the flags that it is given allow.
COMPILER = """#!/bin/sh
for flag; do case $flag in -m*) chosen="$chosen $flag";; esac; done
{cc} $chosen -dM -E -x c /dev/null >{macros}
exec {cc} "$@"
"""
SAID = {
    "PyTorch": r"(?m)^PyTorch: (.+)",
    "oneDNN": r"(?m)^onednn_verbose,.*,cpu,isa:(.+)",
    "MKL": r"(?m)^MKL_VERBOSE .*architecture (.+), Lnx",
}


def instructions(environment: Mapping[str, str]) -> dict[str, str]:
    """What each library says in a process of its own that it computes with, and for what decode.c is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        compiler, macros = Path(folder, "cc"), Path(folder, "macros")
        compiler.write_text(COMPILER.format(cc=environment.get("CC", "cc"), macros=macros))
        compiler.chmod(0o700)
        more = {"CC": str(compiler), "XDG_CACHE_HOME": folder, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env={**environment, **more, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        said = {name: re.findall(pattern, done.stdout) for name, pattern in SAID.items()}
        said["decode.c"] = re.findall(r"__((?:AVX|AMX)\w*)__", macros.read_text())
    return {name: " ".join(sorted(words)) or "nothing" for name, words in said.items()}


def beyond_avx2(said: Mapping[str, str]) -> dict[str, str]:
    """Those that use more, or do not say what they use."""
    return {name: what for name, what in said.items() if what == "nothing" or WIDE.search(what)}


def main(arguments: list[str]) -> None:
    said = instructions(os.environ)
    shown = ", ".join(f"{name}: {what}" for name, what in said.items())
    if not beyond_avx2(said):
        print(f"nothing to narrow: this machine computes with no more than AVX2 ({shown})")
        return
    narrowed = os.environ | NARROW
    for name, what in beyond_avx2(instructions(narrowed)).items():
        sys.exit(f"{name} cannot be narrowed to AVX2: it says {what!r}; no test was run")
    print(f"narrowed to AVX2; otherwise {shown}", flush=True)
    tests = [f"tests/core/test_{name}.py" for name in TESTS]
    os.chdir(REPOSITORY)
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *tests, *arguments], narrowed)


if __name__ == "__main__":
    main(sys.argv[1:])
