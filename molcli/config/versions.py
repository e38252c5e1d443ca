"""Versions of the packages that molcli runs on, and whether it was tested with them.

Read from the packages' metadata: none of them is imported.
"""

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from molcli import __version__

_SHOWN = ("torch", "triton", "transformers", "fla-core")
# Extras whose packages a run uses; those of `test` serve development only.
_EXTRAS = ("", "gpu", "gguf", "eval")


def version_report() -> str:
    """Return a line each for molcli, Python, and the libraries that compute, installed or not."""
    found = installed_versions(_SHOWN)
    lines = [f"molcli {__version__}", f"Python {platform.python_version()}"]
    lines += [f"{name} {found.get(name, 'not installed')}" for name in _SHOWN]
    return "\n".join(lines)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return package -> version, such as 2.13.0+cpu, of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def untested_versions() -> str:
    """Return `describe_untested` of this installation, or "" if molcli itself is not installed."""
    try:
        requires = metadata.requires("molcli") or []
    except metadata.PackageNotFoundError:
        return ""
    return describe_untested(requires, installed_versions(Requirement(r).name for r in requires))


def describe_untested(requires: Iterable[str], installed: Mapping[str, str]) -> str:
    """Return one line about versions outside the tested ranges, with the command that helps.

    Args:
        requires: Requirements as in molcli's own metadata, with the ranges that were tested.
        installed: package -> version. Packages that it lacks are not mentioned.

    Returns:
        The line, or "" if all versions were tested.
    """
    untested = [
        requirement
        for requirement in map(Requirement, requires)
        if _is_used(requirement) and not _is_tested(requirement, installed.get(requirement.name))
    ]
    if not untested:
        return ""
    found = ", ".join(
        f"{requirement.name} {installed[requirement.name]} (tested: {_range(requirement)})"
        for requirement in untested
    )
    command = " ".join(f"'{requirement.name}{_range(requirement)}'" for requirement in untested)
    return f"molcli was not tested with {found}; try: pip install {command}"


def _is_used(requirement: Requirement) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in _EXTRAS)


def _is_tested(requirement: Requirement, version: str | None) -> bool:
    """Also True if the version is unknown."""
    if version is None:
        return True
    try:
        found = Version(version)
    except InvalidVersion:  # of a private build
        return True
    # Pre-releases may lie in the range, too; 5.25.0rc1 does not lie in <5.25.
    return requirement.specifier.contains(found, prereleases=True)


def _range(requirement: Requirement) -> str:
    """>=5.17,<5.25: the lower bound first, which a set of specifiers does not promise."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))
