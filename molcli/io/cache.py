"""Where molcli keeps what it would otherwise fetch or convert again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`molcli` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molcli"
