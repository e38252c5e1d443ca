"""The one table of GPUs: peak rates, memory, and the source of each number."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one GPU.

    Attributes:
        name: for people, such as "H100 SXM".
        pattern: regular expression that finds the GPU in a device name of the driver.
        bf16: FLOP/s of dense bf16 matrix products with fp32 accumulation, without sparsity.
        fp32: FLOP/s of fp32 arithmetic, without TF32.
        memory: bytes.
        bandwidth: bytes/s of the GPU's memory.
        source: where these numbers come from.
    """

    name: str
    pattern: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    source: str


# Keys are the values of `molcli plan --gpu`. The first entry whose pattern is found in a device
# name counts, so special models stand before general ones.
GPUS = {
    "rtx4090": Gpu(
        "RTX 4090",
        r"\bRTX 4090\b(?! (?:Laptop|D)\b)",
        165.2e12,
        82.6e12,
        24e9,
        1.008e12,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A",
    ),
    "l4": Gpu("L4", r"\bL4\b", 121e12, 30.3e12, 24e9, 0.3e12, "NVIDIA L4 data sheet"),
    "l40s": Gpu("L40S", r"\bL40S\b", 362.1e12, 91.6e12, 48e9, 0.864e12, "NVIDIA L40S data sheet"),
    "a10g": Gpu("A10G", r"\bA10G\b", 70e12, 31.5e12, 24e9, 0.6e12, "NVIDIA A10G data sheet"),
    "a100": Gpu(
        "A100 80 GB", r"\bA100\b", 312e12, 19.5e12, 80e9, 2.039e12, "NVIDIA A100 data sheet, SXM"
    ),
    "h100-pcie": Gpu(
        "H100 PCIe", r"\bH100 PCIe\b", 756e12, 51e12, 80e9, 2e12, "NVIDIA H100 data sheet, PCIe"
    ),
    "h100-nvl": Gpu(
        "H100 NVL", r"\bH100 NVL\b", 835.5e12, 60e12, 94e9, 3.9e12, "NVIDIA H100 data sheet, NVL"
    ),
    "h100": Gpu(
        "H100 SXM", r"\bH100\b", 989.4e12, 67e12, 80e9, 3.35e12, "NVIDIA H100 data sheet, SXM"
    ),
    "gh200": Gpu(
        "GH200", r"\bGH200\b", 989.4e12, 67e12, 96e9, 4e12, "NVIDIA GH200 data sheet, HBM3"
    ),
    "h200-nvl": Gpu(
        "H200 NVL", r"\bH200 NVL\b", 835.5e12, 60e12, 141e9, 4.8e12, "NVIDIA H200 data sheet, NVL"
    ),
    "h200": Gpu("H200", r"\bH200\b", 989.4e12, 67e12, 141e9, 4.8e12, "NVIDIA H200 data sheet, SXM"),
    "b200": Gpu(
        "B200",
        r"\bB200\b",
        2250e12,
        75e12,
        180e9,
        8e12,
        "NVIDIA DGX B200 and HGX B200 data sheets, an eighth of eight GPUs",
    ),
}


def find_gpu(device: str) -> Gpu | None:
    """Find a device in the table by its name.

    Args:
        device: as torch.cuda.get_device_name returns it, such as "NVIDIA H100 80GB HBM3".

    Returns:
        None for a device that the table does not have.
    """
    name = " ".join(device.replace("-", " ").split())
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, name)), None)


def bf16_peak(device: str) -> float | None:
    """Return the FLOP/s of bf16 matrix products on a device, None if it is not known.

    Args:
        device: name of the device, as for `find_gpu`.
    """
    gpu = find_gpu(device)
    return None if gpu is None else gpu.bf16
