"""What machine this is, and what it is good at: device, precision, compiling, memory. The only file that asks.

Everything here is a choice between wrappings of the same code: the model and the training step do not know.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minigpt_cli.core import processor
from minigpt_cli.core.compiler import decode_library
from minigpt_cli.core.config import RuntimeConfig, TrainConfig
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.gpus import peak_of
from minigpt_cli.core.world import ALONE, World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

COMPILE_PAYS_FROM = 120.0  # seconds of training without it
EMULATED = "precision: bf16 is emulated on this CPU, and many times slower than fp32"
TRAINING_BYTES = 16  # per parameter: the weight, its gradient, and AdamW's two moments, in float32
BF16_FROM_ROWS = 256  # of a product: below, calling it is most of the work
HALF_FROM_PARAMETERS = 1_000_000  # from here on reading weights, not calling operators, is what decoding waits for


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute. `notes` says what was chosen automatically, and why."""

    device: torch.device
    precision: str  # fp32 | bf16 | fp16
    compile: bool
    notes: tuple[str, ...] = ()
    world: World = ALONE
    parallel: str = "none"  # none | ddp | fsdp
    checkpoint_activations: bool = False
    decode_precision: str | None = None  # of what `decode.c` reads for single tokens, if not `precision`

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in the chosen precision; weights, norms and the loss stay in float32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    @property
    def decoding(self) -> str:
        """The precision of weights and cache where single tokens are computed."""
        return self.decode_precision or self.precision

    @property
    def update_dtype(self) -> torch.dtype:
        """What Muon's matrix products are computed in: fp16 has not the range for them."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which only fp16 needs (Micikevicius et al. 2018, arXiv:1710.03740)."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def wrap(self, model: torch.nn.Module, blocks: Iterable[torch.nn.Module], example: torch.Tensor) -> str | None:
        """Compile the model's `blocks` for training, if so chosen; returns what to tell the user when that failed.

        One block is compiled and serves for all: they share their code. Compiling happens at the first call, so the
        model is called here, forward and backward, on an `example` input. The compiler keeps its results on disk.
        """
        if not self.compile:
            return None
        try:
            for block in blocks:
                block.compile()
            with self.autocast():
                model(example).sum().backward()
            return None
        except Exception as error:  # compiling is a wrapping: whatever stops it, training goes on without
            for block in blocks:
                block._compiled_call_impl = None
            return f"compile: failed, going on without it ({first_line(error)})"
        finally:
            model.zero_grad(set_to_none=True)

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the block compiled code rests: other shapes than training's would compile anew."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    @property
    def memory_bytes(self) -> int | None:
        """The GPU's memory, all of it; None elsewhere."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    @property
    def records(self) -> bool:
        """Whether work can be recorded and replayed here. What ranks exchange, and draw again, is not recorded."""
        return self.device.type == "cuda" and self.world.size == 1 and not self.checkpoint_activations

    @property
    def read_every(self) -> int:
        """How many sampled tokens to read back at once, where reading one means waiting for all that was asked for."""
        return 16 if self.device.type == "cuda" else 1

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does `work` again on the same tensors: a CUDA graph, one launch for hundreds. Does not do it yet."""
        graph = torch.cuda.CUDAGraph()
        # The current device and stream are entered first: they are the thread's own, and a capture that fails leaves
        # its stream behind. Only this thread's work is recorded; others may allocate meanwhile.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            stream = capture_stream(torch.cuda.current_device())
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work()
        return graph.replay


@functools.cache
def capture_stream(device_index: int) -> torch.cuda.Stream:
    """The stream that recordings are made on: one for each device, kept, with the libraries' workspaces for it."""
    return torch.cuda.Stream(device_index)


@dataclass(frozen=True)
class Workload:
    """What a run will ask of the machine: how often, how deep, how much."""

    steps: int
    layers: int
    flops_per_step: float
    parameters: int = 0

    def eager_seconds(self, peak: float | None) -> float:
        """About how long it takes without compiling: by arithmetic at 40 % of the peak, or by the launches of some 120
        kernels per layer and step at 8 microseconds, whichever is longer. `peak` in FLOP/s, where it is known."""
        arithmetic = self.flops_per_step / (0.4 * (peak or 50e12))
        return self.steps * max(arithmetic, self.layers * 120 * 8e-6)


def choose_runtime(
    config: RuntimeConfig, *, width: int, rows: int, workload: Workload | None = None, world: World = ALONE,
    before: str | None = None, compiled_before: bool | None = None,
) -> Runtime:  # fmt: skip
    """Turn `auto` into decisions for this machine; `width` and `rows` are the sizes of the model's matrix products.

    `workload` tells whether compiling pays; without one it does not. A run that is resumed keeps the precision that it
    had `before`, unless this machine cannot compute in it, or only by emulation, and stays as it was `compiled_before`.
    All ranks of `world` decide alike. Raises UserError when the config asks for what the machine has not.
    """
    with world.together():
        device, notes = _choose_device(config.device, world)
    asked = before if config.precision == "auto" and before and _computes_in(before, device) else config.precision
    precision, note = _choose_precision(asked, device, width, rows)
    notes += [note] if note else []
    precision = world.texts(precision)[0]  # another rank's machine could choose otherwise
    parallel, note = _choose_parallel(config.parallel, device, workload, world)
    notes += [note] if note else []
    if parallel == "fsdp" and precision == "fp16":
        raise UserError("precision fp16 does not go with parallel fsdp; use bf16, fp32, or parallel ddp")
    seconds = workload.eager_seconds(peak_flops(device)) if workload else None
    compiling, why = _choose_compile(config.compile, device, seconds, compiled_before)
    notes += [why] if why else []
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 # doubles the kernels; typed late
    return Runtime(device, precision, compiling, tuple(notes), world, parallel, config.checkpoint_activations)


def _choose_parallel(
    asked: str, device: torch.device, workload: Workload | None, world: World
) -> tuple[str, str | None]:
    if world.size == 1:
        return "none", None if asked in ("auto", "none") else f"parallel: none, {asked} takes several ranks (torchrun)"
    if asked == "none":
        raise UserError(f"runtime.parallel none, but {world.size} ranks were started; choose auto, ddp or fsdp")
    if asked != "auto":
        return asked, None
    needed = TRAINING_BYTES * (workload.parameters if workload else 0)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if world.any(there is not None and needed > 0.7 * there):
        return "fsdp", f"parallel: fsdp, weights and optimizer ({needed / 1e9:,.0f} GB) fill a device"
    return "ddp", f"parallel: ddp, {world.size} ranks with a copy of the model each"


def _choose_compile(
    asked: bool | str, device: torch.device, seconds: float | None, before: bool | None = None
) -> tuple[bool, str | None]:
    """Compiled blocks round otherwise, so a run that is resumed stays with what it had `before`."""
    if isinstance(asked, bool):
        return asked, None
    if device.type != "cuda":
        return False, f"compile: off, it makes training on {device.type} no faster"
    if before is not None:
        return before, f"compile: {'on' if before else 'off'}, as before"
    if seconds is None:
        return False, None
    if seconds < COMPILE_PAYS_FROM:
        return False, f"compile: off, compiling would take about as long as it saves in {seconds:,.0f} s of training"
    return True, f"compile: on, about {seconds / 60:,.0f} minutes of training are worth it"


def choose_decoding_runtime(config: RuntimeConfig, n_parameters: int) -> Runtime:
    """As `choose_runtime`, for sampling: one row at a time, where reading the weights is the work.

    `auto` depends on the machine and the model only, never on a measurement: the same seed must give the same text.
    `decode.c` reads bf16 without any instruction for it, and faster than float32; prompts, which PyTorch multiplies,
    stay in float32 where there is no such instruction. Raises UserError when the config asks for what the machine has
    not.
    """
    device, notes = _choose_device(config.device, ALONE)
    if config.precision != "auto":
        precision, _ = _choose_precision(config.precision, device, 1, 1)
    elif device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    else:
        half = device.type == "cpu" and processor.X86 and n_parameters >= HALF_FROM_PARAMETERS
        precision = "bf16" if half else "fp32"
    native, why = _choose_native(config.compile, device, precision)
    notes += [why] if why else []
    single = precision
    if device.type == "cpu" and precision == "bf16":
        if native and _is_emulated(device):
            precision = "fp32"
        elif config.precision == "auto" and not native:
            precision = single = "fp32"  # PyTorch's own products of one row are slower in bf16
    if config.precision == "auto" and single == "bf16":
        kept = "; prompts stay in fp32, this CPU has no instructions for bf16" if precision == "fp32" else ""
        notes.append(f"precision: bf16, weights of half the size are read in half the time{kept}")
    return Runtime(device, precision, native, tuple(notes), decode_precision=single)


def _choose_native(asked: bool | str, device: torch.device, precision: str) -> tuple[bool, str | None]:
    """Whether `decode.c` decodes, compiling it at the first time of all; and what to tell when it could not."""
    if not asked or device.type != "cpu":
        return False, None
    try:
        decode_library(precision)
        return True, None
    except MinigptError as error:
        return False, f"compile: off, decoding is slower without ({error})"


def require_runtime(config: RuntimeConfig) -> None:
    """Raises UserError when the config asks for a device, or a precision, that this machine has not."""
    device, _ = _choose_device(config.device, ALONE)
    if config.precision != "auto":
        _choose_precision(config.precision, device, 1, 1)


def seed_everything(*key: int) -> None:
    """Seed torch's default generators, which initialisation and dropout draw from, as a pure function of `key`."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    # What torch.manual_seed does, but only to the generators in use: for every absent backend it formats a traceback,
    # which takes 0.1 to 0.4 ms, longer than launching a recorded step.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def memory_advice(config: TrainConfig, device: torch.device, ranks: int = 1) -> Iterator[None]:
    """Where memory runs out inside the block, a MinigptError names the micro batch that trains the same in less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError on a GPU; torch or numpy on a CPU
        no_memory = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in no_memory):
            raise
        batch, rows = config.batch_size, config.micro_batch_size or config.batch_size // ranks
        smaller = max((d for d in range(1, rows // 2 + 1) if batch % (d * ranks) == 0), default=None)
        remedy = f"--set train.micro_batch_size={smaller} trains the same in less" if smaller else "use a smaller model"
        raise MinigptError(f"out of memory on {device} with {rows:,} sequences at a time; {remedy}") from None


class ThreadChoice:
    """How many CPU threads a short step, taken over and over, is given: the number that was fastest when last tried.

    Threads that meet after every operator are a gain where cores are free, and take ten times as long where another
    program keeps one busy; and that changes. What is remembered of the slower fades, so that it gets another try.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.first = [*numbers, *numbers]  # each is tried twice: a first step is a slow one
        self.seconds = dict.fromkeys(numbers, float("inf"))  # of the last step with each

    def __enter__(self) -> None:
        """A step begins."""
        self.before, self.start = torch.get_num_threads(), time.perf_counter()
        self.number = self.first.pop() if self.first else min(self.seconds, key=self.seconds.__getitem__)
        torch.set_num_threads(self.number)

    def __exit__(self, *failure: object) -> None:
        torch.set_num_threads(self.before)
        took, last = time.perf_counter() - self.start, self.seconds[self.number]
        for number in self.seconds:
            self.seconds[number] *= 0.99
        self.seconds[self.number] = min(took, 4 * last)  # one bad moment is not held against it for long


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: on CUDA by the allocator, on MPS what Metal holds now, of which it gives little back
    before the end, elsewhere by this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def system_figures(device: torch.device) -> dict[str, float]:
    """For a log: the most memory used so far in bytes and, where the driver tells it, how busy the GPU was just now."""
    figures: dict[str, float] = {"peak_memory_bytes": peak_memory_bytes(device)}
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # NVML is not installed, or not for us to ask
            figures["gpu_use"] = torch.cuda.utilization(device) / 100
    return figures


def peak_flops(device: torch.device) -> float | None:
    """Dense 16-bit FLOP/s by the data sheet, or None where we do not know the device."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def describe_device(device: torch.device) -> str:
    """For people and for benchmark tables: `NVIDIA H100 80GB HBM3`, or `cpu (x86_64, 2 threads)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _choose_device(asked: str, world: World) -> tuple[torch.device, list[str]]:
    if world.size > 1 and (asked in ("auto", "mps") or asked.startswith("cuda")):
        return _device_of_rank(asked, world)
    if asked == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found), [f"device: {found}"]
    device = torch.device(asked)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(
            f"device {asked} was asked for, but PyTorch sees {there or 'no'} CUDA devices; try --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but this machine has none; try --device cpu")
    return device, []


def _device_of_rank(asked: str, world: World) -> tuple[torch.device, list[str]]:
    if asked == "mps" or ":" in asked:
        raise UserError(f"device {asked} is one device, but {world.size} ranks were started; use cuda or cpu")
    there = torch.cuda.device_count()
    if asked == "auto" and not there:
        return torch.device("cpu"), ["device: cpu"]
    if world.local_rank >= there:
        raise UserError(f"rank {world.rank} is number {world.local_rank + 1} on its host, which has {there} GPUs")
    return torch.device("cuda", world.local_rank), [f"device: cuda, {world.size} ranks"]


def _choose_precision(asked: str, device: torch.device, width: int, rows: int) -> tuple[str, str | None]:
    if asked != "auto":
        if asked == "fp16" and device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; on a CPU use bf16 or fp32")
        if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("precision bf16 is not supported by this GPU; use fp16 or fp32")
        if asked == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
            raise UserError("precision bf16 on mps needs macOS 14; use fp16 or fp32")
        return asked, EMULATED if asked == "bf16" and _is_emulated(device) else None
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "precision: bf16, which this GPU supports"
        return "fp16", "precision: fp16, this GPU has no bf16"
    if device.type == "mps":
        return "fp32", "precision: fp32, the safe choice on mps"
    return _choose_cpu_precision(width, rows)


def _computes_in(precision: str, device: torch.device) -> bool:
    try:
        return _choose_precision(precision, device, 1, 1)[1] != EMULATED
    except UserError:
        return False


def _is_emulated(device: torch.device) -> bool:
    """Whether products in bf16 are far slower here than in float32."""
    return device.type == "cpu" and processor.bf16_instructions() is None


def _choose_cpu_precision(width: int, rows: int) -> tuple[str, str]:
    """By the CPU's instructions and the size of the products, never by a measurement: a run must not depend on one."""
    instructions = processor.bf16_instructions()
    if instructions is None:
        return "fp32", "precision: fp32, this CPU has no instructions for bf16"
    if width < processor.BF16_PAYS_FROM[instructions] or rows < BF16_FROM_ROWS:
        return "fp32", f"precision: fp32, products this small are no faster in bf16 ({instructions})"
    return "bf16", f"precision: bf16, which this CPU multiplies with {instructions}"
