"""Choices that depend on the machine: what `auto` becomes, what is refused, what falls back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_cli.core import processor
from minigpt_cli.core.config import ModelConfig, RuntimeConfig
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.measure import measure_decoding, measure_training, random_tokens
from minigpt_cli.core.model import GPT, lm_loss
from minigpt_cli.core.runtime import (
    Runtime,
    ThreadChoice,
    Workload,
    _choose_compile,
    choose_decoding_runtime,
    choose_runtime,
    peak_memory_bytes,
    seed_everything,
)
from runs import CPU, OnlyFloat32, RunTraining, small_config

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def choose(**settings: object) -> Runtime:
    return choose_runtime(RuntimeConfig.model_validate(settings), width=64, rows=256)


@NO_CUDA
def test_auto_says_what_it_chose_and_why() -> None:
    runtime = choose()
    assert runtime.device.type in ("cpu", "mps")
    assert runtime.precision in ("fp32", "bf16")
    assert [note.split(":")[0] for note in runtime.notes] == ["device", "precision", "compile"]


@NO_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_the_users_mistake(device: str) -> None:
    with pytest.raises(UserError, match=r"no CUDA devices.*--device cpu"):
        choose(device=device)


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="bf16 or fp32"):
        choose(device="cpu", precision="fp16")


def test_what_is_asked_for_is_taken_without_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "bf16_instructions", lambda: "AMX")
    runtime = choose(device="cpu", precision="bf16", compile=False)
    assert (runtime.precision, runtime.compile, runtime.notes) == ("bf16", False, ())
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


COMPILES = sys.platform == "linux" and shutil.which("cc") is not None


@NO_CUDA
@pytest.mark.parametrize(
    ("instructions", "width", "rows", "expected"),
    [
        (None, 4096, 16384, "fp32"), (None, 128, 2048, "fp32"),
        ("AMX", 128, 2048, "bf16"), ("AMX", 384, 2048, "bf16"), ("AMX", 768, 256, "bf16"),  # cpu.yaml, gpt.yaml, gpt2
        ("AMX", 32, 256, "fp32"), ("AMX", 384, 64, "fp32"),  # bigram.yaml
        ("AVX-512 BF16", 384, 2048, "bf16"), ("AVX-512 BF16", 128, 2048, "fp32"), ("ARM BF16", 384, 2048, "bf16"),
    ],
)  # fmt: skip
def test_training_takes_bf16_by_the_instructions_and_the_size(
    instructions: str | None, width: int, rows: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "bf16_instructions", lambda: instructions)
    runtime = choose_runtime(RuntimeConfig(device="cpu"), width=width, rows=rows)
    assert runtime.precision == expected
    [note] = [note for note in runtime.notes if note.startswith("precision")]
    assert note.startswith(f"precision: {expected}, ")
    assert (instructions or "no instructions for bf16") in note


@NO_CUDA
def test_nothing_is_computed_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this machine's own flags: no operator runs, so no choice can depend on a clock, or take seconds."""
    called: list[Any] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Watching():
        chosen = {choose_runtime(RuntimeConfig(device="cpu"), width=768, rows=16384).precision for _ in range(3)}
        choose_decoding_runtime(RuntimeConfig(device="cpu"), 124_000_000)
    assert called == []
    assert len(chosen) == 1


@NO_CUDA
def test_a_resumed_run_keeps_its_precision_where_the_machine_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def resumed(before: str, instructions: str | None, asked: str = "auto") -> Runtime:
        monkeypatch.setattr(processor, "bf16_instructions", lambda: instructions)
        return choose_runtime(RuntimeConfig(device="cpu", precision=asked), width=384, rows=2048, before=before)

    assert resumed("fp32", "AMX").precision == "fp32"
    assert resumed("bf16", "AMX").precision == "bf16"
    assert resumed("bf16", None).precision == "fp32"  # emulated: many times slower
    assert resumed("fp16", None).precision == "fp32"  # from a GPU
    asked = resumed("fp32", None, asked="bf16")
    assert asked.precision == "bf16"
    assert "precision: bf16 is emulated on this CPU, and many times slower than fp32" in asked.notes


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, {"AMX", "AVX-512 BF16"}), ({"ONEDNN_MAX_CPU_ISA": "ALL"}, {"AMX", "AVX-512 BF16"}),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, set()), ({"ATEN_CPU_CAPABILITY": "default"}, set()),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, {"AMX", "AVX-512 BF16"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, set()), ({"DNNL_MAX_CPU_ISA": "avx512_core"}, set()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, set()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {"AVX-512 BF16"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}, {"AVX-512 BF16"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, {"AMX", "AVX-512 BF16"}),
    ],
)  # fmt: skip
def test_the_variables_that_narrow_the_instructions_are_respected(environment: dict[str, str], left: set[str]) -> None:
    assert processor.left_by(environment) == left


@pytest.mark.skipif(not processor.X86, reason="another kind of processor")
def test_narrowed_to_avx2_a_process_has_no_bf16() -> None:
    """As docs/cpu.md says it: PyTorch, oneDNN and our own choices, in a process of its own."""
    code = (
        "import torch; from minigpt_cli.core import processor; print(torch.backends.cpu.get_cpu_capability(), "
        "torch.ops.mkldnn._is_mkldnn_bf16_supported(), processor.bf16_instructions(), *processor.compiler_flags())"
    )
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    here = os.environ | {"PYTHONPATH": str(Path(processor.__file__).parents[2])} | narrow
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True)
    assert done.stdout == "AVX2 False None -march=x86-64-v3 -mtune=native\n"


COMPILES = sys.platform == "linux" and shutil.which("cc") is not None


@NO_CUDA
@pytest.mark.parametrize("instructions", ["AMX", None])
@pytest.mark.parametrize(
    ("asked", "parameters", "expected"),
    [
        ("auto", 10_788_929, "bf16"), ("auto", 900_000, "fp32"), ("auto", 124_000_000, "bf16"),
        ("fp32", 10_788_929, "fp32"), ("bf16", 100, "bf16"),
    ],
)  # fmt: skip
def test_single_tokens_take_bf16_by_the_size_of_the_model_and_prompts_by_the_instructions(
    asked: str, parameters: int, expected: str, instructions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "bf16_instructions", lambda: instructions)
    runtime = choose_decoding_runtime(RuntimeConfig(device="cpu", precision=asked), parameters)
    if asked == "auto" and not (COMPILES and processor.X86):
        expected = "fp32"
    prompts = "fp32" if COMPILES and instructions is None else expected
    assert (runtime.decoding, runtime.precision, runtime.compile) == (expected, prompts, COMPILES)
    said = [note for note in runtime.notes if note.startswith("precision: bf16")]
    assert len(said) == (asked == "auto" and expected == "bf16")
    assert all(("prompts stay in fp32" in note) == (instructions is None) for note in said)


def test_threads_are_as_many_as_were_fastest_and_the_others_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: two threads are faster while the machine is free, and ten times slower while it is not."""
    clock, costs, choice = [0.0], {1: 2.0, 2: 1.5}, ThreadChoice((1, 2))
    monkeypatch.setattr("minigpt_cli.core.runtime.time.perf_counter", lambda: clock[0])

    def mean_cost(steps: int) -> float:
        start = clock[0]
        for _ in range(steps):
            with choice:
                clock[0] += costs[torch.get_num_threads()]
        return (clock[0] - start) / steps

    assert mean_cost(1000) < 1.03 * 1.5
    costs[2] = 20.0  # another program began
    assert mean_cost(1000) < 1.10 * 2.0
    costs[2] = 1.5  # and ended
    mean_cost(300)
    assert mean_cost(1000) < 1.03 * 1.5
    costs[2] = 100.0
    mean_cost(1)
    costs[2] = 1.5  # one bad moment
    assert mean_cost(300) < 1.2 * 1.5


def test_seeds_are_a_pure_function_of_their_key() -> None:
    def draw(*key: int) -> float:
        seed_everything(*key)
        return torch.rand(()).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(1, 2, 4), draw(1, 3, 3), draw(12, 3), draw(1, 23), draw(0)}) == 6


def test_seeding_gives_the_bits_that_torchs_own_seeding_gives() -> None:
    import hashlib

    seed = int.from_bytes(hashlib.blake2b(b"(7, 3, 0)", digest_size=8).digest(), "little") >> 1
    torch.manual_seed(seed)
    expected = torch.rand(5)
    seed_everything(7, 3, 0)
    assert torch.equal(torch.rand(5), expected)


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier may help
    torch._dynamo.reset()
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8), 5)
    example = torch.zeros(2, 8, dtype=torch.long)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        note = Runtime(torch.device("cpu"), "fp32", compile=True).wrap(model, model.blocks, example)
    assert note is not None
    assert model(example).shape == (2, 8, 5)  # uncompiled
    assert "going on without" in note


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(run_training: RunTraining) -> None:
    _, eager, _ = run_training("eager", small_config(dropout=0.0))
    _, compiled, _ = run_training(
        "compiled", small_config(dropout=0.0), runtime=Runtime(torch.device("cpu"), "fp32", compile=True)
    )
    if compiled.notes:
        pytest.skip(compiled.notes[0])
    assert eager.losses("train_loss") == pytest.approx(compiled.losses("train_loss"), rel=1e-4)


def test_compiling_is_weighed_against_the_run() -> None:
    """By hand: 6 layers x 120 launches x 8 us = 5.76 ms a step; 1e12 FLOP at 40 % of 50 TFLOP/s = 50 ms."""
    assert Workload(1000, 6, 1e9).eager_seconds(None) == pytest.approx(5.76)
    assert Workload(1000, 6, 1e12).eager_seconds(None) == pytest.approx(50.0)
    assert Workload(1000, 6, 1e12).eager_seconds(1e15) == pytest.approx(5.76)
    cuda = torch.device("cuda")
    assert _choose_compile("auto", cuda, None) == (False, None)
    assert _choose_compile("auto", cuda, 5.76)[0] is False
    assert "6 s of training" in (_choose_compile("auto", cuda, 5.76)[1] or "")
    assert _choose_compile("auto", cuda, 600.0)[0] is True
    assert "10 minutes" in (_choose_compile("auto", cuda, 600.0)[1] or "")
    assert _choose_compile("auto", torch.device("cpu"), 600.0)[0] is False
    assert _choose_compile(True, cuda, 1.0) == (True, None)


def test_recorded_steps_are_the_ordinary_ones(run_training: RunTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording does on the tensors that it was made with, done here by the CPU: dropout, schedule, failures."""
    config = small_config(optimizer="muon", lr_schedule="cosine", grad_clip=1.0, ema=0.9)
    ordinary, told, _ = run_training("ordinary", config)
    calls = []

    def record(self: Runtime, work: Callable[[], None]) -> Callable[[], None]:
        calls.append(work)
        return work

    monkeypatch.setattr(Runtime, "records", True)
    monkeypatch.setattr(Runtime, "record", record)
    recorded, told_too, _ = run_training("recorded", config)
    assert len(calls) == 1
    assert told_too.losses("train_loss") == told.losses("train_loss")
    for name, tensor in load_file(ordinary.last).items():
        assert torch.equal(tensor, load_file(recorded.last)[name]), name


def test_where_recording_fails_training_goes_on_and_says_so(
    run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, told, _ = run_training("ordinary", small_config())
    monkeypatch.setattr(Runtime, "records", True)  # and there is no CUDA: recording raises
    _, told_too, _ = run_training("tried", small_config())
    assert "CUDA graph: failed, going on without it" in told_too.notes[0]
    assert len(told_too.notes) == 1
    assert told_too.losses("train_loss") == told.losses("train_loss")


def test_training_goes_the_same_way_where_the_host_skips_steps(
    run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an Apple GPU gets, on a CPU: the same losses, an exact resume, and a failure that touches no weight."""
    config = small_config(dropout=0.0, optimizer="muon")
    _, usual, _ = run_training("usual", config)
    monkeypatch.setattr("minigpt_cli.core.optim.skips_on_the_device", lambda device: False)
    whole, told, _ = run_training("whole", config)
    assert told.losses("train_loss") == pytest.approx(usual.losses("train_loss"), rel=1e-4)
    run_training("parts", config, stop_at=6)
    parts, _, _ = run_training("parts", config, resume=True)
    for name, tensor in load_file(whole.last).items():
        assert torch.equal(tensor, load_file(parts.last)[name]), name
    with pytest.raises(MinigptError, match="not finite"):
        run_training("wild", small_config(learning_rate=1e30))


@pytest.mark.parametrize("options", [{}, {"norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu"}], ids=str)
def test_nothing_on_a_devices_way_is_float64(options: dict[str, Any], run_training: RunTraining) -> None:
    """Training with every part of a step, evaluating, sampling. (Rotary tables ask which device it is, and say so.)"""
    config = small_config(optimizer="muon", grad_clip=1.0, ema=0.9, sample_interval=6, **options)
    with OnlyFloat32():
        _, told, _ = run_training("run", config)
    assert told.samples
    assert told.losses("val_loss")


def test_bf16_training_stays_near_fp32(run_training: RunTraining) -> None:
    _, exact, _ = run_training("fp32", small_config(dropout=0.0))
    _, rough, _ = run_training("bf16", small_config(dropout=0.0), runtime=Runtime(torch.device("cpu"), "bf16", False))
    assert exact.losses("val_loss") != rough.losses("val_loss")
    assert exact.losses("val_loss") == pytest.approx(rough.losses("val_loss"), rel=0.02)


def test_measuring_takes_real_steps() -> None:
    config = small_config(dropout=0.0)
    speed = measure_training(config, random_tokens(1000, 40), 40, CPU, steps=5, max_seconds=5)
    assert speed.tokens_per_second == pytest.approx(4 * 8 / speed.step_seconds)
    assert 3.0 < speed.loss < 4.5  # near log 40: real losses of a fresh model
    assert speed.flops_utilisation is None
    assert measure_decoding(config, 40, CPU, streams=2, tokens=10, max_seconds=5) > 0


def test_peak_memory_counts_what_this_process_held() -> None:
    before = peak_memory_bytes(CPU.device)
    held = torch.ones(100_000_000)  # 400 MB, touched
    assert peak_memory_bytes(CPU.device) - before > 100e6 or before > 600e6
    del held


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_training_step_never_waits_for_the_gpu() -> None:
    from minigpt_cli.core.dataset import Batches
    from minigpt_cli.core.optim import make_optimizer
    from minigpt_cli.core.step import Statistics, TrainStep

    runtime = choose(device="cuda", compile=False)
    config = small_config()
    model = GPT(config.model, 40).to(runtime.device)
    optimizer, scaler = make_optimizer(model, config.train), runtime.scaler()
    take_step = TrainStep(model, optimizer, scaler, config, runtime, Statistics.zeros(runtime.device), pytest.fail)
    batches = Batches(random_tokens(1000, 40), 8, 4, seed=1, sampling="random", device=runtime.device)
    for step in range(8):
        if step in (2, 5):  # warm: allocations and lazy initialisation are behind us; or recorded
            torch.cuda.set_sync_debug_mode("error")
        try:
            take_step([batches.at(step)], step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "position": "rope", "grad_clip": 1.0}], ids=str)
def test_a_recorded_run_is_the_ordinary_run(
    changes: dict[str, Any], run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, dropout included: otherwise a resumed run, whose first steps are ordinary, would go elsewhere."""
    runtime = choose(device="cuda", compile=False)
    _, recorded, _ = run_training("recorded", small_config(**changes), runtime=runtime)
    monkeypatch.setattr(Runtime, "records", False)
    _, ordinary, _ = run_training("ordinary", small_config(**changes), runtime=runtime)
    assert not recorded.notes
    assert recorded.losses("train_loss") == ordinary.losses("train_loss")
    assert recorded.losses("val_loss") == ordinary.losses("val_loss")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu(run_training: RunTraining) -> None:
    _, cpu, _ = run_training("cpu", small_config(dropout=0.0))
    _, gpu, _ = run_training(
        "gpu", small_config(dropout=0.0), runtime=choose(device="cuda", precision="fp32", compile=False)
    )
    assert cpu.losses("val_loss") == pytest.approx(gpu.losses("val_loss"), rel=1e-3)


def test_lm_loss_is_the_mean_of_minus_log_probability() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    expected = (torch.log(1 + torch.tensor(1.0).exp()) + torch.log(1 + torch.tensor(2.0).exp())) / 2
    assert lm_loss(logits, torch.tensor([[0, 1]])).item() == pytest.approx(expected.item())
