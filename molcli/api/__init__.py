"""The Python interface. Each function does what the command of the same name does.

Importing this package imports neither torch nor transformers; a call does.
"""

from molcli.api.arguments import Settings, Text
from molcli.api.conversion import Conversion, calibrate, convert, sample, upcycle
from molcli.api.measuring import evaluate, inspect, open_model, plan
from molcli.api.training import train

__all__ = [
    "Conversion",
    "Settings",
    "Text",
    "calibrate",
    "convert",
    "evaluate",
    "inspect",
    "open_model",
    "plan",
    "sample",
    "train",
    "upcycle",
]
