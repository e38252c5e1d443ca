"""Peaks of devices, by the names that their drivers give."""

import pytest

from molcli.estimate.gpus import bf16_peak


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert bf16_peak(name) == teraflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A10", "Tesla V100-SXM2-16GB", "cpu", ""])
def test_others_are_not_guessed(name: str) -> None:
    assert bf16_peak(name) is None
