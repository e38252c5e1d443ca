"""Progress bars, by the name that `molcli demo` imports."""

from molcli.report.bars import bar

__all__ = ["bar"]
