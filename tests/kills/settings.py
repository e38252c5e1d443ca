"""What a command finds on another machine: called in its process before it starts."""

import os
import resource
import signal

from tests.kills.moments import make_small


def full_disk(largest: int) -> None:
    """Let a file not grow beyond this many bytes, which fails as a full disk does."""
    make_small()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def umask(mask: int) -> None:
    """Set the permissions that new files do not get."""
    make_small()
    os.umask(mask)
