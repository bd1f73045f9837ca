"""How fast GPUs are on paper, by name. Used for model FLOPs utilisation and for plans; knows nothing of PyTorch."""

from __future__ import annotations

import re

# Dense bf16 tensor-core TFLOP/s with float32 accumulation (fp16 for V100 and T4, which have no bf16), without sparsity:
# NVIDIA's data sheets and architecture white papers.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "A100": 312, "A40": 150, "A30": 165,
    "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65, "RTX 6000 Ada": 364,
    "RTX A6000": 155, "RTX 5090": 210, "RTX 5080": 113, "RTX 5070 Ti": 88, "RTX 5070": 62, "RTX 4090": 165,
    "RTX 4080 Super": 104, "RTX 4080": 97, "RTX 4070 Ti Super": 88, "RTX 4070 Ti": 80, "RTX 4070 Super": 71,
    "RTX 4070": 58, "RTX 4060 Ti": 44, "RTX 4060": 30, "RTX 4060 Laptop": 29, "RTX 3090 Ti": 80, "RTX 3090": 71,
    "RTX 3080 Ti": 68, "RTX 3080": 60, "RTX 3070 Ti": 43, "RTX 3070": 41, "RTX 3060 Ti": 32, "RTX 3060": 25,
}  # fmt: skip


def peak_of(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by the name its driver gives (`NVIDIA H100 80GB HBM3`), or by a part of one of the
    names above (`h100`, `4090`). Whole words only; None for what is unknown or could be several."""
    words = _words(name)
    known = {key: _words(key) for key in PEAK_TFLOPS}
    whole = [key for key in known if known[key] <= words]  # RTX 4060, and RTX 4060 Laptop: the longer one is meant
    if whole:
        found = max(whole, key=lambda key: len(known[key]))
        laptop = "laptop" in words - known[found]  # slower than the card of that name
        return None if laptop else PEAK_TFLOPS[found] * 1e12
    partial = [key for key in known if words and words <= known[key]]
    shortest = min((len(known[key]) for key in partial), default=0)
    nearest = [key for key in partial if len(known[key]) == shortest]
    return PEAK_TFLOPS[nearest[0]] * 1e12 if len(nearest) == 1 else None


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
