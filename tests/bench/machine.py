"""What a figure was measured with."""

from molcli.io.machine import commit, device_name, versions
from molcli.model.checkpoint import default_device


def machine() -> dict[str, str]:
    return {"device": device_name(default_device()), "commit": commit() or "unknown", **versions()}
