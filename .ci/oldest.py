"""Prints pip constraints with the lowest version that pyproject.toml allows of every dependency.

torch is left out: which build of it is installed is decided in `.ci/run`.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["gguf"] + extras["test"]:
    requirement = Requirement(line)
    for specifier in requirement.specifier:
        if specifier.operator == ">=" and requirement.name != "torch":
            print(f"{requirement.name}=={specifier.version}")
