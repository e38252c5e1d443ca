"""Device, versions and commit that reports record."""

import platform
import sys

import pytest
import torch
import transformers

from molcli import __version__
from molcli.report import machine


def test_versions_are_those_of_the_running_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_KERNELS", ("pytest", "no-such-package"))
    assert machine.versions() == {
        "molcli": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pytest": pytest.__version__,
    }


def test_a_gpu_is_named_by_its_driver_and_a_cpu_by_its_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_name(torch.device("cuda", 1)) == "GPU 1"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert machine.device_name(torch.device("cpu")) == "3 threads of riscv64"


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == ""
