"""The switch that narrows the instruction set: it sees what is used, and never runs tests on more than it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import narrow

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64" or shutil.which("cc") is None,
    reason="for x86 processors, Linux and a C compiler",
)


@pytest.mark.slow
def test_what_the_libraries_say_follows_the_variables() -> None:
    """Down to less than AVX2, which every machine has."""
    said = narrow.instructions({**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"})
    assert (said["PyTorch"], said["oneDNN"]) == ("DEFAULT", "Intel SSE4.1")
    assert set(said) == {"PyTorch", "oneDNN", "MKL", "decode.c"}


@pytest.mark.slow
def test_narrowed_nothing_says_more_than_avx2() -> None:
    said = narrow.instructions(os.environ | narrow.NARROW)
    assert narrow.beyond_avx2(said) == {}
    assert said["PyTorch"] == "AVX2"
    assert said["decode.c"] == "AVX AVX2"


@pytest.mark.slow
def test_on_this_machine_it_runs_the_tests_or_says_why_not() -> None:
    done = subprocess.run(
        [sys.executable, narrow.__file__, "--collect-only", "-q"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wide = narrow.beyond_avx2(narrow.instructions(os.environ))
    assert done.stdout.startswith("narrowed to AVX2; otherwise " if wide else "nothing to narrow: ")
    assert ("test_runtime.py" in done.stdout) == bool(wide)


SPR = {
    "PyTorch": "AVX512", "oneDNN": "Intel AVX-512 with float16, Intel DL Boost and bfloat16 support and Intel AMX",
    "MKL": "Intel(R) Advanced Vector Extensions 512 (Intel(R) AVX-512) enabled processors", "decode.c": "AVX AVX512F",
}  # fmt: skip
NARROW = {
    "PyTorch": "AVX2", "oneDNN": "Intel AVX2",
    "MKL": "Intel(R) Advanced Vector Extensions 2 (Intel(R) AVX2) enabled processors", "decode.c": "AVX AVX2",
}  # fmt: skip


@pytest.mark.parametrize("name", SPR)
@pytest.mark.parametrize("left", ["all of it", "nothing"])
def test_what_cannot_be_narrowed_is_refused(name: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that pretends to have AVX-512, one library goes on with it, or does not say what it uses."""
    narrowed = NARROW | {name: SPR[name] if left == "all of it" else left}
    monkeypatch.setattr(narrow, "instructions", lambda env: narrowed if narrow.NARROW.items() <= env.items() else SPR)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("tests were run"))
    with pytest.raises(SystemExit, match=f"{name} cannot be narrowed to AVX2"):
        narrow.main([])


def test_on_a_wider_machine_the_tests_run_with_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(narrow, "instructions", lambda env: NARROW if narrow.NARROW.items() <= env.items() else SPR)
    monkeypatch.setattr(os, "chdir", lambda _: None)
    monkeypatch.setattr(os, "execve", lambda _, words, environment: ran.append((words, environment)))
    narrow.main(["-x"])
    [(words, environment)] = ran
    assert words[1:3] == ["-m", "pytest"]
    assert "tests/core/test_native.py" in words
    assert words[-1] == "-x"
    assert narrow.NARROW.items() <= environment.items()
    assert all((narrow.REPOSITORY / word).exists() for word in words if word.startswith("tests/"))
