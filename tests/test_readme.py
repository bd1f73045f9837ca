"""Every command in README.md runs, in the order in which it stands there: scaled down, on a small text."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands.conftest import call

from served import started

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "model.n_layer=1", "model.n_embd=24", "model.block_size=16", "train.batch_size=4", "train.max_iters=6",
    "train.eval_interval=3", "train.warmup_iters=1", "train.sample_interval=null", "train.lr_decay_iters=null",
]  # fmt: skip
ELSEWHERE = ("pip", "pytest", "ruff", "mypy", "curl")  # what .ci/run types in, and what is tried on the server


def commands() -> list[list[str]]:
    """Each minigpt command of each sh block, split as a shell would."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line.partition(" #")[0]):
                words = shlex.split(command)
                assert not words or words[0] in ("minigpt", "torchrun", *ELSEWHERE), command
                found += [words] if words and words[0] not in ELSEWHERE else []
    return found


@pytest.mark.slow
def test_every_command_in_the_readme_runs(tmp_path: Path, verse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which saves each of them the two seconds in which torch is imported; torchrun's in its own."""
    monkeypatch.chdir(tmp_path)
    assert {words[1] for words in commands()} >= {
        "prepare",
        "train",
        "sample",
        "eval",
        "bench",
        "inspect",
        "info",
        "serve",
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(verse + "ROMEO:")
    (tmp_path / "books").mkdir()
    for number in range(9):
        (tmp_path / "books" / f"{number}.txt").write_text(f"{number} {verse}")
    (tmp_path / "crawl").mkdir()
    documents = "".join(json.dumps({"text": f"{number} {verse[:99]}"}) + "\n" for number in range(99))
    (tmp_path / "crawl" / "one.jsonl").write_text(documents)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in commands():
        begin = words.index("minigpt_cli" if words[0] == "torchrun" else "minigpt")
        launcher, scaled = words[1 : begin + 1], words[begin + 1 :]
        command = scaled[0]
        if command in ("train", "bench") and not {"--help", "--world-size"} & set(words):
            scaled += [word for setting in TINY for word in ("--set", setting)]
        if command == "bench":
            scaled += ["--seconds", "1"]
        if words[1] == "serve":
            try_server(tmp_path / words[3])
            continue
        if launcher:
            launcher[launcher.index("--nproc-per-node") + 1] = "2"
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *scaled],
                env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        else:
            ended = call(*scaled)
            assert ended.code == 0, f"{shlex.join(words)}\n{ended.err}"


def try_server(ckpt: Path) -> None:
    """What the README tells to do with a running server, done with one at another port."""
    section = README.partition("\n## Serve it\n")[2].partition("\n## ")[0]
    request, program = (
        re.findall(rf"^```{kind}\n({start}.*?)^```", section, re.M | re.S)[0]
        for kind, start in (("sh", "curl"), ("python", ""))
    )
    with started(ckpt, errors=ckpt.parent / "stderr") as server:
        here = f"127.0.0.1:{server.port}"
        if shutil.which("curl"):
            words = shlex.split(request.replace("\\\n", " ").replace("127.0.0.1:8000", here))
            answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            assert answer.startswith("data: {")
            assert answer.endswith("data: [DONE]\n\n")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(program.replace("127.0.0.1:8000", here), {})
        assert said.getvalue()


def test_the_python_in_the_readme_runs(
    tmp_path: Path, verse: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it in one notebook's order, with a smaller model and fewer steps."""
    import matplotlib

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text(verse + "The king is dead.")
    section = README.partition("\n## From Python\n")[2].partition("\n## ")[0]
    code = "".join(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))
    settings = ", ".join(f'"{key}": {value}' for key, _, value in (setting.partition("=") for setting in TINY))
    scaled = code.replace('"train.max_iters": 300', settings.replace("null", "None"))
    assert scaled != code
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for _ in range(2):  # a cell is run again and again
        exec(scaled, names)
        drawn = names["plt"].gca().lines  # type: ignore[attr-defined]
        assert [list(line.get_xdata()) for line in drawn] == [[6], [3, 6]]
        names["plt"].close()  # type: ignore[attr-defined]
    assert "device: " in capsys.readouterr().out


def test_the_two_commands_stand_where_scripts_look_for_them() -> None:
    for heading, contains in (("Quick start", "minigpt sample"), ("Tests", "pytest")):
        block = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", README, re.M | re.S)
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
        (["-c", "import minigpt_cli; print(minigpt_cli.load.__doc__)"], "Read a checkpoint"),
        (["-m", "minigpt_cli", "--version"], "minigpt "),
        (["-m", "minigpt_cli", "bench", "--config", "bigram", "--seconds", "0", "--json"], "train_tokens_per_second"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    shipped = {path.stem for path in (tmp_path / "site" / "minigpt_cli" / "configs").glob("*.yaml")}
    assert shipped == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert (tmp_path / "site" / "minigpt_cli" / "data" / "sources.yaml").is_file()
    assert (tmp_path / "site" / "minigpt_cli" / "py.typed").is_file()
    extras = ROOT / "minigpt_cli" / "extras"
    pieces = {path.relative_to(extras) for kind in ("*/static/*", "*/templates/*") for path in extras.glob(kind)}
    assert len(pieces) > 13
    assert all((tmp_path / "site" / "minigpt_cli" / "extras" / piece).is_file() for piece in pieces)
