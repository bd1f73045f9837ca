"""Every command in README.md runs, in the order in which it stands there: scaled down, on a small text."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "model.n_layer=1", "model.n_embd=24", "model.block_size=16", "train.batch_size=4", "train.max_iters=6",
    "train.eval_interval=3", "train.warmup_iters=1", "train.sample_interval=null", "train.lr_decay_iters=null",
]  # fmt: skip
ELSEWHERE = ("pip", "pytest", "ruff", "mypy")  # what .ci/run types in


def commands() -> list[list[str]]:
    """Each minigpt command of each sh block, split as a shell would."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line.partition(" #")[0]):
                words = shlex.split(command)
                assert not words or words[0] in ("minigpt", "torchrun", *ELSEWHERE), command
                found += [words] if words and words[0] not in ELSEWHERE else []
    return found


@pytest.mark.slow
def test_every_command_in_the_readme_runs(tmp_path: Path, verse: str) -> None:
    assert {words[1] for words in commands()} >= {"prepare", "train", "sample", "eval", "bench", "inspect"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(verse + "ROMEO:")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text(verse)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in commands():
        begin = words.index("minigpt_cli" if words[0] == "torchrun" else "minigpt")
        launcher, scaled = words[1 : begin + 1], words[begin + 1 :]
        program = ["-m", "minigpt_cli"]
        if launcher:
            launcher[launcher.index("--nproc-per-node") + 1] = "2"
            program = ["-m", "torch.distributed.run", *launcher]
        command = scaled[0]
        if command in ("train", "bench") and "--help" not in words:
            scaled += [word for setting in TINY for word in ("--set", setting)]
        if command == "bench":
            scaled += ["--seconds", "1"]
        done = subprocess.run(
            [sys.executable, *program, *scaled],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_the_two_commands_stand_where_scripts_look_for_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, contains in (("Quick start", "minigpt sample"), ("Tests", "pytest")):
        block = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", text, re.M | re.S)
        assert block is not None
        assert block[1].count("\n") == 1, "one line"
        assert contains in block[1]


@pytest.mark.slow
def test_the_wheel_runs_without_the_repository(tmp_path: Path) -> None:
    """Built and unpacked (its dependencies are those of this environment): the configs come along."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build backend cannot be installed here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    for arguments, expected in (
        (["--version"], "minigpt "),
        (["bench", "--config", "bigram", "--seconds", "0", "--json"], "train_tokens_per_second"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "minigpt_cli", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    shipped = {path.stem for path in (tmp_path / "site" / "minigpt_cli" / "configs").glob("*.yaml")}
    assert shipped == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert (tmp_path / "site" / "minigpt_cli" / "data" / "sources.yaml").is_file()
    shown = ROOT / "minigpt_cli" / "extras" / "inspect"
    pieces = {path.relative_to(shown) for kind in ("static/*", "templates/*") for path in shown.glob(kind)}
    assert len(pieces) > 10
    assert all((tmp_path / "site" / "minigpt_cli" / "extras" / "inspect" / piece).is_file() for piece in pieces)
