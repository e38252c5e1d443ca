"""Opened parents, by the name that `molcli demo` imports."""

from molcli.api.arguments import open_dense

__all__ = ["open_dense"]
