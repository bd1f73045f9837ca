"""decode.c: the same logits as the model it repeats, for every option; and what happens where it cannot be compiled."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt_cli
from clock import PATIENCE
from minigpt_cli.core import compiler, native, processor
from minigpt_cli.core.config import ModelConfig, RuntimeConfig
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.generate import Sampling, cache_dtype, for_decoding, generate, step_at, thread_numbers
from minigpt_cli.core.layers import ACTIVATIONS, KVCache
from minigpt_cli.core.model import GPT
from minigpt_cli.core.native import MOST_STREAMS, MOST_STREAMS_OF_COPIES, NativeStep
from minigpt_cli.core.runtime import DTYPES, Runtime, choose_decoding_runtime
from oracle.generate import keep_half_and_recompute
from oracle.weights import naive_twin
from runs import MODEL_CHOICES, cpu_threads, varied_model

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="decode.c needs Linux and a C compiler"
)

Tiny = Callable[..., ModelConfig]
V = 11
CPU = torch.device("cpu")
NATIVE, NATIVE_BF16 = (Runtime(CPU, precision, compile=True) for precision in ("fp32", "bf16"))
COPIES = Runtime(CPU, "fp32", compile=True, decode_precision="bf16")  # float32 prompts, bf16 single tokens


make = partial(varied_model, vocab_size=V, by=0.15)


def logits_of(model: GPT, ids_BT: Tensor, step: NativeStep | None) -> Tensor:
    """Logits (B, T, V), token by token with a cache, by `step` or operator by operator."""
    model.native = step
    cache = KVCache(len(ids_BT), model.config, CPU, model.token_embedding.weight.dtype)
    with torch.inference_mode():
        return torch.cat([model(ids_B1, cache) for ids_B1 in ids_BT.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("options", MODEL_CHOICES, ids=str)
def test_every_option_gives_the_logits_of_the_model(options: dict[str, object], tiny: Tiny) -> None:
    model = make(tiny(**options))
    ids = torch.randint(V, (2, 20 if model.slides else 8))
    expected = logits_of(model, ids, None)
    torch.testing.assert_close(logits_of(model, ids, NativeStep(model)), expected, rtol=1e-4, atol=2e-5)


shapes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(0, 3), "n_embd": st.integers(1, 70), "mlp_width": st.integers(1, 90),
        "head_width": st.integers(1, 40), "block_size": st.integers(1, 12),
        "position": st.sampled_from(["learned", "rope", "none"]), "rope_base": st.sampled_from([1.0, 50.0, 5e5]),
        "norm": st.sampled_from(["layernorm", "rmsnorm", "none"]), "norm_eps": st.sampled_from([None, 0.1]),
        "qk_norm": st.booleans(), "mlp": st.sampled_from(list(ACTIVATIONS)), "bias": st.booleans(),
        "bias_qkv": st.booleans(), "bias_head": st.booleans(), "tie_weights": st.booleans(),
        "vocab_multiple": st.sampled_from([1, 8]), "logit_softcap": st.sampled_from([None, 3.0]),
    }
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (6, 6)]), st.integers(1, 9), st.integers(1, 4))
def test_any_shape_gives_the_logits_of_the_model(
    shape: dict[str, Any], heads: tuple[int, int], streams: int, threads: int
) -> None:
    """Of streams that have got to different places, some past their window."""
    torch.manual_seed(0)
    assume(shape["position"] != "rope" or shape["n_layer"] == 0 or shape["head_width"] % 2 == 0)
    model = make(ModelConfig(**shape, n_head=heads[0], n_kv_head=heads[1]))
    size, found = model.config.block_size, []
    lengths = [7 * i % (3 * size) for i in range(streams)] if model.config.position != "learned" else [0] * streams
    ids = torch.randint(V, (size, streams, 1))
    for step in (None, NativeStep(model)):
        model.native, cache = step, KVCache(streams, model.config, CPU, torch.float32)
        for i, layer in enumerate(cache.layers):
            layer.k_BHSD.copy_(torch.linspace(-1, 1 + i, layer.k_BHSD.numel()).view_as(layer.k_BHSD))
            layer.v_BHSD.copy_(torch.linspace(2, -i, layer.v_BHSD.numel()).view_as(layer.v_BHSD))
        with torch.inference_mode(), cpu_threads(threads):
            found.append(torch.stack([
                step_at(model, cache, ids_B1, torch.tensor(lengths) + t, size).float() for t, ids_B1 in enumerate(ids)
            ]))  # fmt: skip
        found.append(torch.stack([part for layer in cache.layers for part in (layer.k_BHSD, layer.v_BHSD)] or [ids]))
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * max(1.0, found[0].abs().max().item())}
    torch.testing.assert_close(found[2], found[0], **tolerance)
    torch.testing.assert_close(found[3], found[1], **tolerance)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_text_past_the_window_is_that_of_the_oracle(position: str, tiny: Tiny) -> None:
    """Learned positions are refilled, as the oracle does it; rotary ones slide, as without decode.c."""
    model, prompt = make(tiny(position=position, block_size=8)), torch.randint(V, (1, 3))
    slid = [(int(ids), logits) for ids, logits in generate(model, prompt, 40, Sampling(0.0))]
    expected = slid if model.slides else zip(*keep_half_and_recompute(naive_twin(model), prompt[0].tolist(), 40, 8))  # noqa: B905
    steps = generate(for_decoding(model, NATIVE), prompt, 40, Sampling(0.0))
    for (ids, logits), (token, wanted) in zip(steps, expected, strict=True):
        torch.testing.assert_close(logits.flatten(), wanted.flatten(), rtol=1e-4, atol=1e-4)
        assert int(ids) == token


@pytest.mark.parametrize("options", [{}, {"position": "rope", "norm": "rmsnorm", "qk_norm": True}], ids=str)
def test_in_bf16_only_keys_and_values_are_rounded(options: dict[str, object], tiny: Tiny) -> None:
    """Against float32 with the same rounded weights: nearer than PyTorch in bf16, which rounds after every operator."""
    half = make(tiny(n_embd=64, block_size=32, **options)).bfloat16()
    exact = GPT(half.config, V).eval()
    exact.load_state_dict(half.state_dict())
    ids = torch.randint(V, (2, 32))
    expected = logits_of(exact, ids, None)
    ours, theirs = ((logits_of(half, ids, step).float() - expected).abs().max() for step in (NativeStep(half), None))
    assert ours < 0.02
    assert ours < theirs


@pytest.mark.parametrize("options", [{}, {"position": "rope", "norm": "rmsnorm", "qk_norm": True}], ids=str)
def test_copies_in_bf16_decode_as_a_model_in_bf16_and_prompts_stay_exact(
    options: dict[str, object], tiny: Tiny
) -> None:
    """Token by token the very logits of a model whose weights are all bf16; the model's own weights are not touched."""
    whole = make(tiny(n_embd=64, block_size=32, **options))
    model, half = for_decoding(copy.deepcopy(whole), COPIES), for_decoding(copy.deepcopy(whole), NATIVE_BF16)
    ids = torch.randint(V, (2, 32))
    assert isinstance(model.native, NativeStep)
    assert isinstance(half.native, NativeStep)
    cache = KVCache(2, model.config, CPU, torch.bfloat16)
    with torch.inference_mode():
        found = torch.cat([model(ids_B1, cache) for ids_B1 in ids.split(1, dim=1)], dim=1)
        assert torch.equal(found, logits_of(half, ids, half.native))
        prompt = model(ids, KVCache(2, model.config, CPU, cache_dtype(model, 2)))
        assert torch.equal(prompt, whole(ids, KVCache(2, model.config, CPU, torch.float32)))
        cache.clear()
        model(ids[:, :20], cache)
        rest = torch.cat([model(ids[:, 20:26], cache), model(ids[:, 26:27], cache)], dim=1)  # behind a cached past
    torch.testing.assert_close(rest, whole(ids)[:, 20:27], rtol=0.05, atol=0.02)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_text_by_copies_goes_on_past_the_window_and_recomputes_it_exactly(position: str, tiny: Tiny) -> None:
    whole = make(tiny(position=position, block_size=8))
    model, prompt = for_decoding(copy.deepcopy(whole), COPIES), torch.randint(V, (1, 3))
    for exact in (False, True):
        found, expected = (
            [logits for _, logits in generate(m, prompt, 20, Sampling(0.0), exact_window=exact)] for m in (model, whole)
        )
        torch.testing.assert_close(found[0], expected[0])  # the prompt
        torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0.1, atol=0.05)
    assert torch.equal(torch.cat(found[8:]), torch.cat(expected[8:]))  # the window as it is, in float32


def test_as_many_streams_as_copies_are_the_quicker_way_for(tiny: Tiny) -> None:
    model, prompt = for_decoding(make(tiny()), COPIES), torch.zeros(1, 2, dtype=torch.long)
    seen: list[int] = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for streams in (MOST_STREAMS_OF_COPIES, MOST_STREAMS_OF_COPIES + 1):
        list(generate(model, prompt.expand(streams, -1), 3, Sampling()))
    assert seen == [MOST_STREAMS_OF_COPIES] + [MOST_STREAMS_OF_COPIES + 1] * 3
    assert [cache_dtype(model, streams) for streams in (1, seen[0], seen[1])] == [torch.bfloat16] * 2 + [torch.float32]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_comes_out_depends_neither_on_the_threads_nor_on_who_else_is_computed(precision: str, tiny: Tiny) -> None:
    model = for_decoding(make(tiny(n_embd=48, position="rope", mlp="gelu")), Runtime(CPU, precision, compile=True))
    ids, step = torch.randint(V, (7, 12)), model.native
    assert isinstance(step, NativeStep)
    together = logits_of(model, ids, step)
    for threads in (1, 2, 3, 5):
        with cpu_threads(threads):
            assert torch.equal(logits_of(model, ids, step), together)
    for i in range(7):
        assert torch.equal(logits_of(model, ids[i : i + 1], step), together[i : i + 1])


def test_the_clock_decides_how_many_threads_and_the_text_stays_the_same(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = for_decoding(make(tiny(n_embd=256, block_size=64)), NATIVE_BF16), []
    step, seen = model.native, list[int]()
    assert step is not None
    with cpu_threads(2):
        both = thread_numbers(model, 1)
    model.native = lambda *given: (seen.append(torch.get_num_threads()), step(*given))[1]
    with cpu_threads(2):
        for numbers in (both, (1,), (2,)):
            monkeypatch.setattr("minigpt_cli.core.generate.thread_numbers", lambda *_, found=numbers: found)
            generator = torch.Generator().manual_seed(1)
            steps = list(generate(model, torch.zeros(1, 1, dtype=torch.long), 30, Sampling(), generator=generator))
            texts.append(torch.cat([logits for _, logits in steps]))
            assert torch.get_num_threads() == 2
    assert set(seen[:30]) == {1, 2}
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_many_streams_are_left_to_the_model(precision: str, tiny: Tiny) -> None:
    model = for_decoding(make(tiny()), Runtime(CPU, precision, compile=True))
    seen: list[int] = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    most = MOST_STREAMS[precision]
    for streams in (1, most, most + 1):
        list(generate(model, torch.zeros(streams, 2, dtype=torch.long), 3, Sampling()))
    assert seen == [1, most] + [most + 1] * 3  # the prompts; and of the last, every token
    with cpu_threads(2):  # what the model computes may be rounded otherwise by another number of threads
        assert [thread_numbers(model, streams) for streams in (1, most, most + 1)] == [(1, 2), (1, 2), (2,)]


@pytest.mark.parametrize("mlp", ACTIVATIONS)
def test_a_damaged_weight_is_said(mlp: str, tiny: Tiny) -> None:
    """Whichever it is, and although the prompt was computed before the damage."""
    whole = make(tiny(mlp=mlp, qk_norm=True))
    for name, _ in whole.named_parameters():
        model = for_decoding(copy.deepcopy(whole), NATIVE)
        steps = generate(model, torch.zeros(1, 1, dtype=torch.long), 5, Sampling())
        next(steps)
        with torch.no_grad():
            model.get_parameter(name).fill_(float("nan"))
        with pytest.raises(MinigptError, match="not finite"):
            next(steps)


def test_what_the_model_does_not_have_is_refused_and_nothing_is_written(tiny: Tiny) -> None:
    model = for_decoding(make(tiny()), NATIVE)
    cache = KVCache(2, model.config, CPU, torch.float32)
    for ids, position in (([0, V], [0, 0]), ([-1, 0], [0, 0]), ([0, 0], [0, 8]), ([0, 0], [-9, 0])):
        with pytest.raises(IndexError, match="token or a position"):
            step_at(model, cache, torch.tensor(ids)[:, None], torch.tensor(position), 8)
    assert not any(layer.k_BHSD.any() for layer in cache.layers)
    with pytest.raises(ValueError, match="positions"):
        step_at(model, cache, torch.tensor([[0], [0]]), torch.tensor([0, 0, 0]), 8)
    for wrong in (
        KVCache(3, model.config, CPU, torch.float32),
        KVCache(2, model.config, CPU, torch.bfloat16),
        KVCache(2, model.config.model_copy(update={"block_size": 7}), CPU, torch.float32),
        KVCache(2, model.config.model_copy(update={"n_layer": 1}), CPU, torch.float32),
    ):
        with pytest.raises(ValueError, match="cache"):
            model(torch.zeros(2, 1, dtype=torch.long), wrong)
    with pytest.raises(TypeError):
        NativeStep(make(tiny()).half())
    model.blocks[0] = nn.Sequential(model.blocks[0])
    with pytest.raises(TypeError):
        NativeStep(model)


def test_what_pytorch_is_set_to_makes_no_difference(tiny: Tiny) -> None:
    model, ids = for_decoding(make(tiny()), NATIVE), torch.randint(V, (2, 8))
    expected = logits_of(model, ids, model.native)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            cache = KVCache(2, model.config, CPU, torch.float32)
            found = [model(ids_B1, cache) for ids_B1 in ids.to(torch.int32).split(1, dim=1)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_new_option_is_not_forgotten() -> None:
    """Whoever adds one to ModelConfig: add it to decode.c and native.py as well, then here."""
    of_no_account = {"dropout", "dropout_attn", "dropout_proj", "dropout_mlp", "init", "zero_init"}  # for one token
    repeated = {
        "n_layer", "n_head", "n_embd", "block_size", "position", "rope_base", "norm", "norm_eps", "qk_norm",
        "n_kv_head", "head_width", "mlp", "mlp_width", "bias", "bias_qkv", "bias_head", "tie_weights", "vocab_multiple",
        "logit_softcap",
    }  # fmt: skip
    assert ModelConfig.model_fields.keys() == of_no_account | repeated


def test_the_names_of_a_config_are_numbered_as_in_the_c_file() -> None:
    source = compiler.SOURCE.read_text(encoding="utf-8")
    assert f"{{ {', '.join(name.upper() for name in native.MLPS)} }} Mlp;" in source
    assert "{ NO_NORM, LAYERNORM, RMSNORM } Norm;" in source
    assert native.NORMS == ("none", "layernorm", "rmsnorm")


# Compiling it.


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one of our own, and nothing remembered in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.decode_library.cache_clear()
    yield tmp_path / "minigpt"
    compiler.decode_library.cache_clear()


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line to this file each time."""
    log, script = tmp_path / "log", tmp_path / "counting-cc"
    script.write_text(f'#!/bin/sh\necho compiled >> {log}\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return log


def flipped(whole: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


def works(library: ctypes.CDLL) -> bool:
    return library.scratch is not None and library.step is not None


def test_it_is_compiled_once_and_kept(cache_folder: Path, counted: Path) -> None:
    for _ in range(3):
        assert works(compiler.decode_library("fp32"))
        compiler.decode_library.cache_clear()
    assert counted.read_text() == "compiled\n"
    assert works(compiler.decode_library("bf16"))
    assert len(list(cache_folder.iterdir())) == 2
    assert cache_folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: b"\x7fELF", lambda whole: whole[:9000], flipped])
def test_a_kept_file_that_is_damaged_is_made_again(
    damage: Callable[[bytes], bytes], cache_folder: Path, counted: Path
) -> None:
    """Loading half a library would not fail, but end the process."""
    compiler.decode_library("fp32")
    compiler.decode_library.cache_clear()
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    path.unlink()  # this process has it in memory
    path.write_bytes(damage(whole))
    assert works(compiler.decode_library("fp32"))
    assert counted.read_text() == "compiled\n" * 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("trouble", ["open to all", "of somebody else", "a link", "a relative path"])
def test_a_folder_that_others_may_write_to_is_not_trusted(
    trouble: str, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if trouble == "a link":
        (tmp_path / "elsewhere").mkdir()
        cache_folder.symlink_to(tmp_path / "elsewhere")
    elif trouble == "a relative path":
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
    else:
        cache_folder.mkdir()
        cache_folder.chmod(0o777 if trouble == "open to all" else 0o700)
    if trouble == "of somebody else":
        if os.getuid() != 0:
            pytest.skip("only root can give folders away")
        os.chown(cache_folder, 12345, -1)
    assert works(compiler.decode_library("fp32"))
    assert not list(tmp_path.rglob("*.so"))


def test_where_nothing_can_be_kept_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler.decode_library.cache_clear()
    assert works(compiler.decode_library("fp32"))
    compiler.decode_library.cache_clear()


def test_where_nothing_kept_may_be_run_each_process_compiles_its_own(cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", cache_folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        assert works(compiler.decode_library("fp32"))
        assert not list(cache_folder.iterdir())
    finally:
        subprocess.run(["umount", cache_folder], check=True)


def test_four_threads_compile_once(cache_folder: Path, counted: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(map(works, pool.map(compiler.decode_library, ["fp32"] * 4)))
    assert counted.read_text() == "compiled\n"


def test_a_compiler_without_openmp_makes_one_thread_and_that_is_not_kept(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Tiny
) -> None:
    script = tmp_path / "plain-cc"
    script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    model, ids = make(tiny()), torch.randint(V, (2, 8))
    expected = logits_of(model, ids, None)
    with cpu_threads(3):
        torch.testing.assert_close(logits_of(model, ids, NativeStep(model)), expected, rtol=1e-4, atol=2e-5)
    assert not list(cache_folder.iterdir())


def test_where_no_folder_can_be_written_it_is_left_out(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(MinigptError, match=r"decode\.c could not be compiled or loaded"):
        compiler.decode_library("fp32")
    assert not choose_decoding_runtime(RuntimeConfig(device="cpu"), 1000).compile


BROKEN = [
    ("/no/such/cc", r"no C compiler \(/no/such/cc\) is installed"),
    ("false", "false could not compile decode.c: exit 1"),
    ("sh -c 'echo bad flag >&2; exit 4'", "sh could not compile decode.c: bad flag"),
    ("true", "decode.c could not be compiled or loaded"),
    ("/", "/ could not compile decode.c: Permission denied"),
    ("sh -c 'exec sleep 3600'", "sh took more than 2 seconds for decode.c"),
    ("sh -c 'kill -9 $$'", "sh could not compile decode.c: exit -9"),
    ("gcc'", "No closing quotation"),
]


@pytest.mark.parametrize(("compiler_command", "message"), BROKEN, ids=[command for command, _ in BROKEN])
def test_without_a_compiler_operators_decode_and_that_is_said(
    compiler_command: str, message: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler_command)
    if "sleep" in compiler_command:
        monkeypatch.setattr(compiler, "PATIENCE", 2)
    with pytest.raises(MinigptError, match=message):
        compiler.decode_library("bf16")
    runtime = choose_decoding_runtime(RuntimeConfig(device="cpu"), 10_000_000)
    assert (runtime.precision, runtime.decoding, runtime.compile) == ("fp32", "fp32", False)
    [note] = [note for note in runtime.notes if note.startswith("compile")]
    assert "\n" not in note
    assert note.startswith("compile: off, decoding is slower without (")
    assert not list(cache_folder.iterdir() if cache_folder.exists() else [])


def test_compile_false_leaves_it_out_and_says_nothing(cache_folder: Path) -> None:
    runtime = choose_decoding_runtime(RuntimeConfig(device="cpu", compile=False), 1000)
    assert (runtime.compile, runtime.notes) == (False, ())
    assert not cache_folder.exists()


@pytest.mark.parametrize("define", [(), ("-DBF16",)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("machine", ["-march=native", "-march=x86-64", "-march=x86-64-v3"])
def test_it_compiles_without_a_warning_for_other_processors_too(
    define: tuple[str, ...], machine: str, tmp_path: Path
) -> None:
    if machine != "-march=native" and os.uname().machine != "x86_64":
        pytest.skip("another kind of processor")
    strict = ["-Wall", "-Wextra", "-Werror", *compiler.FLAGS, machine, *compiler.THREADS, *define]
    done = subprocess.run(
        ["cc", *strict, str(compiler.SOURCE), "-o", str(tmp_path / "x.so"), "-lm"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not processor.X86, reason="another kind of processor")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_narrowed_instructions_it_is_another_library_with_the_same_logits(
    precision: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: Tiny
) -> None:
    """Down to SSE2, which every x86-64 has: sums are added in another order, and nothing else is different."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)  # tests/narrow.py sets it for all
    model, ids = make(tiny(n_embd=64, block_size=32)).to(DTYPES[precision]), torch.randint(V, (2, 32))
    expected = logits_of(model, ids, NativeStep(model))
    for n, capability in enumerate(("avx2", "default"), 2):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        compiler.decode_library.cache_clear()
        torch.testing.assert_close(logits_of(model, ids, NativeStep(model)), expected, rtol=1e-2, atol=1e-2)
        assert len(list(cache_folder.iterdir())) == n


def test_two_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    code = "from minigpt_cli.core.compiler import decode_library; decode_library('fp32').step"
    here = os.environ | {"PYTHONPATH": str(Path(minigpt_cli.__file__).parents[1])}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=here | {"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(3)
    ]
    assert [process.wait(PATIENCE) for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "minigpt").iterdir())) == 1
