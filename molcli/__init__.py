"""molcli: turn a dense language model into a Mixture of Layers model.

>>> import molcli
>>> molcli.upcycle("parent", "out", data="text.jsonl", preset="quality")
>>> model = molcli.open_model("out")

Importing molcli is fast: torch is imported by the first call of a function.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from molcli.errors import Interrupted, MolError

__version__ = "0.1.0"
__all__ = [
    "Interrupted",
    "MolError",
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

if TYPE_CHECKING:
    from molcli.api import (
        calibrate,
        convert,
        evaluate,
        inspect,
        open_model,
        plan,
        sample,
        train,
        upcycle,
    )
else:

    def __getattr__(name: str) -> object:
        """Import `molcli.api` when one of its functions is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("molcli.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
