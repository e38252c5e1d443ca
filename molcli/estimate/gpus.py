"""What a device could do at most."""

# Dense bf16 products with float32 sums, TFLOP/s, from NVIDIA's data sheets without sparsity. The
# first entry whose words are all in the device's name counts.
_BF16 = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.1),
    ("L4", 121.0),
    ("A10G", 70.0),
)


def bf16_peak(device: str) -> float | None:
    """FLOP/s of bf16 matrix products on the device of this name, None if it is not known.

    device: as torch.cuda.get_device_name writes it, such as "NVIDIA H100 80GB HBM3".
    """
    words = device.replace("-", " ").split()
    for name, peak in _BF16:
        if all(word in words for word in name.split()):
            return peak * 1e12
    return None
