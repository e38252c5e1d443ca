"""What a figure was measured with."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
import transformers


@cache
def machine() -> dict[str, str]:
    """commit: of this checkout; MOLCLI_COMMIT says it of a copy without its history."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("MOLCLI_COMMIT") or described or "unknown",
    }
