"""Several ranks are one: the same batches, the same losses, the same checkpoint, whatever their number."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clock import PATIENCE
from minigpt_cli.core import shards
from minigpt_cli.core.checkpoint import HEAD, load
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.metrics import read_metrics
from minigpt_cli.core.model import GPT, initial_weights
from minigpt_cli.core.run import RunFolder, open_run
from minigpt_cli.core.runtime import choose_runtime
from minigpt_cli.core.world import World
from runs import CPU, MODEL_CHOICES, Recorder, run_in, small_config, write_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TESTS = Path(__file__).parents[1]
MODERN = {
    "optimizer": "muon", "lr_schedule": "wsd", "warmup_iters": 2, "sampling": "epoch", "position": "rope",
    "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "n_kv_head": 1, "zero_init": True, "logit_softcap": 15.0,
    "grad_clip": 0.5, "dropout": 0.0,
}  # fmt: skip
PLAIN = {"dropout": 0.0, "sample_interval": 6}
SPLIT = {"batch_size": 8, "micro_batch_size": 1, "dropout": 0.2}  # masks belong to a place in the batch
TIED = {
    "dropout": 0.0, "tie_weights": True, "bias_head": False, "ema": 0.8, "init": "torch",
    "learning_rate": 0.1, "eval_interval": 1,  # so that some evaluations are not the best, and nothing is saved there
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "modern": (MODERN, {}),
    "split": (SPLIT, {}),
    "tied": (TIED, {"checkpoint_activations": True}),
}
FORMS = ("file", "sharded")
BY_TIME = {"dropout": 0.0, "checkpoint_minutes": 1e-9, "checkpoint_interval": 99, "eval_interval": 99}
COUNTED = {"batch_size": 8, "max_iters": 2, "eval_interval": 99, "log_interval": 99, "checkpoint_interval": 99}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    text = " ".join(["the king and queen of winter", "come to speak no more, my lord;", "what say you? Exeunt."] * 60)
    write_dataset(folder / "data", text)
    return folder


def launch(place: Path, ranks: int, jobs: list[dict[str, Any]]) -> None:
    file = place / f"jobs{ranks}.json"
    file.write_text(json.dumps(jobs))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        str(TESTS / "ranks.py"), str(file), str(place / "data"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def job(name: str, case: str, parallel: str, **more: Any) -> dict[str, Any]:
    changes, runtime = CASES[case]
    return {"name": name, "changes": changes, "runtime": runtime, "parallel": parallel, **more}


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Path]:
    """The folders of the same runs on one rank; "parts" is stopped on the way, for others to go on with."""
    dataset = Dataset(place / "data")
    for case, (changes, _) in CASES.items():
        run_in(place / case, dataset, small_config(**changes), CPU, Recorder())
    run_in(place / "parts", dataset, small_config(**PLAIN), CPU, Recorder(stop_at=5))
    return {case: place / case for case in CASES}


@pytest.fixture(scope="module")
def two(place: Path, alone: dict[str, Path]) -> Path:
    """What two ranks make of all cases."""
    jobs = [job(f"{case} {way} 2", case, way) for case in CASES for way in ("ddp", "fsdp")]
    for way in ("ddp", "fsdp"):
        for case in ("modern", "tied"):
            name = f"resumed {case} {way} 2"
            jobs += [job(name, case, way, stop_at="no rank 0"), job(name, case, way, resume=True)]
        for pieces in (1, 4):
            changes = COUNTED | {"micro_batch_size": 4 // pieces}
            jobs.append({"name": f"counted {way} {pieces}", "changes": changes, "parallel": way, "count": True})
    in_parts = CASES["tied"][0] | {"checkpoints": "sharded"}
    jobs += [
        {"name": "in parts", "changes": in_parts, "parallel": "fsdp", "runtime": CASES["tied"][1]},
        {"name": "parts for more", "changes": in_parts, "parallel": "fsdp", "stop_at": 5},
    ]
    jobs += [
        {"name": f"by time {form}", "changes": BY_TIME | {"checkpoints": form}, "parallel": "ddp"} for form in FORMS
    ]
    jobs += [job("for more", "plain", "fsdp", stop_at=7), job("parts", "plain", "ddp", resume=True)]
    launch(place, 2, jobs)
    return place


@pytest.fixture(scope="module")
def four(place: Path, two: Path) -> Path:
    """Four ranks, one of whose runs two ranks began; and one rank that ends what two began."""
    jobs = [job(f"plain {way} 4", "plain", way) for way in ("ddp", "fsdp")]
    jobs += [job("for more", "plain", "ddp", resume=True), job("parts for more", "tied", "ddp", resume=True)]
    launch(place, 4, jobs)
    return place


def assert_close(ours: Path, expected: Path) -> None:
    """Equal to rounding: weights, moments, losses."""
    for name in ("last.safetensors", "best.safetensors"):
        left, right = load_file(ours / name), load_file(expected / name)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    told = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes", "sample")}
            for line in metrics
        ]
        for metrics in map(read_metrics, (ours / "metrics.jsonl", expected / "metrics.jsonl"))
    ]
    assert [line.keys() for line in told[0]] == [line.keys() for line in told[1]]
    for line, reference in zip(*told, strict=True):
        assert line == pytest.approx(reference, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_learns(two: Path, case: str, way: str) -> None:
    assert_close(two / f"{case} {way} 2", two / case)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_four_ranks_learn_what_one_learns(four: Path, way: str) -> None:
    assert_close(four / f"plain {way} 4", four / "plain")


@pytest.mark.parametrize(
    ("name", "case"), [("parts", "plain"), ("for more", "plain"), ("parts for more", "tied")],
    ids=["one, then two", "two, then four", "shards of two, then four and a file"],
)  # fmt: skip
def test_a_run_goes_on_with_another_number_of_ranks(four: Path, name: str, case: str) -> None:
    assert_close(four / name, four / case)
    assert not RunFolder(four / name).shards()


def test_shards_hold_what_a_file_holds(two: Path) -> None:
    folder = RunFolder(two / "in parts")
    for kind, steps in (("last", [12]), ("best", [load(two / "tied fsdp 2" / "best.safetensors").header.step])):
        assert [path.name for path in folder.shards(kind)] == [f"{kind}-{step:08d}.sharded" for step in steps]
        whole = load(two / "tied fsdp 2" / f"{kind}.safetensors")
        parts = {name: torch.empty(shape) for name, shape in shards.shapes(folder.shards(kind)[0]).items()}
        shards.load(folder.shards(kind)[0], parts)
        assert parts.keys() == whole.tensors.keys() - {HEAD}  # which is tied, and stored once in both
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in parts.items())
        assert (
            shards.gathered(folder.shards(kind)[0]).tensors.keys() == load(whole.path, weights_only=True).tensors.keys()
        )
    with pytest.raises(UserError, match=r"in parts; make one file of it: minigpt export"):
        load(folder.shards("best")[0])


@pytest.mark.parametrize("form", FORMS)
def test_ranks_look_at_the_clock_together_where_they_log(two: Path, form: str) -> None:
    """Every third step; and every save is one."""
    saves = json.loads((two / f"by time {form}" / "saves.json").read_text())
    assert [step for name, step in saves if name.startswith("last")] == [3, 6, 9, 12, 12]
    assert [step for name, step in saves if name.startswith("best")] == [12]


@pytest.mark.parametrize("damage", ["a bit", "a missing file", "the header", "no header"])
def test_damaged_shards_are_refused(two: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(RunFolder(two / "in parts").shards("last")[0], tmp_path / "last-00000012.sharded"))
    part = sorted(folder.glob("shard-*"))[1]
    target = {"a bit": part, "the header": folder / "header.json"}.get(damage)
    if target is not None:
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    else:
        (part if damage == "a missing file" else folder / "header.json").unlink()
    with pytest.raises(MinigptError, match=re.escape(str(folder))):
        shards.open_sharded(folder)


def test_shards_that_were_not_finished_are_swept_up(tmp_path: Path) -> None:
    (tmp_path / "run" / ".tmp-last-00000007.sharded").mkdir(parents=True)
    with open_run(tmp_path / "run") as folder:
        assert not folder.holds_run()
    assert not list((tmp_path / "run").glob(".tmp*"))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ["modern", "tied"])
def test_ranks_stop_together_and_resume_to_the_bit(two: Path, case: str, way: str) -> None:
    """One rank was asked to stop, and not the one that writes."""
    whole, parts = (load_file(two / f"{name}{case} {way} 2" / "last.safetensors") for name in ("", "resumed "))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(two: Path, way: str) -> None:
    """As many reductions with four micro batches as with one: slices of weights are gathered, gradients wait."""
    whole, pieces = (json.loads((two / f"counted {way} {n}" / "exchanged.json").read_text()) for n in (1, 4))
    assert whole["gloo:all_reduce"] > COUNTED["max_iters"]
    assert pieces["gloo:all_reduce"] == whole["gloo:all_reduce"]


@pytest.mark.parametrize(
    "changes", [*MODEL_CHOICES[::7], {"init": "torch", "tie_weights": True}, {"init": "gpt2"}, {"zero_init": True}]
)
def test_weights_are_drawn_alike_with_and_without_memory(changes: dict[str, Any]) -> None:
    config = small_config(**changes).model
    torch.manual_seed(3)
    expected = GPT(config, 11)
    torch.manual_seed(4)
    model = GPT(config, 11)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in initial_weights(model):
            model.get_parameter(name).copy_(weight)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can() -> None:
    assert small_config(batch_size=12, micro_batch_size=2).train.pieces(3) == 2
    assert small_config(batch_size=12).train.pieces(3) == 1
    with pytest.raises(UserError, match=r"12 cannot be shared by 5 ranks in micro batches of 2; try 10 or 20"):
        small_config(batch_size=12, micro_batch_size=2).train.pieces(5)
    with pytest.raises(UserError, match=r"micro batches of 1; try 16"):
        small_config(batch_size=12).train.pieces(16)


def test_one_process_ignores_what_takes_several() -> None:
    config = Config.model_validate({"runtime": {"device": "cpu", "precision": "fp32", "parallel": "fsdp"}})
    runtime = choose_runtime(config.runtime, width=16, rows=8)
    assert runtime.parallel == "none"
    assert any("torchrun" in line for line in runtime.notes)


@pytest.mark.parametrize(("rank", "expected"), [(0, slice(0, 3)), (1, slice(3, 6)), (3, slice(9, 12))])
def test_shares_are_equal_and_in_order(rank: int, expected: slice) -> None:
    assert World(rank, 4).share(12) == expected
