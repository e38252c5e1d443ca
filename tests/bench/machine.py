"""What a figure was measured with."""

from molcli.model.checkpoint import default_device
from molcli.report.machine import commit, device_name, versions


def machine() -> dict[str, str]:
    return {"device": device_name(default_device()), "commit": commit() or "unknown", **versions()}
