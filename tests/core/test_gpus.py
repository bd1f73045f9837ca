"""Peaks by name: whole words, and nothing for what could be several."""

from __future__ import annotations

import pytest

from minigpt_cli.core.gpus import PEAK_TFLOPS, peak_of

# Names as NVIDIA's drivers give them, and as people type them.
NAMES = {
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
    "NVIDIA B200": 2250, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA L40": 181,
    "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 65, "Tesla V100-SXM2-16GB": 125, "NVIDIA RTX A6000": 155,
    "NVIDIA RTX 6000 Ada Generation": 364, "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 4060 Laptop GPU": 29,
    "NVIDIA GeForce RTX 4060": 30, "NVIDIA GeForce RTX 4070 Ti SUPER": 88, "NVIDIA GeForce RTX 3080 Ti": 68,
    "h100": 989, "4090": 165, "3080": 60, "3080 ti": 68, "a6000": 155, "6000 ada": 364, "l40": 181, "A10": 125,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), NAMES.items())
def test_a_known_gpu_has_its_own_peak(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "40",
        "RTX",
        "ti",
        "",
        "T400",
        "NVIDIA T400 4GB",
        "L40X",
        "A1000",
        "H10",
        "GeForce",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_what_is_unknown_or_ambiguous_has_none(name: str) -> None:
    assert peak_of(name) is None


def test_every_name_in_the_table_finds_itself() -> None:
    for name, tflops in PEAK_TFLOPS.items():
        assert peak_of(name) == tflops * 1e12
