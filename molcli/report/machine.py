"""Provenance that reports record: the device, the versions of libraries, and the commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from molcli import __version__

_KERNELS = ("triton", "fla-core")  # optional dependencies


def device_name(device: torch.device) -> str:
    """Return a GPU's name from its driver, or a CPU's type and the number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def versions() -> dict[str, str]:
    """Return the versions of molcli, Python, torch, transformers and installed kernel libraries."""
    found = {
        "molcli": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    for package in _KERNELS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of molcli's checkout, with "-dirty" if it was changed; "" without one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
