"""What a figure was measured with: the device, and the versions of what ran on it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from molcli import __version__

_KERNELS = ("triton", "fla-core")  # which not every installation has


def device_name(device: torch.device) -> str:
    """A GPU as its driver calls it; of a CPU the threads that torch takes, and the kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def versions() -> dict[str, str]:
    """Of molcli, Python, and the libraries that compute, as far as they are installed."""
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
    """Of the checkout that molcli runs from, "-dirty" where it was changed; "" if from none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
