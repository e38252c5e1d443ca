"""The warning of versions that were not tested: which, in what words, and when there is none."""

from importlib import metadata

import pytest

from molcli.config.versions import describe_untested, installed_versions, untested_versions

REQUIRES = [
    "torch<3,>=2.10",
    "transformers<5.25,>=5.17",
    "numpy<3,>=2.0",
    'fla-core<0.7,>=0.6; extra == "gpu"',
    'ruff<0.18,>=0.17; extra == "test"',
    'triton<4,>=3.4; sys_platform == "nowhere"',
]


@pytest.mark.parametrize("installed", [
    {"torch": "2.10", "transformers": "5.17.0", "numpy": "2.0.0"},
    {"torch": "2.13.0+cpu", "transformers": "5.24.3", "numpy": "2.4.6", "fla-core": "0.6.0"},
    {"torch": "2.14.0a0+git1234", "transformers": "5.24.0.dev0"},
    {"torch": "2.10.0.post1"},
    {"torch": "our-own-build"},
    {"ruff": "0.30.0", "triton": "9.0"},  # not of a run, not of this machine
    {},
])  # fmt: skip
def test_tested_versions_pass_in_silence(installed: dict[str, str]) -> None:
    assert describe_untested(REQUIRES, installed) == ""


@pytest.mark.parametrize("package, version, tested", [
    ("transformers", "5.25.0", ">=5.17,<5.25"),
    ("transformers", "5.25.0rc1", ">=5.17,<5.25"),
    ("transformers", "5.25.0.dev0", ">=5.17,<5.25"),
    ("transformers", "5.16.1", ">=5.17,<5.25"),
    ("transformers", "5.17.0rc1", ">=5.17,<5.25"),
    ("torch", "2.9.1+cu130", ">=2.10,<3"),
    ("fla-core", "0.7.0", ">=0.6,<0.7"),
])  # fmt: skip
def test_others_are_named_with_what_to_install(package: str, version: str, tested: str) -> None:
    installed = {"torch": "2.13.0", "numpy": "2.4.6"} | {package: version}
    assert describe_untested(REQUIRES, installed) == (
        f"molcli was not tested with {package} {version} (tested: {tested}); "
        f"try: pip install '{package}{tested}'"
    )


def test_several_share_a_line() -> None:
    found = describe_untested(REQUIRES, {"torch": "3.0", "numpy": "1.26.4"})
    assert found == (
        "molcli was not tested with torch 3.0 (tested: >=2.10,<3), numpy 1.26.4 (tested: >=2.0,<3);"
        " try: pip install 'torch>=2.10,<3' 'numpy>=2.0,<3'"
    )


def test_installed_versions_leaves_out_what_is_not_there() -> None:
    found = installed_versions(["pytest", "no-such-package-of-ours"])
    assert found == {"pytest": pytest.__version__}


def test_the_ranges_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["pytest<2,>=1"])
    assert "(tested: >=1,<2)" in untested_versions()


def test_a_copy_that_is_not_installed_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert untested_versions() == ""
