"""What instructions this CPU has, and what the variables that narrow them leave. The only file that asks.

Tests run a second time as on a machine without AVX-512 (docs/cpu.md). Each library has its own variable for that
and reads it when it starts: ATEN_CPU_CAPABILITY for PyTorch's own kernels, ONEDNN_MAX_CPU_ISA for oneDNN, which
multiplies bf16, and MKL_ENABLE_INSTRUCTIONS for MKL, which multiplies float32. PyTorch's flags follow none of them.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

X86 = platform.machine().lower() in ("x86_64", "amd64")
# The smallest width of a model from which training in bf16 pays (docs/cpu.md).
BF16_PAYS_FROM = {"AMX": 64, "AVX-512 BF16": 256, "ARM BF16": 256}
MARCH = {"avx2": "x86-64-v3", "default": "x86-64"}  # by ATEN_CPU_CAPABILITY


def bf16_instructions() -> str | None:
    """What this CPU multiplies matrices of bf16 with, a key of `BF16_PAYS_FROM`; None where bf16 would be emulated."""
    import torch

    if not X86:
        supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "ARM BF16" if supported else None
    left = left_by(os.environ)
    has = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported()}
    return next((name for name, there in has.items() if there and name in left), None)


def left_by(environment: Mapping[str, str]) -> set[str]:
    """Of the x86 instructions for bf16, those that the narrowing variables let PyTorch and oneDNN use."""
    if environment.get("ATEN_CPU_CAPABILITY", "").lower() in MARCH:
        return set()
    most = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "ALL"
    if (most := most.upper()) in ("ALL", "DEFAULT") or "AMX" in most:
        return {"AMX", "AVX-512 BF16"}
    return {"AVX-512 BF16"} if any(name in most for name in ("BF16", "FP16", "AVX10")) else set()


def compiler_flags() -> tuple[str, ...]:
    """For which instructions a C compiler may make code: all of this CPU's, or what ATEN_CPU_CAPABILITY leaves."""
    march = MARCH.get(os.environ.get("ATEN_CPU_CAPABILITY", "").lower())
    return (f"-march={march}", "-mtune=native") if march and X86 else ("-march=native",)


def description() -> str:
    """All the instructions that there are: the same home folder may serve machines of several kinds."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())
    return platform.machine()
