"""GPUs are found by the names that drivers report, and unknown ones are not guessed."""

import pytest

from molcli.estimate.gpus import GPUS, bf16_peak, find_gpu


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert bf16_peak(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA A10",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
        "cpu",
        "",
    ],
)
def test_unknown_devices_are_not_guessed(name: str) -> None:
    assert bf16_peak(name) is None


def test_every_gpu_is_found_by_its_own_name() -> None:
    for gpu in GPUS.values():
        assert find_gpu(f"NVIDIA {gpu.name.removesuffix(' SXM')}") is gpu
