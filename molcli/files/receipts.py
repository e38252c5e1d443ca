"""The receipt of a conversion, which travels with models that are made from the converted one."""

from pathlib import Path
from typing import Any

from molcli.files.json_files import read_object

RECEIPT = "receipt.json"


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Read the receipt of `molcli upcycle` in a checkpoint's folder; None if there is none.

    Raises:
        MolError: If the file is not a JSON object with finite numbers.
    """
    path = folder / RECEIPT
    if not path.is_file():
        return None
    return read_object(
        path,
        allowed="the receipt as molcli upcycle wrote it, or none",
        hint=f"copy it again, or move {path} elsewhere",
    )
